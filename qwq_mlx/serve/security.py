"""Who may ask: the Host and Origin of a request, and its key, looked at before anything else of it.

A web page that a user happens to visit can send requests to 127.0.0.1. It cannot choose its Origin, and where it points
a name of its own at this address (DNS rebinding) the Host shows that name. So both are compared with lists.

Does not: encrypt (put a proxy with TLS before it), or tell users apart.
"""

from __future__ import annotations

import hmac
import ipaddress
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.dialects.errors import error_response
from qwq_mlx.serve.settings import Settings

__all__ = ["Doors"]

_APP_SCHEMES = ("app", "tauri", "vscode-webview")  # as Ollama: pages of applications that are installed here
_OPEN_PATHS = ("/", "/health")  # they say nothing of the model, and no more do files of the page
_PREFLIGHT_S = "600"


class Doors:
    """The outermost application: refuses, or passes a request on and adds the headers that a browser wants.

    log: takes a line for each request: method, path, status, seconds; never what it says.
    """

    def __init__(self, app: ASGIApp, *, settings: Settings, log: Callable[[str], None]) -> None:
        self._app = app
        self._log = log
        self._settings = settings
        self._key = None if settings.api_key is None else settings.api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        began, status = time.monotonic(), 0

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._let_in(scope, receive, noted)
        finally:
            self._log(f"{scope['method']} {scope['path'][:200]!r} {status or 'gone'} {time.monotonic() - began:.2f} s")

    async def _let_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, origin = Headers(scope=scope), ""
        try:
            self._check_host(headers)
            origin = self._checked_origin(headers)
            if scope["method"] == "OPTIONS":
                await _with_cors(Response(status_code=204), origin, headers)(scope, receive, send)
                return
            self._check_key(headers, scope["path"])
        except ApiError as error:
            await _with_cors(error_response(error, scope["path"]), origin, headers)(scope, receive, send)
            return

        async def send_with_cors(message: Message) -> None:
            if message["type"] == "http.response.start" and origin:
                _allow(MutableHeaders(raw=message["headers"]), origin)
            await send(message)

        await self._app(scope, receive, send_with_cors)

    def _check_host(self, headers: Headers) -> None:
        hosts = headers.getlist("host")
        name = _host_name(hosts[0]) if len(hosts) == 1 else None
        if name is None or not self._is_known_host(name):
            shown = repr(hosts[0][:80]) if hosts else "missing"
            raise ApiError(
                403,
                f"The Host header is {shown}, which is no name of this server. Start it with --allow-host for it.",
                code="host_not_allowed",
            )

    def _is_known_host(self, name: str) -> bool:
        if name == "localhost" or name.endswith((".localhost", ".local")) or name in self._settings.allowed_hosts:
            return True
        return _is_address(name)

    def _checked_origin(self, headers: Headers) -> str:
        """The Origin where there is one. Raises ApiError for one that is not on the list."""
        origins = headers.getlist("origin")
        if not origins:
            return ""
        origin = origins[0]
        is_named = origin in self._settings.allowed_origins or _is_of_this_machine(origin)
        if len(origins) == 1 and (is_named or self._is_own_page(origin, headers["host"])):
            return origin
        raise ApiError(
            403,
            f"Pages of {origin[:80]!r} may not use this server. Start it with --allow-origin for them.",
            code="origin_not_allowed",
        )

    def _is_own_page(self, origin: str, host: str) -> bool:
        """Whether an Origin is the page of this server, at the address or name by which the request reached it.

        Anybody in the network can point a name under .local at this machine, so there a key has to be asked for.
        """
        is_same = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())  # https: of a proxy
        return is_same and (self._key is not None or not (_host_name(host) or "").endswith(".local"))

    def _check_key(self, headers: Headers, path: str) -> None:
        if self._key is None or path in _OPEN_PATHS or path.startswith("/page/"):
            return
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        candidates = [headers.get("x-api-key", ""), bearer.strip() if scheme.lower() == "bearer" else ""]
        # latin-1 is how the bytes of a header came in, so any header can be compared
        matches = [hmac.compare_digest(each.encode("latin-1"), self._key) for each in candidates]
        if not any(matches):
            raise ApiError(
                401,
                "The key is missing or wrong. Send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`.",
                code="invalid_api_key",
            )


def _host_name(host: str) -> str | None:
    """A Host header without its port, in lower case; None for what is no host."""
    try:
        parts = urlsplit(f"//{host}")
        parts.port  # noqa: B018 - raises for a port that is none
    except ValueError:
        return None
    is_plain = not (parts.path or parts.query or parts.fragment or parts.username is not None)
    return parts.hostname if is_plain and host == host.strip() else None


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _is_of_this_machine(origin: str) -> bool:
    """Whether an Origin is a page of loopback or of an application."""
    try:
        parts = urlsplit(origin)
        name = parts.hostname or ""
    except ValueError:
        return False
    if parts.scheme in _APP_SCHEMES:
        return True
    is_loopback = name == "localhost" or name.endswith(".localhost")
    if not is_loopback and _is_address(name):
        is_loopback = ipaddress.ip_address(name).is_loopback
    return parts.scheme in ("http", "https") and is_loopback


def _with_cors(response: Response, origin: str, request: Headers) -> Response:
    if not origin:
        return response
    _allow(response.headers, origin)
    response.headers["access-control-allow-methods"] = "GET, HEAD, POST, DELETE, OPTIONS"
    response.headers["access-control-allow-headers"] = request.get("access-control-request-headers", "*")[:2_000]
    response.headers["access-control-max-age"] = _PREFLIGHT_S
    if request.get("access-control-request-private-network") == "true":  # Chrome, of a public page that is allowed
        response.headers["access-control-allow-private-network"] = "true"
    return response


def _allow(headers: MutableHeaders, origin: str) -> None:
    headers["access-control-allow-origin"] = origin
    headers.add_vary_header("Origin")
