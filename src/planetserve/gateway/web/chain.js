// The servers of one answer, hop by hop, and where each millisecond of a token goes.

import { h, sr } from "./dom.js";
import { blocksOf, colorOf, milliseconds, nameOf, shortId } from "./peers.js";

// `report` is the `chain` of a stream's chunk; null: no answer yet.
export function showChain(container, note, report, isRunning) {
  if (!report) {
    note.textContent = "";
    container.replaceChildren(
      h("p", { class: "hint" }, "Send a message: its way through the servers appears here."),
    );
    return;
  }
  const total = report.step_ms + report.head_ms;
  note.textContent = report.num_steps
    ? `${milliseconds(total)} per token${isRunning ? ", live" : ""}`
    : `prompt: ${milliseconds(report.prompt_ms)}`;
  const legs = legsOf(report);
  // Servers and pings give averages of their own, which may be more than these tokens took.
  const claimed = legs.reduce((sum, leg) => sum + (leg.isClaimed ? (leg.ms ?? 0) : 0), 0);
  const scale = report.num_steps && claimed > report.step_ms ? report.step_ms / claimed : 1;
  let at = 0;
  const rows = legs.map((leg) => {
    const ms = leg.ms === null ? null : leg.ms * (leg.isClaimed ? scale : 1);
    const begin = at;
    at += ms ?? 0;
    return { ...leg, ms, begin };
  });
  const table = h(
    "table",
    { class: `way${isRunning ? " live" : ""}` },
    h("caption", { class: "sr" }, "The way of a token through the chain"),
    h("thead", { class: "sr" }, h("tr", null, ["Part", "When", "Time"].map((one) => h("th", { scope: "col" }, one)))),
    h("tbody", null, rows.map((one) => row(one, at || 1))),
  );
  container.replaceChildren(table, h("p", { class: "hint" }, about(report, scale)));
}

function about(report, scale) {
  const prompt = `The prompt took ${milliseconds(report.prompt_ms)}.`;
  if (!report.num_steps) return prompt;
  const means = `Means of ${report.num_steps} tokens on this chain. ${prompt}`;
  return scale < 1 ? `${means} Servers’ own averages are scaled to what the tokens took.` : means;
}

function legsOf(report) {
  const legs = [];
  for (const hop of report.hops) {
    legs.push({ kind: "link", what: `link to ${nameOf(hop)}`, ms: hop.link_ms, color: "links", isClaimed: true });
    legs.push({
      kind: "hop",
      what: nameOf(hop),
      more: `blocks ${blocksOf(hop)}`,
      title: shortId(hop.peer_id),
      ms: hop.compute_ms,
      color: colorOf(hop.peer_id),
      isClaimed: true,
    });
  }
  legs.push({ kind: "link", what: "link back", ms: report.return_ms, color: "links", isClaimed: true });
  legs.push({ kind: "link", what: "everything else", ms: report.other_ms, color: "rest" });
  legs.push({ kind: "hop", what: "Gateway", more: "picks the token", ms: report.head_ms, color: "gateway" });
  return legs;
}

function row({ kind, what, more, title, ms, color, begin }, total) {
  const share = ((ms ?? 0) / total).toFixed(4);
  return h(
    "tr",
    { class: `${kind} ${color}`, title },
    h("th", { scope: "row" }, h("span", { class: "node", "aria-hidden": "true" }), h("span", { class: "what" }, what), more ? h("span", { class: "more" }, more) : ""),
    h("td", { class: "when" }, h("span", { class: "leg", "aria-hidden": "true", "--begin": (begin / total).toFixed(4), "--share": share }), sr(`${Math.round(100 * share)} %`)),
    h("td", { class: "ms" }, ms === null ? "not measured" : milliseconds(ms)),
  );
}
