"""The frame of every command: one form of parser, one answer to each error and signal, one rule for where lines go.

Results go to stdout and everything else to stderr, where --quiet leaves only warnings and errors. The library's
messages name its fields and arguments; here they become the flags that set them.

Does not: know what any command does.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from qwq_mlx.cli.rank import joined_group
from qwq_mlx.cli.signals import Interruption, silence
from qwq_mlx.cli.streams import check_working_folder, open_standard_streams
from qwq_mlx.errors import DiskFullError, OptionError, OutOfMemoryError, QwqError, SavingError

if TYPE_CHECKING:
    from qwq_mlx.default_model import Choice
    from qwq_mlx.generate.question_file.runner import BatchProgress, QuestionFile
    from qwq_mlx.generate.reasoner import Reasoner
    from qwq_mlx.model.load import LoadProgress
    from qwq_mlx.options import Limits

__all__ = [
    "Command",
    "add_output",
    "answer_file",
    "end_verification",
    "how_to_go_on",
    "load_reasoner",
    "make_parser",
    "note_drafts",
    "run_command",
]

_FIRST_WORD = re.compile(r"^(\w+)(?= )()")
_QUOTED = re.compile(r"`(\w+)(=True|=False)?`")


@dataclass(frozen=True, slots=True)
class Command:
    """A command at work: what was parsed, of which arguments, and the signals it gets."""

    parser: argparse.ArgumentParser
    options: argparse.Namespace
    interruption: Interruption
    arguments: Sequence[str] = ()

    @property
    def is_quiet(self) -> bool:
        """Whether --quiet was given."""
        return bool(getattr(self.options, "quiet", False))

    @property
    def shows_progress(self) -> bool:
        """Whether progress that is of use only while one watches is shown: on a terminal, without --quiet."""
        return sys.stderr.isatty() and not self.is_quiet

    def note(self, text: str) -> None:
        """A line on stderr, not under --quiet."""
        if not self.is_quiet:
            self.warn(text)

    def warn(self, text: str) -> None:
        """A line on stderr."""
        sys.stderr.write(self.with_flags(text) + "\n")
        sys.stderr.flush()

    def fail(self, text: str, code: int) -> int:
        """Show an error; returns the exit code."""
        self.warn(f"error: {text}")
        return code

    def fail_stdout(self, error: OSError) -> int:
        """Show that stdout takes no more, which nothing can be written to from then on; returns the exit code."""
        silence(sys.stdout.fileno())
        unshown = SavingError(f"stdout: cannot be written ({error.strerror}). Make room, or send it elsewhere.", error)
        return self.fail(str(unshown), unshown.exit_code)

    def with_flags(self, text: str) -> str:
        """A text of the library with this command's flags: `max_tokens` -> --max-tokens, `force=True` -> --force."""
        return _QUOTED.sub(self._flag, text)

    def explain(self, error: QwqError) -> str:
        """An error's message with this command's flags; one of a wrong value begins with the name of its field."""
        text = _FIRST_WORD.sub(self._flag, str(error)) if isinstance(error, OptionError) else str(error)
        return self.with_flags(text)

    def _flag(self, name: re.Match[str]) -> str:
        flags = {each.dest: each.option_strings[-1] for each in self.parser._actions if each.option_strings}
        negated = flags.get(f"no_{name[1]}")
        if name[2] == "=False" and negated is not None:
            return negated
        return flags.get(name[1], name[0])


def make_parser(name: str, *, description: str, exit_codes: str) -> argparse.ArgumentParser:
    """The parser of `python -m qwq_mlx.NAME`. exit_codes: "0 done, 1 failed, ...", for the end of its help."""
    return argparse.ArgumentParser(
        prog=f"python -m qwq_mlx.{name}",
        description=description,
        epilog=f"Exit codes: {exit_codes}.",
        allow_abbrev=False,
    )


