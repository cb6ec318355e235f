// Recent requests: each with its state, and its times as a waterfall.

import {
  ENGINE_NAMES, PRIORITIES, byId, capital, chip, clock, count, duration, element, facts, plural, setText,
} from "./dom.js";

const KEPT = 150;
const FEW = 15;
const TONES = { running: "good", done: "plain", failed: "bad", expired: "bad", cancelled: "warn" };
const WAITING = ["queued", "triaged", "spilled"];
const ENDED = ["done", "failed", "cancelled", "expired"];
const FILTERS = {
  all: () => true,
  waiting: r => WAITING.includes(r.state),
  running: r => r.state === "running",
  spilled: r => r.state === "spilled" || r.engine === "ollama",
  done: r => r.state === "done",
  failed: r => ["failed", "cancelled", "expired"].includes(r.state),
};
export const hasEnded = request => ENDED.includes(request.state);

/** The phases of a request, as [name, class, from, to] in milliseconds since it was stored. */
export function segments(r, nowMs) {
  const end = r.ended_ms ?? Math.max(nowMs, r.started_ms ?? 0, r.moved_ms ?? 0);
  const parts = [];
  let from = 0;
  const until = (name, kind, to) => {
    const there = Math.min(end, to);
    if (there > from) parts.push([name, kind, from, there]);
    from = Math.max(from, there);
  };
  if (r.moved_ms !== undefined) {
    until("queued", "queued", r.triage_ms ?? r.moved_ms);
    until("triage", "triage", r.moved_ms);
  }
  const waits = r.started_ms ?? end;
  if (r.moved_ms === undefined) until("queued", "queued", waits);
  else if (r.state === "spilled" || r.engine === "ollama") until("queued for Ollama", "for-ollama", waits);
  else until("requeued for MLX", "for-mlx", waits);
  if (r.first_ms !== undefined) until("first token", "first", r.first_ms);
  if (r.state === "done") until("generating", "generating", end);
  else until("running", "running", end);
  return parts;
}

export class Requests {
  constructor(cancel, move) {
    this.cancel = cancel;
    this.move = move;
    this.operator = false;
    this.all = new Map();
    this.rows = new Map();
    this.paused = null;
    this.shown = FEW;
    this.mine = new Set();
    this.list = byId("requests-list");
    this.filter = byId("requests-filter");
    this.filter.addEventListener("change", () => this.draw());
    const pause = byId("requests-pause");
    pause.addEventListener("click", () => {
      this.paused = this.paused ? null : [...this.all.values()];
      pause.setAttribute("aria-pressed", String(this.paused !== null));
      pause.textContent = this.paused ? "Resume" : "Pause";
      this.draw();
    });
    byId("requests-more").addEventListener("click", () => {
      this.shown = this.shown === FEW ? KEPT : FEW;
      this.draw();
    });
  }

  reset() { this.all.clear(); }

  add(requests) {
    for (const request of requests) this.all.set(request.id, request);
    const kept = [...this.all.values()].sort((a, b) => b.change - a.change).slice(0, KEPT);
    this.all = new Map(kept.map(request => [request.id, request]));
  }

  draw(now = this.now) {
    this.now = now;
    const all = (this.paused ?? [...this.all.values()]).sort((a, b) => b.change - a.change);
    const chosen = all.filter(FILTERS[this.filter.value]);
    const shown = chosen.slice(0, this.shown);
    const states = ["waiting", "running"].map(state => `${count(all.filter(FILTERS[state]).length)} ${state}`);
    setText(byId("requests-sum"), all.length
      ? `${plural(all.length, "request")}: ${states.join(", ")}, ${count(all.filter(hasEnded).length)} ended. ` +
        "Most recently updated first. All bars share one time scale."
      : "None yet.");
    const more = byId("requests-more");
    more.hidden = chosen.length <= FEW;
    more.textContent = this.shown === FEW ? `Show all ${chosen.length}` : `Show ${FEW}`;
    const drawn = shown.map(r => [r, segments(r, Math.max(0, (now - r.at) * 1000))]);
    const scale = Math.max(1, ...drawn.map(([, parts]) => parts.at(-1)?.[3] ?? 0));
    const rows = drawn.map(([request, parts]) => this.row(request, parts, scale));
    this.place(rows);
  }

