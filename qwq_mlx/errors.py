"""Every error that qwq_mlx raises on purpose.

    QwqError                 base: str(error) is a complete message for a person
    |- OptionError           a wrong argument or flag (also a ValueError); commands exit with 2
    |  `- RecipeError        a wrong recipe file, with its line
    |- SourceError           a checkpoint or download that is missing, damaged or not what it claims
    |- ConversionError       a conversion that cannot start, go on or be published
    |  `- DiskFullError       the disk is full, or would be; exit code 3
    |- LoadError             a model folder that does not hold the model its config describes
    |- FitError              a run that does not fit the memory of this machine; nothing was loaded for it
    |- PromptError           messages that cannot become a prompt
    |  `- TemplateLimitError an unknown chat template took too long or too much; on a busy machine it may not next time
    |- GenerationError       decoding went wrong; `.trace` keeps what was produced
    |  |- NotFiniteError      a logit was NaN or infinite; exit code 4
    |  |- DamagedModelError   bytes of the loaded conversion are not its manifest's
    |  |- OutOfMemoryError    an allocation failed though the plan fitted; exit code 5
    |  `- SavingError         a run, trace, receipt or line cannot be written; exit code 3 where the disk is full
    `- BackendError          MLX has no usable backend on this machine, or numba cannot compile for it

`convert` and `generate` exit with an error's `exit_code`, which is 1 where the tree names no other; the other commands
know 1 and 2. Every message says where, what was found, what was expected, and what to do next.

Does not: wrap programming errors. A TypeError or an AssertionError is a defect of ours and keeps its traceback.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Mapping, Sequence

__all__ = [
    "BackendError",
    "ConversionError",
    "DamagedModelError",
    "DiskFullError",
    "FitError",
    "GenerationError",
    "LoadError",
    "NotFiniteError",
    "OptionError",
    "OutOfMemoryError",
    "PromptError",
    "QwqError",
    "RankError",
    "RecipeError",
    "SavingError",
    "SourceError",
    "TemplateLimitError",
]

_NO_MEMORY = re.compile(r"alloc|out of memory|insufficient memory", re.IGNORECASE)


class QwqError(Exception):
    """Base of all errors of this package; `str(error)` is meant for a person.

    >>> try:
    ...     qwq_mlx.load("nowhere")
    ... except qwq_mlx.QwqError as error:
    ...     print(type(error).__name__, error.exit_code)
    LoadError 1
    """

    exit_code = 1
    """What a command exits with because of it."""


class OptionError(QwqError, ValueError):
    """An argument or a flag has a value that cannot be honoured.

    >>> qwq_mlx.Sampling(temperature=-1)
    Traceback (most recent call last):
    qwq_mlx.errors.OptionError: temperature is -1, expected a number from 0 to 100.
    """

    exit_code = 2


class RecipeError(OptionError):
    """A recipe file is wrong; the message names the file and the line.

    >>> from qwq_mlx.quant.recipe import recipe_of_text
    >>> recipe_of_text("[weights]\\nbits = 7", path=Path("mine.toml"))
    Traceback (most recent call last):
    qwq_mlx.errors.RecipeError: mine.toml, line 2: bits is 7, expected 2, 3, 4, 5, 6, 8 in mode 'affine'.
    """


class SourceError(QwqError):
    """A checkpoint or download is missing, damaged, or not what it claims to be.

    >>> qwq_mlx.Trace.load("nowhere.jsonl")
    Traceback (most recent call last):
    qwq_mlx.errors.SourceError: nowhere.jsonl: there is no such file. Give the file that save() wrote.
    """


class ConversionError(QwqError):
    """A conversion cannot start, go on, or be published.

    >>> Path("taken").mkdir()
    >>> qwq_mlx.convert_checkpoint(FOLDER, "taken")
    Traceback (most recent call last):
    qwq_mlx.errors.ConversionError: ...taken: exists already. ...
    """


class DiskFullError(ConversionError):
    """The disk of the output is full, or has less room than the plan needs.

    >>> qwq_mlx.DiskFullError.is_meant_by(OSError(errno.ENOSPC, "No space left on device"))
    True
    """

    exit_code = 3

    @staticmethod
    def is_meant_by(error: OSError) -> bool:
        """Whether a write failed for want of room: the disk's, the user's, or that of a file of this file system."""
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

    @staticmethod
    def reason(error: OSError) -> str:
        """What has no room, in words.

        >>> qwq_mlx.DiskFullError.reason(OSError(errno.ENOSPC, "No space left on device"))
        'the disk is full'
        """
        if error.errno == errno.EFBIG:
            return "a file may not be that large here (see ulimit -f, or the file system's limit)"
        if error.errno == errno.EDQUOT:
            return "your quota of this disk is used up"
        return "no inodes are left for another file (see df -i)" if _lacks_inodes(error) else "the disk is full"


def system_said(error: OSError, advice: str) -> str:
    """The end of a message about a file: what the system said, and what to do about that.

    advice: what to do, a sentence; another one takes its place where too many files are open or no inodes are left.

    >>> from qwq_mlx.errors import system_said
    >>> system_said(PermissionError(errno.EACCES, "Permission denied"), "Check its permissions.")
    '(Permission denied). Check its permissions.'
    >>> system_said(OSError(errno.EMFILE, "Too many open files"), "Check its permissions.")
    '(Too many open files). Raise the limit (ulimit -n 4096) and run it again.'
    """
    if error.errno in (errno.EMFILE, errno.ENFILE):
        advice = "Raise the limit (ulimit -n 4096) and run it again."
    elif error.errno == errno.ENOSPC and _lacks_inodes(error):
        advice = "No inodes are left for another file (see df -i): remove files there, or choose another disk."
    return f"({error.strerror or error}). {advice}"


def error_text(error: Exception) -> str:
    """What a person reads of an error: what went wrong, with its kind where it is none of this package's.

    >>> from qwq_mlx.errors import error_text
    >>> error_text(KeyError("third")), error_text(qwq_mlx.OptionError("n is 0, expected 1."))
    ("KeyError: 'third'", 'n is 0, expected 1.')
    """
    return str(error) if isinstance(error, QwqError) else f"{type(error).__name__}: {error}"


def _lacks_inodes(error: OSError) -> bool:
    """Whether the file could not be made because its file system has no inodes left, though it may have room."""
    if error.filename is None or not hasattr(os, "statvfs"):  # a write to an open file needs none; Windows has none
        return False
    try:
        status = os.statvfs(os.path.dirname(os.fsdecode(error.filename)) or ".")  # noqa: PTH120 - may be no valid path
    except (OSError, ValueError):
        return False
    return status.f_files > 0 and status.f_favail == 0  # some file systems count none


class LoadError(QwqError):
    """A model folder does not hold the model that its config describes.

    >>> qwq_mlx.load("nowhere")
    Traceback (most recent call last):
    qwq_mlx.errors.LoadError: nowhere: ...
    """


class FitError(QwqError):
    """A run does not fit the memory of this machine; the message has the arithmetic and the cheapest change.

    >>> from qwq_mlx.model.memory.fit import fitted
    >>> limits = qwq_mlx.Limits(context=4_096)
    >>> try:
    ...     fitted(open_model_folder(FOLDER), limits, limit_bytes=520_000_000, backend="metal")
    ... except qwq_mlx.FitError as error:
    ...     print(str(error).splitlines()[0])
    A context of 4,096 does not fit the memory of this machine:
    """


class PromptError(QwqError):
    """Messages cannot become a prompt for this model.

    >>> reasoner.generate([{"role": "user"}])
    Traceback (most recent call last):
    qwq_mlx.errors.PromptError: ...
    """


class TemplateLimitError(PromptError):
    """An unknown chat template exceeded its limits of time or memory, which says nothing of the messages.

    >>> issubclass(qwq_mlx.TemplateLimitError, qwq_mlx.PromptError)
    True
    """


class GenerationError(QwqError):
    """Decoding went wrong.

    trace: what was produced until then (a `qwq_mlx.Trace`), or None where nothing was.

    >>> def broken(tokens, logits):
    ...     return logits * (1 if tokens.size < len(trace.prompt_ids) + 5 else float("nan"))
    >>> try:
    ...     reasoner.generate(trace.question, logits_processors=[broken])
    ... except qwq_mlx.GenerationError as error:
    ...     print(error.trace.finish_reason, len(error.trace.ids))
    interrupted 5
    """

    def __init__(self, message: str, *, trace: object | None = None) -> None:
        super().__init__(message)
        self.trace = trace


class BatchError(GenerationError):
    """Some questions of a batch could not be answered to their end; the others were.

    traces: of all questions in their order, with what was written until then. failures: by index, why.

    >>> qwq_mlx.BatchError("1 of 8 questions ...", traces=[], failures={3: ValueError("in a hook")}).failures
    {3: ValueError('in a hook')}
    """

    def __init__(self, message: str, *, traces: Sequence[object], failures: Mapping[int, Exception]) -> None:
        super().__init__(message)
        self.traces = list(traces)
        self.failures = dict(failures)


class NotFiniteError(GenerationError):
    """A logit was NaN or infinite, so the ids from there on would mean nothing.

    >>> qwq_mlx.NotFiniteError("step 3: a logit is NaN.").exit_code
    4
    """

    exit_code = 4


class DamagedModelError(GenerationError):
    """Bytes of the conversion that is loaded are not those of its manifest, which was found while it was used.

    The message names file and tensor with both digests; nothing that the model wrote can be relied on.

    >>> issubclass(qwq_mlx.DamagedModelError, qwq_mlx.GenerationError)
    True
    """


class OutOfMemoryError(GenerationError):
    """An allocation failed while loading or in mid-run, though the plan fitted.

    Others took the memory meanwhile, or the plan is wrong.

    >>> qwq_mlx.OutOfMemoryError.is_meant_by(RuntimeError("[metal::malloc] Unable to allocate 34359738368 bytes."))
    True
    """

    exit_code = 5

    @staticmethod
    def is_meant_by(error: Exception) -> bool:
        """Whether what MLX raised (RuntimeError for everything) says on any backend that an allocation failed."""
        return isinstance(error, MemoryError) or _NO_MEMORY.search(str(error)) is not None


class SavingError(GenerationError):
    """What was generated cannot be written; what was there before is whole.

    error: what the system said. Where it is that the disk is full, the exit code is 3.

    >>> trace.save("nowhere/trace.jsonl")
    Traceback (most recent call last):
    qwq_mlx.errors.SavingError: nowhere/trace.jsonl: the trace cannot be saved (No such file or directory). ...
    """

    def __init__(self, message: str, error: OSError) -> None:
        super().__init__(message)
        if DiskFullError.is_meant_by(error):
            self.exit_code = DiskFullError.exit_code


class RankError(QwqError):
    """One of several processes that hold a model together died, stopped or hangs; all are ended.

    >>> qwq_mlx.RankError.exit_code
    6
    """

    exit_code = 6


class BackendError(QwqError):
    """MLX is missing or has no usable backend on this machine, or numba cannot compile for it.

    >>> qwq_mlx.BackendError.exit_code
    1
    """
