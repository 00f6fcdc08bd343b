"""A tuning from begin to end: check, plan, measure, train, measure again, and publish what got better.

Does not: show anything; who calls it does.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx

from qwq_mlx.convert.plan import COPIED
from qwq_mlx.errors import ConversionError, OptionError, OutOfMemoryError, QwqError
from qwq_mlx.files.checkpoint import CONFIG_NAME
from qwq_mlx.files.digest import sha256_file, sha256_json
from qwq_mlx.files.lock import FolderLock
from qwq_mlx.files.output_file import check_name, lies_in
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.device import backend_name, limit_bytes, memory_limit, small_cache
from qwq_mlx.model.folder import ModelFolder, open_model_folder
from qwq_mlx.model.load import LoadedModel, load_model
from qwq_mlx.model.tokenizer import load_tokenizer
from qwq_mlx.model.upstream import package_version
from qwq_mlx.tune_draft.examples import Split, read_examples, split_by_problem
from qwq_mlx.tune_draft.memory import check_fits, n_trained
from qwq_mlx.tune_draft.settings import TuneSettings
from qwq_mlx.tune_draft.staging import Staging
from qwq_mlx.tune_draft.tokens_a_pass import tokens_a_pass
from qwq_mlx.tune_draft.training import Trainer
from qwq_mlx.tune_draft.windows import Batch, batches, cut, shuffled

__all__ = ["DECIDING_LENGTH", "NotBetterError", "Progress", "Stopped", "Tuning", "tune_draft"]

DECIDING_LENGTH = 3
"""Drafts a pass at which the tuned drafter must give more tokens a pass than before."""

_SAVE_EVERY_S = 60.0  # of training between two states on the disk; a state of all weights is written in seconds
_CACHE_BYTES = 1 << 30  # freed memory that MLX keeps; batches differ in shape, and on CUDA it would fill the card
_PACKING_KEYS = ("quantization", "quantization_config")


class NotBetterError(QwqError):
    """The tuned drafter names no more of the held-out tokens than before. result: both figures."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result


class Stopped(Exception):  # noqa: N818 - no error: it was asked for
    """The training was stopped; all that is done is kept."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far it is. what: is done now. n_before: of n_done, what an earlier call did. note: behind the rate."""

    what: str
    n_done: int
    n_total: int
    n_before: int = 0
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuning:
    """What a tuning is of.

    draft: folder of the drafter.
    traces: files of the target's outputs.
    held_out: files to measure on; None holds out a part of the problems of traces.
    output: folder of the tuned drafter.
    keep: publish it even if it got no better.
    restart: discard an unfinished tuning of this output.
    """

    draft: Path
    traces: Sequence[Path]
    output: Path
    held_out: Sequence[Path] | None = None
    keep: bool = False
    restart: bool = False


