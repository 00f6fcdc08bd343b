"""Every error that qwq_mlx raises on purpose.

    QwqError                 base: str(error) is a complete message for a person
    |- OptionError           a wrong argument or flag (also a ValueError); commands exit with 2
    |  `- RecipeError        a wrong recipe file, with its line
    |- SourceError           a checkpoint or download that is missing, damaged or not what it claims
    |- ConversionError       a conversion that cannot start, go on or be published
    |- LoadError             a model folder that does not hold the model its config describes
    |- FitError              a run that does not fit the memory of this machine; nothing was loaded for it
    |- PromptError           messages that cannot become a prompt
    |  `- TemplateLimitError an unknown chat template took too long or too much; on a busy machine it may not next time
    |- GenerationError       decoding went wrong (for example NaN logits); `.trace` keeps what was produced
    `- BackendError          MLX has no usable backend on this machine

Every message says where, what was found, what was expected, and what to do next.

Does not: wrap programming errors. A TypeError or an AssertionError is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

__all__ = [
    "BackendError",
    "ConversionError",
    "FitError",
    "GenerationError",
    "LoadError",
    "OptionError",
    "PromptError",
    "QwqError",
    "RecipeError",
    "SourceError",
    "TemplateLimitError",
]


class QwqError(Exception):
    """Base of all errors of this package; `str(error)` is meant for a person."""


class OptionError(QwqError, ValueError):
    """An argument or a flag has a value that cannot be honoured."""


class RecipeError(OptionError):
    """A recipe file is wrong; the message names the file and the line."""


class SourceError(QwqError):
    """A checkpoint or download is missing, damaged, or not what it claims to be."""


class ConversionError(QwqError):
    """A conversion cannot start, go on, or be published."""


class LoadError(QwqError):
    """A model folder does not hold the model that its config describes."""


class FitError(QwqError):
    """A run does not fit the memory of this machine; the message has the arithmetic and the cheapest change."""


class PromptError(QwqError):
    """Messages cannot become a prompt for this model."""


class TemplateLimitError(PromptError):
    """An unknown chat template exceeded its limits of time or memory, which says nothing of the messages."""


class GenerationError(QwqError):
    """Decoding went wrong.

    `trace` is what was produced until then (a `qwq_mlx.Trace`), or None where nothing was.
    """

    def __init__(self, message: str, *, trace: object | None = None) -> None:
        super().__init__(message)
        self.trace = trace


class BackendError(QwqError):
    """MLX is missing or has no usable backend on this machine."""