  /** Order the rows with as few moves as possible, so that a row keeps its focus and stays open. */
  place(rows) {
    const wanted = new Set(rows);
    for (const row of [...this.list.children]) if (!wanted.has(row)) row.remove();
    rows.forEach((row, i) => { if (this.list.children[i] !== row) this.list.insertBefore(row, this.list.children[i] ?? null); });
    for (const [id, row] of this.rows) if (!wanted.has(row.item)) this.rows.delete(id);
  }

  row(request, parts, scale) {
    let row = this.rows.get(request.id);
    if (!row) {
      row = {
        at: element("time", { className: "at" }), state: element("span", { className: "state" }),
        priority: element("span", { className: "priority" }), id: element("span", { className: "id mono" }),
        bar: element("span", { className: "bar", role: "img" }), took: element("span", { className: "took" }),
        more: element("dl", { className: "facts" }), cancel: element("button", { type: "button", textContent: "Cancel request" }),
      };
      row.moves = PRIORITIES.map(priority => {
        const button = element("button", { type: "button", textContent: `Move to ${priority}`, data: { move: priority } });
        button.addEventListener("click", () => this.move(request.id, this.all.get(request.id)?.priority ?? "", priority));
        return button;
      });
      row.details = element("details", {},
        element("summary", {}, row.at, row.priority, row.state, row.id, row.bar, row.took),
        element("div", { className: "request-more" }, row.more, element("div", { className: "actions" }, ...row.moves, row.cancel)));
      row.item = element("li", {}, row.details);
      row.cancel.addEventListener("click", () => this.cancel(request.id));
      row.details.addEventListener("toggle", () => this.draw());
      this.rows.set(request.id, row);
    }
    this.fill(row, request, parts, scale);
    return row.item;
  }

  fill(row, r, parts, scale) {
    row.item.dataset.id = r.id;
    row.item.dataset.state = r.state;
    row.item.classList.toggle("mine", this.mine.has(r.id));
    setText(row.at, clock(r.at));
    setText(row.priority, capital(r.priority));
    row.priority.dataset.priority = r.priority;
    const where = r.engine && r.state !== "queued" ? ` \u00b7 ${ENGINE_NAMES[r.engine]}` : "";
    const state = (r.state === "spilled" ? "for Ollama" : r.state === "triaged" ? "for MLX" : r.state) + where;
    if (row.shown !== state) row.state.replaceChildren(chip(state, TONES[r.state] || "plain"));
    row.shown = state;
    setText(row.id, r.id);
    row.id.title = r.id;
    const took = parts.at(-1)?.[3] ?? 0;
    setText(row.took, duration(took));
    while (row.bar.children.length > parts.length) row.bar.lastChild.remove();
    parts.forEach(([, kind, from, to], i) => {
      const part = row.bar.children[i] ?? row.bar.appendChild(element("i"));
      part.className = kind;
      part.style.left = `${100 * from / scale}%`;
      part.style.width = `${100 * (to - from) / scale}%`;
    });
    row.bar.setAttribute("aria-label", parts.map(([name, , from, to]) => `${name} ${duration(to - from)}`).join(", "));
    row.cancel.parentElement.hidden = hasEnded(r);
    for (const button of row.moves) {
      button.hidden = !this.operator || !WAITING.includes(r.state) || button.dataset.move === r.priority;
    }
    if (row.details.open) {
      facts(row.more, [
        ["Id", r.id], ["Tenant", r.tenant], ["Stored", new Date(r.at * 1000).toLocaleString("en-GB")],
        ...parts.map(([name, , from, to]) => [capital(name), duration(to - from)]),
        ["Total", hasEnded(r) ? duration(r.ended_ms) : ""], ["Reason", r.reason], ["Error", r.code],
      ]);
    }
  }
}
