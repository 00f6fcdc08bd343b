"""A recipe says how each matrix of a model is packed. It is a TOML file under conversions/:

    [weights]            # every matrix
    mode = "affine"
    bits = 4
    group_size = 64
    fit = "min-max"

    [[override]]         # matrices that differ; a later override wins
    match = ["*.v_proj", "*.down_proj"]
    layers = "sensitive"
    bits = 6

`match` holds shell patterns of tensor paths (without ".weight"). `layers` narrows them: "all", or "sensitive": the
first and last eighth of the layers and every third between (as in mlx-lm's mixed recipes and llama.cpp's K mixes).
`keep = true` leaves a matrix as it is. Every error names the file and the line.

Does not: look at weights, or know which tensors a model has until it is asked about them.
"""

from __future__ import annotations

import fnmatch
import functools
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from qwq_mlx.errors import OptionError, RecipeError, SourceError
from qwq_mlx.files.reading import read_regular_file
from qwq_mlx.quant import DEFAULT_RECIPE
from qwq_mlx.quant.modes import FITS, Packing

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "DEFAULT_RECIPE",
    "Override",
    "Recipe",
    "is_sensitive_layer",
    "layer_of",
    "load_recipe",
    "recipe_names",
    "recipe_of_mapping",
    "recipe_of_text",
]

_FOLDER = Path(__file__).resolve().parent / "recipes"  # conversions/ of the checkout, and its copy in an installation
_MAX_BYTES = 1 << 20
_PACKING_KEYS = ("mode", "bits", "group_size")
_LAYERS = ("all", "sensitive")


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """Matrices that differ from the recipe's own packing.

    match: shell patterns of tensor paths. layers: "all" or "sensitive". packing: None keeps the matrix as it is.
    line: where it stands in the file.
    """

    match: tuple[str, ...]
    layers: str
    packing: Packing | None
    line: int

    def applies(self, path: str, n_layers: int) -> bool:
        """Whether the matrix `path` (without ".weight") of a model of `n_layers` is one of these."""
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in self.match):
            return False
        return self.layers == "all" or _is_sensitive(path, n_layers)


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How every matrix of a model is packed. path: the file it came from; text: the file as it was read."""

    name: str
    path: Path
    text: str
    packing: Packing
    fit: str
    overrides: tuple[Override, ...] = ()

    def packing_of(self, path: str, *, n_layers: int) -> Packing | None:
        """The packing of the matrix `path` (without ".weight"), or None where it stays as it is."""
        packing: Packing | None = self.packing
        for override in self.overrides:
            if override.applies(path, n_layers):
                packing = override.packing
        return packing

    def as_mapping(self) -> dict[str, Any]:
        """The file as it parses, with its name: what the manifest keeps."""
        return {"name": self.name, **tomllib.loads(self.text)}

    def check_matches(self, paths: Iterable[str], *, n_layers: int) -> None:
        """Raise RecipeError for an override that no matrix of the model matches."""
        paths = list(paths)
        for override in self.overrides:
            if not any(override.applies(path, n_layers) for path in paths):
                listed = ", ".join(sorted({path.rpartition(".")[2] for path in paths}))
                raise RecipeError(
                    f"{self.path}, line {override.line}: match {list(override.match)} with layers = "
                    f"{override.layers!r} fits no matrix of this model. Its matrices end in: {listed}."
                )


def _is_sensitive(path: str, n_layers: int) -> bool:
    """mlx-lm's use_more_bits; a matrix outside the layers counts as layer 0, as it does there."""
    return is_sensitive_layer(layer_of(path) or 0, n_layers)


@functools.lru_cache(maxsize=4096)  # a plan asks for each name of a model at each context that it tries
def layer_of(name: str) -> int | None:
    """The layer that a tensor or matrix of this name belongs to, from 0; None where it stands outside the layers."""
    match = re.search(r"(?:^|\.)layers\.(\d+)\.", name)
    return None if match is None else int(match[1])


def is_sensitive_layer(layer: int, n_layers: int) -> bool:
    """Whether `layers = "sensitive"` means this one: the first and last eighth, and every third between."""
    eighth = n_layers // 8
    return layer < eighth or layer >= 7 * n_layers // 8 or (layer - eighth) % 3 == 2


def recipe_names() -> list[str]:
    """Names of the recipes that come with the package, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load_recipe(name: str | Path) -> Recipe:
    """Read a recipe by its name, or a file of one's own by its path (it ends in ".toml").

    Raises RecipeError: no such recipe, not TOML, or a key or value that cannot be honoured, with its line.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = _FOLDER / f"{name}.toml"
        if str(name) not in recipe_names():
            raise RecipeError(
                f"There is no recipe {str(name)!r}. Recipes: {', '.join(recipe_names())}; "
                "or give the path of a file of your own that ends in .toml."
            )
    return recipe_of_text(_read(path), path=path)


def recipe_of_text(text: str, *, path: Path) -> Recipe:
    """A recipe from the text of its file. Raises RecipeError as `load_recipe` does."""
    try:
        parsed = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # TOMLDecodeError is one, and so is a number of 5,000 digits
        raise RecipeError(f"{path}: not TOML: {str(error)[:200].rstrip('.')}. Correct that line.") from error
    return _Parser(path, text).recipe(parsed)


