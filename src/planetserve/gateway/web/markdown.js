// Shows the Markdown that models write: paragraphs, headings, lists, quotes, tables, code, emphasis,
// links. It makes elements and text nodes only, so nothing that a model writes is ever HTML.

import { copyButton, h } from "./dom.js";

const MOST_DEPTH = 8;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]{0,30})/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+/;
const RULE = /^ {0,3}([-*_])\s*(\1\s*){2,}$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const TABLE_LINE = /^\s*\|?\s*:?-{2,}:?\s*(\|\s*:?-{2,}:?\s*)*\|?\s*$/;
const URL_START = /^https?:\/\/[^\s<>"'`]+/;

// Brings `container` up to date; blocks that have not changed stay as they are.
export function show(container, text) {
  const before = container.shownBlocks ?? [];
  const after = blocks(text.split("\n"));
  container.shownBlocks = after;
  after.forEach((block, place) => {
    const old = before[place];
    block.node = old?.raw === block.raw ? old.node : block.build();
    if (block.node === old?.node) return;
    if (old) old.node.replaceWith(block.node);
    else container.append(block.node);
  });
  for (const old of before.slice(after.length)) old.node.remove();
}

function blocks(lines, depth = 0) {
  const found = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at++;
      continue;
    }
    const [end, build] = block(lines, at, depth);
    found.push({ raw: lines.slice(at, end).join("\n"), build });
    at = end;
  }
  return found;
}

const built = (lines, depth) =>
  depth > MOST_DEPTH ? [lines.join("\n")] : blocks(lines, depth).map((one) => one.build());

function end(lines, at, goesOn) {
  while (at < lines.length && goesOn(lines[at])) at++;
  return at;
}

// The block that begins at line `at`: where it ends, and what makes it.
function block(lines, at, depth) {
  const line = lines[at];
  const fence = FENCE.exec(line);
  if (fence) {
    const close = end(lines, at + 1, (one) => !one.trim().startsWith(fence[1]));
    const code = lines.slice(at + 1, close).join("\n");
    return [Math.min(close + 1, lines.length), () => codeBlock(code, fence[2])];
  }
  const heading = HEADING.exec(line);
  if (heading) {
    const level = Math.min(6, heading[1].length + 2);
    return [at + 1, () => h(`h${level}`, null, inline(heading[2]))];
  }
  if (RULE.test(line)) return [at + 1, () => h("hr")];
  if (/^ {0,3}>/.test(line)) {
    const stop = end(lines, at, (one) => /^ {0,3}>/.test(one));
    const inner = lines.slice(at, stop).map((one) => one.replace(/^ {0,3}> ?/, ""));
    return [stop, () => h("blockquote", null, built(inner, depth + 1))];
  }
  if (line.includes("|") && TABLE_LINE.test(lines[at + 1] ?? "")) {
    const stop = end(lines, at + 2, (one) => one.includes("|"));
    return [stop, () => table(lines.slice(at, stop))];
  }
  if (ITEM.test(line)) return list(lines, at, depth);
  const stop = end(lines, at + 1, (one) => one.trim() && !starts(one));
  return [stop, () => h("p", null, inline(lines.slice(at, stop).join("\n")))];
}

const starts = (line) =>
  FENCE.test(line) || HEADING.test(line) || RULE.test(line) || /^ {0,3}>/.test(line) || ITEM.test(line);

function list(lines, at, depth) {
  const first = ITEM.exec(lines[at]);
  const isOrdered = /\d/.test(first[2]);
  const items = [];
  while (at < lines.length) {
    const item = ITEM.exec(lines[at]);
    if (!item || item[1].length > first[1].length + 1 || /\d/.test(item[2]) !== isOrdered) break;
    const width = item[0].length;
    const inner = [lines[at].slice(width)];
    at++;
    while (at < lines.length) {
      const isIndented = /^\s{2,}/.test(lines[at]) && indent(lines[at]) > first[1].length;
      const isBlank = !lines[at].trim() && indent(lines[at + 1] ?? "") > first[1].length;
      const isLazy = lines[at].trim() && lines[at - 1].trim() && !starts(lines[at]);
      if (!isIndented && !isBlank && !isLazy) break;
      inner.push(lines[at].slice(Math.min(width, indent(lines[at]))));
      at++;
    }
    items.push(inner);
    while (at < lines.length && !lines[at].trim() && ITEM.test(lines[at + 1] ?? "")) at++;
  }
  const start = isOrdered ? Number.parseInt(first[2], 10) : null;
  const build = () =>
    h(
      isOrdered ? "ol" : "ul",
      { start: start === 1 ? null : start },
      items.map((inner) => {
        const parts = built(inner, depth + 1);
        // A short item is a line, no paragraph.
        const isLine = parts[0] instanceof HTMLParagraphElement;
        return h("li", null, isLine ? [...parts[0].childNodes, ...parts.slice(1)] : parts);
      }),
    );
  return [at, build];
}

