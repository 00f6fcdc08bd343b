// The list of runs: each is opened, picked for a comparison, or deleted.

import { outcome } from "/page/api.js";

export class RunList {
  /** element: a list. onOpen, onDelete: called with the id of a run. onPick: with how many are picked. */
  constructor(element, { onOpen, onDelete, onPick }) {
    Object.assign(this, { element, onOpen, onDelete, onPick });
    this.picked = new Set(); // in the order of the clicks
  }

  /** Show these runs; who works by keyboard stays where they are, and runs that are gone are picked no longer. */
  show(runs) {
    const focused = document.activeElement?.dataset.control;
    this.element.replaceChildren(...runs.map((run) => this.item(run)));
    const ids = new Set(runs.map((run) => run.id));
    for (const id of this.picked) if (!ids.has(id)) this.picked.delete(id);
    const controls = [...this.element.querySelectorAll("[data-control]")];
    if (focused) controls.find((each) => each.dataset.control === focused)?.focus({ preventScroll: true });
    this.onPick(this.picked.size);
  }

  item(run) {
    const item = document.createElement("li");
    const name = `${run.question.slice(0, 120)} · ${outcome(run)}`;
    const box = Object.assign(document.createElement("input"), { type: "checkbox", checked: this.picked.has(run.id) });
    box.setAttribute("aria-label", `Compare ${name}`);
    box.addEventListener("change", () => {
      this.picked[box.checked ? "add" : "delete"](run.id);
      this.onPick(this.picked.size);
    });
    const title = button(name, () => this.onOpen(run.id));
    title.append(document.createElement("br"), facts(run));
    const remove = button("Delete", () => this.onDelete(run.id));
    remove.setAttribute("aria-label", `Delete ${name}`);
    item.append(box, title, remove);
    [...item.children].forEach((each, place) => (each.dataset.control = `${run.id}/${place}`));
    return item;
  }
}

function facts(run) {
  const from = run.parent ? ` (from token ${run.parent.at} of ${run.parent.id})` : "";
  const when = new Date(run.created * 1000).toLocaleString();
  const textContent = `${run.tokens.toLocaleString()} tokens, seed ${run.seed}, ${when}${from}`;
  return Object.assign(document.createElement("small"), { textContent });
}

function button(text, action) {
  const element = Object.assign(document.createElement("button"), { type: "button", textContent: text });
  element.addEventListener("click", action);
  return element;
}
