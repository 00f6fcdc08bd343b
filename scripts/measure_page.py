"""How smooth the server's page is while a long run comes: 20,000 tokens at 200 a second, without a model.

    python scripts/measure_page.py [--tokens 20000] [--rate 200]

It needs playwright and Debian's chromium-headless-shell. Printed are the longest gaps between two frames, which a busy
machine lengthens (those of an idle page are beside them), and the longest tasks of the page's main thread in CPU time,
which it hardly does: once while the tokens come, once when the run that is over is opened again.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from qwq_mlx.serve.http_thread import HttpThread
from qwq_mlx.serve.settings import Settings
from qwq_mlx.serve.static import page_routes

RUN = "run-1"
_TICK_S = 0.01
_IDLE_S = 30.0
_WORDS = ("so", "the", "sum", "of", "these", "is", "7", "and", "12,", "which", "needs", "a", "check:", "wait,", "if")
_ANSWER = "**Final Answer**\n\n\\[ \\boxed{\\frac{1}{2}} \\]"
_GAPS = """() => {
  window.gaps = [];
  let last = performance.now();
  const look = (now) => { window.gaps.push(now - last); last = now; requestAnimationFrame(look); };
  requestAnimationFrame(look);
}"""

_IS_WHOLE = """(n) => document.querySelectorAll("#thinking span[data-index]").length > 0.97 * n
  && document.querySelector("#status").textContent.includes("ended its text")
  && document.querySelector("#rendered .katex") !== null"""


def make_steps(n_tokens: int) -> list[bytes]:
    """Lines of steps as the server writes them: lines of 60 tokens, one paragraph of 3,000, a loop, and an answer."""
    draw = random.Random(1)
    lines = []
    for index in range(n_tokens):
        is_answer = index == n_tokens - 1
        is_paragraph = 4_000 <= index < 7_000
        text = _ANSWER if is_answer else "\n" if index % 60 == 59 and not is_paragraph else f" {draw.choice(_WORDS)}"
        step = {
            "index": index,
            "id": index % 1_000,
            "text": text,
            "segment": "answer" if is_answer else "thinking",
            "logprob": -draw.random(),
            "entropy": draw.random() * 4,
            "margin": draw.random(),
            "is_injected": False,
            "alternatives": [{"id": each, "text": f" {_WORDS[each]}", "logprob": -each - 0.1} for each in range(5)],
            "loop_scores": {"cycle": draw.random(), "variants": 0.0, "candidate": 0.0, "doubts": 0.0},
        }
        if index == 9_000:
            step["events"] = [_LOOP]
        lines.append(f"{json.dumps(step)}\n".encode())
    return lines


_LOOP = {"event": "loop", "start": 8_000, "end": 9_000, "kind": "cycle", "evidence": "the same 12 tokens came 80 times"}


def make_app(n_tokens: int, rate: float) -> Starlette:
    """The page, and one run that begins to come when its steps are first asked for."""
    steps, began_s = make_steps(n_tokens), [0.0]

    def n_due() -> int:
        began_s[0] = began_s[0] or time.monotonic()
        return min(n_tokens, int((time.monotonic() - began_s[0]) * rate))

    def info() -> dict[str, Any]:
        is_over = began_s[0] > 0 and n_due() == n_tokens
        summary = {
            "answer": "1/2",
            "description": "the model ended its text",
            "finish_reason": "stop",
            "injections": [],
        }
        return {
            "id": RUN,
            "state": "ended" if is_over else "running",
            "can_resume": False,
            "created": 0,
            "question": "A long one",
            "seed": 1,
            "parent": None,
            "tokens": n_tokens if is_over else 0,
            "think_tokens": n_tokens,
            "error": None,
            "summary": {**summary, "events": [_LOOP], "conclusion_span": [n_tokens - 1, n_tokens]} if is_over else None,
        }

    async def lines(start: int) -> AsyncIterator[bytes]:
        while start < n_tokens:
            if (due := n_due()) > start:
                yield b"".join(steps[start:due])
                start = due
            else:
                await asyncio.sleep(_TICK_S)
        yield f"{json.dumps({'run': info()})}\n".encode()

    async def run(request: Request) -> JSONResponse:
        return JSONResponse(info())

    async def runs(request: Request) -> JSONResponse:
        return JSONResponse({"runs": [info()], "can_save": False})

    async def follow(request: Request) -> StreamingResponse:
        return StreamingResponse(lines(int(request.query_params["from"])), media_type="application/x-ndjson")

    async def vote(request: Request) -> JSONResponse:
        return JSONResponse({"n": 0, "running": 0, "groups": [], "runs": []})

    async def models(request: Request) -> JSONResponse:
        return JSONResponse({"data": [{"id": "none", "max_model_len": 32_768}]})

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"memory": {"used": 1e9, "planned": 2e9, "limit": None}})

    paths = {"": run, "/steps": follow, "/vote": vote}
    return Starlette(
        routes=[
            *page_routes(),
            Route("/v1/models", models),
            Route("/health", health),
            Route("/api/qwq/runs", runs),
            *(Route(f"/api/qwq/runs/{RUN}{path}", endpoint) for path, endpoint in paths.items()),
        ]
    )


@contextmanager
def serving(n_tokens: int, rate: float) -> Iterator[str]:
    """The address of a server of that run."""
    thread = HttpThread(make_app(n_tokens, rate), Settings(port=0))
    host, port = thread.start()
    try:
        yield f"http://{host}:{port}"
    finally:
        thread.abort()
        thread.join(30)


def watch(browser: Any, address: str, n_tokens: int, timeout_s: float) -> tuple[list[float], list[float]]:
    """Open the run and wait for its end.

    Returns the gaps between frames and the CPU time of the main thread's tasks, in ms, the longest first.
    """
    page = browser.new_page(viewport={"width": 1_000, "height": 800})
    page.goto(address)
    page.wait_for_selector("#runs li")
    page.evaluate(_GAPS)
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        browser.start_tracing(page=page, path=str(trace), categories=["toplevel"])
        page.click("#runs li button >> nth=0")
        end = time.monotonic() + timeout_s
        while not page.evaluate(_IS_WHOLE, n_tokens):  # the page's policy forbids Playwright's own wait
            assert time.monotonic() < end, f"not whole after {timeout_s:.0f} s"
            time.sleep(0.5)
        browser.stop_tracing()
        events = json.loads(trace.read_text())["traceEvents"]
    gaps = sorted(page.evaluate("window.gaps"), reverse=True)
    page.close()
    threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
    tasks = [e for e in events if e.get("name") == "ThreadControllerImpl::RunTask" and "tdur" in e]
    main = [e["tdur"] / 1_000 for e in tasks if threads.get((e["pid"], e["tid"])) == "CrRendererMain"]
    return gaps, sorted(main, reverse=True)


def idle_gaps(browser: Any, address: str) -> list[float]:
    """The gaps between frames of a page that does nothing, in ms, the longest first."""
    page = browser.new_page(viewport={"width": 1_000, "height": 800})
    page.goto(address)
    page.evaluate(_GAPS)
    time.sleep(_IDLE_S)
    gaps = sorted(page.evaluate("window.gaps"), reverse=True)
    page.close()
    return gaps


def longest(values: list[float]) -> str:
    """The first five, and how many exceed 100."""
    return ", ".join(f"{each:.0f}" for each in values[:5]) + f" ({sum(each > 100 for each in values)} over 100)"


def main() -> int:
    """Run the script; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--rate", type=float, default=200.0, help="tokens a second")
    options = parser.parse_args()
    from playwright.sync_api import sync_playwright

    with serving(options.tokens, options.rate) as address, sync_playwright() as playwright:
        chromium = shutil.which("chromium-headless-shell")
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        idle = idle_gaps(browser, address)
        print(f"idle page: longest gaps between {len(idle):,} frames {longest(idle)} ms, which are the machine's")
        for what in ("while it comes", "opened again"):
            gaps, tasks = watch(browser, address, options.tokens, 60 + 2 * options.tokens / options.rate)
            print(f"{what}: between {len(gaps):,} frames {longest(gaps)} ms; longest tasks {longest(tasks)} ms of CPU")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
