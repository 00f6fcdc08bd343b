// A page that watches runs of `/api/qwq/runs`. No build step; model text becomes text nodes, and in the answer's rendered
// form what `answer.js` lets through.

import { render } from "/page/answer.js";
import { API, Refused, call, steps } from "/page/api.js";
import { compare } from "/page/compare.js";
import { RunList } from "/page/list.js";
import { Samples } from "/page/samples.js";
import { TokenView, chanceOf, nameOf, percent } from "/page/tokens.js";

const ALTERNATIVES = 5;
const AGAIN_MS = 2000; // between two attempts at a server that is gone, and two looks at its memory
const RENDER_MS = 1000; // between two drawings of an answer that grows, at least
const RATE_MS = 5000; // tokens a second are those of so long
const PAGE = 50;

const at = (id) => document.getElementById(id);
const tokens = new TokenView(at("thinking"), at("answer"), tell);
const samples = new Samples(at("samples"), at("groups"), { onOpen: open, onEnd: () => quietly(showRuns) });
const view = { id: null, run: null, watching: null, arrivals: [], rendered: -Infinity, rest: RENDER_MS, thought: 0, listed: PAGE };
const list = new RunList(at("runs"), {
  onOpen: (id) => {
    open(id);
    at("run-title").focus();
  },
  onDelete: (id) => attempt(() => remove(id)),
  onPick: (n) => (at("compare").disabled = n !== 2),
});

/** Do what somebody asked for, and say what went wrong with it. */
async function attempt(work) {
  at("message").textContent = "";
  return quietly(work);
}

/** Do something that nobody asked for, and say what went wrong with it. */
async function quietly(work) {
  try {
    return await work();
  } catch (error) {
    if (error.name === "AbortError") return undefined;
    if (error.status === 401) at("key-label").hidden = false;
    at("message").textContent = error.message;
  }
}

function pause() {
  return new Promise((done) => setTimeout(done, AGAIN_MS));
}

/** Say something to those who hear the page; not more than is worth it. */
function announce(text) {
  at("announcement").textContent = text;
}

// --- the list of runs

async function showRuns() {
  const { runs, can_save } = await call("GET", `${API}?limit=${view.listed + 1}`);
  at("save").hidden = !can_save;
  at("older").hidden = runs.length <= view.listed;
  list.show(runs.slice(0, view.listed));
}

async function remove(id) {
  await call("DELETE", `${API}/${id}`);
  if (view.id === id) close();
  await showRuns();
  at("runs-title").focus();
}

// --- one run

/** Watch a run from its first token; the address names it, so a reload comes back to it. */
function open(id) {
  close();
  view.id = id;
  view.watching = new AbortController();
  if (location.hash.slice(1) !== id) history.pushState(null, "", `#${id}`);
  at("run").hidden = false;
  quietly(() => watch(id, view.watching.signal));
  quietly(() => samples.show(id));
  quietly(showRuns);
}

function close() {
  view.watching?.abort();
  Object.assign(view, { id: null, run: null, arrivals: [], rendered: -Infinity, thought: 0 });
  tokens.clear();
  samples.stop();
  at("marks").replaceChildren();
  at("rendered").replaceChildren();
  at("message").textContent = at("resume-limit").value = "";
  for (const each of ["run", "token", "votes", "comparison"]) at(each).hidden = true;
}

/** Follow a run to its end; a server that is gone is asked again until it is back. */
async function watch(id, signal) {
  let isLost = false;
  for (;;) {
    try {
      show(await call("GET", `${API}/${id}`));
      if (isLost) await quietly(showRuns);
      isLost = false;
      for await (const values of steps(id, { from: tokens.steps.length, signal })) {
        if (signal.aborted) return;
        take(values);
      }
      if (view.run.state !== "running") return;
    } catch (error) {
      if (error.status === 404) throw new Refused(404, `${error.message} A server without a history forgets its runs.`);
      if (error instanceof Refused && error.status !== 503) throw error;
      if (error.name === "AbortError") return;
    }
    if (signal.aborted) return;
    if (!isLost) at("message").textContent = "The server is gone. The page looks for it every 2 seconds.";
    isLost = true;
    await pause();
    if (signal.aborted) return;
  }
}

function show(run) {
  view.run = run;
  at("run-title").textContent = run.question;
  at("message").textContent = "";
  tell();
}

function take(values) {
  const last = values.at(-1);
  const arrived = last?.run ? values.slice(0, -1) : values;
  if (arrived.length) {
    view.arrivals.push([performance.now(), arrived.length]);
    view.thought += arrived.filter((step) => step.segment === "thinking").length;
    if (tokens.steps.length === 0) announce("The thinking has begun.");
    tokens.add(arrived);
  }
  if (last?.run) end(last.run);
}

