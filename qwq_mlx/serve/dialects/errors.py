"""One error, in the form of the client that asked: by the path it asked at.

Does not: decide what is an error.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from qwq_mlx.serve.api_error import ApiError
from qwq_mlx.serve.body import json_response

__all__ = ["error_body", "error_response"]

_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
_ANTHROPIC_TYPES = {**_OPENAI_TYPES, 413: "request_too_large", 503: "overloaded_error"}


def error_body(error: ApiError, path: str) -> dict[str, Any]:
    """The body of the answer to a request at this path."""
    if path.startswith("/api/"):
        return {"error": str(error)}
    default = "invalid_request_error" if error.status < 500 else "api_error"
    if path.startswith("/v1/messages"):
        return {"type": "error", "error": {"type": _ANTHROPIC_TYPES.get(error.status, default), "message": str(error)}}
    kind = _OPENAI_TYPES.get(error.status, default)
    return {"error": {"message": str(error), "type": kind, "param": error.param, "code": error.code}}


def error_response(error: ApiError, path: str, *, headers: Mapping[str, str] | None = None) -> Response:
    """The whole answer, with the headers that belong to its status, beside `headers`."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(error.retry_after_s)
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return json_response(error_body(error, path), status=error.status, headers=headers)
