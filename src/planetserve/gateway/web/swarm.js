// The swarm: how whole it is, each server's blocks over the model, and what has changed.

import { h, sr } from "./dom.js";
import { blocksOf, colorOf, count, milliseconds, nameOf, shortId } from "./peers.js";

const STATES = {
  ready: "ready",
  left_out: "left out: it failed",
  excluded: "left out by settings",
  incompatible: "speaks another protocol",
  other_files: "serves other files",
};

const REASONS = {
  better_chain: "a faster chain was found",
  cache_exhausted: "its memory is full",
  capacity: "it is full",
  decryption: "a message was damaged",
  edge_stalled: "two servers cannot reach each other",
  handshake: "it did not prove who it is",
  leaving: "it is leaving",
  missing_blocks: "blocks without a server",
  no_chain: "no chain of servers",
  peer_reported: "a server refused",
  protocol: "it broke the protocol",
  queue_full: "it is busy",
  refused: "servers refused",
  stream_closed: "it closed the connection",
  timeout: "it stopped answering",
  transport: "the connection failed",
  unreachable: "it cannot be reached",
};

const MOST_EVENTS = 30;
const MOST_MARKS = 10;
const STEPS = [1, 2, 5, 10, 20, 50, 100, 200, 500];
const seen = { servers: null, model: null };
const arrivals = [];

const isReady = (server) => server.state === "ready";

export function showHealth(button, text, swarm) {
  const isWhole = !swarm.uncovered.length;
  button.dataset.state = isWhole ? "good" : "bad";
  const number = swarm.servers.filter(isReady).length;
  text.textContent = isWhole ? `${number} server${number === 1 ? "" : "s"}` : "blocks missing";
}

export function showTiles(container, swarm) {
  const ready = swarm.servers.filter(isReady);
  const missing = swarm.uncovered.reduce((sum, [from, to]) => sum + to - from, 0);
  const covered = swarm.num_blocks - missing;
  const per = (value) => perBlock(ready, swarm.num_blocks, value);
  const room = missing ? 0 : Math.min(...per((server) => server.free_cache_tokens));
  const nearest = Math.min(...ready.map((server) => server.rtt_ms ?? Infinity));
  const tiles = [
    ["Servers ready", String(ready.length), ready.length ? "" : "bad"],
    ["Blocks served", `${covered} of ${swarm.num_blocks}`, missing ? "bad" : "good"],
    ["Room for tokens", count(room), ""],
    ["Nearest server", Number.isFinite(nearest) ? milliseconds(nearest) : "–", ""],
  ];
  container.replaceChildren(
    ...tiles.map(([name, value, state]) =>
      h("div", { class: `tile ${state}` }, h("dt", null, name), h("dd", null, value)),
    ),
  );
}

// For each block the sum of a value over the servers that run it.
function perBlock(servers, numBlocks, value) {
  const sums = new Array(numBlocks).fill(0);
  for (const server of servers) {
    for (let block = server.start; block < Math.min(server.end, numBlocks); block++) {
      sums[block] += value(server);
    }
  }
  return sums;
}

// `hops`: the chain to mark.
export function showMap(container, note, swarm, hops) {
  const ready = swarm.servers.filter(isReady);
  for (const server of swarm.servers) colorOf(server.peer_id);
  const used = new Map(hops.map((hop) => [hop.peer_id, hop]));
  note.textContent = `${swarm.num_blocks} blocks of ${swarm.model}`;
  const rows = swarm.servers.map((server) => row(server, used.get(server.peer_id)));
  container.style.setProperty("--n", swarm.num_blocks);
  const left = swarm.num_servers - swarm.servers.length;
  container.replaceChildren(
    coverage(perBlock(ready, swarm.num_blocks, () => 1)),
    ...missing(swarm.uncovered),
    h("ul", { class: "servers", "aria-label": "Servers" }, rows),
    left > 0 ? h("p", { class: "hint" }, `and ${left} more`) : "",
  );
}

function coverage(servers) {
  const most = Math.max(1, ...servers);
  const cells = servers.map((number, block) =>
    h("span", {
      class: number ? "cell" : "cell none",
      title: `block ${block}: ${number} server${number === 1 ? "" : "s"}`,
      "--level": number / most,
    }),
  );
  const step = STEPS.find((one) => servers.length / one <= MOST_MARKS) ?? servers.length;
  const marks = servers.map((_, block) => block).filter((block) => block % step === 0);
  return h(
    "div",
    { class: "coverage", "aria-hidden": "true" },
    h("div", { class: "cells" }, cells),
    h("div", { class: "axis" }, marks.map((block) => h("span", { "--at": block }, String(block)))),
  );
}

