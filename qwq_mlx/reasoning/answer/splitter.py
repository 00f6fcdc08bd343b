"""Thinking and answer apart, while the text is written and without needing tags.

A model of profile "qwq-preview" ends with a heading ("**Final Answer**"), a box, a tag that the prompt asked for, or a
sentence that states the answer. A model of profile "qwq-tagged" closes its thinking itself, and the same marks are then
looked for behind the tag. What decides between several is written in `precedence`, how each is read in `rules`.

Spans are token indices and partition the output: thinking is [0, k), the conclusion [k, n). Each token costs constant
work and memory; the result is the same however the text is cut into tokens.

Does not: know ids, stop anything, or judge whether an answer is right. A text that quotes "**Final Answer**" at the
beginning of a line and says something else after it is split there.
"""

from __future__ import annotations

import re

from qwq_mlx.reasoning.answer.code_blocks import CodeAnswer
from qwq_mlx.reasoning.answer.cues import announces, begins_explanation, doubts, is_bullet, is_remark, part_of
from qwq_mlx.reasoning.answer.markers import Mark, Scanner
from qwq_mlx.reasoning.answer.precedence import FAR, LAST_WORD, SEVERAL_BOXES, Boxes, Ending
from qwq_mlx.reasoning.answer.question import Question
from qwq_mlx.reasoning.answer.reply_rules import LAST_LINES, REPLIES, LastLine, Reply
from qwq_mlx.reasoning.answer.rule import Reading, first, within
from qwq_mlx.reasoning.answer.rules import MARK
from qwq_mlx.reasoning.answer.split import Candidate, Kind, Place, Segment, Split
from qwq_mlx.reasoning.profile import Profile

__all__ = ["Splitter", "extract"]

_PIECE = 1024  # characters scanned at once
_FAR = 1_500  # characters after a mark from which on it is less likely to be the last word
_SHORT = 200  # characters of a line that can be an answer by itself
_BESIDE = 24  # characters between two boxes that belong together: \boxed{2} and \boxed{3}
_LINE_ENDS = (".", "!", "。", "**", "$", "\\)", "\\]")  # a line that was cut here is whole: "the answer is 5" may go on


def extract(text: str, profile: Profile, *, prompt: str | None = None) -> str | None:
    """The answer that a whole output gives, as written, or None; the same that `Splitter` finds token by token.

    >>> from qwq_mlx.reasoning.profile import find_profile
    >>> extract("2 + 3 = 5.\\n\\nSo the answer is 5.", find_profile("qwq-preview"))
    '5'
    """
    splitter = Splitter(profile, prompt=prompt)
    splitter.feed(text)
    return splitter.finish().answer


