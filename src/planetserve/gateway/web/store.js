// Conversations and settings, in this browser's local storage. When that is full the oldest go.

const CHATS = "planetserve.chats";
const SETTINGS = "planetserve.settings";
const MOST_CHATS = 100;

const isText = (value) => typeof value === "string";

function read(name, otherwise) {
  try {
    return JSON.parse(localStorage.getItem(name)) ?? otherwise;
  } catch {
    return otherwise;
  }
}

function isChat(chat) {
  return (
    isText(chat?.id) &&
    isText(chat.title) &&
    Array.isArray(chat.messages) &&
    chat.messages.every((one) => isText(one?.role) && isText(one.content))
  );
}

export function loadChats() {
  const chats = read(CHATS, []);
  return Array.isArray(chats) ? chats.filter(isChat) : [];
}

// Newest first. Changes `chats` when it must drop some.
export function saveChats(chats) {
  chats.splice(MOST_CHATS);
  for (;;) {
    try {
      localStorage.setItem(CHATS, JSON.stringify(chats.filter((chat) => chat.messages.length)));
      return;
    } catch {
      if (chats.length < 2) return; // no storage: they last as long as the page
      chats.pop();
    }
  }
}

export function newChat() {
  const bytes = crypto.getRandomValues(new Uint8Array(8));
  const id = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return { id, title: "New chat", messages: [] };
}

export const loadSettings = () => ({ ...read(SETTINGS, {}) });

export function saveSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    // as above
  }
}
