// The conversation: sends, streams, stops, answers again, edits.

import { ApiError, stream } from "./api.js";
import { $, button, copyButton, h } from "./dom.js";
import { show } from "./markdown.js";
import { blocksOf, colorOf, nameOf } from "./peers.js";
import { loadChats, newChat, saveChats } from "./store.js";

const SHOW_MS = 60;
const MOST_TITLE = 60;

export class Chat {
  // `settings()` gives model, system, temperature, maxTokens; `onChain(report, isRunning)` hears of
  // every chain, `onError(error)` of every failure.
  constructor({ settings, onChain, onError }) {
    this.settings = settings;
    this.onChain = onChain;
    this.onError = onError;
    this.chats = loadChats();
    this.current = newChat();
    this.running = null;
    this.chats.unshift(this.current);
    this.showAll();
  }

  open(chat) {
    if (this.running) this.stop();
    this.current = chat;
    this.showAll();
    const last = chat.messages.findLast((message) => message.chain);
    this.onChain(last?.chain ?? null, false);
  }

  startNew() {
    const empty = this.chats.find((chat) => !chat.messages.length) ?? newChat();
    this.chats = [empty, ...this.chats.filter((chat) => chat !== empty)];
    this.open(empty);
    $("prompt").focus();
  }

  remove(chat) {
    this.chats = this.chats.filter((one) => one !== chat);
    saveChats(this.chats);
    if (chat === this.current) this.startNew();
    else this.showList();
  }

  send(text) {
    const chat = this.current;
    if (!chat.messages.length) chat.title = text.trim().split("\n")[0].slice(0, MOST_TITLE);
    chat.messages.push({ role: "user", content: text });
    this.chats = [chat, ...this.chats.filter((one) => one !== chat)];
    this.answer();
  }

  // Ends whatever answers come after a place in the conversation, and answers anew.
  again(place, text) {
    if (this.running) return;
    this.current.messages.splice(place);
    if (text === undefined) this.answer();
    else this.send(text);
  }

  stop() {
    this.running?.abort.abort();
  }

  async answer() {
    const chat = this.current;
    const message = { role: "assistant", content: "", reasoning: "" };
    const body = this.request(chat.messages);
    chat.messages.push(message);
    const run = { message, abort: new AbortController(), beganMs: performance.now(), timer: 0 };
    this.running = run;
    this.showAll();
    tell("The answer begins.");
    try {
      for await (const event of stream("v1/chat/completions", body, run.abort.signal)) {
        this.take(run, event);
      }
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else {
        message.error = error.message;
        if (!(error instanceof ApiError)) console.error(error);
        this.onError(error);
      }
    }
    clearTimeout(run.timer);
    this.running = null;
    if (message.chain) this.onChain(message.chain, false);
    saveChats(this.chats);
    this.showAll();
    const stats = message.stats;
    tell(message.error ? `The answer failed: ${message.error}` : `The answer has ended${stats ? `, ${stats.tokens} tokens` : ""}.`);
  }

  request(messages) {
    const { model, system, temperature, maxTokens } = this.settings();
    const sent = messages
      .filter((message) => message.content && !message.error)
      .map(({ role, content }) => ({ role, content }));
    if (system) sent.unshift({ role: "system", content: system });
    return {
      model,
      messages: sent,
      stream: true,
      stream_options: { include_usage: true, continuous_usage_stats: true, include_chain: true },
      ...(temperature === null ? {} : { temperature }),
      ...(maxTokens === null ? {} : { max_tokens: maxTokens }),
    };
  }

  take(run, event) {
    const { message } = run;
    if (event.chain) {
      message.chain = event.chain;
      this.onChain(event.chain, true);
    }
    const nowMs = performance.now();
    const delta = event.choices[0]?.delta;
    message.content += delta?.content ?? "";
    message.reasoning += delta?.reasoning_content ?? "";
    if (event.usage?.completion_tokens) {
      run.firstMs ??= nowMs;
      message.stats = {
        tokens: event.usage.completion_tokens,
        cached: event.usage.prompt_tokens_details?.cached_tokens ?? 0,
        firstMs: run.firstMs - run.beganMs,
        ms: nowMs - run.firstMs,
      };
    }
    message.cut = event.choices[0]?.finish_reason === "length" || message.cut;
    run.timer ||= setTimeout(() => {
      run.timer = 0;
      if (this.running === run) this.showRunning(run);
    }, SHOW_MS);
  }