def add_output(parser: argparse.ArgumentParser, *, json: str | None = None) -> None:
    """Add --quiet, and where `json` is its help, --json."""
    if json is not None:
        parser.add_argument("--json", action="store_true", help=json)
    parser.add_argument("--quiet", action="store_true", help="on stderr only warnings and errors")


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    work: Callable[[Command], int],
    *,
    interrupted: Callable[[argparse.Namespace], str] = lambda options: "interrupted: nothing was changed.",
    asks: bool | None = False,
    failure_code: int | None = None,
) -> int:
    """Parse and do the work; returns the exit code.

    work: returns the exit code of a command that came to its end. interrupted: the line for a command that a signal
    ended at once, "" for none. asks: as `Interruption` takes it. failure_code: for every error; None takes each one's
    own.
    """
    open_standard_streams()
    options = parser.parse_args(arguments)
    sys.stdout.reconfigure(encoding="utf-8", errors="replace", newline="")  # type: ignore[union-attr]
    with Interruption(asks=asks) as interruption:
        command = Command(parser, options, interruption, sys.argv[1:] if arguments is None else arguments)
        try:
            check_working_folder()
            code = work(command)
            sys.stdout.flush()
            return code
        except QwqError as error:
            return command.fail(command.explain(error), error.exit_code if failure_code is None else failure_code)
        except MemoryError as error:  # of numpy, say; what MLX raises is told by whoever called it
            code = OutOfMemoryError.exit_code if failure_code is None else failure_code
            said = f" ({error})" if str(error) else ""
            return command.fail(f"memory ran out{said}. End what else takes memory, or ask for less.", code)
        except BrokenPipeError:  # whoever read our output has left, which is their right
            silence(sys.stdout.fileno())
            return 0
        except OSError as error:
            if error.filename is not None or not DiskFullError.is_meant_by(error):
                raise  # whoever writes a file says what became of it; stdout has no name
            return command.fail_stdout(error)
        except KeyboardInterrupt:
            if line := interrupted(options):
                command.warn(line)
            return interruption.exit_code or 130


def how_to_go_on(options: argparse.Namespace) -> str:
    """What a command says that was interrupted and keeps unfinished work in OUTPUT.partial."""
    output = Path(options.output).absolute()
    partial = output.with_name(f"{output.name}.partial")
    if not partial.exists():
        return "interrupted: nothing was kept."
    return (
        f"interrupted: what is finished is kept in {partial}. "
        "Run the same command again to go on from there, or add --restart to begin anew."
    )


def load_reasoner(
    command: Command,
    limits: Limits,
    *,
    choice: Choice | None = None,
    warns_of_template: bool = True,
    reproducible: bool = False,
    progress: LoadProgress | None = None,
) -> Reasoner:
    """The model of --model, or the default one, which a line says. choice: where it was chosen already.
    progress: as `qwq_mlx.load` takes it.

    Raises what `qwq_mlx.load` raises.
    """
    from qwq_mlx.default_model import ready_model
    from qwq_mlx.generate.reasoner import load
    from qwq_mlx.model.device import backend_name
    from qwq_mlx.model.template import template_warning

    folder = ready_model(choice or command.options.model, command.note)
    options = command.options
    reasoner = load(
        folder,
        limits=limits,
        force=options.force,
        verify=not options.no_verify,
        chat_template=options.chat_template,
        follow_links=options.follow_links,
        reproducible=reproducible,
        draft=options.draft,
        draft_length=options.draft_length,
        group=joined_group(),
        split=options.hosts_split,
        progress=progress,
    )
    for line in () if reasoner.drafts is None else reasoner.drafts.notes:
        command.warn(line)
    if backend_name() == "cuda":
        command.note("CUDA: the first answer of a process compiles kernels first, about a minute")
    for line in reasoner.model.warnings:
        command.warn(f"warning: {line}")
    # Whoever converted has read the warning, and a template that was given is the user's own.
    is_accepted = reasoner.model.has_manifest or options.chat_template is not None
    warning = None if is_accepted else template_warning(reasoner.model.tokenizer.chat_template)
    if warning is not None and warns_of_template:
        command.note(f"warning: {warning}")
    return reasoner


def answer_file(command: Command, batch: QuestionFile) -> BatchProgress:
    """Answer the questions of a file until all are answered or a signal stops it, with progress.

    Returns how far it came. Raises what `QuestionFile.work` raises.
    """
    from qwq_mlx.cli.terminal import batch_progress

    command.interruption.run = batch
    try:
        with batch_progress(is_shown=not command.is_quiet) as progress:
            return batch.work(progress)
    finally:
        command.interruption.run = None


def note_drafts(command: Command, reasoner: Reasoner) -> None:
    """Say what came of drafting, where there was any."""
    if reasoner.drafts is not None:
        command.note(reasoner.drafts.summary)


def end_verification(command: Command, reasoner: Reasoner) -> None:
    """Wait up to 10 s for the comparison of the model's bytes with its manifest, and say where it is not finished.

    Raises DamagedModelError where bytes are wrong; at its end a command must not be silent about them.
    """
    if unfinished := reasoner.wait_for_verification():
        command.note(unfinished)
    reasoner.close()
