// A page that watches runs of `/api/qwq/runs`. No library and no build step; model text only ever becomes text nodes.

const API = "/api/qwq/runs";
const ALTERNATIVES = 5;
const SHADES = [0.3, 0.8, 1.5, 2.5]; // nats of entropy from which on a token has the next shade
const VOTES_MS = 1000;

const at = (id) => document.getElementById(id);
const view = { id: null, run: null, steps: [], shown: 0, chosen: null, began: 0, watching: null, frame: 0, votes: 0 };

function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

async function call(method, path, body) {
  const answer = await fetch(path, { method, headers: headers(), body: body && JSON.stringify(body) });
  if (answer.status === 401) at("key-label").hidden = false;
  if (answer.status === 204) return null;
  const value = await answer.json();
  if (!answer.ok) throw new Error(typeof value.error === "string" ? value.error : value.error.message);
  return value;
}

/** Do something, and say what went wrong with it. */
async function attempt(work) {
  try {
    at("message").textContent = "";
    return await work();
  } catch (error) {
    if (error.name !== "AbortError") at("message").textContent = error.message;
  }
}

function listItem(text, action) {
  const item = document.createElement("li");
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.addEventListener("click", action);
  item.append(button);
  return item;
}

async function showRuns() {
  const { runs } = await call("GET", API);
  const line = (run) => {
    const answer = run.summary?.answer ?? (run.state === "ended" ? "no answer" : run.state);
    const from = run.parent ? ` (from token ${run.parent.at} of ${run.parent.id})` : "";
    return `${run.question.slice(0, 120)} · ${answer} · ${run.tokens} tokens, seed ${run.seed}${from}`;
  };
  at("runs").replaceChildren(...runs.map((run) => listItem(line(run), () => open(run.id))));
}

/** Watch a run from its first token; the address names it, so a reload comes back to it. */
function open(id) {
  view.watching?.abort();
  clearInterval(view.votes);
  Object.assign(view, { id, run: null, steps: [], shown: 0, began: performance.now(), chosen: null });
  view.watching = new AbortController();
  if (location.hash.slice(1) !== id) history.pushState(null, "", `#${id}`);
  clear();
  at("groups").replaceChildren();
  at("votes").hidden = true;
  at("run").hidden = false;
  attempt(() => watch(id, view.watching.signal));
}

async function watch(id, signal) {
  try {
    view.run = await call("GET", `${API}/${id}`);
  } catch (error) {
    at("run").hidden = true;
    throw new Error(`${error.message} A restarted server has forgotten its runs; start it again.`);
  }
  const answer = await fetch(`${API}/${id}/steps`, { headers: headers(), signal });
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) break;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines.filter((each) => each)) take(JSON.parse(line));
    if (!view.frame) view.frame = requestAnimationFrame(draw);
  }
}

function take(value) {
  if (!value.run) {
    view.steps.push(value);
    return;
  }
  view.run = value.run;
  if (view.run.summary) {
    clear(); // where the answer begins is known only now
    view.shown = 0;
  }
  attempt(showRuns);
}

function clear() {
  for (const each of ["thinking", "answer", "marks"]) at(each).replaceChildren();
  at("token").hidden = true;
  view.chosen = null;
}

/** Append what came since the last frame. */
function draw() {
  view.frame = 0;
  for (; view.shown < view.steps.length; view.shown++) append(view.steps[view.shown]);
  tell();
  if (view.run?.summary) mark(view.run.summary);
}

