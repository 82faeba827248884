// Makes elements. Strings become text nodes, never HTML, whoever wrote them.

export const $ = (id) => document.getElementById(id);

// h("p", {class: "note", onclick: f}, "text", node, null)
export function h(tag, attributes, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name.startsWith("--")) node.style.setProperty(name, String(value));
    else node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

export const sr = (text) => h("span", { class: "sr" }, text);

export function button(label, onclick, attributes) {
  return h("button", { type: "button", class: "quiet", onclick, ...attributes }, label);
}

export async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    // Without TLS browsers have no clipboard object.
    const field = h("textarea", { class: "sr", readonly: true });
    field.value = text;
    document.body.append(field);
    field.select();
    const done = document.execCommand("copy");
    field.remove();
    return done;
  }
}

// A button that says for a moment that it has copied.
export function copyButton(label, text, attributes) {
  return button(
    label,
    async (event) => {
      const pressed = event.currentTarget;
      pressed.textContent = (await copy(text())) ? "Copied" : "Not allowed";
      setTimeout(() => (pressed.textContent = label), 1500);
    },
    attributes,
  );
}