  showAll() {
    const { messages } = this.current;
    $("empty").hidden = messages.length > 0;
    this.items = messages.map((message, place) => this.item(message, place));
    $("messages").replaceChildren(...this.items);
    $("send").hidden = Boolean(this.running);
    $("stop").hidden = !this.running;
    $("scroll").scrollTop = $("scroll").scrollHeight;
    this.showList();
  }

  showRunning(run) {
    const scroll = $("scroll");
    const isAtEnd = scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < 80;
    const item = this.items.at(-1);
    if (item) {
      show(item.querySelector(".text"), run.message.content);
      item.querySelector(".footer").replaceChildren(facts(run.message));
      showReasoning(item, run.message, true);
    }
    if (isAtEnd) scroll.scrollTop = scroll.scrollHeight;
  }

  item(message, place) {
    const isRunning = message === this.running?.message;
    const isUser = message.role === "user";
    const text = h("div", { class: "text" });
    if (isUser) text.append(message.content);
    else show(text, message.content);
    const footer = h("div", { class: "footer" });
    const item = h(
      "li",
      { class: `message ${isUser ? "user" : "assistant"}${isRunning ? " running" : ""}` },
      h("h2", { class: "sr" }, isUser ? "You" : "Answer"),
      h("div", { class: "reasoning" }),
      text,
      message.error ? h("p", { class: "failed" }, message.error) : "",
      footer,
    );
    showReasoning(item, message, isRunning);
    if (!isUser) footer.append(facts(message));
    if (!isRunning) footer.append(this.actions(message, place, isUser, item));
    return item;
  }

  actions(message, place, isUser, item) {
    const found = [];
    if (message.content) found.push(copyButton("Copy", () => message.content));
    if (isUser) found.push(button("Edit", () => this.edit(place, item)));
    else found.push(button(message.error ? "Try again" : "Regenerate", () => this.again(place)));
    return h("div", { class: "actions" }, found);
  }

  edit(place, item) {
    if (this.running) return;
    const field = h("textarea", { rows: "3", "aria-label": "Message" });
    field.value = this.current.messages[place].content;
    const form = h(
      "form",
      { class: "edit" },
      field,
      h("div", { class: "actions" }, h("button", { type: "submit", class: "send" }, "Send"), button("Cancel", () => this.showAll())),
    );
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (field.value.trim()) this.again(place, field.value);
    });
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") this.showAll();
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
        event.preventDefault();
        form.requestSubmit();
      }
    });
    item.replaceChildren(form);
    field.focus();
  }

  showList() {
    const items = this.chats.map((chat) =>
      h(
        "li",
        null,
        h(
          "button",
          {
            type: "button",
            class: "open",
            "aria-current": chat === this.current ? "true" : null,
            onclick: () => {
              this.open(chat);
              document.body.dataset.view = "chat";
            },
          },
          chat.title,
        ),
        chat.messages.length
          ? button("×", () => this.remove(chat), { class: "quiet delete", "aria-label": `Delete ${chat.title}` })
          : "",
      ),
    );
    $("chat-list").replaceChildren(...items);
  }
}

function showReasoning(item, message, isRunning) {
  const place = item.querySelector(".reasoning");
  if (!message.reasoning) return;
  if (!place.firstChild) {
    const isOpen = isRunning && !message.content;
    place.append(h("details", { open: isOpen }, h("summary", null, "Reasoning"), h("div", { class: "text" })));
  }
  show(place.querySelector(".text"), message.reasoning);
}

// Tokens, speed, and which servers answered.
function facts(message) {
  const { stats, chain } = message;
  const found = [];
  if (stats) {
    const speed = stats.tokens > 1 && stats.ms > 0 ? (stats.tokens - 1) / (stats.ms / 1000) : null;
    found.push(h("span", null, `${stats.tokens} tokens`));
    if (speed) found.push(h("span", { class: "speed" }, `${speed.toFixed(1)} tokens/s`));
    found.push(h("span", null, `first after ${(stats.firstMs / 1000).toFixed(2)} s`));
    if (stats.cached) found.push(h("span", null, `${stats.cached} of the prompt kept warm`));
  }
  if (message.cut) found.push(h("span", null, "cut at the limit"));
  if (message.stopped) found.push(h("span", null, "stopped"));
  const chips = (chain?.hops ?? []).map((hop) =>
    h("span", { class: `chip ${colorOf(hop.peer_id)}`, title: hop.peer_id }, h("i", { "aria-hidden": "true" }), nameOf(hop), ` ${blocksOf(hop)}`),
  );
  return h("div", { class: "facts" }, found, chips);
}

function tell(text) {
  $("status").textContent = text;
}