function end(run) {
  view.run = run;
  if (run.summary) tokens.split(run.summary.conclusion_span);
  const answer = run.summary?.answer;
  announce(answer == null ? `The run is over: ${stateOf(run)}` : `The answer is ${answer}.`);
  view.rendered = -Infinity;
  tokens.schedule();
  quietly(showRuns);
}

function stateOf(run) {
  if (run.state === "interrupted") return "interrupted, because the server ended while it ran";
  return run.summary?.description ?? run.error ?? run.state;
}

/** After a frame that drew tokens: numbers, buttons, and the answer as people read it. */
function tell() {
  const { run } = view;
  if (!run) return;
  const n = tokens.steps.length;
  const isRunning = run.state === "running";
  const now = performance.now();
  while (view.arrivals.length && now - view.arrivals[0][0] > RATE_MS) view.arrivals.shift();
  const recent = view.arrivals.slice(1).reduce((sum, [, count]) => sum + count, 0);
  const seconds = view.arrivals.length > 1 ? (view.arrivals.at(-1)[0] - view.arrivals[0][0]) / 1000 : 0;
  const rate = isRunning && seconds > 0.5 ? `, ${(recent / seconds).toFixed(1)} tokens a second` : "";
  const state = isRunning && n === 0 ? "waits, or its prompt is read" : stateOf(run);
  at("status").textContent = `${n.toLocaleString()} tokens${rate}; ${state}`;
  at("stop").disabled = !isRunning;
  const wasAsked = run.summary?.injections.length > 0;
  at("answer-now").disabled = !isRunning && (wasAsked || run.summary?.answer != null || n === 0);
  tellResume(run, isRunning);
  at("spent-label").hidden = run.think_tokens === null;
  if (run.think_tokens !== null) {
    at("spent").value = run.think_tokens ? Math.min(1, view.thought / run.think_tokens) : 1;
    at("spent-text").textContent = `${view.thought.toLocaleString()} of ${run.think_tokens.toLocaleString()}`;
  }
  if (tokens.shown < n) return;
  if (run.summary) showMarks(run.summary.events);
  if (run.summary ? view.rendered !== Infinity : now - view.rendered > view.rest) renderAnswer(run, now);
}

function tellResume(run, isRunning) {
  const reason = run.summary?.finish_reason;
  const isCut = reason === "length" || reason === "context_full";
  at("resume-part").hidden = isRunning || !run.can_resume;
  at("resume-label").hidden = !isCut;
  at("resume-what").textContent = reason === "context_full" ? "Positions" : "Tokens in all";
  const n = run.tokens + (reason === "context_full" ? run.prompt_tokens : 0);
  if (isCut && !at("resume-limit").value) at("resume-limit").value = 2 * n;
}

function renderAnswer(run, now) {
  const { span } = tokens;
  const isAnswer = (step) => (span === undefined ? step.segment === "answer" : span && step.index >= span[0]);
  const start = tokens.steps.findIndex(isAnswer);
  if (start < 0 && span === undefined) return;
  view.rendered = run.summary ? Infinity : now;
  const text = start < 0 ? "" : tokens.steps.slice(start).map((step) => step.text).join("");
  const began = performance.now();
  render(at("rendered"), text);
  view.rest = Math.max(RENDER_MS, 20 * (performance.now() - began)); // thousands of formulas are drawn less often
}

function showMarks(events) {
  if (at("marks").children.length === events.length) return;
  const items = events.map((event) => {
    const item = document.createElement("li");
    const mark = Object.assign(document.createElement("button"), { type: "button", textContent: nameOf(event) });
    mark.addEventListener("click", () => tokens.choose(event.start));
    item.append(mark);
    return item;
  });
  at("marks").replaceChildren(...items);
}

function showToken() {
  const step = tokens.steps[tokens.chosen];
  if (!step) return;
  at("token-title").textContent = `Token ${step.index}: ${JSON.stringify(step.text)}, ${chanceOf(step)}`;
  const items = step.alternatives.map((each) => {
    const item = document.createElement("li");
    item.textContent = `${JSON.stringify(each.text)} ${percent(each.logprob)}`;
    return item;
  });
  at("alternatives").replaceChildren(...items);
  at("token").hidden = false;
  at("token-title").focus({ preventScroll: true });
  at("token").scrollIntoView({ block: "nearest" });
}

function hideToken() {
  const part = tokens.nodes[tokens.chosen]?.[0]?.closest(".text");
  at("token").hidden = true;
  part?.focus({ preventScroll: true });
}

// --- memory

