// Lanes, engines and spills: the newest data of the stream.

import {
  ENGINES, ENGINE_NAMES, PRIORITIES, byId, bytes, capital, chip, clock, count, duration, element, plural, setText,
} from "./dom.js";

const LEVEL_TONES = { normal: "good", busy: "warn", saturated: "bad" };
const STATE_TONES = { ready: "good", loading: "warn", draining: "warn", down: "bad" };

// ---- lanes

const cells = new Map();

function makeLanes() {
  const table = document.querySelector(".lanes");
  for (const priority of PRIORITIES) {
    const cell = {
      depth: element("b"), queued: element("span", { data: { field: "queued" } }),
      running: element("td", { data: { field: "running" } }), wait: element("td", { data: { field: "wait" } }),
      more: element("span"),
    };
    const bar = element("i", { "aria-hidden": "true" }, cell.depth);
    table.append(element("tbody", { data: { priority, lane: priority } },
      element("tr", {},
        element("th", { scope: "row" }, element("span", { className: "priority", textContent: capital(priority) }),
          element("span", { className: "chip paused-mark", textContent: "paused", data: { tone: "warn" }, hidden: true })),
        element("td", { className: "depth" }, element("div", { className: "depth-bar" }, bar, cell.queued)),
        cell.running, cell.wait),
      element("tr", { className: "more" }, element("td", { colSpan: 4 }, cell.more,
        element("button", { type: "button", className: "quiet", textContent: "Pause", hidden: true })))));
    cells.set(priority, cell);
  }
}

export function drawLanes(lanes, loads) {
  if (!cells.size) makeLanes();
  const most = lanes ? Math.max(10, ...PRIORITIES.map(p => lanes[p].queued)) : 1;
  for (const priority of PRIORITIES) {
    const cell = cells.get(priority);
    const lane = lanes?.[priority];
    setText(cell.queued, lane ? count(lane.queued) : "\u2013");
    setText(cell.running, lane ? count(lane.running) : "\u2013");
    setText(cell.wait, duration(loads?.mlx?.predicted_wait_ms[priority]));
    cell.depth.style.width = lane ? `${100 * lane.queued / most}%` : "0";
    setText(cell.more, lane ? laneHistory(lane) : "no data: the monitor does not answer");
  }
  const errors = Object.entries(lanes?.errors ?? {}).sort((a, b) => b[1] - a[1]);
  setText(byId("errors"), lanes ? `Errors since the monitor started: ${
    errors.map(([code, number]) => `${count(number)} ${code}`).join(", ") || "none"}.` : "");
}

function laneHistory(lane) {
  const parts = [`${count(lane.done)} done`];
  for (const name of ["spilled", "failed", "cancelled", "expired"]) if (lane[name]) parts.push(`${count(lane[name])} ${name}`);
  if (lane.done) {
    parts.push(`wait p50\u00a0${duration(lane.wait_ms.p50)}, p95\u00a0${duration(lane.wait_ms.p95)}`);
    parts.push(`first token ${duration(lane.ttft_ms.p50)}`);
  }
  return parts.join(" \u00b7 ");
}

// ---- engines

export function drawEngines(loads, workers) {
  byId("engine-list").replaceChildren(...ENGINES.map(
    engine => engineCard(engine, loads?.[engine], (workers || []).filter(w => w.engine === engine))));
}

