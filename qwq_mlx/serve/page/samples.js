// The samples of a vote side by side, and how their answers count so far.

import { API, call, outcome, steps } from "/page/api.js";

const POLL_MS = 500;

/** Shows them in an element of a section until `stop`; `groups` is a list, `onOpen` is called with the id of a sample. */
export class Samples {
  constructor(element, groups, { onOpen, onEnd }) {
    Object.assign(this, { element, groups, onOpen, onEnd });
    this.stop();
  }

  stop() {
    clearTimeout(this.timer);
    this.id = null;
    this.cards = new Map();
    this.element.replaceChildren();
    this.groups.replaceChildren();
  }

  /** Show the samples of a run, if there are any. Polls until all have ended. */
  async show(id) {
    if (this.id !== id) this.stop();
    this.id = id;
    clearTimeout(this.timer);
    const vote = await call("GET", `${API}/${id}/vote`);
    if (this.id !== id) return; // another run was opened meanwhile
    this.element.closest("section").hidden = vote.n === 0; // before there is text, which is scrolled
    for (const run of vote.runs) if (!this.cards.has(run)) this.cards.set(run, new Card(this.element, run, () => this.onOpen(run)));
    await Promise.all([...this.cards.values()].map((card) => card.update()));
    if (this.id !== id) return;
    this.count(vote);
    if (vote.running) this.timer = setTimeout(() => this.show(id).catch(this.onEnd), POLL_MS);
    else if (vote.n) this.onEnd();
  }

  count({ n, running, groups }) {
    const items = groups.map((group) => {
      const item = document.createElement("li");
      const bar = Object.assign(document.createElement("meter"), { max: n, value: group.runs.length });
      bar.setAttribute("aria-hidden", "true");
      item.append(`${group.answer}: ${group.runs.length} of ${n} `, bar);
      return item;
    });
    if (running) items.push(Object.assign(document.createElement("li"), { textContent: `${running} under way` }));
    this.groups.replaceChildren(...items);
  }
}

/** One sample: what it is, its text as it comes. */
class Card {
  constructor(parent, id, open) {
    this.id = id;
    this.shown = 0;
    this.isOver = false;
    const card = document.createElement("article");
    this.head = document.createElement("button");
    this.head.type = "button";
    this.head.addEventListener("click", open);
    this.text = document.createElement("div");
    this.text.tabIndex = 0;
    this.text.className = "sample";
    card.append(this.head, this.text);
    parent.append(card);
  }

  async update() {
    if (this.isOver) return;
    const texts = [];
    for await (const values of steps(this.id, { from: this.shown, wait: 0 })) {
      for (const value of values) {
        if (value.run) this.tell(value.run);
        else texts.push(value.text);
      }
    }
    this.shown += texts.length;
    this.text.append(texts.join(""));
    this.text.scrollTop = this.text.scrollHeight;
  }

  tell(run) {
    this.isOver = run.state !== "running";
    this.head.textContent = `seed ${run.seed}: ${outcome(run)}, ${run.tokens.toLocaleString()} tokens`;
    this.text.setAttribute("aria-label", `Sample of seed ${run.seed}`);
  }
}