async function watchMemory() {
  try {
    const { memory } = await call("GET", "/health");
    const gb = (bytes) => `${(bytes / 1e9).toFixed(bytes < 1e9 ? 3 : 1)} GB`;
    at("memory-label").hidden = !memory.used;
    at("memory").value = memory.planned ? Math.min(1, memory.used / memory.planned) : 0;
    const limit = memory.limit === null ? "" : `, limit ${gb(memory.limit)}`;
    at("memory-text").textContent = `${gb(memory.used)} of ${gb(memory.planned)} planned${limit}`;
  } catch {
    at("memory-label").hidden = true; // the server is gone, which whoever watches a run says
  }
  setTimeout(watchMemory, AGAIN_MS);
}

// --- what people do

function numberIn(id) {
  const text = at(id).value;
  return text === "" ? null : Number(text);
}

async function post(what, body) {
  return call("POST", `${API}/${view.id}/${what}`, body);
}

async function resume(body) {
  open((await post("resume", body)).id);
}

function showComparison(first, second) {
  close();
  const address = `#compare/${first}/${second}`;
  if (location.hash !== address) history.pushState(null, "", address);
  at("comparison").hidden = false;
  return quietly(async () => {
    await compare(first, second, { sides: at("sides"), shared: at("shared") });
    at("comparison-title").focus();
  });
}

function follow() {
  const [what, ...rest] = location.hash.slice(1).split("/");
  if (what === "compare" && rest.length === 2) showComparison(...rest);
  else if (what) open(what);
  else close();
}

const actions = {
  "answer-now": () => (view.run?.state === "running" ? post("answer-now", {}) : resume({ answer_now: true })),
  stop: () => post("stop", {}),
  resume: () => {
    const name = view.run?.summary?.finish_reason === "context_full" ? "context" : "max_tokens";
    return resume(at("resume-label").hidden ? {} : { [name]: numberIn("resume-limit") });
  },
  save: async () => announce((at("message").textContent = `Saved: ${(await post("save", {})).path}`)),
  vote: async () => {
    await post("vote", { n: numberIn("samples-count") });
    await samples.show(view.id);
    await showRuns();
  },
  fork: async () => open((await post("fork", { at: tokens.chosen })).id),
  close: hideToken,
  compare: () => showComparison(...[...list.picked].reverse()),
  "close-comparison": () => {
    history.pushState(null, "", location.pathname);
    close();
    at("runs-title").focus();
  },
  older: async () => {
    view.listed += PAGE;
    await showRuns();
  },
  "as-tokens": (event) => {
    const isTokens = event.currentTarget.getAttribute("aria-pressed") !== "true";
    event.currentTarget.setAttribute("aria-pressed", isTokens);
    at("answer").hidden = !isTokens;
    at("rendered").hidden = isTokens;
  },
};
for (const [id, action] of Object.entries(actions)) at(id).addEventListener("click", (event) => attempt(() => action(event)));

at("ask").addEventListener("submit", (event) => {
  event.preventDefault();
  attempt(async () => {
    const body = {
      question: at("question").value,
      think_tokens: numberIn("budget"),
      seed: numberIn("seed"),
      temperature: numberIn("temperature"),
      alternatives: ALTERNATIVES,
    };
    open((await call("POST", API, body)).id);
    at("run-title").focus();
  });
});
at("question").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) at("ask").requestSubmit();
});
for (const id of ["thinking", "answer"]) {
  at(id).addEventListener("click", (event) => {
    const token = event.target.closest("span");
    if (!token) return;
    tokens.choose(Number(token.dataset.index));
    showToken();
  });
  at(id).addEventListener("keydown", (event) => {
    const offset = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (offset) {
      tokens.move(event.currentTarget, offset);
      announce(tokens.chosen === null ? "" : JSON.stringify(tokens.steps[tokens.chosen].text));
    } else if (event.key === "Enter") showToken();
    else if (event.key === "Escape") hideToken();
    else return;
    event.preventDefault();
  });
}
at("token").addEventListener("keydown", (event) => event.key === "Escape" && hideToken());
addEventListener("popstate", follow);

/** The model's name, as soon as it is loaded. */
async function connect() {
  for (;;) {
    try {
      const { data } = await call("GET", "/v1/models");
      at("model").textContent = `${data[0].id}, ${data[0].max_model_len.toLocaleString()} positions`;
      return;
    } catch (error) {
      if (error instanceof Refused && error.status !== 503) throw error;
      at("model").textContent = error instanceof Refused ? error.message : "The server is gone.";
    }
    await pause();
  }
}

async function begin() {
  quietly(connect);
  await quietly(showRuns);
  if (location.hash) follow();
}

at("key").addEventListener("change", () => {
  sessionStorage.setItem("key", at("key").value);
  attempt(begin);
});
begin();
watchMemory();
