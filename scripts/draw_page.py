"""Pictures of the server's page for docs/clients.md, by the bundled model in Chromium.

    python scripts/draw_page.py [docs/figures]

It needs playwright and Debian's chromium-headless-shell.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from qwq_mlx.default_model import pocket_checkpoint
from qwq_mlx.generate.reasoner import load
from qwq_mlx.serve.history import History
from qwq_mlx.serve.server import Server
from qwq_mlx.serve.settings import Settings

QUESTION = (
    "Please add a pair of parentheses to the incorrect equation: 2 + 3 * 4 + 5 * 6 = 164, to make the equation true."
)


def until(is_so: Callable[[], bool]) -> None:
    """Wait for what must come."""
    end = time.monotonic() + 120
    while not is_so():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.1)


def address_of(page: Any) -> str:
    """The part behind #, asked of the page itself: playwright's own value is as old as its last event."""
    return str(page.evaluate("location.hash"))


def start(page: Any, *, budget: int) -> None:
    """Ask, and wait for the answer."""
    before = address_of(page)
    page.fill("#question", QUESTION)
    page.fill("#temperature", "1.3")
    page.fill("#seed", "3")
    page.fill("#budget", str(budget))
    page.press("#question", "Control+Enter")
    until(lambda: address_of(page) != before and page.locator("#rendered .katex").count() == 1)
    page.wait_for_timeout(300)


def draw(browser: Any, address: str, folder: Path) -> None:
    """All pictures."""
    page = browser.new_page(viewport={"width": 900, "height": 860}, color_scheme="light")
    page.goto(address)
    start(page, budget=500)
    page.click("#thinking span >> nth=60")
    page.screenshot(path=folder / "page.png")
    run = address_of(page)
    page.click("#close")
    page.fill("#samples-count", "3")
    page.click("#vote")
    until(lambda: " of 3" in page.text_content("#groups"))
    page.evaluate("document.querySelector('#run-title').scrollIntoView()")
    page.screenshot(path=folder / "page-samples.png", clip={"x": 0, "y": 0, "width": 900, "height": 620})
    until(lambda: "under way" not in page.text_content("#groups"))
    start(page, budget=130)
    for place in (0, -1):  # the second run and the first
        page.locator("#runs input").nth(place).check()
    page.click("#compare")
    until(lambda: page.locator("#sides article").count() == 2)
    page.locator("#comparison").screenshot(path=folder / "page-comparison.png")
    page.close()
    for name, width, scheme in (("page-dark", 900, "dark"), ("page-narrow", 400, "dark")):
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        page.goto(f"{address}/{run}")
        until(lambda page=page: page.locator("#rendered .katex").count() == 1)
        page.wait_for_timeout(1_000)
        page.evaluate("document.querySelector('#run-title').scrollIntoView()")
        page.screenshot(path=folder / f"{name}.png")
        page.close()


def main() -> int:
    """Run the script; returns its exit code."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/figures")
    with tempfile.TemporaryDirectory() as temporary:
        history = History(Path(temporary) / "history.sqlite3", max_bytes=1 << 30)
        settings = Settings(port=0, name="pocket", width=4, runs_folder=Path(temporary))
        server = Server(lambda: load(pocket_checkpoint()), settings, history=history)
        host, port = server.start()
        until(lambda: server.is_ready)
        with sync_playwright() as playwright:
            path = shutil.which("chromium-headless-shell")
            browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
            draw(browser, f"http://{host}:{port}", folder)
            browser.close()
        server.abort()
        server.wait(30)
    return 0


if __name__ == "__main__":
    sys.exit(main())
