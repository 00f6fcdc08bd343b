"""The page in a real browser: a run is shown, forked and voted on, and nothing that a model or a user writes is HTML.

Skipped without playwright and Debian's chromium-headless-shell; no browser is downloaded.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import pytest
from serving import QUESTION, Served

pytestmark = pytest.mark.pocket

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium-headless-shell")
HOSTILE = "What is 2 + 2? <img src=x onerror=\"document.title='hacked'\">"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs chromium-headless-shell")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, pocket_server: Served) -> Iterator[Any]:
    """The page; at the end nothing may have gone to the console."""
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme="dark")
    page.set_default_timeout(30_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(pocket_server.url)
    yield page
    assert said == []
    page.close()


def start(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.fill("#temperature", "0")
    page.press("#question", "Control+Enter")


def ended(page: Any) -> None:
    sync_api.expect(page.locator("#status")).to_contain_text("the model ended its text", timeout=30_000)


def test_a_run_is_shown_chosen_from_forked_and_voted_on(page: Any) -> None:
    start(page, QUESTION)
    ended(page)
    assert "3+4=7" in page.inner_text("#thinking") and page.inner_text("#answer").startswith("**Final Answer**")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    address = page.url
    page.reload()
    ended(page)
    assert page.url == address and "3+4=7" in page.inner_text("#thinking")
    page.focus("#thinking")
    for key in ("ArrowRight", "ArrowRight", "Enter"):
        page.keyboard.press(key)
    assert page.inner_text("#token-title").startswith('Token 1: " by"')
    assert page.locator("#alternatives li").count() == 5
    page.click("#fork")
    page.wait_for_url(lambda url: url != address)
    ended(page)
    assert "(from token 1 of " in page.inner_text("#runs li >> nth=0")
    page.click("#vote")
    sync_api.expect(page.locator("#groups")).to_contain_text("of 4", timeout=30_000)


def test_what_people_write_is_never_html(page: Any) -> None:
    start(page, HOSTILE)
    sync_api.expect(page.locator("#runs li").first).to_contain_text("<img src=x", timeout=30_000)
    assert page.locator("img").count() == 0 and page.title() == "qwq_mlx"
    page.click("#stop")
