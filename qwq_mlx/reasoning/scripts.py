"""Scripts of a text while it is written: which share each has in a step, and where a step leaves the prompt's own.

QwQ drifts, most often from English to Chinese and back. Scripts, not languages, are what characters tell for certain:
Latin, Han, Kana, Hangul, Cyrillic, Greek, Arabic, Hebrew, Devanagari, Thai and "Other". Digits, punctuation, spaces and
symbols belong to none. Greek letters, formulas and quotations (`quotation` says where they are) are not counted.

Does not: tell English from French, or mask tokens; `allowed` says what a guard may let through, `generate` applies it.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from qwq_mlx.reasoning.quotation import Quoting, followed

__all__ = ["ScriptWatcher", "Switch", "allowed", "script_of", "scripts_of"]

_NAMES = (
    ("LATIN", "Latin"), ("CJK", "Han"), ("HIRAGANA", "Kana"), ("KATAKANA", "Kana"), ("HANGUL", "Hangul"),
    ("CYRILLIC", "Cyrillic"), ("GREEK", "Greek"), ("ARABIC", "Arabic"), ("HEBREW", "Hebrew"),
    ("DEVANAGARI", "Devanagari"), ("THAI", "Thai"), ("FULLWIDTH LATIN", "Latin"), ("IDEOGRAPHIC", "Han"),
)  # fmt: skip
_FORMULA = "Greek"  # letters that formulas use whatever the language
_MAX_QUOTE = 400  # characters; a quotation mark that nobody closes must not hide the rest
_MIN_LETTERS = 2  # foreign letters in a step that count as a switch
_MIN_LATIN = 20  # Latin letters, which names and units bring into any text: so many, and
_LATIN_SHARE = 0.8  # this share of the step, to count where the prompt is mostly in another script


@lru_cache(maxsize=8192)
def script_of(char: str) -> str | None:
    """The script of one character, "Other" for a letter of a script without a name here, None for what has none."""
    if char.isascii():
        return "Latin" if char.isalpha() else None
    if not unicodedata.category(char).startswith("L"):
        return None
    name = unicodedata.name(char, "")
    return next((script for prefix, script in _NAMES if name.startswith(prefix)), "Other")


def scripts_of(text: str) -> dict[str, int]:
    """Letters of each script in a text, the most frequent first.

    >>> scripts_of("Let me think: 所以")
    {'Latin': 10, 'Han': 2}
    """
    counts: dict[str, int] = {}
    for char in text:
        script = script_of(char)
        if script is not None:
            counts[script] = counts.get(script, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def allowed(text: str, scripts: Iterable[str]) -> bool:
    """Whether a token's text holds letters of the given scripts only; a guard may let it through.

    Text without letters, Greek letters (formulas) and Latin ones (names, units, code) are always allowed.
    """
    permitted = {*scripts, _FORMULA, "Latin"}
    return all(script in permitted for script in scripts_of(text))


@dataclass(frozen=True, slots=True, kw_only=True)
class Switch:
    """A step with letters of other scripts than the prompt's.

    start, end: the step's token indices, end not included.
    at: the token with the first foreign letter.
    scripts: letters of each foreign script.
    share: foreign letters of all letters in the step, 0 to 1.
    """

    start: int
    end: int
    at: int
    scripts: tuple[tuple[str, int], ...]
    share: float


class ScriptWatcher:
    """Feed each token's text; a step is a line. `feed` returns a Switch when a line with foreign letters ends.

    prompt: the user's question. Its scripts are no switch, and neither is Latin, except for whole steps in it where the
    prompt is mostly in another script.

    >>> watcher = ScriptWatcher("What is 2 + 3?")
    >>> watcher.feed("所以是5。\\n").scripts
    (('Han', 3),)
    """

    def __init__(self, prompt: str) -> None:
        letters = scripts_of(prompt)
        self._home = {*letters, _FORMULA, "Latin"}
        self._is_latin = letters.get("Latin", 0) * 2 >= sum(letters.values())
        self._first: dict[str, int] = {}  # token of each script's first letter in the step
        self._n_tokens = 0
        self._start = 0
        self._counts: dict[str, int] = {}
        self._quoting = Quoting()
        self._n_quoted = 0  # characters since the quotation that is open began
        self.totals: dict[str, int] = {}

    @property
    def home(self) -> frozenset[str]:
        """Scripts that are no switch."""
        return frozenset(self._home)

    @property
    def line_start(self) -> int:
        """The token that begins the line under way; where none is, the number of tokens so far."""
        return self._start

    def feed(self, text: str) -> Switch | None:
        """Take one token's text."""
        switch = None
        for char in text:
            if char == "\n":
                switch = self._end_step(self._n_tokens + 1) or switch
            else:
                self._take(char)
        self._n_tokens += 1
        return switch

    def finish(self) -> Switch | None:
        """The last step, which no line break ends."""
        return self._end_step(self._n_tokens)

    def _take(self, char: str) -> None:
        was_open = self._quoting.is_open
        self._quoting = followed(self._quoting, char)
        self._n_quoted = self._n_quoted + 1 if was_open else 0
        if self._n_quoted > _MAX_QUOTE:
            self._quoting = Quoting()
        if was_open or self._quoting.is_open:
            return
        script = script_of(char)
        if script is not None:
            self._first.setdefault(script, self._n_tokens)
            self._counts[script] = self._counts.get(script, 0) + 1

    def _end_step(self, end: int) -> Switch | None:
        counts, first, start = self._counts, self._first, self._start
        self._counts, self._first, self._start, self._quoting = {}, {}, end, Quoting()
        for script, count in counts.items():
            self.totals[script] = self.totals.get(script, 0) + count
        foreign = {script: count for script, count in counts.items() if script not in self._home}
        n_latin, n_letters = counts.get("Latin", 0), sum(counts.values())
        if not self._is_latin and n_latin >= max(_MIN_LATIN, _LATIN_SHARE * n_letters):
            foreign["Latin"] = n_latin
        n_foreign = sum(foreign.values())
        if n_foreign < _MIN_LETTERS:
            return None
        return Switch(
            start=start,
            end=end,
            at=min(first[script] for script in foreign),
            scripts=tuple(sorted(foreign.items())),
            share=round(n_foreign / n_letters, 3),
        )
