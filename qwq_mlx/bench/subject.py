"""The protocol of a subject: what it gets (`Bench`), and what it returns (`Row`s).

A subject is a function in a file of its own; `SUBJECTS` in `__main__` names them. It measures ours and mlx-lm's on the
same arrays with `take_turns`.

Does not: measure.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from qwq_mlx.bench.machine import read_bandwidth
from qwq_mlx.bench.models import in_compute_type, qwq_shaped, random_module
from qwq_mlx.bench.options import BenchOptions
from qwq_mlx.bench.timing import Runs, take_turns
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.device import backend_name
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.upstream import import_mlx

__all__ = ["AS_LOADED", "OURS", "THEIRS", "Bench", "Row", "Subject", "Target"]

OURS, THEIRS, AS_LOADED = "qwq_mlx", "mlx-lm, same arrays", "mlx-lm as it loads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table.

    subject: that measured it. model: its name. setting: what else is particular, as "ids, context 0".
    unit: "tok/s", of which more is better, or "s" or "ms", of which less is.
    runs: contestant -> its figures; ours is the first.
    byte_limit: tokens per second that reading weights and cache once a token would allow; None where it is no limit.
    """

    subject: str
    model: str
    setting: str
    unit: str
    runs: dict[str, Runs]
    byte_limit: float | None = None

    def times_as_fast(self, other: str) -> float:
        """How many times as fast as another contestant ours is."""
        ours, theirs = self.runs[OURS].median, self.runs[other].median
        return ours / theirs if self.unit == "tok/s" else theirs / ours

    @property
    def fraction_of_limit(self) -> float | None:
        """Of the byte limit that ours reaches."""
        return None if self.byte_limit is None else self.runs[OURS].median / self.byte_limit

    def as_json(self) -> dict[str, Any]:
        """All fields, with medians, spreads and ratios."""
        fraction = self.fraction_of_limit
        return {
            "subject": self.subject,
            "model": self.model,
            "setting": self.setting,
            "unit": self.unit,
            "median": {name: round(each.median, 4) for name, each in self.runs.items()},
            "spread": {name: round(each.spread, 4) for name, each in self.runs.items()},
            "times_as_fast": {name: round(self.times_as_fast(name), 3) for name in self.runs if name != OURS},
            "byte_limit": None if self.byte_limit is None else round(self.byte_limit, 3),
            "fraction_of_limit": None if fraction is None else round(fraction, 4),
            "runs": {name: [round(value, 5) for value in each.values] for name, each in self.runs.items()},
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model in memory.

    module: ours.
    theirs: mlx-lm's on the same arrays.
    n_ids: that may be drawn.
    twin: the same weights in the type that mlx-lm would load, None where it is ours.
    share: runs are this many times shorter (a token of QwQ's width takes a second on a CPU).
    reasoner: of a folder; None for random weights.
    """

    name: str
    module: Any
    theirs: Any
    config: Qwen2Config
    n_ids: int
    twin: Any = None
    share: int = 1
    reasoner: Any = None


class Bench:
    """What subjects share: the options, the model folder, and what is loaded or measured once, when it is first used.

    progress: shows a line that says what runs now. source: the checkpoint that is converted.
    """

    _CPU_SHARE = 8

    def __init__(self, folder: Path, options: BenchOptions, progress: Callable[[str], None], source: Path) -> None:
        self.folder = folder
        self.options = options
        self.progress = progress
        self.source = source

    @property
    def name(self) -> str:
        """Of the model folder."""
        return self.folder.resolve().name

    @cached_property
    def bandwidth(self) -> float:
        """Bytes per second that this machine reads."""
        return read_bandwidth()

    @cached_property
    def targets(self) -> list[Target]:
        """The model folder's, and the QwQ-shaped one, unless one is left out. Raises as `load_model` does."""
        targets = [] if self.options.is_shaped_only else [self._of_folder()]
        if self.options.n_layers > 0:
            targets.append(self._qwq_shaped())
        return targets

    def at_rows(self, measure: Callable[[Target, int], Row]) -> list[Row]:
        """What is measured with each number of rows; a target whose rows take seconds each is left out with a word."""
        rows = []
        for target in self.targets:
            if target.share > 1:
                self.progress(f"{target.name}: left out, its rows take seconds each on the CPU")
                continue
            rows += [measure(target, n_rows) for n_rows in self.options.rows]
        return rows

    def turns(self, contestants: dict[str, Callable[[], float]], what: str) -> dict[str, Runs]:
        """`take_turns` with the options' repeats. what: begins the lines of progress.

        The medians are told at once, for a benchmark that is interrupted prints no table.
        A run begins when the device is through with the one before: mlx-lm leaves a step under way at its end.
        """

        def progress(text: str) -> None:
            import_mlx().synchronize()
            self.progress(f"{what}: {text}")

        runs = take_turns(contestants, repeats=self.options.repeats, progress=progress)
        self.progress(f"{what}: medians: " + ", ".join(f"{name} {each.median:.4g}" for name, each in runs.items()))
        return runs

    def _of_folder(self) -> Target:
        from qwq_mlx.generate.reasoner import load

        reasoner = load(self.folder, verify=False)  # nothing else is to run beside what is measured
        model = reasoner.model
        twin = None
        if model.compute_type != "bfloat16":
            twin = in_compute_type(model.module, model.config, model.packed, "bfloat16")
        return Target(
            name=f"{self.name} ({model.weights})",
            module=model.module,
            theirs=in_compute_type(model.module, model.config, model.packed, model.compute_type),
            config=model.config,
            n_ids=model.tokenizer.n_ids,
            twin=twin,
            reasoner=reasoner,
        )

    def _qwq_shaped(self) -> Target:
        """QwQ-32B's widths with few layers; mlx-lm's own type is left out."""
        n_layers = self.options.n_layers
        config, packed = qwq_shaped(n_layers)
        compute_type = default_compute_type()
        module = random_module(config, packed, compute_type, seed=0)
        return Target(
            name=f"QwQ-shaped, {n_layers} of 64 layers, random 4-bit weights",
            module=module,
            theirs=in_compute_type(module, config, packed, compute_type),
            config=config,
            n_ids=config.vocab_size,
            share=self._CPU_SHARE if backend_name() == "cpu" else 1,
        )


class Subject(Protocol):
    """Measures one thing. Raises what loading, converting or generating raises."""

    def __call__(self, bench: Bench) -> list[Row]:
        """The rows of the table."""
        ...
