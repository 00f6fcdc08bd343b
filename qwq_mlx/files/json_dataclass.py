"""JSON values that came from a file become dataclasses, strictly: every field there, none unknown, each of its type.

Types that are understood: dataclasses, NamedTuples and tuples (JSON lists), mappings with text or integer keys (JSON
objects), Literal, unions, str, bool, int, float (an integer will do), Any. A value that breaks a rule of its own class
(`__post_init__` raises ValueError or TypeError) is named like any other.

Why no library: msgspec ignores unknown fields of dataclasses and does not say what it found.

Does not: parse JSON (`json_object` and the readers of lines do), or write any (`dataclasses.asdict` does).
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

__all__ = ["FieldError", "from_json_value", "shown"]

T = TypeVar("T")
_SHOWN = 60
_NAMES = {str: "a text", bool: "true or false", int: "a whole number", float: "a number", type(None): "null"}


class FieldError(ValueError):
    """A field of a JSON value that is not what its class says: where, found and expected in one sentence.

    >>> str(FieldError("steps[3].id", "'x'", "a whole number"))
    "steps[3].id is 'x', expected a whole number"
    """

    def __init__(self, where: str, found: str, expected: str) -> None:
        super().__init__(f"{where or 'the value'} is {found}, expected {expected}")


def from_json_value(value: Any, kind: type[T], *, where: str = "", without: Collection[str] = ()) -> T:
    """The value as an instance of `kind`. where: what it is called in errors. without: fields that are left out.

    Raises FieldError for the first difference, in the order of the fields.

    >>> @dataclasses.dataclass
    ... class Point:
    ...     x: int
    ...     y: float | None
    >>> from_json_value({"x": 1, "y": None}, Point)
    Point(x=1, y=None)
    >>> from_json_value({"x": "1", "y": None}, Point)
    Traceback (most recent call last):
    qwq_mlx.files.json_dataclass.FieldError: x is '1', expected a whole number
    """
    if not dataclasses.is_dataclass(kind):
        raise TypeError(f"{kind!r} is no dataclass.")
    return typing.cast("T", _dataclass(value, kind, where, without))


def shown(value: Any) -> str:
    """A value as an error shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _read(value: Any, kind: Any, where: str) -> Any:
    if kind is Any:
        return value
    if kind in _NAMES:
        return _plain(value, kind, where)
    if dataclasses.is_dataclass(kind):
        return _dataclass(value, kind, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(value, arguments, where)
    if origin is Literal:
        if not isinstance(value, (str, int)) or value not in arguments or type(value) not in map(type, arguments):
            raise FieldError(where, shown(value), f"one of {', '.join(map(repr, arguments))}")
        return value
    if isinstance(kind, type) and issubclass(kind, tuple):
        hints = _hints(kind)
        return kind(*_items(value, list(hints.values()), where))
    if origin is tuple:
        repeated = len(arguments) == 2 and arguments[1] is ...
        return tuple(_items(value, arguments[0] if repeated else list(arguments), where))
    if origin in (list, Sequence):
        return list(_items(value, arguments[0], where))
    if origin in (dict, Mapping):
        return _mapping(value, arguments, where)
    raise TypeError(f"{where}: the type {kind!r} is not understood.")


def _plain(value: Any, kind: Any, where: str) -> Any:
    # an integer of 400 digits is JSON, but no float
    is_fine = type(value) is kind or (kind is float and type(value) is int and abs(value) <= 2**1023)
    if not is_fine:
        raise FieldError(where, shown(value), _NAMES[kind])
    return value


def _dataclass(value: Any, kind: Any, where: str, without: Collection[str] = ()) -> Any:
    if not isinstance(value, dict):
        raise FieldError(where, shown(value), "an object")
    hints = {name: hint for name, hint in _hints(kind).items() if name not in without}
    within = f"{where}." if where else ""
    for name in (*hints, *value):
        if name not in value or name not in hints:
            raise FieldError(
                f"{within}{name}", *(("missing", "a value") if name in hints else ("present", "no such field"))
            )
    fields = {name: _read(value[name], hint, f"{within}{name}") for name, hint in hints.items()}
    return _made(lambda: kind(**fields), where, value)


def _made(make: Callable[[], Any], where: str, value: Any) -> Any:
    try:
        return make()
    except FieldError:
        raise
    except (ValueError, TypeError) as error:
        raise FieldError(where, shown(value), f"a sound one ({error})") from error


def _union(value: Any, kinds: Sequence[Any], where: str) -> Any:
    """The first member that takes the value; of several dataclasses the one whose Literal fields agree is named."""
    errors = []
    for kind in kinds:
        try:
            return _read(value, kind, where)
        except FieldError as error:
            # without its traceback, or frame and error keep each other, and with them all that the callers hold
            errors.append((_has_tag(value, kind), error.with_traceback(None)))
    tagged = [error for is_tagged, error in errors if is_tagged]
    if tagged:
        raise tagged[0]
    names = [_NAMES.get(kind) or getattr(kind, "__name__", str(kind)) for kind in kinds]
    others = [error for kind, (_, error) in zip(kinds, errors, strict=True) if kind is not type(None)]
    raise others[0] if len(others) == 1 and value is not None else FieldError(where, shown(value), " or ".join(names))


def _has_tag(value: Any, kind: Any) -> bool:
    if not isinstance(kind, type) or not dataclasses.is_dataclass(kind) or not isinstance(value, dict):
        return False
    return any(get_origin(hint) is Literal and value.get(name) in get_args(hint) for name, hint in _hints(kind).items())


def _items(value: Any, kinds: Any, where: str) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise FieldError(where, shown(value), "a list")
    if isinstance(kinds, list):
        if len(value) != len(kinds):
            raise FieldError(where, shown(value), f"a list of {len(kinds)}")
        return [
            _read(each, kind, f"{where}[{place}]") for place, (each, kind) in enumerate(zip(value, kinds, strict=True))
        ]
    return [_read(each, kinds, f"{where}[{place}]") for place, each in enumerate(value)]


def _mapping(value: Any, kinds: Sequence[Any], where: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise FieldError(where, shown(value), "an object")
    return {_key(name, kinds[0], where): _read(each, kinds[1], f"{where}.{name}") for name, each in value.items()}


def _key(name: Any, kind: Any, where: str) -> Any:
    if kind is int and isinstance(name, str):
        if not (name.isascii() and name.isdecimal()):
            raise FieldError(where, f"an object with the key {name!r}", "keys that are whole numbers")
        return int(name)
    return _plain(name, kind, where)


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    hints = get_type_hints(kind)
    names = kind._fields if issubclass(kind, tuple) else [each.name for each in dataclasses.fields(kind) if each.init]
    return {name: hints[name] for name in names}
