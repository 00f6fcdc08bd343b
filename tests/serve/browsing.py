"""What the tests in a real browser share: Chromium, and a page whose console has to stay silent.

They run by `make browser`, which names Debian's chromium-headless-shell in $QWQ_MLX_BROWSER; no browser is downloaded.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

WAIT_S = 30  # a busy machine


@contextmanager
def chromium() -> Iterator[Any]:
    path = os.environ.get("QWQ_MLX_BROWSER")
    if not path:
        pytest.skip("needs Chromium: make browser")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextmanager
def opened(
    browser: Any, address: str, *, width: int = 1_000, scheme: str = "light", expected: tuple[str, ...] = ()
) -> Iterator[Any]:
    """A page; at the end nothing may have gone to its console but what holds one of the expected texts."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.set_default_timeout(WAIT_S * 1_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(address)
    yield page
    page.close()
    unexpected = [text for text in said if not any(each in text for each in expected)]
    assert not unexpected, unexpected


def until_shown(page: Any, selector: str, text: str) -> None:
    """Wait until an element holds a text."""
    wait(lambda: text in (page.text_content(selector) or ""), f"{selector} never held {text!r}")


def wait(is_so: Callable[[], bool], otherwise: str) -> None:
    end = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < end, otherwise
        time.sleep(0.05)
