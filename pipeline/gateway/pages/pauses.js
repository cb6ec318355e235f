// What is paused, and an operator's dialogs: pause a lane or a tenant, change the priority of a request.

import { PRIORITIES, byId, capital, clock, count, element, plural, setText } from "./dom.js";
import { ask, errorOf } from "./stream.js";

const post = (path, body) => ask(path, {
  method: "POST", headers: { "content-type": "application/json" }, body: JSON.stringify(body),
});

const scopeOf = pause => [pause.priority && `lane ${pause.priority}`, pause.tenant && `tenant ${pause.tenant}`].filter(Boolean).join(" of ");

export class Pauses {
  constructor() {
    this.pauses = [];
    this.lanes = null;
    this.operator = false;
    this.dialog = byId("operate-dialog");
    this.act = async () => {};
    byId("operate-no").addEventListener("click", () => this.dialog.close());
    byId("operate-form").addEventListener("submit", event => {
      event.preventDefault();
      this.dialog.close();
      this.act();
    });
    for (const name of ["operate-tenant", "operate-lane"]) byId(name).addEventListener("input", () => this.describe());
    byId("pause-tenant").addEventListener("click", () => this.askToPause("", ""));
  }

  /** Draw the pauses, and the buttons of an operator. */
  draw(pauses, lanes, operator) {
    this.pauses = pauses ?? [];
    this.lanes = lanes;
    this.operator = operator;
    byId("pause-tenant").hidden = !operator;
    for (const priority of PRIORITIES) this.mark(priority);
    const focused = document.activeElement?.closest?.("#pause-list li")?.dataset.scope;
    byId("pause-list").replaceChildren(...this.pauses.map(pause => this.row(pause)));
    if (focused !== undefined) (byId("pause-list").querySelector("button") ?? byId("pause-tenant")).focus();
  }

  /** The lane's mark and its button, in the row that `drawLanes` has made. */
  mark(priority) {
    const row = document.querySelector(`[data-lane="${priority}"]`);
    if (!row) return;
    const pause = this.pauses.find(each => each.priority === priority && !each.tenant);
    row.dataset.paused = Boolean(pause);
    const mark = row.querySelector(".paused-mark");
    mark.hidden = !pause;
    const button = row.querySelector("button");
    button.hidden = !this.operator;
    setText(button, pause ? "Resume" : "Pause");
    button.setAttribute("aria-label", `${pause ? "Resume" : "Pause"} lane ${priority}`);
    button.onclick = () => pause ? this.askToResume(pause) : this.askToPause(priority, null);
  }

  row(pause) {
    const resume = element("button", { type: "button", textContent: "Resume", hidden: !this.operator });
    resume.setAttribute("aria-label", `Resume ${scopeOf(pause)}`);
    resume.addEventListener("click", () => this.askToResume(pause));
    const by = pause.by ? ` by ${pause.by}` : "";
    return element("li", { data: { scope: scopeOf(pause) } },
      element("span", { className: "why", textContent:
        `${capital(scopeOf(pause))}: paused at ${clock(pause.at)}${by}${pause.reason ? ` (${pause.reason})` : ""}` }),
      element("span", { className: "actions" }, resume));
  }

  // ---- dialogs

  /** A lane, with tenant null; or a tenant that the dialog asks for. */
  askToPause(priority, tenant) {
    byId("operate-scope").hidden = tenant === null;
    byId("operate-tenant").required = tenant !== null;
    byId("operate-tenant").value = tenant ?? "";
    byId("operate-lane").value = priority;
    this.describe = () => {
      const name = tenant === null ? null : byId("operate-tenant").value.trim();
      const lane = byId("operate-lane").value;
      setText(byId("operate-touches"), this.touches(lane, name));
    };
    this.open(tenant === null ? `Pause lane ${priority}?` : "Pause a tenant?", "Pause", reason => {
      const scope = tenant === null ? { priority } : { tenant: byId("operate-tenant").value.trim() };
      const lane = byId("operate-lane").value;
      return post("queue/pause", { ...scope, ...(lane ? { priority: lane } : {}), reason });
    });
  }

  touches(priority, tenant) {
    const rest = "No request of it begins until it is resumed. What runs continues, new requests are accepted, and deadlines run.";
    if (tenant !== null) return `All queued requests of the tenant${priority ? ` in lane ${priority}` : ""}. ${rest}`;
    const lane = this.lanes?.[priority];
    return `${lane ? `${plural(lane.queued, "queued request")}; ${count(lane.running)} running. ` : ""}${rest}`;
  }

  askToResume(pause) {
    byId("operate-scope").hidden = true;
    byId("operate-tenant").required = false;
    const lane = pause.tenant ? null : this.lanes?.[pause.priority];
    this.describe = () => setText(byId("operate-touches"),
      `${lane ? `${plural(lane.queued, "queued request")}. ` : ""}Its requests begin again in their turn.`);
    const { priority, tenant } = pause;
    this.open(`Resume ${scopeOf(pause)}?`, "Resume",
      reason => post("queue/resume", { ...(priority && { priority }), ...(tenant && { tenant }), reason }));
  }

  askToMove(id, from, priority) {
    byId("operate-scope").hidden = true;
    byId("operate-tenant").required = false;
    this.describe = () => setText(byId("operate-touches"),
      `Request ${id} leaves lane ${from} and waits at the end of lane ${priority}. Its deadline stays.`);
    this.open(`Move this request to ${priority}?`, "Move",
      reason => post(`queue/requests/${encodeURIComponent(id)}/priority`, { priority, reason }));
  }

  open(title, verb, work) {
    setText(byId("operate-title"), title);
    setText(byId("operate-yes"), verb);
    byId("operate-reason").value = "";
    this.describe();
    this.act = async () => {
      const response = await work(byId("operate-reason").value.trim());
      const notice = byId("notice");
      notice.hidden = response.ok;
      if (!response.ok) setText(notice, `Nothing was changed. ${await errorOf(response)}`);
    };
    this.dialog.showModal();
  }

  describe() { /* set by each dialog */ }
}
