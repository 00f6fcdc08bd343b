"""Loops, reported while they are written: exact cycles, near repeats of the same steps, one answer stated again and
again, and doubt after doubt without anything new.

A cycle of numbers, cells or code is reported much later than one of sentences, because matrices, tables and lists
repeat for good reasons (see `data_margin`). Four small finders, each with constant work per token and bounded memory,
behind one door.

Does not: stop or change a run; `generate` chooses what to do. Counting without end is no loop here, nor are rows of
digits in no order; one line of them is, from 400 tokens on, where the question names no larger number. Periods above
10,922 tokens are not seen, nor loops that put every repetition into new words.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter, deque
from dataclasses import dataclass
from typing import Literal

from qwq_mlx.errors import OptionError
from qwq_mlx.reasoning.answer import MAX_LINE, doubts, normalise, stated
from qwq_mlx.reasoning.loops.exact_cycles import CycleFinder
from qwq_mlx.reasoning.loops.near_repeats import Variants, VariantsFinder

__all__ = ["Loop", "LoopDetector", "LoopOptions", "LoopScores"]

LoopKind = Literal["cycle", "variants", "candidate", "doubts"]
_WORD = re.compile(r"[^\W_]+")
_PROSE = re.compile(r"[A-Za-z]{2}|[^\x00-\x7f\W\d_]")  # two letters, or one of another script
_NUMBER = re.compile(r"(?<![\d.])\d{1,4}(?![\d.]*\d)")
_COMMA = re.compile(r"(?<=\d),(?=\d{3}\b)")  # of "1,000"
_FRACTION = re.compile(r"\\[dt]?frac\s?\{[^{}]*\}\s?\{[^{}]*\}")  # its numbers say nothing of how long a text is to be
_MAX_ASKED = 4096  # a larger number in a question is rarely how often something is to be written
_MAX_DATA_LINE = 1024  # the steps from 27 down to 1 (3n + 1) are 600 tokens on one line
_MAX_UNBROKEN = 399  # tokens; 2^1000 has 302 digits, a key of 2,048 bits is about as long in base64
_UNBROKEN = (re.compile(r"[A-Za-z0-9+/=]+"), re.compile(r"[0-9 ]+"))  # one number or word, and digits in groups
_BOX = re.compile(r"\\boxed\{([^{}]{1,80})\}")
_CONCLUSION = re.compile(r"[*#\s]{1,8}(?:the )?final (?:answer|solution)\b", re.I)
_MAX_SEEN = 20_000  # distinct words and pairs of words remembered


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopOptions:
    """When to report a loop. Larger numbers report later and more rarely.

    cycle_margin: tokens beyond three exact repetitions.
    soon_limit: cumulative sum of stale over fresh words, for steps that return at once (see `near_repeats`).
    near_limit: the same for steps that return changed.
    far_limit: the same for long rounds.
    words_limit: the same for single words and pictographs, however they are put together.
    n_candidates: how often one answer is stated within `candidate_tokens`.
    candidate_tokens: the window for `n_candidates`, in tokens.
    n_doubts: cumulative sum over lines, never below zero. A line that opens with a doubt ("Wait") and brings at most
    one new word adds the share of its word pairs that occurred before; any other line subtracts its share of new
    pairs, and every line one for each word never used before.

    scripts/choose_limits.py chooses the defaults and judges them on outputs that they were not chosen by.
    Raises OptionError for a value that could never report, or would at once.
    """

    cycle_margin: int = 48
    soon_limit: float = 33.0
    near_limit: float = 46.0
    far_limit: float = 41.0
    words_limit: float = 14.0
    n_candidates: int = 12
    candidate_tokens: int = 6_000
    n_doubts: int = 12

    def __post_init__(self) -> None:
        for name, low, high in (
            ("cycle_margin", 0, 4096),
            ("soon_limit", 1, 10_000),
            ("near_limit", 1, 10_000),
            ("far_limit", 1, 10_000),
            ("words_limit", 1, 10_000),
            ("n_candidates", 2, 10_000),
            ("n_doubts", 2, 10_000),
            ("candidate_tokens", 16, 32_768),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise OptionError(f"{name} is {value!r}, expected {low} to {high}. The default reports no good text.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A loop and its evidence.

    kind: the finder that reports it.
    start, end: token indices of the repeating stretch as far as known, end not included.
    period: tokens from one repetition to the next, None where there is no regular one.
    score: repetitions for "cycle", the cumulative sum for "variants" and "doubts", statements for "candidate".
    evidence: one line for a person.
    """

    kind: LoopKind
    start: int
    end: int
    period: int | None
    score: float
    evidence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopScores:
    """How near each finder is to a report, as a share of what it reports at: 1 or more is a loop."""

    cycle: float
    variants: float
    candidate: float
    doubts: float


