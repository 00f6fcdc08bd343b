"""`python -m qwq_mlx.generate`: a question in, the model's text out on stdout, everything else on stderr.

Arguments are read and checked before anything heavy is imported, so --help and a wrong option answer at once.

Does not: hold a conversation (`qwq_mlx.chat` does), or rewrite the prompt in any way.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwq_mlx.cli.command import (
    Command,
    add_output,
    answer_file,
    end_verification,
    load_reasoner,
    make_parser,
    note_drafts,
    run_command,
)
from qwq_mlx.cli.generate_flags import (
    RunOptions,
    add_limits,
    add_loading,
    add_sampling,
    run_options,
)
from qwq_mlx.cli.on_hosts import or_on_hosts
from qwq_mlx.cli.rank import snapshot_path
from qwq_mlx.cli.signals import silence
from qwq_mlx.cli.streams import read_stdin
from qwq_mlx.cli.terminal import prefill_progress, settings_line, show, summary_line
from qwq_mlx.cli.vote import answer_by_vote
from qwq_mlx.default_model import Choice, choose_model
from qwq_mlx.errors import DamagedModelError, GenerationError, OptionError, OutOfMemoryError
from qwq_mlx.files.output_file import check_output_files

if TYPE_CHECKING:
    from qwq_mlx.generate.checkpoint.autosave import Autosave
    from qwq_mlx.generate.reasoner import Reasoner
    from qwq_mlx.generate.stream import Stream
    from qwq_mlx.progress import ProgressBar
    from qwq_mlx.trace.trace import Trace


_EXIT_CODES = (
    "0 done, 1 failed, 2 wrong usage, 3 the disk is full, 4 the model's logits were NaN or "
    "infinite, 5 memory ran out while loading or in mid-run, 6 one of several processes (--hosts) failed, 129 "
    "terminal closed, 130 interrupted (Ctrl-C), 143 terminated. After 4 and above, what there was of the run is in "
    "the file of --save; without it, after 5 and above, in one of its own"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(
        _parser(),
        arguments,
        or_on_hosts(_work),
        interrupted=lambda options: "interrupted: at once, what was not shown is lost",
        asks=None,
    )


def _work(command: Command) -> int:
    options = command.options
    asked = run_options(vars(options))
    if options.input is not None or options.output is not None:
        return _batch(command, asked)
    if options.samples is not None:
        return answer_by_vote(command, _prompt(options), asked)
    return _generate(command, None if options.resume is not None else _prompt(options), asked)


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "generate",
        description="Answer one question. The model's text goes to stdout, everything else to stderr.",
        exit_codes=_EXIT_CODES,
    )
    add = parser.add_argument
    add("-p", "--prompt", metavar="TEXT", help="the question; '-' or piped stdin reads it from stdin")
    add("--system-prompt", metavar="TEXT", help="system prompt (default: the chat template's)")
    add(
        "--model",
        metavar="DIR",
        help="model folder, or a GGUF (FILE.gguf, ollama:NAME[:TAG], lmstudio:PUBLISHER/REPO), which is converted once "
        "into the user's cache (default: $QWQ_MLX_MODEL, else a conversion under conversions/, else the bundled model)",
    )
    add(
        "--save",
        metavar="FILE",
        help="save the run here if it is cut short (Ctrl-C, a signal, --max-tokens, full context) or ends without an "
        "answer, to resume it later (default: qwq-run-DATE-TIME-PID if a signal or a full context cuts it short)",
    )
    add("--no-save", action="store_true", help="do not save a run that a signal or a full context cuts short")
    add("--save-every", type=int, metavar="N", help="also save every N tokens (default: only at the end)")
    add(
        "--resume",
        metavar="FILE",
        help="resume a saved run with its own settings; --max-tokens and --context may be raised",
    )
    add("--answer-now", action="store_true", help="with --resume: ask for the answer now, also in a run that has ended")
    add(
        "--ask-answer",
        action="store_true",
        help="where the text gives no sure answer, ask the model for it behind the text, which stays as it is",
    )
    add_loading(add)
    add(
        "--receipt", metavar="FILE", help="write a receipt of the run; python -m qwq_mlx.replay repeats and compares it"
    )
    add(
        "--samples",
        type=int,
        metavar="N",
        help="draw N samples side by side and print the answer that most agree on; ends once that cannot change",
    )
    add("--all-samples", action="store_true", help="with --samples: draw all of them to their end")
    add(
        "--confidence",
        type=float,
        metavar="P",
        help="with --samples: end also where the first answer is more frequent than the second with this probability, "
        "0.95 say",
    )
    add_output(parser, json="print the whole trace as one line of JSON instead of the text")
    _add_question_file(parser.add_argument_group("a file of questions").add_argument)
    add_limits(parser.add_argument_group("limits").add_argument)
    add_sampling(parser.add_argument_group("sampling (default: the model's generation_config.json)").add_argument)
    return parser


def _add_question_file(add: Callable[..., Any]) -> None:
    add("--input", metavar="FILE", help='JSON lines of {"question" or "messages", "id", "expected"}')
    add(
        "--output",
        metavar="FILE",
        help="their traces, one a line; an existing file is continued",
    )
    add(
        "--width",
        type=int,
        metavar="N",
        help="questions or samples side by side (default: what the memory plan allows, at most 8)",
    )
    add(
        "--reproducible",
        action="store_true",
        help="the same tokens in any width, to the last near-tie: rows share a pass only as far as they are computed "
        "as alone (7 on the CPU, 32 of a 4-bit model on CUDA, none else), which is slower",
    )


def _prompt(options: argparse.Namespace) -> str:
    """The question as it was given; checked for emptiness here, so that no model is loaded for nothing."""
    text: str | None = options.prompt
    if text == "-" or (text is None and not sys.stdin.isatty()):
        text = read_stdin(sys.stdin.buffer)
    if text is None:
        raise OptionError("There is no prompt. Give one with --prompt TEXT, or pipe it in.")
    if not text.strip():
        raise OptionError("The prompt is empty. Give a question, for example --prompt 'How many r in strawberry?'.")
    return text


def _batch(command: Command, asked: RunOptions) -> int:
    from qwq_mlx.generate.question_file.questions import read_questions
    from qwq_mlx.generate.question_file.results import Results
    from qwq_mlx.progress import ProgressBar

    options, interruption = command.options, command.interruption
    choice = choose_model(options.model)
    check_output_files({"output": options.output}, inputs=[options.input], folders=[choice.folder])
    with ProgressBar(unit=" questions", is_shown=not command.is_quiet) as bar:
        questions = read_questions(
            Path(options.input),
            system_prompt=options.system_prompt,
            note=command.note,
            progress=lambda n_questions: bar.show("reading", n_questions, None),
        )
    with Results(Path(options.output)) as results:
        reasoner = load_reasoner(command, asked.limits, choice=choice, reproducible=options.reproducible)
        from qwq_mlx.generate.question_file.runner import QuestionFile

        batch = QuestionFile(
            reasoner,
            questions,
            results,
            sampling=asked.sampling,
            limits=asked.limits,
            thinking=asked.thinking,
            system_prompt=options.system_prompt,
            ask_answer=options.ask_answer,
            width=options.width,
        )
        reached = answer_file(command, batch)
    note_drafts(command, reasoner)
    end_verification(command, reasoner)
    if batch.is_stopped and reached.n_done < reached.n_total:
        command.warn(
            f"interrupted: {reached.n_done:,} of {reached.n_total:,} are in {options.output}; run it again to go on"
        )
        return interruption.exit_code
    if reached.n_failed:
        text = f"{options.output}: {reached.n_failed:,} questions were not answered; see their 'error'."
        if not reached.n_out_of_memory:
            return command.fail(text, 1)
        text += f" Memory ran out in {reached.n_out_of_memory:,}: make room and run it again, which tries those again."
        return command.fail(text, OutOfMemoryError.exit_code)
    return 0


def _generate(command: Command, prompt: str | None, asked: RunOptions) -> int:
    options, choice = command.options, choose_model(command.options.model)
    check_output_files({"save": options.save, "receipt": options.receipt}, inputs=[], folders=[choice.folder])
    check_output_files({"receipt": options.receipt}, inputs=[options.resume])
    if options.save is None:
        return _answer(command, prompt, asked, choice, None)
    from qwq_mlx.generate.checkpoint.autosave import Autosave

    with Autosave(Path(options.save), every=options.save_every, warn=command.warn) as autosave:
        return _answer(command, prompt, asked, choice, autosave)


def _answer(command: Command, prompt: str | None, asked: RunOptions, choice: Choice, autosave: Autosave | None) -> int:
    from qwq_mlx.model.prompt import conversation
    from qwq_mlx.progress import ProgressBar

    options, interruption = command.options, command.interruption
    if prompt is not None:
        conversation(prompt, system_prompt=options.system_prompt)  # wrong text is told before a model is loaded
    reasoner = load_reasoner(  # a saved run has its prompt
        command, asked.limits, choice=choice, warns_of_template=prompt is not None
    )
    from qwq_mlx.generate.checkpoint.autosave import keep_unasked, way_on
    from qwq_mlx.generate.checkpoint.snapshot import kept_steps

    bar = ProgressBar(unit="tokens", is_shown=command.shows_progress)
    run = _start(reasoner, options, prompt, asked, bar)
    interruption.run = run
    if run.request.note:
        command.warn(run.request.note)
    command.note(settings_line(run))
    try:
        with bar:
            steps = autosave.steps(run) if autosave is not None else run
            kept = kept_steps(run, steps, snapshot_path(), warn=command.warn)
            show(kept, sys.stdout, is_silent=options.json)
        if options.ask_answer:
            run.ask_answer()
        trace = run.trace()
        if options.json:
            _print_json(trace)
        sys.stdout.flush()
    except GenerationError as error:
        return _failed(error, run, autosave, command)
    except OSError as error:
        return _unshown(error, run, autosave, command)
    finally:
        interruption.run = None
    is_saved = autosave is not None and (trace.is_resumable or trace.can_be_asked)
    if is_saved:
        run.save(options.save)
        command.warn(way_on(trace, options.save))
    elif autosave is None and _is_kept_unasked(trace, command):
        keep_unasked(run, command.warn)
    _forget_snapshot()
    if options.receipt is not None:
        reasoner.receipt(trace).save(options.receipt)
    if not command.is_quiet or trace.finish_reason not in ("stop", "answered") or trace.asked is not None:
        command.warn(summary_line(trace, is_saved=is_saved))
    note_drafts(command, reasoner)
    end_verification(command, reasoner)
    return interruption.exit_code if trace.finish_reason == "interrupted" else 0


def _start(
    reasoner: Reasoner, options: argparse.Namespace, prompt: str | None, asked: RunOptions, bar: ProgressBar
) -> Stream:
    """The run of a question, or where there is none the saved one."""
    if prompt is None:
        return reasoner.resume(
            options.resume,
            max_tokens=asked.limits.max_tokens,
            context=asked.limits.context,
            answer_now=options.answer_now,
        )
    return reasoner.stream(
        prompt,
        system_prompt=options.system_prompt,
        sampling=asked.sampling,
        limits=asked.limits,
        thinking=asked.thinking,
        progress=prefill_progress(bar),
    )


def _print_json(trace: Trace) -> None:
    sys.stdout.write(json.dumps(trace.to_json(), ensure_ascii=False) + "\n")


def _is_kept_unasked(trace: Trace, command: Command) -> bool:
    """Whether hours may be lost otherwise: somebody answered so, or it was cut short and nobody could be asked."""
    if command.interruption.wants_save is not None:
        return command.interruption.wants_save and trace.is_resumable
    return trace.finish_reason in ("interrupted", "context_full") and bool(trace.ids) and not command.options.no_save


def _failed(error: GenerationError, run: Stream, autosave: Autosave | None, command: Command) -> int:
    """What was written is kept: in the file of --save, on stdout with --json, and as text it is there already."""
    from qwq_mlx.generate.checkpoint.autosave import keep_unasked

    if command.options.json:
        _print_json(run.trace())
    sys.stdout.flush()
    if autosave is not None and not isinstance(error, DamagedModelError) and autosave.save(run):
        command.warn(f"saved: go on with --resume {command.options.save}")
        _forget_snapshot()
    if autosave is None and isinstance(error, OutOfMemoryError) and not command.options.no_save and run.trace().ids:
        keep_unasked(run, command.warn)
    return command.fail(command.explain(error), error.exit_code)


def _forget_snapshot() -> None:
    """What it holds is saved or shown now, and more; whoever ends all is not to save it in that one's place."""
    if (snapshot := snapshot_path()) is not None:
        snapshot.unlink(missing_ok=True)


def _unshown(error: OSError, run: Stream, autosave: Autosave | None, command: Command) -> int:
    """Stdout takes no more: its reader left, the disk is full, or the terminal was closed. What there is gets saved."""
    from qwq_mlx.generate.checkpoint.autosave import keep_unasked

    silence(sys.stdout.fileno())
    exit_code = command.interruption.exit_code
    if autosave is not None and autosave.save(run):
        command.warn(f"saved: go on with --resume {autosave.path}")
        _forget_snapshot()
    # Ctrl-C also ends the reader of a pipe (| tee), often before the run has come to its end.
    if autosave is None and exit_code and _is_kept_unasked(run.trace(), command):
        keep_unasked(run, command.warn)
    return exit_code if exit_code or isinstance(error, BrokenPipeError) else command.fail_stdout(error)


if __name__ == "__main__":
    sys.exit(main())
