"""The page at `/`: static files that a browser may run, with a policy by which it runs nothing else.

Does not: serve any other file; names are a table, so that no path of a request reaches the disk.
"""

from __future__ import annotations

from pathlib import Path

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

__all__ = ["page_routes"]

_FOLDER = Path(__file__).with_name("page")
_KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".woff2": "font/woff2"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; font-src 'self'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify",  # so that text becomes HTML through DOMPurify alone
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-cache",
}


def page_routes() -> list[Route]:
    """`/` and the files that it asks for."""
    files = [path for path in sorted(_FOLDER.rglob("*")) if path.suffix in _KINDS and path.name != "index.html"]
    return [Route("/", _root, methods=["GET"]), *(_route(path) for path in files)]


def _route(path: Path) -> Route:
    async def file(request: Request) -> Response:
        return _response(path)

    return Route(f"/page/{path.relative_to(_FOLDER).as_posix()}", file, methods=["GET"])


async def _root(request: Request) -> Response:
    """The page for a browser; for others the sentence by which Ollama's clients know a server."""
    if "text/html" not in request.headers.get("accept", ""):
        return PlainTextResponse("Ollama is running")
    return _response(_FOLDER / "index.html")


def _response(path: Path) -> Response:
    return Response(path.read_bytes(), media_type=_KINDS[path.suffix], headers=_HEADERS)
