// The accounts of use: requests and tokens of each tenant and key, for the chosen period.

import { byId, count, element, plural, setText } from "./dom.js";
import { ask, errorOf } from "./stream.js";

const EVERY_MS = 5000;
const MOST = 50;
const COLUMNS = ["prompt", "cached", "completion", "reasoning", "spilled"];

const total = ({ done = 0, failed = 0, cancelled = 0, expired = 0 }) => done + failed + cancelled + expired;

export class Usage {
  constructor() {
    this.report = null;
    this.reading = false;
    this.wanted = false;
    byId("usage-period").addEventListener("change", () => this.draw());
  }

  /** The accounts may have changed. They are read at most once in five seconds, and while the page is visible. */
  changed() {
    this.wanted = true;
    if (!this.reading) this.read();
  }

  async read() {
    this.reading = true;
    this.wanted = false;
    try {
      const response = await ask("queue/usage");
      if (!response.ok) throw new Error(await errorOf(response));
      this.report = await response.json();
      this.draw();
    } catch (error) {
      setText(byId("usage-sum"), `The accounts could not be read. ${error.message}`);
    }
    setTimeout(() => {
      this.reading = false;
      if (this.wanted) this.read();
    }, EVERY_MS);
  }

  draw() {
    if (!this.report) return;
    const { start, tenants, keys, total: all } = this.report[byId("usage-period").value];
    const tokens = (all.tokens.prompt ?? 0) + (all.tokens.completion ?? 0);
    const since = new Date(start * 1000).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" });
    const shown = tenants.slice(0, MOST);
    const rest = tenants.length - shown.length;
    setText(byId("usage-sum"), `Since ${since}: ${plural(total(all.requests), "request")}, ${count(tokens)} tokens.${rest ? ` Showing the ${MOST} tenants with the most tokens.` : ""}`);
    byId("usage-table").hidden = !tenants.length;
    byId("usage-rows").replaceChildren(...shown.flatMap(tenant => [
      this.row(tenant, tenant.tenant, ""),
      ...keys.filter(key => key.tenant === tenant.tenant).slice(0, MOST).map(key => this.row(key, "", key.key)),
    ]));
  }

  row({ requests, tokens }, tenant, key) {
    const unanswered = total(requests) - (requests.done ?? 0);
    const cells = [total(requests), unanswered, ...COLUMNS.map(name => tokens[name])];
    return element("tr", { data: { tenant, key } },
      element("th", { scope: "row", textContent: tenant }), element("td", { textContent: key }),
      ...cells.map(number => element("td", { className: "number", textContent: count(number ?? 0) })));
  }
}