def tune_draft(
    tuning: Tuning,
    settings: TuneSettings,
    *,
    progress: Callable[[Progress], None] = lambda progress: None,
    note: Callable[[str], None] = lambda line: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> dict[str, Any]:
    """Tune a drafter; returns tokens a pass on the held-out outputs, before and after, as JSON values.

    progress, note: told how far it is, and what is planned. is_stopped: asked behind every batch.
    Raises OptionError, SourceError, LoadError, FitError or ConversionError before a weight is read; NotBetterError
    where nothing is published; Stopped, OutOfMemoryError, NotFiniteError.
    """
    _check_folders(tuning)
    files = open_model_folder(tuning.draft)
    split = _read(tuning, settings, files)
    backend = backend_name()
    planned = check_fits(files.config, settings, limit_bytes=limit_bytes(), backend=backend)
    length = min(settings.max_length, files.config.max_position_embeddings // 2 * 2)
    training, measured = (batches(cut(each, length), settings.batch_tokens) for each in split)
    n_tokens = sum(len(batch.targets) for batch in training)
    note(
        f"{n_tokens:,} tokens of {len({each.problem for each in split.training}):,} problems to train on, "
        f"{sum(len(batch.targets) for batch in measured):,} of {len({each.problem for each in split.held_out}):,} held "
        f"out; {len(training) * settings.epochs:,} steps, {planned / 1e9:.1f} GB of memory"
    )
    with FolderLock(tuning.output):
        staging = Staging(tuning.output, _description(tuning, settings, files, split))
        if (result := staging.published_result()) is not None:
            staging.discard()
            return result
        if tuning.output.exists():
            raise ConversionError(f"{tuning.output}: exists already. Choose another output, or remove it.")
        staging.open(restart=tuning.restart)
        staging.check_disk(_disk_bytes(files, settings))
        try:
            with small_cache(_CACHE_BYTES), memory_limit(planned):
                return _Work(tuning, settings, files, staging, progress, is_stopped).result(training, measured)
        except (RuntimeError, MemoryError) as error:
            if not OutOfMemoryError.is_meant_by(error):
                raise
            raise OutOfMemoryError(
                f"memory ran out ({error}). Run the same command with a smaller `batch_tokens` and `restart`."
            ) from error


def _check_folders(tuning: Tuning) -> None:
    """Refuse an output that cannot be made, before traces are read."""
    output = tuning.output
    if not output.name or not output.parent.is_dir():
        raise OptionError(f"output is {str(output)!r}, but there is no folder {str(output.parent)!r}. Make it first.")
    check_name(output, name="output")
    if lies_in(output, tuning.draft):
        raise OptionError(
            f"output is {str(output)!r}, which lies in the drafter's folder {tuning.draft}. Give another."
        )


def _read(tuning: Tuning, settings: TuneSettings, files: ModelFolder) -> Split:
    tokenizer = load_tokenizer(files.path, vocab_size=files.config.vocab_size)
    examples = read_examples(tuning.traces, tokenizer, folder=files.path)
    held_out = None if tuning.held_out is None else read_examples(tuning.held_out, tokenizer, folder=files.path)
    return split_by_problem(examples, held_out, share=settings.held_out_share, seed=settings.seed)


def _description(tuning: Tuning, settings: TuneSettings, files: ModelFolder, split: Split) -> dict[str, Any]:
    """All that decides the tuned weights, by the options that set it."""
    training, held_out = (sha256_json([[each.prompt_ids, each.ids] for each in part]) for part in split)
    return {
        "schema": 1,
        "draft": [sha256_file(shard.path) for shard in files.checkpoint.shards],
        "traces": training,
        "held_out": held_out,
        **asdict(settings),
        "backend": backend_name(),
        "versions": {name: package_version(name) for name in ("mlx", "mlx-lm")},
    }


def _disk_bytes(files: ModelFolder, settings: TuneSettings) -> int:
    """Two states of the training, and the tuned drafter."""
    n_weights = sum(map(math.prod, tensor_shapes(files.config).values()))
    return 2 * 12 * n_trained(files.config, settings) + 2 * n_weights


class _Work:
    """A tuning with everything checked."""

    def __init__(
        self,
        tuning: Tuning,
        settings: TuneSettings,
        files: ModelFolder,
        staging: Staging,
        progress: Callable[[Progress], None],
        is_stopped: Callable[[], bool],
    ) -> None:
        self._tuning, self._settings, self._files = tuning, settings, files
        self._staging, self._progress, self._is_stopped = staging, progress, is_stopped

    def result(self, training: Sequence[Batch], measured: Sequence[Batch]) -> dict[str, Any]:
        """Train, measure, and publish what got better."""
        before, seconds = self._make_model(training, measured)
        after = self._measured("measuring after", load_model(self._staging.model), measured)
        result = {
            "output": str(self._tuning.output),
            "before": before,
            "after": after,
            "training_s": round(seconds, 1),
            "peak_bytes": mx.get_peak_memory(),
        }
        length = str(DECIDING_LENGTH)
        was, now = (each["by_length"][length] for each in (before, after))
        if now <= was and not self._tuning.keep:
            self._staging.discard()
            raise NotBetterError(
                f"The tuned drafter gives {now:.3f} tokens a pass at {length} drafts on the held-out outputs, the "
                f"drafter as it was {was:.3f}, so it is not kept. Give more traces or another `learning_rate`; `keep` "
                "keeps it all the same.",
                result,
            )
        self._staging.publish(result)
        return result

    def _make_model(self, training: Sequence[Batch], measured: Sequence[Batch]) -> tuple[dict[str, Any], float]:
        """Measure and train the drafter, and write the tuned one; returns the figures and the seconds of training.

        On return nothing of the drafter is held any more.
        """
        order = [
            training[place]
            for epoch in range(self._settings.epochs)
            for place in shuffled(len(training), seed=self._settings.seed, epoch=epoch)
        ]
        before, trainer = self._trainer(measured, len(order))
        started = time.perf_counter()
        weights = self._train(trainer, order)
        seconds = time.perf_counter() - started
        self._staging.write_model(weights, self._small_files())
        return before, seconds

    def _trainer(self, measured: Sequence[Batch], n_steps: int) -> tuple[dict[str, Any], Trainer]:
        """Measure the drafter, and begin. Packed weights are let go, for the trainer has floats."""
        model = load_model(self._files.path)
        before = self._staging.once(lambda: self._measured("measuring before", model, measured))
        return before, Trainer(model, self._settings, n_steps=n_steps)

    def _measured(self, what: str, model: LoadedModel, measured: Sequence[Batch]) -> dict[str, Any]:
        n_total = sum(len(batch.targets) for batch in measured)

        def show(n_done: int) -> None:
            self._progress(Progress(what=what, n_done=n_done, n_total=n_total))
            if self._is_stopped():
                raise Stopped

        told = tokens_a_pass(model.module, measured, show)
        by_length = {str(length): round(value, 4) for length, value in told.by_length.items()}
        return {"tokens": told.n_tokens, "named": round(told.named, 4), "by_length": by_length}

    def _train(self, trainer: Trainer, order: Sequence[Batch]) -> dict[str, Any]:
        """Take the steps that are left of these batches in order; returns the tuned tensors."""
        if (last := self._staging.last_step()) is not None:
            trainer.load_state(last[1], last[0])
        n_total = sum(len(batch.targets) for batch in order)
        n_done = n_before = sum(len(batch.targets) for batch in order[: trainer.n_taken])
        saved = time.monotonic()
        self._progress(Progress(what="training", n_done=n_done, n_total=n_total, n_before=n_before))
        for batch in order[trainer.n_taken :]:
            loss = trainer.step(batch)
            n_done += len(batch.targets)
            note = f"loss {loss:.3f}"
            self._progress(Progress(what="training", n_done=n_done, n_total=n_total, n_before=n_before, note=note))
            is_stopped = self._is_stopped()
            if is_stopped or time.monotonic() - saved > _SAVE_EVERY_S:
                self._staging.save_step(trainer.n_taken, trainer.state())
                saved = time.monotonic()
            if is_stopped:
                raise Stopped
        self._staging.save_step(trainer.n_taken, trainer.state())
        return trainer.weights()

    def _small_files(self) -> dict[str, bytes]:
        """Config and tokenizer of the drafter; the tuned one has floats."""
        checkpoint = self._files.checkpoint
        config = {name: value for name, value in checkpoint.config.items() if name not in _PACKING_KEYS}
        config["torch_dtype"] = "bfloat16"
        copied = {name: (checkpoint.folder / name).read_bytes() for name in checkpoint.extra_files if name in COPIED}
        return {**copied, CONFIG_NAME: (json.dumps(config, indent=2) + "\n").encode()}
