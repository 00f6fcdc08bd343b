"""What a prompt says about the answer's form: the choices it lists, yes or no, code, tags; and an answer read by it.

Does not: understand a question.
"""

from __future__ import annotations

from dataclasses import dataclass

from qwq_mlx.reasoning.answer.choices import Choices, choose, named_letter, offered
from qwq_mlx.reasoning.answer.sentences import asks_for_code, asks_yes_or_no, requested_tags
from qwq_mlx.reasoning.answer.unmarked import concluded, displayed, said_yes_or_no

__all__ = ["Question"]


@dataclass(frozen=True, slots=True)
class Question:
    """choices: of a multiple choice, () for none. tags: names of answer tags asked for, in lower case.

    is_yes_or_no: it can be answered so. is_code: a code block can be its answer.
    """

    choices: Choices
    tags: tuple[str, ...]
    is_yes_or_no: bool
    is_code: bool

    @classmethod
    def of(cls, prompt: str | None) -> Question:
        """What a prompt asks for; one that is not known may ask for code."""
        text = prompt or ""
        return cls(offered(text), requested_tags(text), asks_yes_or_no(text), prompt is None or asks_for_code(text))

    def labelled(self, value: str | None) -> str | None:
        """An answer in words that repeats one of the choices, as its label; any other as it is."""
        return value and (choose(value, self.choices) or value)

    def guessed(self, paragraph: str, *, tail: str) -> str | None:
        """What the last paragraph of an output comes to that marks no answer. tail: the output's end."""
        if self.choices:
            return (
                named_letter(paragraph, self.choices, is_bare=False)
                or choose(paragraph, self.choices, is_part=True)
                or named_letter(paragraph, self.choices, is_bare=True)
            )
        if self.is_yes_or_no and (value := said_yes_or_no(paragraph)) is not None:
            return value
        return concluded(paragraph) or displayed(tail)