function missing(uncovered) {
  if (!uncovered.length) return [];
  const spans = uncovered.map(([start, end]) => blocksOf({ start, end })).join(", ");
  const bars = uncovered.map(([start, end]) => h("span", { class: "bar none", "--from": start, "--to": end }));
  return [
    h(
      "div",
      { class: "missing" },
      h("p", null, `No server runs block${/[,–]/.test(spans) ? "s" : ""} ${spans}`),
      h("div", { class: "track", "aria-hidden": "true" }, bars),
    ),
  ];
}

function row(server, hop) {
  const isUsable = isReady(server);
  const bars = [
    h("span", { class: `bar ${colorOf(server.peer_id)}`, "--from": server.start, "--to": server.end }),
  ];
  if (hop) {
    const span = { class: `bar used ${colorOf(server.peer_id)}`, "--from": hop.start, "--to": hop.end };
    bars.push(h("span", span));
  }
  const facts = [
    `${count(server.tokens_per_s)} tok/s`,
    `${count(server.free_cache_tokens)} free`,
    server.rtt_ms === null ? null : `${milliseconds(server.rtt_ms)} away`,
    server.quant_type === "none" ? server.dtype : server.quant_type,
    `v${server.version}`,
  ];
  return h(
    "li",
    { class: isUsable ? "server" : "server out", "data-peer": server.peer_id, "data-state": server.state },
    h(
      "div",
      { class: "head" },
      h("strong", null, nameOf(server)),
      server.name ? h("code", { class: "id" }, shortId(server.peer_id)) : "",
      h("span", { class: "grow" }),
      hop ? h("span", { class: "tag" }, "in use") : "",
      isUsable ? "" : h("span", { class: "tag out" }, STATES[server.state] ?? server.state),
      h("span", { class: "span" }, sr("blocks "), blocksOf(server)),
    ),
    h("div", { class: "track", "aria-hidden": "true" }, bars),
    h("p", { class: "facts" }, facts.filter(Boolean).map((fact) => h("span", null, fact))),
  );
}

// Servers that have come or gone since the last look.
function notice(swarm) {
  const now = new Map(swarm.servers.map((server) => [server.peer_id, server]));
  if (seen.servers && seen.model === swarm.model) {
    const at = Date.now() / 1000;
    for (const [id, server] of now) {
      if (!seen.servers.has(id)) arrivals.unshift(event(at, "good", server, "has joined"));
    }
    for (const [id, server] of seen.servers) {
      if (!now.has(id)) arrivals.unshift(event(at, "bad", server, "has left the list"));
    }
    arrivals.splice(MOST_EVENTS);
  } else {
    arrivals.length = 0;
  }
  seen.servers = now;
  seen.model = swarm.model;
}

const event = (at_s, kind, server, text) => ({
  at_s,
  kind,
  who: nameOf(server),
  text: `${text}, blocks ${blocksOf(server)}`,
});

export function showEvents(container, swarm) {
  const names = new Map([...(seen.servers ?? []), ...swarm.servers.map((one) => [one.peer_id, one])]);
  notice(swarm);
  const changes = swarm.changes.map((change) => ({
    at_s: change.at_s,
    kind: change.reason === "better_chain" ? "good" : "warn",
    who: change.peer_ids
      .slice(0, 3)
      .map((id) => nameOf(names.get(id) ?? { peer_id: id }))
      .join(", "),
    text: REASONS[change.reason] ?? change.reason,
    more: change.text,
  }));
  const found = [...arrivals, ...changes].sort((a, b) => b.at_s - a.at_s).slice(0, MOST_EVENTS);
  if (!found.length) {
    container.replaceChildren(h("li", { class: "hint" }, "Nothing has failed since this gateway started."));
    return;
  }
  container.replaceChildren(
    ...found.map((one) =>
      h(
        "li",
        { class: `event ${one.kind}` },
        h("time", { datetime: new Date(one.at_s * 1000).toISOString() }, clock(one.at_s)),
        h(
          "div",
          null,
          one.who ? h("strong", null, one.who) : "",
          one.who ? ": " : "",
          one.text,
          one.more ? h("p", null, one.more) : "",
        ),
      ),
    ),
  );
}

const clock = (seconds) => new Date(seconds * 1000).toLocaleTimeString([], { hour12: false });
