// What servers are called and which colour each has, the same everywhere on the page.

const NUM_COLORS = 8;
const colors = new Map();

export function colorOf(peerId) {
  if (!colors.has(peerId)) colors.set(peerId, colors.size % NUM_COLORS);
  return `hue${colors.get(peerId)}`;
}

export const shortId = (peerId) => `…${peerId.slice(-6)}`;

export const nameOf = (server) => server.name || shortId(server.peer_id);

// "0" for one block, "0–3" for blocks [0, 4).
export const blocksOf = ({ start, end }) => (end - start === 1 ? `${start}` : `${start}–${end - 1}`);

export function milliseconds(value) {
  if (value === null || value === undefined) return "–";
  if (value >= 1000) return `${(value / 1000).toFixed(1)} s`;
  return `${value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2)} ms`;
}

export function count(value) {
  if (value >= 1e6) return `${(value / 1e6).toFixed(1)} M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(0)} k`;
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toFixed(1);
}