function append(step) {
  const span = view.run?.summary?.conclusion_span;
  const isAnswer = view.run?.summary ? span && step.index >= span[0] : step.segment === "answer";
  const parent = at(isAnswer ? "answer" : "thinking");
  const lines = step.text.split("\n");
  lines.forEach((line, number) => {
    if (number || !parent.lastChild) parent.append(document.createElement("div"));
    if (line || !number) parent.lastChild.append(tokenOf(step, line));
  });
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

function tell() {
  const { run, steps } = view;
  if (!run) return;
  const seconds = (performance.now() - view.began) / 1000;
  const rate = run.state === "running" && seconds > 1 ? `, ${(steps.length / seconds).toFixed(1)} tokens a second` : "";
  const end = run.summary?.description ?? run.error ?? run.state;
  at("status").textContent = `${steps.length.toLocaleString()} tokens${rate}; ${end}`;
  const isRunning = run.state === "running";
  at("answer-now").disabled = at("stop").disabled = !isRunning;
  at("spent").hidden = run.think_tokens === null;
  if (run.think_tokens) {
    const thought = steps.filter((step) => step.segment === "thinking").length;
    at("spent").value = Math.min(1, thought / run.think_tokens);
  }
}

/** Say where loops and other scripts were noticed, and underline the loops. */
function mark(summary) {
  const say = (each) => `${each.event} from token ${each.start}${each.evidence ? `: ${each.evidence}` : ""}`;
  at("marks").textContent = summary.events.map(say).join("; ");
  const loops = summary.events.filter((each) => each.event === "loop");
  for (const token of loops.length ? document.querySelectorAll(".text span") : []) {
    const index = Number(token.dataset.index);
    if (loops.some((each) => each.start <= index && index < each.end)) token.classList.add("loop");
  }
}

function choose(token) {
  if (!token) return;
  view.chosen?.classList.remove("chosen");
  view.chosen = token;
  token.classList.add("chosen");
  token.scrollIntoView({ block: "nearest" });
}

function showToken() {
  if (!view.chosen) return;
  const step = view.steps[Number(view.chosen.dataset.index)];
  const percent = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)} %`;
  const sure = step.logprob === null ? "put there, not drawn" : percent(step.logprob);
  at("token-title").textContent = `Token ${step.index}: ${JSON.stringify(step.text)}, ${sure}`;
  const items = step.alternatives.map((each) => {
    const item = document.createElement("li");
    item.textContent = `${JSON.stringify(each.text)} ${percent(each.logprob)}`;
    return item;
  });
  at("alternatives").replaceChildren(...items);
  at("token").hidden = false;
}

/** The token before or after the chosen one in a part; its first one where none is chosen there. */
function neighbour(part, offset) {
  const tokens = [...part.querySelectorAll("span")];
  const place = tokens.indexOf(view.chosen);
  return tokens[place < 0 ? 0 : Math.max(0, Math.min(tokens.length - 1, place + offset))];
}

async function showVotes(id) {
  const { n, running, groups } = await call("GET", `${API}/${id}/vote`);
  at("votes").hidden = n === 0;
  const items = groups.map((group) => {
    const item = document.createElement("li");
    item.textContent = `${group.answer}: ${group.runs.length} of ${n}`;
    return item;
  });
  if (running) items.push(Object.assign(document.createElement("li"), { textContent: `${running} under way` }));
  at("groups").replaceChildren(...items);
  if (!running) clearInterval(view.votes);
  await showRuns();
}

function numberIn(id) {
  const text = at(id).value;
  return text === "" ? null : Number(text);
}

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  if (at("key").value) sessionStorage.setItem("key", at("key").value);
  attempt(async () => {
    const body = {
      question: at("question").value,
      think_tokens: numberIn("budget"),
      seed: numberIn("seed"),
      temperature: numberIn("temperature"),
      alternatives: ALTERNATIVES,
    };
    const run = await call("POST", API, body);
    await showRuns();
    open(run.id);
  });
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) at("ask").requestSubmit();
});
at("answer-now").addEventListener("click", () => attempt(() => call("POST", `${API}/${view.id}/answer-now`, {})));
at("stop").addEventListener("click", () => attempt(() => call("POST", `${API}/${view.id}/stop`, {})));
at("vote").addEventListener("click", () =>
  attempt(async () => {
    const id = view.id;
    await call("POST", `${API}/${id}/vote`, { n: 4 });
    clearInterval(view.votes);
    view.votes = setInterval(() => attempt(() => showVotes(id)), VOTES_MS);
    await showVotes(id);
  }),
);
at("fork").addEventListener("click", () =>
  attempt(async () => {
    const run = await call("POST", `${API}/${view.id}/fork`, { at: Number(view.chosen.dataset.index) });
    await showRuns();
    open(run.id);
  }),
);
at("close").addEventListener("click", () => {
  at("token").hidden = true;
  view.chosen?.closest(".text").focus();
});
for (const id of ["thinking", "answer"]) {
  at(id).addEventListener("click", (event) => {
    const token = event.target.closest("span");
    choose(token);
    if (token) showToken();
  });
  at(id).addEventListener("keydown", (event) => {
    const offset = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (offset) choose(neighbour(event.currentTarget, offset));
    else if (event.key === "Enter") showToken();
    else if (event.key === "Escape") at("token").hidden = true;
    else return;
    event.preventDefault();
  });
}
addEventListener("popstate", () => location.hash && open(location.hash.slice(1)));

attempt(async () => {
  const { data } = await call("GET", "/v1/models");
  at("model").textContent = `${data[0].id}, ${data[0].max_model_len.toLocaleString()} positions`;
  await showRuns();
  if (location.hash) open(location.hash.slice(1));
});
