"""`python -m qwq_mlx.evaluate`: what models solve of a task, with intervals, costs, votes, and tests between them.

The tables go to stdout, with --json the whole report as one line of JSON; progress goes to stderr. The folder of
--output holds every trace and verdict; the same command goes on where it was cut off, and with --output alone the
report of a folder is made again without a model.

Does not: convert, fetch data, or rank models by one number.
"""

from __future__ import annotations

import argparse
import gc
import json
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

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
from qwq_mlx.cli.generate_flags import add_limits, add_loading, add_sampling, checked_options
from qwq_mlx.cli.on_hosts import or_on_hosts
from qwq_mlx.errors import OptionError
from qwq_mlx.files.output_file import lies_in
from qwq_mlx.options import MAX_SAMPLES

if TYPE_CHECKING:
    from qwq_mlx.default_model import Choice
    from qwq_mlx.evaluate.folder import Evaluation, Setup
    from qwq_mlx.evaluate.models import CheckedModel
    from qwq_mlx.evaluate.rows import Row
    from qwq_mlx.evaluate.task import Task

_MAX_TOKENS, _ON_LOOP = 4096, "stop"
_OF_REPORTS = ("output", "against", "lm_eval", "json", "quiet")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    return run_command(
        _parser(),
        arguments,
        or_on_hosts(_evaluate),
        interrupted=lambda options: f"interrupted: what is in {options.output} is whole; run it again to go on",
    )


def _parser() -> argparse.ArgumentParser:
    parser = make_parser(
        "evaluate",
        description="Ask models the problems of a task, judge their answers and compare them. Ended samples are kept "
        "in --output, and the same command goes on from there; with --output alone its report is made again.",
        exit_codes="0 done, 1 failed, 2 wrong usage, 3 the disk is full, 130 interrupted (Ctrl-C), 143 terminated",
    )
    add = parser.add_argument
    add("--task", metavar="NAME", help="gsm8k, math500 or game24 with --data, or a file of problems (.jsonl)")
    add("--data", metavar="FILE", help="the named task's own file, which is not part of this package")
    add(
        "--model",
        action="append",
        metavar="DIR",
        help="model folder; repeatable (default: as python -m qwq_mlx.generate)",
    )
    add("--samples", type=int, metavar="N", help="samples of each problem by each model (default: 1)")
    add("--output", metavar="DIR", required=True, help="folder of traces, verdicts and reports; continued if it exists")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    add("--offset", type=int, metavar="N", help="pass over the first N problems")
    add("--levels", nargs="+", metavar="LEVEL", help="only problems of these levels")
    add("--instruction", metavar="TEXT", help="put behind each question; '' is none (default: the task's own)")
    add("--system-prompt", metavar="TEXT", help="system prompt (default: the chat template's)")
    add("--width", type=int, metavar="N", help="samples side by side (default: what the memory plan allows, at most 8)")
    add("--against", metavar="LABEL", help="model that the others are compared with (default: the table's first)")
    add("--lm-eval", action="store_true", help="also write the samples in lm-eval's form, LABEL.lm_eval.jsonl")
    add("--reproducible", action="store_true", help="the same tokens in any width, which is slower on a GPU")
    add_loading(add)
    add_output(parser, json="print the report as one line of JSON instead of the tables")
    limits = parser.add_argument_group(
        f"limits (defaults here: --max-tokens {_MAX_TOKENS}, --on-loop {_ON_LOOP}: a loop counts as wrong)"
    )
    add_limits(limits.add_argument)
    add_sampling(parser.add_argument_group("sampling (default: the model's generation_config.json)").add_argument)
    parser.set_defaults(max_tokens=_MAX_TOKENS, on_loop=_ON_LOOP)
    return parser


def _evaluate(command: Command) -> int:
    from qwq_mlx.evaluate.folder import EVALUATION_NAME
    from qwq_mlx.files.lock import FolderLock

    options, output = command.options, Path(command.options.output)
    if options.task is None:
        for name, value in vars(options).items():
            if name not in _OF_REPORTS and value != command.parser.get_default(name):
                raise OptionError(f"{name} needs `task`, or leave it out to report on `output`.")
        return _report_alone(command, output)
    from qwq_mlx.evaluate.task import read_task
    from qwq_mlx.generate.batch import check_width

    samples = 1 if options.samples is None else options.samples
    if not 1 <= samples <= MAX_SAMPLES:
        raise OptionError(f"--samples is {samples:,}, expected a whole number from 1 to {MAX_SAMPLES:,}.")
    data = None if options.data is None else Path(options.data)
    task = read_task(options.task, data, levels=options.levels or (), offset=options.offset or 0, limit=options.limit)
    checked_options(vars(options))
    check_width(options.width)
    if not output.parent.is_dir():
        raise OptionError(f"--output is {str(output)!r}, but there is no folder {str(output.parent)!r}. Make it first.")
    choices = _choices(command)
    for choice in choices.values():
        if lies_in(output / EVALUATION_NAME, choice.folder):
            raise OptionError(f"--output is {str(output)!r}, which lies in the model's folder {choice.folder}.")
    with FolderLock(output):
        return _run(command, task, samples, choices, output)