const indent = (line) => (line.trim() ? line.length - line.trimStart().length : 0);

function cells(line) {
  const inner = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  return inner.split("|").map((cell) => inline(cell.trim()));
}

function table(lines) {
  const [head, , ...rows] = lines.map(cells);
  return h(
    "div",
    { class: "table", tabindex: "0", role: "region", "aria-label": "Table" },
    h(
      "table",
      null,
      h("thead", null, h("tr", null, head.map((cell) => h("th", { scope: "col" }, cell)))),
      h("tbody", null, rows.map((row) => h("tr", null, row.map((cell) => h("td", null, cell))))),
    ),
  );
}

function codeBlock(code, language) {
  return h(
    "figure",
    { class: "code" },
    h("figcaption", null, h("span", null, language || "code"), copyButton("Copy", () => code)),
    h("pre", { tabindex: "0", "aria-label": `Code: ${language || "text"}` }, h("code", null, code)),
  );
}

// The nodes of a line of text.
export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  let at = 0;
  const push = (node, length) => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
    nodes.push(node);
    at += length;
  };
  while (at < text.length) {
    const found = depth < MOST_DEPTH ? special(text, at, depth) : null;
    if (found?.node) push(found.node, found.length);
    else {
      plain += found?.text ?? text[at];
      at += found?.length ?? 1;
    }
  }
  if (plain) nodes.push(document.createTextNode(plain));
  return nodes;
}

function special(text, at, depth) {
  const char = text[at];
  if (char === "\\" && /[!-/:-@[-`{-~]/.test(text[at + 1] ?? "")) {
    return { text: text[at + 1], length: 2 };
  }
  if (char === "\n" && text.slice(at - 2, at) === "  ") return { node: h("br"), length: 1 };
  if (char === "`") return codeSpan(text, at);
  if (char === "*" || char === "_" || char === "~") return emphasis(text, at, depth);
  if (char === "[") {
    const link = /^\[([^[\]]{1,500})\]\((\S{1,2000}?)\)/.exec(text.slice(at, at + 2600));
    const node = link && anchor(link[2], inline(link[1], depth + 1));
    return node ? { node, length: link[0].length } : null;
  }
  if (char === "h" && !/\w/.test(text[at - 1] ?? "")) {
    const url = URL_START.exec(text.slice(at, at + 2000))?.[0].replace(/[.,;:!?)\]]+$/, "");
    const node = url && anchor(url, [url]);
    return node ? { node, length: url.length } : null;
  }
  return null;
}

function codeSpan(text, at) {
  const run = /^`+/.exec(text.slice(at))[0];
  const close = text.indexOf(run, at + run.length);
  if (close < 0) return { text: run, length: run.length };
  const code = text.slice(at + run.length, close);
  return { node: h("code", null, code.trim() || code), length: close + run.length - at };
}

const TAGS = { 1: "em", 2: "strong" };

function emphasis(text, at, depth) {
  const char = text[at];
  const size = text[at + 1] === char ? 2 : 1;
  if (char === "~" && size === 1) return null;
  const run = char.repeat(size);
  const close = text.indexOf(run, at + size + 1);
  const isInWord = char === "_" && (/\w/.test(text[at - 1] ?? "") || /\w/.test(text[close + size] ?? ""));
  if (close < 0 || isInWord || /\s/.test(text[at + size]) || /\s/.test(text[close - 1])) {
    return { text: run, length: size };
  }
  const tag = char === "~" ? "del" : TAGS[size];
  const inner = inline(text.slice(at + size, close), depth + 1);
  return { node: h(tag, null, inner), length: close + size - at };
}

// A link that leads to the web or to a mail address; null for others, such as javascript:.
function anchor(address, children) {
  let url;
  try {
    url = new URL(address);
  } catch {
    return null;
  }
  if (!["http:", "https:", "mailto:"].includes(url.protocol)) return null;
  return h("a", { href: url.href, target: "_blank", rel: "noopener noreferrer" }, children);
}
