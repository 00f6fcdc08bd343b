"""A request's body: JSON within limits, and its fields read one by one, so that a field nobody reads is told.

Does not: know what any field means.
"""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from qwq_mlx.serve.api_error import ApiError, not_built

__all__ = ["Fields", "dumped", "json_response", "read_json"]

_MAX_DEPTH = 32
_READ_S = 60.0  # a body that takes longer to arrive holds a connection for nothing


async def read_json(request: Request, *, max_bytes: int) -> dict[str, Any]:
    """The body as a JSON object. Raises ApiError: too large, too slow, too deep, no JSON, no object."""
    try:
        raw = await asyncio.wait_for(_read(request, max_bytes), _READ_S)
    except asyncio.TimeoutError as error:
        raise ApiError(408, f"The body did not arrive within {_READ_S:g} s.") from error
    except ClientDisconnect as error:
        raise ApiError(400, "The connection was closed before the body was complete.") from error
    try:
        value = json.loads(raw, parse_constant=_refuse_constant)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # also no UTF-8, or a number of more digits than Python reads
        raise ApiError(400, f"The body is no JSON: {str(error)[:200]}.") from error
    if not isinstance(value, dict):
        raise ApiError(400, f"The body is {_kind(value)}, expected a JSON object.")
    _check_depth(value)
    return value


async def _read(request: Request, max_bytes: int) -> bytes:
    too_large = ApiError(413, f"The body is larger than {max_bytes:,} bytes.", code="request_too_large")
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > max_bytes:
        raise too_large
    parts, n_bytes = [], 0
    async for part in request.stream():
        parts.append(part)
        n_bytes += len(part)
        if n_bytes > max_bytes:
            raise too_large
    return b"".join(parts)


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is no JSON number")


def _too_deep() -> ApiError:
    return ApiError(400, f"The body is nested deeper than {_MAX_DEPTH} levels.")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            inner
            for each in level
            if isinstance(each, (dict, list))
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    raise _too_deep()


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names[type(value)]


def dumped(value: Any) -> str:
    """JSON in one line of ASCII, so that half a pair of surrogates, which is no text, can be told as well.

    NaN and infinity, which JSON has not, become null.
    """
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def json_response(value: Any, *, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A value as a whole answer."""
    return Response(dumped(value), status_code=status, headers=headers, media_type="application/json")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class Fields:
    """The fields of an object; null is a field left out. At the end `refuse_others` names what was not read.

    where: what stands before a name in messages: "messages[0]." for example.
    """

    def __init__(self, value: Any, where: str = "") -> None:
        if not isinstance(value, dict):
            name = where.rstrip(".") or "The body"
            raise ApiError(400, f"{name} is {_kind(value)}, expected an object.", param=name)
        self._values = {name: each for name, each in value.items() if each is not None}
        self._where = where
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def raw(self, name: str) -> Any:
        """Any value; None where there is none."""
        self._read.add(name)
        return self._values.get(name)

    def text(self, name: str) -> str | None:
        """A text; None where there is none."""
        value = self.raw(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a text")
        return value

    def choice(self, name: str, choices: Sequence[str]) -> str | None:
        """One of these texts; None where there is none."""
        value = self.text(name)
        if value is not None and value not in choices:
            raise self.wrong(name, f"one of {', '.join(choices)}")
        return value

    def flag(self, name: str) -> bool | None:
        """True or false; None where there is none."""
        value = self.raw(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return value

    def number(self, name: str, low: float = -math.inf, high: float = math.inf) -> float | None:
        """A number; None where there is none."""
        value = self.raw(name)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise self.wrong(name, "a number" if math.isinf(low) else f"a number from {low:g} to {high:g}")
        return value if abs(value) < 1e300 else math.copysign(1e300, value)  # a whole number may exceed any float

    def whole(self, name: str, low: int, high: int = 2**31 - 1) -> int | None:
        """A whole number, also written 5.0; None where there is none."""
        value = self.raw(name)
        is_float = isinstance(value, float) and value.is_integer()
        if value is None:
            return None
        if isinstance(value, bool) or not (isinstance(value, int) or is_float) or not low <= value <= high:
            raise self.wrong(name, f"a whole number from {low:,} to {high:,}")
        return int(value)

    def texts(self, name: str, *, at_most: int) -> tuple[str, ...]:
        """A text or a list of texts, none of them empty; () where there is none."""
        value = self.raw(name)
        texts = [value] if isinstance(value, str) else ([] if value is None else value)
        if not isinstance(texts, list) or not all(isinstance(each, str) for each in texts):
            raise self.wrong(name, "a text or a list of texts")
        if len(texts) > at_most:
            raise self.wrong(name, f"at most {at_most} texts")
        return tuple(each for each in texts if each)

    def inner(self, name: str) -> Fields | None:
        """The fields of an object; None where there is none."""
        value = self.raw(name)
        return None if value is None else Fields(value, f"{self._where}{name}.")

    def items(self, name: str) -> list[Any]:
        """A list; empty where there is none."""
        value = self.raw(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list")
        return value or []

    def ignore(self, *names: str) -> None:
        """These change nothing in the answer."""
        self._read.update(names)

    def refuse_unless(self, name: str, neutral: Iterable[Any]) -> None:
        """A field that is not implemented, which may have these values because they ask for nothing."""
        value = self.raw(name)
        if value is not None and not any(type(value) is type(each) and value == each for each in neutral):
            raise not_built(self._where + name)

    def refuse_others(self, neutral: Mapping[str, Iterable[Any]] | None = None) -> None:
        """Raises ApiError naming the first field that was not read. neutral: fields as for `refuse_unless`."""
        for name, values in (neutral or {}).items():
            self.refuse_unless(name, values)
        for name in self._values:
            if name not in self._read:
                raise not_built(f"{self._where}{name[:80]}")

    def wrong(self, name: str, expected: str) -> ApiError:
        """A field of a wrong kind or value."""
        value = self._values.get(name)
        if name not in self._values:
            return ApiError(400, f"{self._where}{name} is missing, expected {expected}.", param=self._where + name)
        shown = json.dumps(value)[:80] if isinstance(value, (str, int, float)) else _kind(value)
        return ApiError(400, f"{self._where}{name} is {shown}, expected {expected}.", param=self._where + name)
