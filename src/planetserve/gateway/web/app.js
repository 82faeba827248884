// Wires the page: models, settings, key, views, and the swarm's state every few seconds.

import { getJson, hasKey, setKey } from "./api.js";
import { Chat } from "./chat.js";
import { showChain } from "./chain.js";
import { $, h } from "./dom.js";
import { loadSettings, saveSettings } from "./store.js";
import { showEvents, showHealth, showMap, showTiles } from "./swarm.js";

const POLL_MS = 5000;
const BUSY_POLL_MS = 1500;
const STARTERS = ["What is a list?", "What is a generator?", "How do I read a file?"];

const settings = { temperature: null, maxTokens: null, system: "", ...loadSettings() };
let swarm = null;
let report = null;
let timer = 0;

const chat = new Chat({
  settings: () => ({ ...settings, model: $("model").value }),
  onChain,
  onError: (error) => error.status === 401 && askKey(),
});

function onChain(now, isRunning) {
  const hops = (one) => one?.hops.map((hop) => `${hop.peer_id} ${hop.start} ${hop.end}`).join();
  const isOther = hops(now) !== hops(report);
  report = now;
  showChain($("chain"), $("chain-note"), now, isRunning);
  if (isOther) {
    showSwarm();
    if (isRunning) poll();
  }
}

function showSwarm() {
  if (!swarm) return;
  showHealth($("health"), $("health-text"), swarm);
  showTiles($("tiles"), swarm);
  showMap($("map"), $("map-note"), swarm, report?.hops ?? swarm.latest_chain);
}

async function poll() {
  clearTimeout(timer);
  timer = 0;
  if (document.hidden || !$("model").value) return;
  const model = $("model").value;
  try {
    const found = await getJson(`swarm?model=${encodeURIComponent(model)}`);
    if (model !== $("model").value) return;
    swarm = found;
    $("swarm-error").hidden = true;
    showSwarm();
    showEvents($("events"), swarm);
  } catch (error) {
    if (error.status === 401) return askKey();
    $("swarm-error").textContent = error.message;
    $("swarm-error").hidden = false;
    $("health").dataset.state = "bad";
    $("health-text").textContent = "no answer";
  }
  clearTimeout(timer);
  timer = setTimeout(poll, chat.running ? BUSY_POLL_MS : POLL_MS);
}

async function begin() {
  try {
    const { data } = await getJson("v1/models");
    const chosen = settings.model;
    $("model").replaceChildren(...data.map(({ id }) => h("option", { value: id, selected: id === chosen }, id)));
    await poll();
  } catch (error) {
    if (error.status === 401) return askKey();
    $("swarm-error").textContent = error.message;
    $("swarm-error").hidden = false;
    setTimeout(begin, POLL_MS);
  }
}

function askKey() {
  $("key-wrong").hidden = !hasKey();
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", () => {
  setKey($("key").value.trim());
  $("key").value = "";
  begin();
});
// Without a key there is nothing to see.
$("key-dialog").addEventListener("cancel", (event) => event.preventDefault());

function number(text) {
  const value = Number.parseFloat(text);
  return Number.isFinite(value) ? value : null;
}

for (const [id, name, parse] of [
  ["system", "system", (text) => text],
  ["temperature", "temperature", number],
  ["max-tokens", "maxTokens", number],
]) {
  $(id).value = settings[name] ?? "";
  $(id).addEventListener("input", () => {
    settings[name] = parse($(id).value);
    saveSettings(settings);
  });
}
$("settings").addEventListener("submit", (event) => event.preventDefault());
$("settings-button").addEventListener("click", () => {
  $("settings").hidden = !$("settings").hidden;
  $("settings-button").setAttribute("aria-expanded", String(!$("settings").hidden));
});
$("model").addEventListener("change", () => {
  settings.model = $("model").value;
  saveSettings(settings);
  report = null;
  onChain(null, false);
  poll();
});

const prompt = $("prompt");
function fit() {
  prompt.style.height = "auto";
  prompt.style.height = `${Math.min(prompt.scrollHeight, 240)}px`;
}
function send() {
  const text = prompt.value;
  if (!text.trim() || chat.running) return;
  prompt.value = "";
  fit();
  chat.send(text);
}
$("compose").addEventListener("submit", (event) => {
  event.preventDefault();
  send();
});
prompt.addEventListener("input", fit);
prompt.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  }
});
$("stop").addEventListener("click", () => {
  chat.stop();
  prompt.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && chat.running) chat.stop();
});
$("new-chat").addEventListener("click", () => {
  chat.startNew();
  view("chat");
});
$("starters").replaceChildren(
  ...STARTERS.map((text) =>
    h("li", null, h("button", { type: "button", class: "starter", onclick: () => chat.running || chat.send(text) }, text)),
  ),
);

function view(name) {
  document.body.dataset.view = name;
  for (const one of document.querySelectorAll(".views button")) {
    if (one.dataset.to === name) one.setAttribute("aria-current", "page");
    else one.removeAttribute("aria-current");
  }
}
for (const one of document.querySelectorAll(".views button")) {
  one.addEventListener("click", () => view(one.dataset.to));
}
$("health").addEventListener("click", () => {
  view("swarm");
  $("swarm").focus();
});
view("chat");

document.addEventListener("visibilitychange", () => document.hidden || poll());
showChain($("chain"), $("chain-note"), null, false);
begin();