class LoopDetector:
    """Watches one output. After a report, `feed` stays silent about that kind until `reset`.

    >>> detector = LoopDetector(LoopOptions(cycle_margin=8))
    >>> loops = [detector.feed(token_id, "") for token_id in [1, 2, 3] * 10]
    >>> [(loop.kind, loop.start, loop.period) for loop in loops if loop]
    [('cycle', 0, 3)]
    """

    def __init__(self, options: LoopOptions | None = None, *, question: str = "") -> None:
        """question: its largest number outside of fractions is how often numbers and cells may come back."""
        self._options = options or LoopOptions()
        numbers = (int(number) for number in _NUMBER.findall(_COMMA.sub("", _FRACTION.sub(" ", question))))
        self._n_asked = max((number for number in numbers if number <= _MAX_ASKED), default=0)
        self.reset()
        self._n_tokens = 0

    def reset(self) -> None:
        """Forget everything but the token count: the run was changed to leave the loop."""
        options = self._options
        self._cycles = CycleFinder(margin=options.cycle_margin, n_asked=self._n_asked)
        self._variants = VariantsFinder(
            soon_limit=options.soon_limit,
            near_limit=options.near_limit,
            far_limit=options.far_limit,
            words_limit=options.words_limit,
        )
        self._n_data = 0  # tokens since the last word outside of code, table and brackets
        self._last_char = ""  # a word may lie in several tokens
        self._n_unbroken = [0, 0]  # tokens of one number or word, and of digits in groups
        self._n_data_line = 0  # of them, those of a line that is none of these
        self._line: list[str] = []
        self._line_chars = 0
        self._stated: deque[tuple[int, str]] = deque()
        self._doubts = 0.0
        self._first_doubt = 0  # token where the sum of doubts left zero
        self._seen: dict[int, None] = {}  # words, and pairs of them, the one not met for longest first
        self._reported: set[LoopKind] = set()
        self._has_concluded = False

    @property
    def scores(self) -> LoopScores:
        """The finders' running scores. Candidates and doubts change at the ends of lines."""
        options = self._options
        limits = (options.soon_limit, options.near_limit, options.far_limit, options.words_limit)
        variants = max(value / limit for value, limit in zip(self._variants.scores, limits, strict=True))
        stated_most = max(Counter(value for _, value in self._stated).values(), default=0)
        return LoopScores(
            cycle=round(self._cycles.score, 4),
            variants=round(variants, 4),
            candidate=round(stated_most / options.n_candidates, 4),
            doubts=round(self._doubts / options.n_doubts, 4),
        )

    @property
    def sums(self) -> tuple[float, float, float, float]:
        """The sums of stale over fresh words, for soon_limit, near_limit, far_limit and words_limit."""
        return self._variants.scores

    def feed(self, token_id: int, text: str) -> Loop | None:
        """Take one token and the text it released; returns a loop when one becomes certain."""
        index = self._n_tokens
        self._n_tokens += 1
        variants = self._variants.feed(text, index) if text else None
        self._count_data(text)
        loop = self._cycle(token_id, index)
        if text:
            loop = loop or self._stale(variants, index)
            if "\n" in text or self._line_chars + len(text) > MAX_LINE:
                before, _, after = text.rpartition("\n")
                line = "".join(self._line) + before
                self._line, self._line_chars = [after], len(after)
                loop = loop or self._take_line(line.strip()[-MAX_LINE:], index)
            else:
                self._line.append(text)
                self._line_chars += len(text)
        if loop is None or loop.kind in self._reported:
            return None
        self._reported.add(loop.kind)
        return loop

    def _cycle(self, token_id: int, index: int) -> Loop | None:
        cycle = self._cycles.feed(token_id, n_data=self._n_data)
        if cycle is None or "cycle" in self._reported:
            return None
        return Loop(
            kind="cycle",
            start=index + 1 - cycle.length,
            end=index + 1,
            period=cycle.period,
            score=round(cycle.n_repeats, 2),
            evidence=f"the last {cycle.length:,} tokens repeat every {cycle.period:,}, {cycle.n_repeats:.1f} times",
        )

    def _count_data(self, text: str) -> None:
        """Numbers, cells and code since the last sentence. A blank line ends a table, a matrix or a number."""
        is_code = self._variants.is_code
        is_structured = self._variants.is_structured
        has_word = not is_structured and _PROSE.search(self._last_char + text) is not None
        is_prose = not text or ("\n\n" in text and not is_code) or has_word
        self._last_char = text[-1:]
        self._n_data = 0 if is_prose else self._n_data + 1
        is_still = not self._variants.is_counting
        for place, pattern in enumerate(_UNBROKEN):
            self._n_unbroken[place] = self._n_unbroken[place] + 1 if is_still and pattern.fullmatch(text) else 0
        is_line = not is_prose and not is_structured and "\n" not in text and not self._variants.is_counting
        self._n_data_line = self._n_data_line + 1 if is_line else 0

    def _stale(self, variants: Variants | None, index: int) -> Loop | None:
        if "variants" in self._reported:
            return None
        for n_tokens, n_most, what in (
            (max(self._n_unbroken), _MAX_UNBROKEN, "one number or word"),
            (self._n_data_line, _MAX_DATA_LINE, "numbers and marks on one line"),
        ):
            if n_tokens > max(n_most, min(2 * _MAX_DATA_LINE, 4 * self._n_asked)):
                return Loop(
                    kind="variants",
                    start=index + 1 - n_tokens,
                    end=index + 1,
                    period=None,
                    score=n_tokens,
                    evidence=f"the last {n_tokens:,} tokens are {what}, in no order",
                )
        if variants is None:
            return None
        return Loop(
            kind="variants",
            start=variants.start,
            end=index + 1,
            period=variants.period,
            score=round(variants.score, 1),
            evidence=f"the same steps return about every {variants.period:,} tokens with little that is new",
        )

    def _take_line(self, line: str, index: int) -> Loop | None:
        if not line:
            return None
        if not self._has_concluded and _CONCLUSION.match(line):
            self._has_concluded = True  # a conclusion may repeat the thinking, but only one may
            self._variants.forget()
        return self._candidate(line, index) or self._doubt(line, index)

    def _candidate(self, line: str, index: int) -> Loop | None:
        boxes = _BOX.findall(line)
        value = boxes[-1] if boxes else stated(line)
        if value is None:
            return None
        value = normalise(value)
        self._stated.append((index, value))
        while self._stated[0][0] <= index - self._options.candidate_tokens:
            self._stated.popleft()
        places = [place for place, other in self._stated if other == value]
        if len(places) < self._options.n_candidates:
            return None
        return Loop(
            kind="candidate",
            start=places[0],
            end=index + 1,
            period=(places[-1] - places[0]) // (len(places) - 1),
            score=len(places),
            evidence=f"the answer {value[:40]!r} was stated {len(places)} times in {index + 1 - places[0]:,} tokens",
        )

    def _doubt(self, line: str, index: int) -> Loop | None:
        words = _WORD.findall(line.lower())
        n_new = sum(self._is_new(hash(word)) for word in dict.fromkeys(words))
        pairs = [hash(pair) for pair in itertools.pairwise(words)]
        known = sum(not self._is_new(pair) for pair in pairs) / max(1, len(pairs))
        is_doubt = n_new <= 1 and doubts(line) and not self._variants.is_counting
        if is_doubt and not self._doubts:
            self._first_doubt = index
        gain = known if is_doubt else known - 1
        self._doubts = max(0.0, self._doubts + gain - n_new)
        if self._doubts < self._options.n_doubts:
            return None
        return Loop(
            kind="doubts",
            start=self._first_doubt,
            end=index + 1,
            period=None,
            score=round(self._doubts, 1),
            evidence=f"{self._doubts:.0f} more doubts than lines with news in {index + 1 - self._first_doubt:,} tokens",
        )

    def _is_new(self, what: int) -> bool:
        """Whether this was not met lately; it is from now on."""
        is_new = what not in self._seen
        self._seen.pop(what, None)
        self._seen[what] = None
        if len(self._seen) > _MAX_SEEN:
            del self._seen[next(iter(self._seen))]
        return is_new
