// The dashboard: passes the parts of the stream of changes to the panels.

import { byId, clock, setText } from "./dom.js";
import { ask, errorOf, follow, hasKey, useKey } from "./stream.js";
import { Chart } from "./chart.js";
import { drawEngines, drawLanes, drawMoves } from "./panels.js";
import { Letters } from "./letters.js";
import { Pauses } from "./pauses.js";
import { Prompt } from "./prompt.js";
import { Requests } from "./requests.js";
import { Usage } from "./usage.js";

const MOVES_KEPT = 150;
const THEMES = ["system", "light", "dark"];

const view = { about: null, lanes: null, loads: null, store: null, pauses: [], workers: [], moves: [] };
let ahead = 0;         // how far the gateway's clock is ahead of this one, in seconds
let chart = null;
const pauses = new Pauses();
const requests = new Requests(cancelRequest, (id, from, to) => pauses.askToMove(id, from, to));
const prompt = new Prompt(requests);
const letters = new Letters();
const usage = new Usage();
let dirty = new Set();

const now = () => Date.now() / 1000 + ahead;

// ---- events

function onEvent(name, data) {
  ahead = data.at - Date.now() / 1000;
  if (name === "all") begin(data);
  const { requests: news = [], moves = [], points } = data;
  for (const part of ["lanes", "loads", "workers", "store", "pauses"]) {
    if (part in data) {
      if (part === "lanes" && data.lanes?.dead !== view.lanes?.dead) letters.read();
      view[part] = data[part];
      dirty.add(part);
    }
  }
  if (points) chart.add(points, now());  // drawn by the timer below
  if (moves.length) { view.moves = [...moves, ...view.moves].slice(0, MOVES_KEPT); dirty.add("moves"); }
  if (news.length) {
    requests.add(news);
    news.forEach(request => prompt.heard(request));
    if (name !== "all" && news.some(r => ["done", "failed", "cancelled", "expired"].includes(r.state))) usage.changed();
    if (name !== "all" && news.some(r => r.code === "engine_failed")) letters.read();
    dirty.add("requests");
  }
  schedule();
}

function begin(data) {
  view.about = data.about;
  view.moves = [];
  requests.reset();
  chart ??= new Chart(data.about);
  chart.about = data.about;
  chart.points = { mlx: [], ollama: [] };
  requests.operator = data.about.sees_all;
  prompt.prefix = data.about.name_prefix;
  const { tenant, sees_all: all } = data.about;
  const who = byId("who");
  who.hidden = !tenant;
  setText(who, all ? `operator (${tenant})` : `tenant ${tenant}`);
  byId("change-key").hidden = !hasKey();
  dirty = new Set(["lanes", "loads", "workers", "store", "pauses", "chart", "moves", "requests"]);
  letters.read();
  usage.changed();
}

let frame = 0;
function schedule() {
  frame ||= requestAnimationFrame(() => {
    frame = 0;
    draw();
  });
}

function draw() {
  const changed = dirty;
  dirty = new Set();
  if (changed.has("lanes") || changed.has("loads")) drawLanes(view.lanes, view.loads);
  if (changed.has("lanes") || changed.has("pauses")) pauses.draw(view.pauses, view.lanes, view.about?.sees_all ?? false);
  if (changed.has("loads") || changed.has("workers")) drawEngines(view.loads, view.workers);
  if (changed.has("store")) {
    byId("store").hidden = !view.store;
    setText(byId("store"), view.store?.reason ?? "");
  }
  if (changed.has("workers") && view.about) {
    const models = new Set(view.workers.filter(w => w.state === "ready").flatMap(w => w.models));
    prompt.offer([...models], view.about.highest);
  }
  if (changed.has("moves") || changed.has("lanes")) drawMoves(view.moves, view.lanes);
  if (changed.has("chart") && chart) { chart.now = now(); chart.draw(); }
  if (changed.has("requests")) requests.draw(now());
}

// Without events too, the chart moves and the bars of waiting and running requests grow.
setInterval(() => {
  if (document.hidden || !view.about || document.body.classList.contains("is-stale")) return;
  dirty.add("chart");
  if (!requests.paused) dirty.add("requests");
  schedule();
}, 1000);

// ---- the connection

const connection = byId("connection");
let lastState = "";

function onState(state, why = "", retryIn = 0) {
  if (state === "live" && lastState === "live") return;
  lastState = state;
  connection.dataset.state = state;
  document.body.classList.toggle("is-stale", state === "off" || (state === "connecting" && view.about !== null));
  if (state === "live") setText(connection, "live");
  else if (state === "connecting") setText(connection, "connecting");
  else {
    const since = view.about ? ` Showing data from ${clock(now())}.` : "";
    setText(connection, `Disconnected. ${why}${since}${retryIn ? ` Retrying in ${Math.ceil(retryIn)} s.` : ""}`);
  }
}

const keyDialog = byId("key-dialog");
let keyGiven = () => {};

function askForKey(why) {
  setText(byId("key-why"), why);
  byId("key").value = "";
  keyDialog.showModal();
  return new Promise(resolve => { keyGiven = resolve; });
}

byId("key-form").addEventListener("submit", () => {
  useKey(byId("key").value.trim());
  keyGiven();
});
keyDialog.addEventListener("cancel", event => { if (!view.about) event.preventDefault(); });
byId("change-key").addEventListener("click", async () => {
  await askForKey("Enter another API key.");
  location.reload();
});

// ---- cancelling, and the theme

async function cancelRequest(id) {
  const response = await ask(`queue/requests/${encodeURIComponent(id)}`, { method: "DELETE" });
  const notice = byId("notice");
  notice.hidden = response.ok;
  if (!response.ok) setText(notice, `The request was not cancelled. ${await errorOf(response)}`);
}

const themeButton = byId("theme");
const chosenTheme = () => document.documentElement.dataset.theme || "system";
const nameTheme = () => setText(themeButton, `Theme: ${chosenTheme()}`);
themeButton.addEventListener("click", () => {
  const next = THEMES[(THEMES.indexOf(chosenTheme()) + 1) % THEMES.length];
  if (next === "system") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = next;
  try {
    if (next === "system") localStorage.removeItem("headrace-theme");
    else localStorage.setItem("headrace-theme", next);
  } catch { /* without storage: for this visit only */ }
  nameTheme();
});
nameTheme();

const base = location.origin + location.pathname.replace(/\/$/, "");
setText(byId("openai"), `${base}/v1`);
setText(byId("ollama"), base);
drawLanes(null, null);
follow("queue/live", { event: onEvent, state: onState, denied: askForKey });
