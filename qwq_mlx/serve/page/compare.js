// Two runs from their first differing token.

import { outcome, whole } from "/page/api.js";
import { chanceOf, percent } from "/page/tokens.js";

const BEFORE = 60; // shared tokens that are shown

/** Fill `sides` and `shared` with two runs. */
export async function compare(first, second, { sides, shared }) {
  const both = await Promise.all([whole(first), whole(second)]);
  const [a, b] = both.map(({ steps }) => steps);
  const n = Math.min(a.length, b.length);
  let at = 0;
  while (at < n && a[at].id === b[at].id) at++;
  const isSame = at === a.length && at === b.length;
  shared.textContent = isSame
    ? `All ${at.toLocaleString()} tokens are the same.`
    : `The first ${at.toLocaleString()} tokens are the same; they differ from token ${at.toLocaleString()} on.`;
  sides.replaceChildren(...both.map(({ run, steps }, place) => side(run, steps, at, both[1 - place].steps[at])));
}

function side(run, steps, at, other) {
  const article = document.createElement("article");
  const head = document.createElement("h3");
  head.textContent = `Seed ${run.seed}: ${outcome(run)}, ${run.tokens.toLocaleString()} tokens`;
  const question = document.createElement("p");
  question.className = "hint";
  question.textContent = run.question;
  const text = document.createElement("div");
  text.className = "side";
  text.tabIndex = 0;
  text.setAttribute("aria-label", `Text of seed ${run.seed}`);
  const join = (part) => part.map((step) => step.text).join("");
  const before = document.createElement("span");
  before.className = "shared";
  before.textContent = (at > BEFORE ? "… " : "") + join(steps.slice(Math.max(0, at - BEFORE), at));
  text.append(before);
  if (steps[at]) {
    const differing = document.createElement("mark");
    differing.textContent = steps[at].text;
    text.append(differing, join(steps.slice(at + 1)));
  } else if (other) {
    text.append(Object.assign(document.createElement("mark"), { textContent: " ends here" }));
  }
  article.append(head, question, chances(steps[at], other), text);
  return article;
}

/** How probable both tokens were here. */
function chances(step, other) {
  const line = document.createElement("p");
  if (!step) return line;
  const rival = other && step.alternatives.find((each) => each.id === other.id);
  const rest = rival && rival.id !== step.id ? `; ${JSON.stringify(rival.text)} had ${percent(rival.logprob)}` : "";
  line.textContent = `${JSON.stringify(step.text)}: ${chanceOf(step)}${rest}`;
  return line;
}
