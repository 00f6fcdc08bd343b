"""The page: what a browser may load and run, and that nothing of it is needed from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from serving import Served

import qwq_mlx.serve

pytestmark = pytest.mark.tiny

FOLDER = Path(qwq_mlx.serve.__file__).parent / "page"


def test_a_browser_gets_the_page_and_clients_of_ollama_their_sentence(tiny_server: Served) -> None:
    status, headers, raw = tiny_server.send("GET", "/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert status == 200 and headers["content-type"].startswith("text/html") and b"<textarea" in raw
    policy = headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'self';") and "unsafe" not in policy
    assert tiny_server.send("GET", "/")[2] == b"Ollama is running"


@pytest.mark.parametrize(("name", "kind"), [("page.css", "text/css"), ("page.js", "text/javascript")])
def test_its_files_come_with_the_same_policy(tiny_server: Served, name: str, kind: str) -> None:
    status, headers, raw = tiny_server.send("GET", f"/page/{name}")
    assert status == 200 and headers["content-type"].startswith(kind) and raw == (FOLDER / name).read_bytes()
    assert headers["x-content-type-options"] == "nosniff" and "content-security-policy" in headers


@pytest.mark.parametrize("name", ["index.html", "../settings.py", "%2e%2e/settings.py", "page.js/", ""])
def test_no_path_reaches_another_file(tiny_server: Served, name: str) -> None:
    assert tiny_server.send("GET", f"/page/{name}")[0] in (307, 404)


def test_the_page_asks_nobody_else_and_makes_no_html_of_text() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}
    assert set(texts) == {"index.html", "page.css", "page.js"}
    for name, text in texts.items():
        assert not re.search(r"https?://|@import|url\(", text), name
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=", texts["page.js"])
    assert "style=" not in texts["index.html"] and not re.search(r"<script(?![^>]*src)", texts["index.html"])


def test_every_element_that_the_script_names_is_there() -> None:
    ids = set(re.findall(r'id="([\w-]+)"', (FOLDER / "index.html").read_text(encoding="utf-8")))
    named = set(re.findall(r'\bat\("([\w-]+)"\)', (FOLDER / "page.js").read_text(encoding="utf-8")))
    assert named and named <= ids
