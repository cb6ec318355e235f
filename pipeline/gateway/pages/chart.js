// The last minutes: the saturation of each engine, and the number of queued requests.

import { ENGINES, ENGINE_NAMES, PRIORITIES, byId, clock, element, setText, svg } from "./dom.js";

const HEIGHT = 270;
const TOP = 8;
const SPLIT = 172;       // base line of the saturation
const DEPTH_TOP = 196;
const BASE = 250;        // base line of the queue depth
const LEFT = 44;
const RIGHT = 10;
const GAP_S = 12;        // without work a load comes every five seconds; a longer gap means that the monitor was away

/** A number in at most four characters, as the space beside the axis has room for. */
const compact = number => number < 10_000 ? String(number) : number < 1e6 ? `${Math.round(number / 1000)}k` : `${Math.round(number / 1e6)}M`;

/** Linear up to 1, then logarithmic: 1 is full, and an overload can reach 60. */
const squeeze = value => (value <= 1 ? value : 1 + Math.log2(value));

export class Chart {
  constructor(about) {
    this.about = about;
    this.points = { mlx: [], ollama: [] };
    this.now = 0;
    this.cursor = null;  // seconds before now
    this.box = byId("chart");
    this.reading = byId("chart-reading");
    byId("load-legend").replaceChildren(
      ...ENGINES.map(e => element("span", { className: `key ${e}`, textContent: ENGINE_NAMES[e] })),
      ...PRIORITIES.map(p => element("span", { className: "priority", textContent: `${p} queued`, data: { priority: p } })));
    this.listen();
  }

  listen() {
    new ResizeObserver(() => this.draw()).observe(this.box);
    this.box.addEventListener("pointermove", event => {
      const box = this.box.getBoundingClientRect();
      const share = (event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT);
      this.point((1 - Math.min(1, Math.max(0, share))) * this.about.window_s);
    });
    this.box.addEventListener("pointerleave", () => this.point(null));
    this.box.addEventListener("blur", () => this.point(null));
    this.box.addEventListener("keydown", event => {
      const step = { ArrowLeft: 5, ArrowRight: -5, PageUp: 30, PageDown: -30 }[event.key];
      if (!step && event.key !== "Escape") return;
      event.preventDefault();
      if (event.key === "Escape") this.point(null);
      else this.point(Math.min(this.about.window_s, Math.max(0, (this.cursor ?? 0) + step)));
    });
  }

  point(secondsAgo) {
    this.cursor = secondsAgo;
    this.draw();
  }

  add(points, now) {
    for (const [engine, items] of Object.entries(points)) {
      for (const [at, saturation, level, high, medium, low] of items) {
        const line = this.points[engine];
        while (line.length && line.at(-1).at >= at) line.pop();
        line.push({ at, saturation, level, high, medium, low });
      }
    }
    const oldest = now - this.about.window_s - GAP_S;
    for (const engine of ENGINES) this.points[engine] = this.points[engine].filter(p => p.at >= oldest);
  }

  at(engine, time) {
    const found = this.points[engine].findLast(p => p.at <= time);
    return found && time - found.at <= GAP_S ? found : null;
  }

  draw() {
    const width = this.box.clientWidth;
    if (!width || !this.now) return;
    const { window_s: span, busy_at: busy, saturated_at: saturated } = this.about;
    const highest = Math.max(saturated * 2, ...ENGINES.flatMap(e => this.points[e].map(p => p.saturation)));
    const top = squeeze(highest) * 1.04;
    // Points are kept for a little longer than the chart shows: nothing is drawn left of its axis.
    const x = at => LEFT + (width - LEFT - RIGHT) * Math.max(0, 1 - (this.now - at) / span);
    const y = value => SPLIT - (SPLIT - TOP) * squeeze(value) / top;
    const parts = [this.zones(width, y, busy, saturated, highest), this.minutes(width, x, span)];
    const labels = parts[0].querySelectorAll(".label");
    parts.push(this.depths(width, x), ...ENGINES.map(e => svg("path", { class: `line ${e}`, d: this.line(e, x, y) })));
    if (this.cursor !== null) {
      const there = x(this.now - this.cursor);
      parts.push(svg("line", { class: "cursor", x1: there, x2: there, y1: TOP, y2: BASE }));
    }
    parts.push(...labels);  // above the lines
    const drawn = svg("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, height: HEIGHT, "aria-hidden": "true" }, ...parts);
    this.box.replaceChildren(drawn);
    this.read();
  }

  zones(width, y, busy, saturated, highest) {
    const group = svg("g");
    group.append(svg("rect", { class: "zone", x: LEFT, width: width - LEFT - RIGHT, y: TOP, height: y(saturated) - TOP }));
    for (const [name, value] of [["busy", busy], ["saturated", saturated]]) {
      group.append(svg("line", { class: `threshold ${name}`, x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
      const below = name === "busy";
      const label = svg("text", { class: `label label-${name}`, x: LEFT + 5, y: y(value) + (below ? 13 : -4) });
      label.append(name);
      group.append(label);
    }
    const ticks = [0, 1];
    for (let tick = 2; tick <= highest; tick *= squeeze(highest) > 6 ? 4 : 2) ticks.push(tick);
    for (const tick of ticks) {
      const text = svg("text", { x: LEFT - 8, y: y(tick) + 4, "text-anchor": "end" });
      text.append(tick < 2 ? tick.toFixed(1) : compact(tick));
      group.append(text);
      if (tick > 1) group.append(svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: y(tick), y2: y(tick) }));
    }
    group.append(svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: SPLIT, y2: SPLIT }));
    return group;
  }