def _choices(command: Command) -> dict[str, Choice]:
    """The models that were named, or the default one, by their labels; what must be converted first is."""
    from qwq_mlx.default_model import choose_model, ready_model
    from qwq_mlx.evaluate.models import chosen_labels

    names = command.options.model or [None]
    choices = [choose_model(name) for name in names]
    for choice in choices:
        ready_model(choice, command.note)
    labels = chosen_labels([name or choice.folder for name, choice in zip(names, choices, strict=True)])
    return {label: replace(choice, note="", source=None) for label, choice in zip(labels, choices, strict=True)}


def _run(command: Command, task: Task, samples: int, choices: Mapping[str, Choice], output: Path) -> int:
    from qwq_mlx.evaluate.answering import is_complete
    from qwq_mlx.evaluate.folder import begin
    from qwq_mlx.evaluate.models import check_models
    from qwq_mlx.evaluate.summary import check_against
    from qwq_mlx.model.template import read_template_file

    options = command.options
    template = None if options.chat_template is None else read_template_file(Path(options.chat_template))
    models = check_models(
        choices,
        task.problems[0].question,
        system_prompt=options.system_prompt,
        chat_template=template,
        follow_links=options.follow_links,
    )
    for model in models:
        if options.temperature is None and not model.names_sampling:
            command.warn(
                f"warning: {model.label} names no sampling (generation_config.json), so it draws at temperature 1. "
                "QwQ's card has --temp 0.7 --top-p 0.8 --top-k 20"
            )
    setup = _setup(command, task, template, output)
    evaluation, models = begin(output, task, setup, samples=samples, models=models)
    check_against(evaluation, options.against)
    code = 0
    for model in models:
        if not is_complete(evaluation, model.label):
            code = _answer(command, evaluation, model)
        if code:
            break
    _show(command, evaluation)
    return code


def _setup(command: Command, task: Task, template: str | None, output: Path) -> Setup:
    """What is asked; a seed that was not given is that of the folder, or drawn."""
    from qwq_mlx.evaluate.folder import EVALUATION_NAME, Setup, read_evaluation
    from qwq_mlx.model.template import template_digest
    from qwq_mlx.options import to_json

    options = command.options
    asked = checked_options(vars(options))
    seed = asked.sampling.seed
    if seed is None:
        has_begun = (output / EVALUATION_NAME).exists()
        seed = read_evaluation(output).setup.seed if has_begun else secrets.randbits(32)
    return Setup(
        task=task.name,
        problems_sha256=task.sha256,
        instruction=task.instruction if options.instruction is None else options.instruction,
        system_prompt=options.system_prompt,
        template_sha256=None if template is None else template_digest(template),
        settings=to_json(replace(asked.sampling, seed=seed), asked.limits, asked.thinking),
    )


def _answer(command: Command, evaluation: Evaluation, model: CheckedModel) -> int:
    """Answer what one model has not answered yet; returns the exit code of a run that was interrupted, else 0."""
    from qwq_mlx.evaluate.answering import limits_of, question_file
    from qwq_mlx.evaluate.folder import write_evaluation
    from qwq_mlx.generate.question_file.results import Results
    from qwq_mlx.model.upstream import import_mlx

    options, interruption = command.options, command.interruption
    command.note(f"{model.label}: {model.weights}")
    reasoner = load_reasoner(
        command,
        limits_of(evaluation, model),
        choice=model.choice,
        warns_of_template=False,
        reproducible=options.reproducible,
    )
    write_evaluation(evaluation)
    with Results(evaluation.traces(model.label)) as results:
        batch = question_file(evaluation, model, reasoner, results, width=options.width)
        reached = answer_file(command, batch)
    note_drafts(command, reasoner)
    end_verification(command, reasoner)
    del batch, reasoner
    gc.collect()  # a run and its caches know each other
    import_mlx().clear_cache()  # the next model is loaded where this one was
    if reached.n_done < reached.n_total and interruption.exit_code:
        command.warn(f"interrupted: {reached.n_done:,} of {reached.n_total:,} samples; run it again to go on")
        return interruption.exit_code
    return 0


def _report_alone(command: Command, output: Path) -> int:
    from qwq_mlx.evaluate.folder import EVALUATION_NAME, read_evaluation
    from qwq_mlx.files.lock import FolderLock

    if not (output / EVALUATION_NAME).is_file():
        raise OptionError(
            f"--output is {str(output)!r}, which holds no evaluation. Name a --task to begin one, or another folder."
        )
    with FolderLock(output):
        _show(command, read_evaluation(output))
    return 0


def _show(command: Command, evaluation: Evaluation) -> None:
    """Judge what is not judged yet, write the reports and print one."""
    from qwq_mlx.evaluate.reports import write_reports
    from qwq_mlx.evaluate.rows import judged_rows
    from qwq_mlx.evaluate.sample_log import write_sample_log
    from qwq_mlx.evaluate.summary import summarise
    from qwq_mlx.evaluate.table import summary_text

    rows: dict[str, list[Row]] = {model.label: judged_rows(evaluation, model.label) for model in evaluation.models}
    summary = summarise(evaluation, rows, against=command.options.against)
    if summary.models:
        write_reports(evaluation.folder, summary)
    for label in rows if command.options.lm_eval else ():
        if rows[label]:
            write_sample_log(evaluation, label, rows[label])
    print(json.dumps(asdict(summary), ensure_ascii=False) if command.options.json else summary_text(summary))


if __name__ == "__main__":
    sys.exit(main())