function engineCard(engine, load, workers) {
  const flags = [
    workers.some(w => w.standin) && "stand-in, not Ollama",
    workers.some(w => w.simulated) && "simulated, no model",
    workers.some(w => w.models.some(isDemo)) && "demo model",
  ].filter(Boolean);
  const states = [...new Set(workers.map(w => w.state))];
  const models = [...new Set(workers.flatMap(w => w.models))];
  const inMemory = [...new Set(workers.flatMap(w => Object.entries(w.facts ?? {})
    .filter(([, facts]) => facts.loaded && !facts.alias_of).map(([name]) => name)))];
  const troubles = workers.filter(w => w.reason).map(w => w.reason);
  const failed = Object.assign({}, ...workers.map(w => w.cannot_load ?? {}));
  const alone = new Set(workers.map(w => w.alone).filter(Boolean));
  return element("article", { className: "engine", data: { engine } },
    element("div", { className: "engine-head" },
      element("strong", { textContent: ENGINE_NAMES[engine] }),
      flags.length > 0 && element("span", { className: "placeholder", textContent: flags.join(" \u00b7 ") }),
      element("span", { className: "engine-state", data: { field: "state" } },
        ...(states.length ? states.map(stateMark) : [chip("offline", "bad")]), " ",
        !load ? chip("no data", "plain") : load.available ? chip(load.level, LEVEL_TONES[load.level]) : chip("away", "bad"))),
    element("p", { className: "engine-why", textContent: [load?.reason, ...troubles, ...alone].filter(Boolean).join("; ") }),
    ...Object.entries(failed).map(([model, why]) =>
      element("p", { className: "engine-why", data: { failed: model }, textContent: `Model ${model} cannot be loaded: ${why}` })),
    figures(load, workers),
    ...workers.filter(w => w.dialect === "openai").map(w => element("p", { className: "engine-models foot", data: { server: w.server } },
      `${w.state === "ready" ? "" : `${w.state}: `}OpenAI server `, element("code", { textContent: w.server }),
      ` \u00b7 ${w.slots.used} of ${w.slots.total} slots`)),
    models.length > 0 && element("p", { className: "engine-models foot" },
      `${plural(models.length, "model")}: `, element("code", { textContent: models.join(", ") }),
      inMemory.length > 0 && inMemory.length < models.length && ` \u00b7 in memory: ${inMemory.join(", ")}`,
      workers.length > 1 && ` \u00b7 ${workers.length} workers`));
}

/** A ready worker gets no coloured chip. */
function stateMark(state) {
  return state === "ready" ? element("span", { className: "quiet-state", textContent: state }) : chip(state, STATE_TONES[state] || "plain");
}

export const isDemo = model => model.startsWith("headrace-demo");

function figures(load, workers) {
  const slots = load?.slots ?? { used: 0, total: 0 };
  const kv = workers.reduce((sum, w) => sum + w.kv_bytes, 0);
  const limit = workers.reduce((sum, w) => sum + w.kv_bytes_limit, 0);
  const perRequest = workers.map(w => w.tokens_per_request).filter(Boolean);
  const figure = (name, field, value, ...more) => element("div", {},
    element("dt", { textContent: name }), element("dd", { data: { field } }, value, ...more));
  const small = text => element("small", { textContent: text });
  return element("dl", { className: "figures" },
    figure("Slots", "slots", `${slots.used} `, small(`of ${slots.total}`), pips(slots)),
    figure("Output", "rate", load ? `${Math.round(load.tokens_per_s)} ` : "\u2013 ", small("tokens/s")),
    figure("KV memory", "memory", kv ? `${bytes(kv)} ` : "\u2013 ", limit ? small(`of ${bytes(limit)}`) : ""),
    figure("Per request", "tokens", perRequest.length
      ? `${Math.round(perRequest.reduce((a, b) => a + b) / perRequest.length)} ` : "\u2013 ", small("tokens")));
}

function pips(slots) {
  if (slots.total > 32) return "";
  return element("span", { className: "pips", "aria-hidden": "true" },
    ...Array.from({ length: slots.total }, (_, i) => element("i", { className: i < slots.used ? "used" : "" })));
}

// ---- spills

export function drawMoves(moves, lanes) {
  const spilled = lanes ? PRIORITIES.reduce((sum, p) => sum + lanes[p].spilled, 0) : 0;
  setText(byId("moves-sum"), spilled
    ? `${plural(spilled, "request")} spilled to Ollama since the monitor started. The newest ${count(moves.length)} by reason:`
    : "None yet. Simple requests go to Ollama while MLX is saturated.");
  const reasons = new Map();
  for (const move of moves) {
    const reason = move.to === "ollama" ? move.reason || "no reason" : `back to MLX: ${move.reason}`;
    reasons.set(reason, (reasons.get(reason) || 0) + 1);
  }
  byId("moves-reasons").replaceChildren(...[...reasons].sort((a, b) => b[1] - a[1]).slice(0, 5).map(([reason, number]) =>
    element("li", {}, element("b", { textContent: count(number) }), element("span", { textContent: reason }))));
  byId("moves-list").replaceChildren(...moves.slice(0, 6).map(move => element("li", {},
    element("time", { textContent: clock(move.at), datetime: new Date(move.at * 1000).toISOString() }),
    element("span", { className: "priority", textContent: capital(move.priority), data: { priority: move.priority } }),
    element("span", { className: "id mono", textContent: move.id, title: move.id }),
    element("span", { className: "why", textContent: (move.to === "mlx" ? "back to MLX: " : "") + move.reason }))));
}