  minutes(width, x, span) {
    const group = svg("g");
    const step = width < 520 ? 120 : 60;
    for (let ago = 0; ago <= span; ago += step) {
      const there = x(this.now - ago);
      group.append(svg("line", { class: "axis", x1: there, x2: there, y1: BASE, y2: BASE + 4 }));
      const anchor = ago === 0 ? "end" : ago === span ? "start" : "middle";
      const text = svg("text", { x: there, y: BASE + 17, "text-anchor": anchor });
      text.append(ago ? `\u2212${ago / 60} min` : "now");
      group.append(text);
    }
    group.append(svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: BASE, y2: BASE }));
    return group;
  }

  line(engine, x, y) {
    let path = "";
    let before = null;
    for (const p of this.points[engine]) {
      const there = x(p.at);
      path += before && p.at - before.at <= GAP_S ? `H${there.toFixed(1)}V${y(p.saturation).toFixed(1)}`
        : `M${there.toFixed(1)} ${y(p.saturation).toFixed(1)}`;
      before = p;
    }
    if (before && this.now - before.at <= GAP_S) path += `H${x(this.now).toFixed(1)}`;
    return path;
  }

  depths(width, x) {
    const group = svg("g");
    const times = [...new Set(ENGINES.flatMap(e => this.points[e].map(p => p.at)))].sort((a, b) => a - b);
    const rows = times.map(at => ({ at, ...this.waiting(at) }));
    const most = Math.max(4, ...rows.map(r => r.high + r.medium + r.low));
    const y = number => BASE - (BASE - DEPTH_TOP) * number / most;
    const text = svg("text", { x: LEFT - 8, y: DEPTH_TOP + 5, "text-anchor": "end" });
    text.append(compact(most));
    group.append(text, svg("line", { class: "axis", x1: LEFT, x2: width - RIGHT, y1: DEPTH_TOP, y2: DEPTH_TOP }));
    let below = rows.map(() => 0);
    for (const priority of [...PRIORITIES].reverse()) {
      const above = rows.map((row, i) => below[i] + row[priority]);
      if (rows.length && above.some((total, i) => total > below[i])) {
        const right = i => x(i + 1 < rows.length ? rows[i + 1].at : this.now).toFixed(1);
        let path = `M${x(rows[0].at).toFixed(1)} ${y(below[0]).toFixed(1)}`;
        rows.forEach((_, i) => { path += `V${y(above[i]).toFixed(1)}H${right(i)}`; });
        for (let i = rows.length - 1; i >= 0; i -= 1) path += `V${y(below[i]).toFixed(1)}H${x(rows[i].at).toFixed(1)}`;
        group.append(svg("path", { class: "area", "data-priority": priority, d: `${path}Z` }));
      }
      below = above;
    }
    return group;
  }

  waiting(time) {
    const there = ENGINES.map(engine => this.at(engine, time)).filter(Boolean);
    return Object.fromEntries(PRIORITIES.map(p => [p, there.reduce((sum, point) => sum + point[p], 0)]));
  }

  read() {
    const time = this.now - (this.cursor ?? 0);
    const said = ENGINES.map(engine => {
      const point = this.at(engine, time);
      return `${ENGINE_NAMES[engine]} ${point ? `${point.saturation.toFixed(2)}, ${point.level}` : "no data"}`;
    });
    const depth = this.waiting(time);
    const waiting = PRIORITIES.map(p => `${depth[p]} ${p}`).join(", ");
    const when = this.cursor === null ? "Now" : clock(time);
    setText(this.reading, `${when}: ${said.join("; ")}. Queued: ${waiting}.`);
  }
}
