// A prompt, sent as any client of OpenAI's API sends it, and its streamed answer.

import { ENGINE_NAMES, PRIORITIES, byId, duration, element, facts, plural } from "./dom.js";
import { call, errorOf, events } from "./stream.js";

export class Prompt {
  constructor(requests) {
    this.requests = requests;
    this.asking = null;
    this.prefix = "";  // the ids of this key's requests begin with it
    this.form = byId("try-form");
    this.status = byId("try-status");
    this.answer = byId("try-answer");
    this.account = byId("try-account");
    this.form.addEventListener("submit", event => {
      event.preventDefault();
      if (!this.asking) this.send();
    });
    byId("prompt").addEventListener("keydown", event => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) this.form.requestSubmit();
    });
    byId("try-cancel").addEventListener("click", () => this.cancel());
  }

  /** Offer the ready models, and the priorities that the key permits. */
  offer(models, highest) {
    const select = byId("model");
    const names = ["auto", ...models];
    if ([...select.options].map(o => o.value).join("\n") !== names.join("\n")) {
      const chosen = select.value;
      select.replaceChildren(...names.map(n => element("option", { value: n, textContent: n === "auto" ? "any" : n })));
      if (names.includes(chosen)) select.value = chosen;
    }
    for (const [rank, priority] of PRIORITIES.entries()) {
      const radio = this.form.elements.priority[rank];
      radio.disabled = rank < PRIORITIES.indexOf(highest);
      if (radio.disabled && radio.checked) this.form.elements.priority[PRIORITIES.indexOf(highest)].checked = true;
    }
  }

  say(text, tone = "") {
    this.status.textContent = text;
    this.status.dataset.tone = tone;
  }

  /** Show the state of the waiting request, from the stream of changes. */
  heard(request) {
    if (!this.asking || this.begun || request.id !== this.asking.id) return;
    const state = { queued: "Queued.", triaged: "Queued for MLX.", spilled: "Spilled: queued for Ollama.", running: "Running." }[request.state];
    if (state) this.say([state, request.reason].filter(Boolean).join(" "));
  }

  async send() {
    const chosen = `${this.prefix}page-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
    this.asking = { id: chosen, ending: new AbortController(), cancelled: false };
    this.requests.mine.add(chosen);
    this.begun = false;
    this.busy(true);
    this.answer.textContent = "";
    this.answer.hidden = this.account.hidden = true;
    this.say("Sent.");
    try {
      await this.follow(chosen);
    } catch (error) {
      this.say(this.asking.cancelled ? "Cancelled." : `The connection was lost: ${error.message}`, "bad");
    }
    this.asking = null;
    this.busy(false);
  }

  async follow(chosen) {
    const data = new FormData(this.form);
    const response = await call("v1/chat/completions", {
      method: "POST",
      signal: this.asking.ending.signal,
      headers: { "content-type": "application/json", "x-priority": data.get("priority"), "idempotency-key": chosen },
      body: JSON.stringify({
        model: byId("model").value,
        messages: [{ role: "user", content: byId("prompt").value }],
        stream: true,
        stream_options: { include_usage: true },
      }),
    });
    if (!response.ok) {
      const why = await errorOf(response);
      this.say(this.asking.cancelled ? "Cancelled." : why, "bad");
      return;
    }
    for await (const [, text] of events(response)) {
      if (text !== "[DONE]") this.part(JSON.parse(text));
    }
  }

  part(chunk) {
    if (chunk.error) {
      this.say(this.asking.cancelled ? "Cancelled." : chunk.error.message, "bad");
      return;
    }
    const delta = chunk.choices?.[0]?.delta;
    const added = delta?.content;
    if (delta?.reasoning && !this.begun) this.say("Reasoning.");
    if (added) {
      if (!this.begun) this.say("Answering.");
      this.begun = true;
      this.answer.hidden = false;
      this.answer.append(added);
      this.answer.scrollTop = this.answer.scrollHeight;
    }
    if (chunk.headrace) this.tell(chunk);
  }

  tell({ headrace: account, model, usage, id }) {
    this.say(`Answered by ${ENGINE_NAMES[account.engine]}${account.simulated ? " (simulated, no model)" : ""}.`);
    facts(this.account, [
      ["Engine", `${ENGINE_NAMES[account.engine]}, ${model}${account.spilled ? ", spilled" : ""}`],
      ["Reason", account.reason],
      ["Priority", account.priority],
      ["Queue wait", duration(account.queue_ms)],
      ["First token", `after ${duration(account.ttft_ms)}`],
      ["Total", `${duration(account.total_ms)}, ${plural(account.attempts, "attempt")}`],
      ["Tokens", usage ? `${usage.prompt_tokens} in, ${usage.completion_tokens} out` : ""],
      ["Id", id],
    ]);
    this.account.hidden = false;
  }

  async cancel() {
    const asking = this.asking;
    if (!asking) return;
    asking.cancelled = true;
    byId("try-cancel").disabled = true;
    this.say("Cancelling.");
    let known = false;
    try {
      known = (await call(`queue/requests/${asking.id}`, { method: "DELETE" })).ok;
    } catch { /* aborting the stream cancels it too */ }
    if (!known) asking.ending.abort();
  }

  busy(yes) {
    byId("try-send").disabled = yes;
    byId("try-cancel").disabled = !yes;
    this.answer.setAttribute("aria-busy", String(yes));
    if (!yes && document.activeElement === document.body) byId("prompt").focus();
  }
}
