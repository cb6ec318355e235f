// Dead letters: show, replay, delete.

import { byId, capital, clock, element, facts, plural, setText } from "./dom.js";
import { ask, errorOf } from "./stream.js";

const path = (id, action = "") => `queue/dead/${encodeURIComponent(id)}${action}`;

/** The time, with the day if it is not today. */
function when(at) {
  const day = new Date(at * 1000).toLocaleDateString("en-GB");
  return day === new Date().toLocaleDateString("en-GB") ? clock(at) : `${day} ${clock(at)}`;
}

export class Letters {
  constructor() {
    this.reading = false;
    this.again = false;
    this.dialog = byId("letter-dialog");
    byId("letter-close").addEventListener("click", () => this.dialog.close());
    byId("purge-no").addEventListener("click", () => byId("purge-dialog").close());
    byId("purge-yes").addEventListener("click", () => this.purge());
  }

  /** Read the list. A call during a read repeats it afterwards. */
  async read() {
    this.again = this.reading;
    if (this.reading) return;
    this.reading = true;
    try {
      const response = await ask("queue/dead");
      if (!response.ok) throw new Error(await errorOf(response));
      this.draw(await response.json());
      if (this.unread) this.say("");
      this.unread = false;
    } catch (error) {
      this.unread = true;
      this.say(`The list could not be read. ${error.message}`);
    }
    this.reading = false;
    if (this.again) this.read();
  }

  say(text) { setText(byId("dead-status"), text); }

  draw({ data, total }) {
    setText(byId("dead-sum"), total ? `${plural(total, "request")} failed on every attempt. Replay queues a request again.${total > data.length ? ` Showing the newest ${data.length}.` : ""}`
      : "No dead letters.");
    const link = byId("dead-link");
    link.hidden = !total;
    setText(link, plural(total, "dead letter"));
    const focused = document.activeElement?.closest?.("#dead-list li")?.dataset.id;
    const action = document.activeElement?.dataset?.action;
    const list = byId("dead-list");
    list.replaceChildren(...data.map(letter => this.row(letter)));
    if (focused !== undefined) {
      const row = [...list.children].find(item => item.dataset.id === focused);
      (row?.querySelector(`[data-action="${action}"]`) ?? byId("dead")).focus();
    }
  }

  row(letter) {
    const button = (action, work) => {
      const made = element("button", { type: "button", textContent: capital(action), data: { action } });
      made.setAttribute("aria-label", `${capital(action)} ${letter.id}`);
      made.addEventListener("click", () => work.call(this, letter.id));
      return made;
    };
    return element("li", { data: { id: letter.id } },
      element("span", { className: "what" },
        element("span", { className: "priority", textContent: capital(letter.priority), data: { priority: letter.priority } }),
        element("span", { className: "id mono", textContent: letter.id }),
        element("span", { textContent: `${when(letter.died_at)}, ${plural(letter.attempts, "attempt")}` })),
      element("span", { className: "why", textContent: `${letter.code}: ${letter.message}` }),
      element("span", { className: "actions" },
        button("show", this.show), button("replay", this.replay), button("delete", this.askToPurge)));
  }

  async show(id) {
    const response = await ask(path(id));
    if (!response.ok) return this.say(`${id} could not be read. ${await errorOf(response)}`);
    const letter = await response.json();
    facts(byId("letter-facts"), [
      ["Id", letter.id], ["Priority", letter.priority], ["Error", `${letter.code}: ${letter.message}`],
      ["Attempts", String(letter.attempts)], ["Failed", new Date(letter.died_at * 1000).toLocaleString("en-GB")],
      ["Subject", letter.subject], ["Trace", letter.trace_id],
    ]);
    const { request, headers } = letter;
    setText(byId("letter-request"), typeof request === "string" ? request : JSON.stringify(request, null, 2));
    setText(byId("letter-headers"), Object.entries(headers).map(([name, value]) => `${name}: ${value}`).join("\n") || "none");
    this.dialog.showModal();
  }

  async replay(id) {
    const response = await ask(path(id, "/replay"), { method: "POST" });
    const failed = !response.ok && await errorOf(response);
    await this.read();
    this.say(failed ? `${id} was not replayed. ${failed}` : `${id} was queued again.`);
  }

  askToPurge(id) {
    this.wanted = id;
    setText(byId("purge-id"), id);
    byId("purge-dialog").showModal();
  }

  async purge() {
    byId("purge-dialog").close();
    const response = await ask(path(this.wanted), { method: "DELETE" });
    const failed = !response.ok && await errorOf(response);
    await this.read();
    this.say(failed ? `${this.wanted} was not deleted. ${failed}` : `${this.wanted} was deleted.`);
  }
}
