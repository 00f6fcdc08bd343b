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


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("page.css", "text/css"),
        ("page.js", "text/javascript"),
        ("vendor/purify.min.js", "text/javascript"),
        ("vendor/fonts/KaTeX_Main-Regular.woff2", "font/woff2"),
    ],
)
def test_its_files_come_with_the_same_policy(tiny_server: Served, name: str, kind: str) -> None:
    status, headers, raw = tiny_server.send("GET", f"/page/{name}")
    assert status == 200 and headers["content-type"].startswith(kind) and raw == (FOLDER / name).read_bytes()
    assert headers["x-content-type-options"] == "nosniff" and "content-security-policy" in headers


@pytest.mark.parametrize(
    "name",
    ["index.html", "../settings.py", "%2e%2e/settings.py", "page.js/", "", "vendor/", "vendor/README.md"],
)
def test_no_path_reaches_another_file(tiny_server: Served, name: str) -> None:
    assert tiny_server.send("GET", f"/page/{name}")[0] in (307, 404)


def test_the_page_asks_nobody_else_and_makes_html_in_one_place() -> None:
    texts = {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir() if path.is_file()}
    for name, text in texts.items():
        assert not re.search(r"https?://|@import|url\(", text), name
        assert not re.search(
            r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|style=|<script(?![^>]*src)", text
        )
        assert "DOMPurify" not in text or name == "answer.js"


def test_every_element_that_the_script_names_is_there_and_every_button_does_something() -> None:
    page = (FOLDER / "index.html").read_text(encoding="utf-8")
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    ids = set(re.findall(r'id="([\w-]+)"', page))
    named = set(re.findall(r'\bat\("([\w-]+)"\)', script))
    assert named and named <= ids
    actions = re.search(r"const actions = \{(.*?)\n\};", script, re.DOTALL)
    assert actions is not None
    buttons = set(re.findall(r'<button id="([\w-]+)"', page))
    assert buttons == set(re.findall(r'^  "?([\w-]+)"?: ', actions[1], re.MULTILINE)) | ({"close"} & buttons)


def test_the_libraries_are_small_and_have_their_licences() -> None:
    files = [path for path in (FOLDER / "vendor").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 680_000
    licences = {path.stem for path in files if path.suffix == ".LICENSE"}
    table = (FOLDER / "vendor" / "README.md").read_text(encoding="utf-8")
    assert licences == {"katex", "marked", "dompurify"} and all(f"`{name}.LICENSE`" in table for name in licences)
    fonts = set(re.findall(r"url\(fonts/([^)]+)\)", (FOLDER / "vendor" / "katex.min.css").read_text()))
    assert fonts == {path.name for path in files if path.suffix == ".woff2"}
