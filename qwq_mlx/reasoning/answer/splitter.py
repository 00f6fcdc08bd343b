"""Thinking and answer apart, while the text is written and without needing tags.

A model of profile "qwq-preview" ends with one of: a heading ("**Final Answer**"), a box, a tag that the prompt asked
for, or a sentence that states the answer. The last strong mark wins, because boxes in the thinking get revised; a
stated answer wins only where no strong mark stands, or where the text took the strong mark back first ("Wait, ...").
A model of profile "qwq-tagged" closes its thinking itself, and the same marks are then looked for behind the tag.

Spans are token indices and partition the output: thinking is [0, k), the conclusion [k, n). Each token costs constant
work and memory; the result is the same however the text is cut into tokens.

Does not: know ids, stop anything, or judge whether an answer is right. A text that quotes "**Final Answer**" at the
beginning of a line and says something else after it is split there.
"""

from __future__ import annotations

from qwq_mlx.reasoning.answer.code_blocks import CodeAnswer
from qwq_mlx.reasoning.answer.list_items import begins_explanation, is_item, is_remark, joined, part_of
from qwq_mlx.reasoning.answer.markers import Mark, Scanner
from qwq_mlx.reasoning.answer.question import Question
from qwq_mlx.reasoning.answer.sentences import announces, revises, stated
from qwq_mlx.reasoning.answer.split import Candidate, Kind, Place, Segment, Split
from qwq_mlx.reasoning.answer.unmarked import reduced, unmarked
from qwq_mlx.reasoning.profile import Profile

__all__ = ["Kind", "Segment", "Split", "Splitter"]

_PIECE = 1024  # characters scanned at once
_FAR = 1_500  # characters after a mark from which on it is less likely to be the last word
_SHORT = 200  # characters of a line that can be an answer by itself
_BESIDE = 24  # characters between two boxes that belong together: \boxed{2} and \boxed{3}
_LINE_ENDS = (".", "!", "。", "**", "$", "\\)", "\\]")  # a line that was cut here is whole: "the answer is 5" may go on


