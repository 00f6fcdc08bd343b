"""The page at `/`: three files that a browser may run, with a policy by which it runs nothing else.

Does not: serve any other file; names are a table, so that no path of a request reaches the disk.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

__all__ = ["page_routes"]

_FOLDER = Path(__file__).with_name("page")
_KINDS = {"index.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """`/` and the files that it asks for."""
    files = [Route(f"/page/{name}", _file, methods=["GET"], name=name) for name in ("page.css", "page.js")]
    return [Route("/", _root, methods=["GET"]), *files]


async def _root(request: Request) -> Response:
    """The page for a browser; for others the sentence by which Ollama's clients know a server."""
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running")
    return _response("index.html")


async def _file(request: Request) -> Response:
    return _response(request.url.path.removeprefix("/page/"))


def _response(name: str) -> Response:
    return Response((_FOLDER / name).read_bytes(), media_type=_KINDS[name], headers=_HEADERS)
