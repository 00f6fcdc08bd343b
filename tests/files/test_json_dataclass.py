"""A JSON value becomes a dataclass only where every field is there, known and of its type; else the field is named."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwq_mlx.files.json_dataclass import FieldError, from_json_value


class Pair(NamedTuple):
    id: int
    text: str


@dataclass(frozen=True)
class Circle:
    kind: Literal["circle"]
    radius: float

    def __post_init__(self) -> None:
        if self.radius < 0:
            raise ValueError(f"radius is {self.radius}, expected 0 or more")


@dataclass(frozen=True)
class Square:
    kind: Literal["square"]
    side: float


@dataclass(frozen=True)
class Drawing:
    name: str
    shapes: tuple[Circle | Square, ...]
    at: tuple[int, float | None]
    pairs: tuple[Pair, ...]
    bias: Mapping[int, float]
    extra: Any = None
    is_final: bool = False


def sound() -> dict[str, Any]:
    return {
        "name": "a",
        "shapes": [{"kind": "circle", "radius": 1}, {"kind": "square", "side": 2.5}],
        "at": [3, None],
        "pairs": [[1, "x"]],
        "bias": {"7": -1},
        "extra": {"any": [1]},
        "is_final": True,
    }


def test_a_sound_value_becomes_its_classes() -> None:
    expected = Drawing(
        "a", (Circle("circle", 1), Square("square", 2.5)), (3, None), (Pair(1, "x"),), {7: -1}, {"any": [1]}, True
    )
    assert from_json_value(sound(), Drawing) == expected
    assert from_json_value(json.loads(json.dumps(dataclasses.asdict(expected))), Drawing) == expected


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("name",), 5, "name is 5, expected a text"),
        (("name",), None, "name is None, expected a text"),
        (("is_final",), 1, "is_final is 1, expected true or false"),
        (("at", 0), True, r"at\[0\] is True, expected a whole number"),
        (("at", 0), 3.0, r"at\[0\] is 3\.0, expected a whole number"),
        (("at", 1), "x", r"at\[1\] is 'x', expected a number"),
        (("at",), [1], r"at is \[1\], expected a list of 2"),
        (("at",), "ab", "at is 'ab', expected a list"),
        (("pairs", 0), [1], r"pairs\[0\] is \[1\], expected a list of 2"),
        (("pairs", 0, 1), 5, r"pairs\[0\]\[1\] is 5, expected a text"),
        (("bias",), {"x": 1.0}, "bias is an object with the key 'x', expected keys that are whole numbers"),
        (("bias",), {"-1": 1.0}, "bias is an object with the key '-1'"),
        (("bias", "7"), None, "bias.7 is None, expected a number"),
        (("shapes", 0, "kind"), "cube", r"shapes\[0\] is .*, expected Circle or Square"),
        (("shapes", 0, "radius"), "x", r"shapes\[0\]\.radius is 'x', expected a number"),
        (("shapes", 0, "radius"), -1, r"shapes\[0\] is .*, expected a sound one \(radius is -1, expected 0 or more\)"),
        (("shapes", 0, "more"), 1, r"shapes\[0\]\.more is present, expected no such field"),
        (("more",), 1, "more is present, expected no such field"),
    ],
)
def test_one_wrong_field_is_named(path: tuple[Any, ...], value: Any, message: str) -> None:
    whole: Any = sound()
    target = whole
    for key in path[:-1]:
        target = target[key]
    target[path[-1]] = value
    with pytest.raises(FieldError, match=f"^{message}"):
        from_json_value(whole, Drawing)


@pytest.mark.parametrize("name", [each.name for each in dataclasses.fields(Drawing)])
def test_a_missing_field_is_named_also_one_with_a_default(name: str) -> None:
    value = sound()
    del value[name]
    with pytest.raises(FieldError, match=f"^{name} is missing, expected a value$"):
        from_json_value(value, Drawing)
    if name == "extra":
        assert from_json_value(value, Drawing, without={"extra"}).extra is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(list(sound())), inner),
    max_leaves=12,
)


@given(JSON, st.sampled_from(list(sound())))
def test_whatever_stands_there_ends_in_the_class_or_in_our_error(value: Any, name: str) -> None:
    for whole in (value, {**sound(), name: value}):
        try:
            assert isinstance(from_json_value(whole, Drawing), Drawing)
        except FieldError as error:
            assert ", expected " in str(error)