class Splitter:
    """Splits one output. `prompt` is the whole templated prompt's text, or the question's; None where it is unknown.

    It says which answer tags were asked for, and whether the thinking is already open when the output begins.
    """

    def __init__(self, profile: Profile, *, prompt: str | None = None) -> None:
        self._profile = profile
        self._question = Question.of(prompt)
        self._scanner = Scanner(open_tag=profile.open_tag, close_tag=profile.close_tag, answer_tags=self._question.tags)
        self._n_tokens = 0
        self._token_start = 0  # character at which the current token's text begins
        self._pending: list[Place] = []
        start = self._place(0)
        self._line = self._previous = self._sentence = start
        self._strong: Candidate | None = None
        self._weak: Candidate | None = None
        self._is_announced = False
        self._part = 0  # of a question in several parts: the number that a line began with, since the heading
        self._code = CodeAnswer(start, is_asked_for=self._question.is_code)
        self._before = ""  # the last line that was not blank
        self._fenced: Candidate | None = None  # a box in a code block counts where nothing else does
        self._thinking_chars = [0, 0]
        # With tags: what follows the thinking. A prompt that does not open the thinking gets an answer at once.
        self._reply: Candidate | None = None
        self._is_closed = False
        if profile.has_tags and prompt is not None and not prompt.rstrip().endswith(profile.open_tag or ""):
            self._reply = Candidate("closed", start, 0)

    def feed(self, text: str) -> Segment:
        """Take the text that one token released ("" if none yet); returns the part it belongs to as far as known."""
        if text:
            self._token_start = self._scanner.n_chars
        for at in range(0, len(text), _PIECE):
            self._feed_piece(text[at : at + _PIECE])
        self._n_tokens += 1
        return self.segment

    @property
    def segment(self) -> Segment:
        """The part that the next token belongs to, as far as known."""
        if self._profile.has_tags:
            return "thinking" if self._reply is None else "answer"
        return "answer" if self._strong is not None and not self._strong.is_revised else "thinking"

    @property
    def is_answered(self) -> bool:
        """Whether the answer part holds a closed box or tag, so that nothing more is needed."""
        strong = self._strong
        return strong is not None and strong.value is not None and not strong.is_revised

    def finish(self, *, is_ended: bool = True) -> Split:
        """The final split; feed nothing after it.

        is_ended: the model ended its text itself. Of a text that was cut nothing is guessed from where it stops.
        """
        line = self._scanner.line.rstrip()
        if line:
            is_whole = is_ended or line.endswith(_LINE_ENDS)
            self._take_line(self._scanner.line, self._scanner.n_chars, is_whole=is_whole)
        self._take_open_tag()
        self._settle_places()
        best, n_chars = self._best(is_ended), self._scanner.n_chars
        start = None if best is None else (self._reply or best).place
        if best is None or start is None or start.token is None or start.token >= self._n_tokens:
            return Split(thinking=(0, self._n_tokens), thinking_chars=self._thinking_until(n_chars))
        return Split(
            thinking=(0, start.token),
            thinking_chars=self._thinking_until(start.char),
            conclusion=(start.token, self._n_tokens),
            conclusion_chars=(start.char, n_chars),
            answer=best.value,
            confidence=best.confidence(is_far=self._is_far(best)),
            kind=best.kind,
            is_revised=best.is_revised,
        )

    def _thinking_until(self, char: int) -> tuple[int, int]:
        """The thinking in characters, without its tags; char: where it ends if no tag closed it."""
        start, closed = self._thinking_chars
        return start, closed if self._is_closed else char

    def _settle_places(self) -> None:
        """Places behind all text so far are in the token that comes now."""
        for place in self._pending:
            place.token = self._n_tokens
        self._pending.clear()

    def _feed_piece(self, text: str) -> None:
        self._settle_places()
        for candidate in (self._strong, self._reply):
            if candidate is not None:
                candidate.capture(text)
        for mark in self._scanner.feed(text):
            self._take(mark)

    def _place(self, char: int) -> Place:
        is_here = self._token_start <= char < self._scanner.n_chars
        place = Place(char, self._n_tokens if is_here else None)
        if not is_here:
            self._pending.append(place)
        return place

    def _take(self, mark: Mark) -> None:
        if mark.kind == "line":
            self._take_line(mark.value, mark.end)
            if mark.value.strip() and not is_remark(mark.value):
                self._previous = self._line
            self._line = self._sentence = self._place(mark.end)
        elif mark.kind == "sentence":
            self._sentence = self._place(mark.end)
        elif mark.kind == "open":
            self._open(mark)
        elif mark.kind == "close":
            self._close(mark)
        elif self._profile.has_tags and self._reply is None:
            pass  # a box in a thinking that is not closed yet
        elif mark.kind == "heading":
            self._take_heading(mark)
        elif mark.kind == "box":
            self._take_box(mark)
        elif mark.kind == "tag":
            self._take_value("tag", mark)

    def _take_heading(self, mark: Mark) -> None:
        if self._code.fences.is_open:
            if self._scanner.tail(mark.start).lstrip().startswith("#"):
                return  # a comment in code
            self._code.fences.close()
        self._strong, self._weak, self._part = Candidate("heading", self._line, mark.end), None, 0
        self._strong.capture(self._scanner.tail(mark.end))

    def _take_box(self, mark: Mark) -> None:
        if self._code.fences.is_open:
            self._fenced = Candidate("box", self._line, mark.end, mark.value.strip())
        elif self._strong is None or self._strong.is_revised or not self._is_explaining(self._strong):
            self._take_value("box", mark)

    def _open(self, mark: Mark) -> None:
        """The thinking opens; behind an answer only at the beginning of a line, or it is a quotation."""
        if self._reply is not None and self._line.char != mark.start:
            return
        if mark.start < _PIECE and not self._scanner.tail(0)[: mark.start].strip():
            self._thinking_chars[0] = mark.end
        self._strong = self._weak = self._reply = None
        self._is_closed = False

    def _close(self, mark: Mark) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._thinking_chars[1] = mark.start
        self._line = self._previous = self._sentence = self._place(mark.end)
        self._strong = self._weak = None
        self._reply = Candidate("closed", self._line, mark.end)
        self._reply.capture(self._scanner.tail(mark.end))

    def _is_explaining(self, strong: Candidate) -> bool:
        is_later = strong.value is not None and strong.end <= self._line.char
        return strong.is_explained or (is_later and begins_explanation(self._scanner.line))

    def _take_line(self, line: str, end: int, *, is_whole: bool = True) -> None:
        """A line is complete: it may take the answer back, state one, or be the answer that the last one announced."""
        strong = self._strong
        if strong and strong.end <= self._line.char:
            strong.is_revised |= revises(line, strictly=strong.value is None)
            strong.is_explained |= strong.value is not None and begins_explanation(line)
        self._part = part_of(line) or self._part
        if is_whole and (strong is None or strong.is_revised):
            value, start = stated(line), self._line
            if value is None and self._is_announced and line.strip() and len(line) <= _SHORT:
                value, start = unmarked(line), self._previous
            if value is not None:
                self._weak = Candidate("sentence", start, end, reduced(value))
        self._code.take(line, end, line=self._line, before=(self._before, self._previous))
        if line.strip():
            self._before = line
            self._is_announced = announces(line)

    def _take_value(self, kind: Kind, mark: Mark) -> None:
        value = mark.value.strip()
        if not value.strip(" .…?_"):
            return  # a placeholder: \boxed{...}
        strong = self._strong
        if strong and strong.value is not None and mark.start < strong.end:  # a box in a tag, or a tag in a box
            strong.end, strong.kind = mark.end, "tag" if strong.kind == "box" else strong.kind
            return
        part = part_of(self._scanner.line) or self._part
        is_next = strong is not None and (0 < strong.part == part - 1 or self._is_next_item(strong))
        if strong and not strong.is_revised and (is_next or strong.kind == "heading" or strong.end > self._line.char):
            strong.value = f"{strong.value}, {value}" if is_next else self._joined(strong, value, mark)
            strong.end, strong.part = mark.end, part if is_next or part == 1 else 0
            return
        start = self._previous if self._is_announced else self._sentence
        self._strong, self._weak = Candidate(kind, start, mark.end, value, part=part if part == 1 else 0), None

    def _is_next_item(self, strong: Candidate) -> bool:
        """Whether this box and the last one stand in neighbouring items of the conclusion's list."""
        is_list = strong.kind == "heading" and is_item(self._scanner.line) and is_item(self._before)
        return is_list and self._previous.char < strong.end <= self._line.char

    def _joined(self, strong: Candidate, value: str, mark: Mark) -> str:
        """Boxes side by side in one line are one answer; otherwise the last box counts."""
        gap = mark.start - strong.end
        is_beside = strong.end > self._line.char and 0 <= gap <= _BESIDE
        if strong.value is None or not is_beside or "\\boxed" not in self._scanner.tail(mark.start):
            return value
        return joined(strong.value, self._scanner.tail(strong.end)[:gap], value)

    def _take_open_tag(self) -> None:
        """An answer tag that the text, or a stop string, ended before it was closed: "<answer>5"."""
        text = self._scanner.open_tag_text.strip()
        if text and len(text) <= _SHORT and "\n" not in text and not text.lower().startswith("tag"):
            end = self._scanner.n_chars
            self._strong, self._weak = Candidate("tag", self._sentence, end, text), None

    def _best(self, is_ended: bool) -> Candidate | None:
        """The candidate that is the model's last word, its value filled in."""
        strong, weak = self._strong, self._weak
        if self._profile.has_tags and self._reply is None:
            return None
        if weak is not None:
            weak.value = self._question.labelled(weak.value)
        if strong is not None and strong.value is None:
            strong.value = self._question.labelled(self._unboxed(strong, is_ended))
        if strong is not None and strong.is_revised and weak is not None:
            if weak.value == strong.value:
                strong.is_revised = False
                return strong
            return weak
        if strong is not None:
            return self._later(strong) if strong.is_revised and is_ended else strong
        code = self._code.last
        if code is not None and is_ended and (weak is None or code.end > weak.end):
            return code
        if weak is not None and (is_ended or not self._is_far(weak)):
            return weak
        if self._fenced is not None:
            return self._fenced
        if self._reply is not None:
            self._reply.value = self._question.labelled(unmarked(self._reply.captured))
            return self._reply
        if is_ended and self._scanner.n_chars:
            return self._guessed()
        return None

    def _later(self, strong: Candidate) -> Candidate:
        """Of an answer that was taken back: what the last paragraph comes to, where it comes to something else."""
        guess = self._guessed()
        return strong if guess.place.char < strong.end or guess.value in (None, strong.value) else guess

    def _guessed(self) -> Candidate:
        """What the last line comes to that says more than that all before it is right."""
        line = self._scanner.line
        last = self._line if line.strip() and not is_remark(line) else self._previous
        text = self._scanner.tail(last.char).partition("\n")[0]
        value = self._question.guessed(text, tail=self._scanner.tail(0))
        return Candidate("paragraph", last, self._scanner.n_chars, value)

    def _unboxed(self, strong: Candidate, is_ended: bool) -> str | None:
        """What a conclusion without a box says; of a cut one only its whole lines count, and an open box is none."""
        if self._scanner.is_inside:
            return None
        text = strong.captured
        if not is_ended and not text.rstrip().endswith((*_LINE_ENDS, "```")):
            text = text.rpartition("\n")[0]
        return unmarked(text)

    def _is_far(self, candidate: Candidate) -> bool:
        return self._scanner.n_chars - candidate.end > _FAR
