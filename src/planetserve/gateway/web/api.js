// Talks to the gateway that served the page. The key stays in this tab.

const KEY = "planetserve.key";

export class ApiError extends Error {
  constructor(status, message, retryAfterS) {
    super(message);
    this.status = status;
    this.retryAfterS = retryAfterS;
  }
}

export function setKey(key) {
  sessionStorage.setItem(KEY, key);
}

export const hasKey = () => Boolean(sessionStorage.getItem(KEY));

async function ask(path, options = {}) {
  const headers = { ...options.headers };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  let response;
  try {
    response = await fetch(new URL(path, document.baseURI), { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The gateway does not answer.");
  }
  if (response.ok) return response;
  let message = `The gateway answered ${response.status}.`;
  try {
    message = String((await response.json()).error.message);
  } catch {
    // not one of its own errors: a proxy's, perhaps
  }
  throw new ApiError(response.status, message, Number(response.headers.get("Retry-After")) || 0);
}

export async function getJson(path) {
  return (await ask(path, { cache: "no-store" })).json();
}

// Yields the objects of a stream of server-sent events, up to [DONE].
export async function* stream(path, body, signal) {
  const response = await ask(path, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(body),
    signal,
  });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) throw new ApiError(0, "The connection to the gateway was lost.");
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      if (!line.startsWith("data: ")) continue;
      if (line === "data: [DONE]") {
        reader.cancel();
        return;
      }
      const event = JSON.parse(line.slice(6));
      if (event.error) throw new ApiError(event.error.code, String(event.error.message));
      yield event;
    }
  }
}
