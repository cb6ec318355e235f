// Calls to the gateway with the API key, and the stream of changes, which reconnects until it succeeds.

const KEY = "headrace-key";
// The gateway sends something every ten seconds. A stream that is silent for longer is dead.
const SILENCE_MS = 25000;
const LONGEST_PAUSE_MS = 8000;
let key = "";
try { key = sessionStorage.getItem(KEY) || ""; } catch { /* without storage the page asks again */ }

export const hasKey = () => key !== "";

export function useKey(given) {
  key = given;
  try { sessionStorage.setItem(KEY, given); } catch { /* without storage it is kept until the page closes */ }
}

/** fetch with the key. */
export function call(path, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.authorization = `Bearer ${key}`;
  return fetch(path, { ...options, headers, cache: "no-store" });
}

/** call for one response. Without an answer it is a response with status 503. */
export async function ask(path, options = {}) {
  try {
    return await call(path, options);
  } catch {
    return new Response(JSON.stringify({ error: { message: "The gateway does not answer." } }), { status: 503 });
  }
}

/** The message in an error's response. */
export async function errorOf(response) {
  try {
    const body = await response.json();
    return body.error.message || body.error;
  } catch {
    return `The gateway responded with status ${response.status}.`;
  }
}

/** The server-sent events of a response, as [event, data]. */
export async function* events(response, onBytes = () => {}) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    onBytes();
    const parts = (text + value).split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      let name = "message";
      const data = [];
      for (const line of part.split("\n")) {
        if (line.startsWith("event: ")) name = line.slice(7);
        else if (line.startsWith("data: ")) data.push(line.slice(6));
      }
      if (data.length) yield [name, data.join("\n")];
    }
  }
}

/** Wait for a time, or until the browser is online again. */
const pause = ms => new Promise(resolve => {
  const over = () => {
    clearTimeout(timer);
    removeEventListener("online", over);
    resolve();
  };
  const timer = setTimeout(over, ms);
  addEventListener("online", over);
});

/**
 * Follow the stream, and reconnect after each failure.
 * on.event(name, data): one event. on.state("connecting" | "live" | "off", why, retryInSeconds).
 * on.denied(why): resolves when there is another key to try.
 */
export async function follow(path, on) {
  let failures = 0;
  for (;;) {
    let why = "The gateway does not answer.";
    const ending = new AbortController();
    let watchdog;
    const alive = () => { clearTimeout(watchdog); watchdog = setTimeout(() => ending.abort(), SILENCE_MS); };
    try {
      alive();
      const response = await call(path, { signal: ending.signal });
      if (response.status === 401 || response.status === 403) {
        clearTimeout(watchdog);
        on.state("off", "An API key is required.");
        await on.denied(await errorOf(response));
        continue;
      }
      if (response.ok) {
        for await (const [name, data] of events(response, alive)) {
          failures = 0;
          on.event(name, JSON.parse(data));
          on.state("live");
        }
        why = "The gateway closed the connection.";
      } else {
        why = await errorOf(response);
      }
    } catch (error) {
      if (error instanceof SyntaxError) why = "The gateway sent a malformed event.";
    }
    clearTimeout(watchdog);
    ending.abort();
    failures += 1;
    const wait = Math.min(LONGEST_PAUSE_MS, 500 * 2 ** (failures - 1)) * (0.75 + Math.random() / 2);
    on.state("off", why, wait / 1000);
    await pause(wait);
    on.state("connecting");
  }
}
