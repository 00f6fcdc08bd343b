// Requests to the server that the page is from.

export const API = "/api/qwq/runs";

/** An answer of the server that is an error. */
export class Refused extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }
}

function headers() {
  const key = sessionStorage.getItem("key");
  return { "content-type": "application/json", ...(key ? { authorization: `Bearer ${key}` } : {}) };
}

export async function call(method, path, body) {
  const answer = await fetch(path, { method, headers: headers(), body: body && JSON.stringify(body) });
  if (answer.status === 204) return null;
  if (!answer.ok && path !== "/health") throw await refused(answer);
  return answer.json();
}

/** The error of an answer in any of the server's forms, or of a proxy, which has none of them. */
async function refused(answer) {
  const { error } = await answer.json().catch(() => ({}));
  return new Refused(answer.status, error?.message ?? error ?? `The server answers with status ${answer.status}.`);
}

/** The steps of a run from a place on, a list for each piece that arrives; the last value is {run}. */
export async function* steps(id, { from = 0, wait = 1, signal } = {}) {
  const answer = await fetch(`${API}/${id}/steps?from=${from}&wait=${wait}`, { headers: headers(), signal });
  if (!answer.ok) throw await refused(answer);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    // A whole run comes in pieces of some hundred kB; a slice of it at a time leaves room for frames between.
    for (let start = 0; start < lines.length; start += 500) {
      yield lines.slice(start, start + 500).flatMap((line) => (line ? [JSON.parse(line)] : []));
      if (lines.length > 500) await new Promise((done) => setTimeout(done));
    }
  }
}

/** All there is of a run now: {run, steps}. */
export async function whole(id) {
  const all = [];
  for await (const values of steps(id, { wait: 0 })) for (const value of values) all.push(value);
  return { run: all.pop().run, steps: all };
}

/** What became of a run, in a word or its answer. */
export function outcome(run) {
  return run.summary ? (run.summary.answer ?? "no answer") : run.state;
}
