// Elements and number formats. Text from outside is only ever set as text.

/** An element with properties, data attributes (`data`), classes and children. Children that are null or false are left out. */
export function element(name, properties = {}, ...children) {
  const made = document.createElement(name);
  fill(made, properties, children);
  return made;
}

export function svg(name, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children);
  return made;
}

function fill(made, properties, children) {
  for (const [key, value] of Object.entries(properties)) {
    if (key === "data") Object.assign(made.dataset, value);
    else if (key.startsWith("aria-") || key === "role" || key === "scope" || key === "datetime") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter(child => child !== null && child !== false && child !== undefined));
}

export const byId = id => document.getElementById(id);

/** Set a text only if it differs, so that nothing is drawn or announced without need. */
export function setText(made, text) {
  if (made.textContent !== text) made.textContent = text;
}

export const PRIORITIES = ["high", "medium", "low"];
export const ENGINES = ["mlx", "ollama"];
export const ENGINE_NAMES = { mlx: "MLX", ollama: "Ollama" };
/** What answered, from the account of a request. */
export const answeredBy = account => account.dialect === "openai" ? "an OpenAI server" : ENGINE_NAMES[account.engine];
export const capital = word => word[0].toUpperCase() + word.slice(1);

/** Milliseconds as a short text with at most three digits. */
export function duration(ms) {
  if (ms === null || ms === undefined) return "\u2013";
  if (ms < 0.95) return "0 ms";
  if (ms < 999.5) return `${Math.round(ms)} ms`;
  if (ms < 9995) return `${(ms / 1000).toFixed(2)} s`;
  if (ms < 99950) return `${(ms / 1000).toFixed(1)} s`;
  if (ms < 3600e3) return `${Math.floor(ms / 60e3)} min ${Math.round(ms / 1000) % 60} s`;
  return `${(ms / 3600e3).toFixed(1)} h`;
}

const counts = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });
export const count = number => counts.format(number);
export const plural = (number, one, many = one + "s") => `${count(number)} ${number === 1 ? one : many}`;

export function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit < units.length - 1) { number /= 1024; unit += 1; }
  return `${number >= 100 || unit === 0 ? Math.round(number) : number.toFixed(1)} ${units[unit]}`;
}

export const clock = at => new Date(at * 1000).toLocaleTimeString("en-GB");

export function chip(text, tone) {
  return element("span", { className: "chip", textContent: text, data: { tone } });
}

export function facts(list, pairs) {
  list.replaceChildren(...pairs.filter(([, text]) => text).flatMap(
    ([name, text]) => [element("dt", { textContent: name }), element("dd", { textContent: text })]));
}