class Splitter:
    """Splits one output.

    profile: how the model marks its thinking.
    prompt: the question, or the whole templated prompt; None where it is unknown. It says which answer tags and choices
    there are.
    is_open: whether the prompt has opened the thinking already; None reads it from the end of a templated prompt.

    >>> from qwq_mlx.reasoning.profile import find_profile
    >>> splitter = Splitter(find_profile("qwq-preview"), prompt="What is 2 + 3?")
    >>> [splitter.feed(token) for token in ("2 + 3 is 5.", "\\n\\n", "**Final Answer**", "\\n\\n", "5")]
    ['thinking', 'thinking', 'answer', 'answer', 'answer']
    >>> split = splitter.finish()
    >>> split.thinking, split.conclusion, split.answer, split.confidence
    ((0, 2), (2, 5), '5', 0.98)
    """

    def __init__(self, profile: Profile, *, prompt: str | None = None, is_open: bool | None = None) -> None:
        self._profile = profile
        if is_open is None:
            is_open = prompt is None or prompt.rstrip().endswith(profile.open_tag or "")
        self._question = Question.of(prompt)
        self._scanner = Scanner(open_tag=profile.open_tag, close_tag=profile.close_tag, answer_tags=self._question.tags)
        self._n_tokens = 0
        self._token_start = 0  # character at which the current token's text begins
        self._pending: list[Place] = []
        start = self._place(0)
        self._line = self._previous = self._sentence_start = start
        self._marked: Candidate | None = None
        self._stated: Candidate | None = None
        self._is_announced = False
        self._part = 0  # of a question in several parts: the number that a line began with, since the heading
        self._code = CodeAnswer(start, is_asked_for=self._question.is_code)
        self._last_text = ""  # the last line that was not blank
        self._boxed_in_code: Candidate | None = None
        self._thinking_chars = [0, 0]
        # With tags: what follows the thinking. A prompt that does not open the thinking gets an answer at once.
        self._reply: Candidate | None = None
        self._is_closed = False
        if profile.has_tags and not is_open:
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
        if self._profile.has_tags or self._reply is not None:
            return "thinking" if self._reply is None else "answer"
        return "answer" if self._marked is not None and not self._marked.is_revised else "thinking"

    @property
    def answer_char(self) -> int | None:
        """The character at which the answer begins, as far as known; None in the thinking."""
        candidate = self._reply or self._marked
        return None if self.segment == "thinking" or candidate is None else candidate.place.char

    @property
    def thinking_char(self) -> int:
        """The character at which the thinking begins: behind the tag that opens it."""
        return self._thinking_chars[0]

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
        last_word, n_chars = self._last_word(is_ended), self._scanner.n_chars
        start = None if last_word is None else (self._reply or last_word.value).place
        if last_word is None or start is None or start.token is None or start.token >= self._n_tokens:
            return Split(thinking=(0, self._n_tokens), thinking_chars=self._thinking_until(n_chars))
        best = last_word.value
        far = FAR.get(best.kind, 0.7) if self._is_far(best) else 1.0
        return Split(
            thinking=(0, start.token),
            thinking_chars=self._thinking_until(start.char),
            conclusion=(start.token, self._n_tokens),
            conclusion_chars=(start.char, n_chars),
            answer=best.value,
            confidence=round(last_word.confidence * best.confidence * far, 3),
            kind=best.kind,
            is_revised=best.is_revised,
            rule=f"{last_word.rule} / {best.rule}",
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
        for candidate in (self._marked, self._reply):
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
            self._line = self._sentence_start = self._place(mark.end)
        elif mark.kind == "sentence":
            self._sentence_start = self._place(mark.end)
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
        self._marked, self._stated, self._part = Candidate("heading", self._line, mark.end), None, 0
        self._marked.capture(self._scanner.tail(mark.end))

    def _take_box(self, mark: Mark) -> None:
        if self._code.fences.is_open:
            self._boxed_in_code = Candidate("box", self._line, mark.end)
            self._boxed_in_code.take(MARK["box"].read(mark.value))
        elif self._marked is None or self._marked.is_revised or not self._is_explaining(self._marked):
            self._take_value("box", mark)

    def _open(self, mark: Mark) -> None:
        """The thinking opens; behind an answer only at the beginning of a line, or it is a quotation."""
        if self._reply is not None and self._line.char != mark.start:
            return
        if mark.start < _PIECE and not self._scanner.tail(0)[: mark.start].strip():
            self._thinking_chars[0] = mark.end
        self._marked = self._stated = self._reply = None
        self._is_closed = False

    def _close(self, mark: Mark) -> None:
        if self._is_closed:
            return
        self._is_closed = True
        self._thinking_chars[1] = mark.start
        self._line = self._previous = self._sentence_start = self._place(mark.end)
        self._marked = self._stated = None
        self._reply = Candidate("closed", self._line, mark.end)
        self._reply.capture(self._scanner.tail(mark.end))

    def _is_explaining(self, marked: Candidate) -> bool:
        is_later = marked.value is not None and marked.end <= self._line.char
        return marked.is_explained or (is_later and begins_explanation(self._scanner.line))

    def _take_line(self, line: str, end: int, *, is_whole: bool = True) -> None:
        """A line is complete: it may take the answer back, state one, or be the answer that the last one announced."""
        marked = self._marked
        if marked and marked.end <= self._line.char:
            marked.is_revised |= doubts(line, strictly=marked.value is None)
            marked.is_explained |= marked.value is not None and begins_explanation(line)
        self._part = part_of(line) or self._part
        if is_whole and (marked is None or marked.is_revised):
            reading, start = MARK["sentence"].read(line), self._line
            if reading is None and self._is_announced and line.strip() and len(line) <= _SHORT:
                reading, start = MARK["announced"].read(line), self._previous
            if reading is not None:
                self._stated = Candidate("sentence", start, end)
                self._stated.take(reading)
        self._code.take(line, end, line=self._line, before=(self._last_text, self._previous))
        if line.strip():
            self._last_text = line
            self._is_announced = announces(line)

    def _take_value(self, kind: Kind, mark: Mark) -> None:
        """A box or tag is complete: a new answer, or more of the last one."""
        if not mark.value.strip(" \t\n\r.…?_"):
            return  # a placeholder: \boxed{...}
        reading, marked = MARK[kind].read(mark.value), self._marked
        part = part_of(self._scanner.line) or self._part
        boxes = None if marked is None else self._boxes(marked, mark, part)
        further = None if boxes is None else first(SEVERAL_BOXES, boxes)
        if marked is None or boxes is None or further is None:
            start = self._previous if self._is_announced else self._sentence_start
            self._marked, self._stated = Candidate(kind, start, mark.end, part=part if part == 1 else 0), None
            self._marked.take(reading)
            return
        if boxes.is_inside and marked.kind == "box":
            marked.kind = "tag"
        if not boxes.is_inside:
            marked.part = part if boxes.is_next_part or part == 1 else 0
        marked.end = mark.end
        marked.take(within(MARK[marked.kind], further))

    def _boxes(self, marked: Candidate, mark: Mark, part: int) -> Boxes:
        is_one_line = marked.end > self._line.char
        between = self._scanner.tail(marked.end)[: max(0, mark.start - marked.end)]
        is_beside = is_one_line and 0 <= mark.start - marked.end <= _BESIDE
        is_open = not marked.is_revised
        is_next_part = is_open and (0 < marked.part == part - 1 or self._is_next_item(marked))
        return Boxes(
            value=marked.value,
            further=mark.value.strip(),
            between=between if marked.value is not None and is_open and is_beside and mark.kind == "box" else None,
            is_inside=marked.value is not None and mark.start < marked.end,
            is_next_part=is_next_part,
            is_same_conclusion=is_open and (is_next_part or marked.kind == "heading" or is_one_line),
        )

    def _is_next_item(self, marked: Candidate) -> bool:
        """Whether this box and the last one stand in neighbouring items of the conclusion's list."""
        is_list = marked.kind == "heading" and is_bullet(self._scanner.line) and is_bullet(self._last_text)
        return is_list and self._previous.char < marked.end <= self._line.char

    def _take_open_tag(self) -> None:
        """An answer tag that the text, or a stop string, ended before it was closed: "<answer>5"."""
        text = self._scanner.open_tag_text.strip()
        if text and len(text) <= _SHORT and "\n" not in text and not text.lower().startswith("tag"):
            self._marked, self._stated = Candidate("tag", self._sentence_start, self._scanner.n_chars), None
            self._marked.take(MARK["tag"].read(text))

    def _last_word(self, is_ended: bool) -> Reading[Candidate] | None:
        """The candidate that is the model's last word, its value read."""
        if self._profile.has_tags and self._reply is None:
            return None
        marked, stated, reply = self._marked, self._stated, self._reply
        if marked is not None and marked.value is None:
            marked.take(self._under_heading(marked, is_ended))
            self._label(marked)
        elif marked is not None and not re.search(r"\d", marked.value or ""):
            self._label(marked)
        if reply is not None:
            reply.take(first(REPLIES, Reply(reply.captured, self._question)))
        for candidate in filter(None, (stated, reply)):
            self._label(candidate)
        ending = Ending(
            marked=marked,
            sentence=stated,
            code=self._code.last,
            boxed_in_code=self._boxed_in_code,
            reply=reply,
            last_line=self._last_line() if is_ended and self._scanner.n_chars else None,
            is_ended=is_ended,
            is_far=stated is not None and self._is_far(stated),
        )
        return first(LAST_WORD, ending)

    def _label(self, candidate: Candidate) -> None:
        """Give the label of a choice for its words: then it does not matter how many they are."""
        label = self._question.labelled(candidate.value)
        if label != candidate.value:
            candidate.value = label
            candidate.confidence = max(
                candidate.confidence, MARK[candidate.kind].confidence if candidate.kind in MARK else 0
            )

    def _last_line(self) -> Candidate:
        """What the last line comes to that says more than that all before it is right."""
        line = self._scanner.line
        last = self._line if line.strip() and not is_remark(line) else self._previous
        text = self._scanner.tail(last.char).partition("\n")[0]
        candidate = Candidate("paragraph", last, self._scanner.n_chars)
        tail = self._scanner.tail(0)
        is_whole = text.strip() == tail.strip()
        candidate.take(first(LAST_LINES, LastLine(text, tail, self._question, is_whole)))
        return candidate

    def _under_heading(self, marked: Candidate, is_ended: bool) -> Reading[str] | None:
        """What a conclusion without a box says; of a cut one only its whole lines count, and no open box."""
        text = marked.captured
        if not is_ended and not text.rstrip().endswith((*_LINE_ENDS, "```")):
            text = text.rpartition("\n")[0]
        return MARK["heading"].read("" if self._scanner.is_inside and not is_ended else text)

    def _is_far(self, candidate: Candidate) -> bool:
        return self._scanner.n_chars - candidate.end > _FAR
