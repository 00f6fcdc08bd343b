// The tokens of a run in two parts, thinking and answer. What comes is appended once a frame and only for a few
// milliseconds of it, in blocks that are laid out only where they can be seen, so that 20,000 tokens cost no long frame.

const SHADES = [0.3, 0.8, 1.5, 2.5]; // nats of entropy from which on a token has the next shade
const FRAME_MS = 8;
const BLOCK_TOKENS = 200; // a paragraph that is longer is broken, because a block is laid out as a whole

export class TokenView {
  /** thinking, answer: elements. onDraw: called after each frame that drew something. */
  constructor(thinking, answer, onDraw) {
    Object.assign(this, { thinking, answer, onDraw });
    this.clear();
  }

  clear() {
    this.steps = [];
    this.nodes = []; // of each token, its elements
    this.notes = []; // what was noticed at a token
    this.shown = 0;
    this.chosen = null;
    this.span = undefined; // of the answer, once it is known; null where there is none
    this.frame ||= 0;
    this.fills = new Map([this.thinking, this.answer].map((part) => [part, 0])); // tokens of the last block
    this.thinking.replaceChildren();
    this.answer.replaceChildren();
  }

  add(steps) {
    for (const step of steps) this.steps.push(step);
    this.schedule();
  }

  schedule() {
    this.frame ||= requestAnimationFrame(() => {
      this.frame = 0;
      this.draw();
    });
  }

  draw() {
    const follows = [this.thinking, this.answer].filter((part) => part.scrollTop + part.clientHeight > part.scrollHeight - 40);
    const end = performance.now() + FRAME_MS;
    while (this.shown < this.steps.length && performance.now() < end) {
      const last = Math.min(this.shown + 20, this.steps.length);
      while (this.shown < last) this.append(this.steps[this.shown++]);
    }
    for (const part of follows) part.scrollTop = part.scrollHeight;
    if (this.shown < this.steps.length) this.schedule();
    this.onDraw();
  }

  partOf(step) {
    if (this.span === undefined) return step.segment === "answer" ? this.answer : this.thinking;
    return this.span && step.index >= this.span[0] ? this.answer : this.thinking;
  }

  append(step) {
    const part = this.partOf(step);
    const nodes = [];
    step.text.split("\n").forEach((line, number) => {
      const n = this.fills.get(part);
      if (number || !part.lastChild || (n >= BLOCK_TOKENS && /^\s|^[^\p{L}\p{N}]/u.test(line)) || n >= 4 * BLOCK_TOKENS) {
        part.append(document.createElement("div"));
        this.fills.set(part, 0);
      }
      if (line || !number) {
        const token = tokenOf(step, line);
        nodes.push(token);
        part.lastChild.append(token);
        this.fills.set(part, this.fills.get(part) + 1);
      }
    });
    this.nodes[step.index] = nodes;
    for (const event of step.events ?? []) this.note(event, step.index, part);
  }

  /** Say it where it was noticed, and underline what is meant. */
  note(event, at, part) {
    const note = document.createElement("em");
    note.className = "note";
    note.textContent = ` ${nameOf(event)} `;
    part.lastChild.append(note);
    (this.notes[at] ??= []).push(note);
    for (let index = event.start; index < event.end; index++) {
      for (const node of this.nodes[index] ?? []) node.classList.add(event.event);
    }
  }

  /** The answer begins somewhere else than was thought while it came: tokens from there on change their part. */
  split(span) {
    const old = this.steps.findIndex((step) => step.segment === "answer");
    this.span = span ?? null;
    const start = Math.min(old < 0 ? Infinity : old, span ? span[0] : Infinity);
    if (old === (span ? span[0] : -1) || start >= this.shown) return;
    for (let index = start; index < this.shown; index++) for (const node of [...this.nodes[index], ...(this.notes[index] ?? [])]) node.remove();
    for (const part of [this.thinking, this.answer]) {
      while (part.lastChild && !part.lastChild.hasChildNodes()) part.lastChild.remove();
      this.fills.set(part, part.lastChild ? part.lastChild.childNodes.length : 0);
    }
    this.nodes.length = this.notes.length = this.shown = start;
    this.chosen = null;
    this.schedule();
  }

  choose(index) {
    const nodes = this.nodes[index];
    if (!nodes) return;
    for (const node of this.nodes[this.chosen] ?? []) node.classList.remove("chosen");
    this.chosen = index;
    for (const node of nodes) node.classList.add("chosen");
    nodes[0]?.scrollIntoView({ block: "nearest" });
  }

  /** The token before or after the chosen one in a part; its first one where none is chosen there. */
  move(part, offset) {
    const isIn = (index) => this.nodes[index]?.[0] && part.contains(this.nodes[index][0]);
    const index = isIn(this.chosen) ? this.chosen + offset : this.nodes.findIndex((_, each) => isIn(each));
    if (isIn(index)) this.choose(index);
  }
}

export function nameOf(event) {
  if (event.event === "loop") return `loop from token ${event.start}: ${event.evidence}`;
  const scripts = Object.keys(event.scripts).join(", ");
  return `other script from token ${event.start}: ${scripts}`;
}

/** How probable a token was. */
export function chanceOf(step) {
  return step.logprob === null ? "put there, not drawn" : percent(step.logprob);
}

export function percent(logprob) {
  return `${(100 * Math.exp(logprob)).toFixed(1)} %`;
}

function tokenOf(step, text) {
  const token = document.createElement("span");
  token.textContent = text;
  token.dataset.index = step.index;
  const shade = SHADES.filter((nats) => (step.entropy ?? 0) >= nats).length;
  if (shade) token.classList.add(`u${shade}`);
  if (step.is_injected) token.classList.add("injected");
  return token;
}