def recipe_of_mapping(mapping: Mapping[str, Any], *, where: Path) -> Recipe:
    """A recipe from what `Recipe.as_mapping` gave, as a manifest keeps it. Raises RecipeError."""
    parsed = {key: value for key, value in mapping.items() if key != "name"}
    return replace(_Parser(where, "").recipe(parsed), name=str(mapping.get("name")))


def _read(path: Path) -> str:
    advice = f"Give a recipe file, or one of the package: {', '.join(recipe_names())}."
    try:
        raw = read_regular_file(path, limit_bytes=_MAX_BYTES, expected="a recipe", advice=advice)
        return raw.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except SourceError as error:
        raise RecipeError(str(error)) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: is not UTF-8 (byte {error.start:,}). Save it as UTF-8.") from error


class _Parser:
    """Parsed TOML to a Recipe; knows the text, so that an error can name the line."""

    def __init__(self, path: Path, text: str) -> None:
        self._path = path
        self._lines = text.split("\n")  # TOML's own lines: U+2028 may stand in a text
        self._text = text

    def recipe(self, parsed: Mapping[str, Any]) -> Recipe:
        self._only_keys(parsed, ("weights", "override"), "", 0)
        weights = parsed.get("weights")
        if not isinstance(weights, Mapping):
            raise RecipeError(f"{self._path}: there is no [weights] table, which says how every matrix is packed.")
        self._only_keys(weights, (*_PACKING_KEYS, "fit"), "weights", 0)
        packing = self._packing(Packing(), weights, "weights", 0)
        fit = weights.get("fit", FITS[0])
        if fit not in FITS:
            raise self._error("weights", 0, "fit", f"fit is {fit!r}, expected one of {', '.join(FITS)}.")
        self._check_mode(packing, fit, "weights", 0)
        overrides = parsed.get("override", [])
        if not isinstance(overrides, list) or not all(isinstance(each, Mapping) for each in overrides):
            raise self._error("override", 0, "", "override is one table, expected a list of them: [[override]].")
        return Recipe(
            name=self._path.stem,
            path=self._path,
            text=self._text,
            packing=packing,
            fit=fit,
            overrides=tuple(self._override(packing, fit, table, index) for index, table in enumerate(overrides)),
        )

    def _check_mode(self, packing: Packing, fit: str, section: str, index: int) -> None:
        if not packing.is_affine and fit != "min-max":
            what = (
                f"mode {packing.mode!r} has only the fit 'min-max', this recipe's fit is {fit!r}. Give fit = 'min-max'."
            )
            raise self._error(section, index, "mode", what)

    def _override(self, default: Packing, fit: str, table: Mapping[str, Any], index: int) -> Override:
        self._only_keys(table, (*_PACKING_KEYS, "match", "layers", "keep"), "override", index)
        match = table.get("match")
        patterns = [match] if isinstance(match, str) else match
        if not isinstance(patterns, list) or not patterns or not all(isinstance(p, str) and p for p in patterns):
            raise self._error("override", index, "match", f"match is {match!r}, expected a pattern or a list of them.")
        layers = table.get("layers", "all")
        if layers not in _LAYERS:
            raise self._error(
                "override", index, "layers", f"layers is {layers!r}, expected one of {', '.join(_LAYERS)}."
            )
        keep = table.get("keep", False)
        if not isinstance(keep, bool):
            raise self._error("override", index, "keep", f"keep is {keep!r}, expected true or false.")
        if keep == any(key in table for key in _PACKING_KEYS):
            what = "keep = true stands beside a packing" if keep else "it changes nothing"
            raise self._error(
                "override", index, "match", f"{what}: give either keep = true or one of {', '.join(_PACKING_KEYS)}."
            )
        packing = None if keep else self._packing(default, table, "override", index)
        if packing is not None:
            self._check_mode(packing, fit, "override", index)
        return Override(
            match=tuple(patterns), layers=layers, packing=packing, line=self._line("override", index, "match")
        )

    def _packing(self, default: Packing, table: Mapping[str, Any], section: str, index: int) -> Packing:
        """One field at a time would refuse mode before its bits are known; so all at once, and the line by the text."""
        try:
            return replace(default, **{key: table[key] for key in _PACKING_KEYS if key in table})
        except OptionError as error:
            raise self._error(section, index, str(error).split(" ", 1)[0], str(error)) from error

    def _only_keys(self, table: Mapping[str, Any], allowed: Iterable[str], section: str, index: int) -> None:
        allowed = tuple(allowed)
        for key in table:
            if key not in allowed:
                raise self._error(section, index, key, f"unknown key {key!r}, expected one of {', '.join(allowed)}.")

    def _error(self, section: str, index: int, key: str, what: str) -> RecipeError:
        return RecipeError(f"{self._path}, line {self._line(section, index, key)}: {what}")

    def _line(self, section: str, index: int, key: str) -> int:
        """The line of `key` in the index-th table called `section`, or of that table's header."""
        current, seen, header = "", -1, 1
        for number, line in enumerate(self._lines, start=1):
            text = line.strip()
            if match := re.match(r"\[+\s*([^\]]+?)\s*\]", text):
                current = match.group(1)
                seen += current == section
                if current == section and seen == index:
                    header = number
                if current == key and not section:
                    return number
            elif (
                current == section
                and (not section or seen == index)
                and re.match(rf"[\"']?{re.escape(key)}[\"']?\s*=", text)
            ):
                return number
        return header
