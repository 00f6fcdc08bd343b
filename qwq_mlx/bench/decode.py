"""The contest: decode tokens per second of our loop and mlx-lm's, on the same arrays, with the same sampling.

Two levels. "ids": the loop alone, from logits to ids (ours also works out logprob and entropy of every id and refuses
NaN). "text": what a user sees, ids to text (ours also splits thinking from answer). Where mlx-lm would compute in
another type than we do, a folder is also run as mlx-lm loads it (bfloat16 throughout). For the QwQ-shaped model it is
left out, and on the CPU backend its runs are an eighth as long: a token of that width takes a second or more there.

Does not: measure prefill or quality.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from qwq_mlx.bench.models import in_compute_type, qwq_shaped, random_module
from qwq_mlx.bench.timing import BenchOptions, Rates, compare
from qwq_mlx.model.folder import open_model_folder
from qwq_mlx.model.load import default_compute_type
from qwq_mlx.model.upstream import import_mlx, import_mlx_lm
from qwq_mlx.options import Limits, Sampling

__all__ = ["Row", "bench_folder", "bench_qwq_shaped", "describe_machine"]

OURS, THEIRS, AS_LOADED = "qwq_mlx", "mlx-lm, same arrays", "mlx-lm as it loads"
_N_PROMPT = 2  # the loop is measured from an empty context; prefill is not timed, but waited for
_CPU_SHARE = 8
_QUESTION = "Add one pair of parentheses to make the equation true: 1 + 2 * 3 + 4 * 5 + 6 * 7 + 8 * 9 = 479"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of the table. n_tokens: per run, at most. rates: contestant -> its runs."""

    model: str
    level: str
    n_tokens: int
    rates: dict[str, Rates]

    def as_json(self) -> dict[str, Any]:
        """Medians, runs and our ratio to each other contestant."""
        return {
            "model": self.model,
            "level": self.level,
            "tokens": self.n_tokens,
            "median_tok_s": {name: round(rates.median, 3) for name, rates in self.rates.items()},
            "ratio": {
                name: round(self.rates[OURS].median / rates.median, 3)
                for name, rates in self.rates.items()
                if name != OURS
            },
            "runs_tok_s": {name: [round(run, 3) for run in rates.runs] for name, rates in self.rates.items()},
        }


def bench_qwq_shaped(options: BenchOptions, progress: Callable[[str], None]) -> Row:
    """QwQ-32B's widths with few layers and random 4-bit weights, at the level of ids."""
    config, packed = qwq_shaped(options.n_layers)
    compute_type = default_compute_type()
    module = random_module(config, packed, compute_type, seed=0)
    if compute_type == "float32":
        options = replace(options, n_tokens=max(2, options.n_tokens // _CPU_SHARE))
    model = f"QwQ-shaped, {options.n_layers} of 64 layers, random 4-bit weights"
    return _ids_row(model, module, None, config.vocab_size, options, progress)


def bench_folder(folder: Path, options: BenchOptions, progress: Callable[[str], None]) -> list[Row]:
    """A model folder at both levels. Raises as `load_model` does."""
    from qwq_mlx.generate.reasoner import load

    reasoner = load(folder, verify=False)  # nothing else is to run beside what is measured
    model, packed = reasoner.model, open_model_folder(folder).packed
    is_same = model.compute_type == "bfloat16"
    twin = None if is_same else in_compute_type(model.module, model.config, packed, "bfloat16")
    name = f"{folder.resolve().name} ({model.weights})"
    return [
        _ids_row(name, model.module, twin, model.tokenizer.n_ids, options, progress),
        _text_row(name, reasoner, twin, options, progress),
    ]


def _ids_row(
    model: str, module: Any, twin: Any, n_ids: int, options: BenchOptions, progress: Callable[[str], None]
) -> Row:
    prompt = [(7 * place) % min(n_ids, 256) for place in range(_N_PROMPT)]
    contestants: dict[str, Callable[[], Iterable[object]]] = {
        OURS: lambda: _our_ids(module, prompt, n_ids, options.n_tokens),
        THEIRS: lambda: _their_ids(module, prompt, options.n_tokens),
    }
    if twin is not None:
        contestants[AS_LOADED] = lambda: _their_ids(twin, prompt, options.n_tokens)
    rates = compare(contestants, repeats=options.repeats, progress=lambda text: progress(f"{model}, ids: {text}"))
    return Row(model=model, level="ids", n_tokens=options.n_tokens, rates=rates)


def _text_row(model: str, reasoner: Any, twin: Any, options: BenchOptions, progress: Callable[[str], None]) -> Row:
    limits = Limits(max_tokens=options.n_tokens)
    contestants: dict[str, Callable[[], Iterable[object]]] = {
        OURS: lambda: reasoner.stream(_QUESTION, sampling=_sampling(), limits=limits),
        THEIRS: lambda: _their_text(reasoner, reasoner.model.module, options.n_tokens),
    }
    if twin is not None:
        contestants[AS_LOADED] = lambda: _their_text(reasoner, twin, options.n_tokens)
    rates = compare(contestants, repeats=options.repeats, progress=lambda text: progress(f"{model}, text: {text}"))
    return Row(model=model, level="text", n_tokens=options.n_tokens, rates=rates)


def _sampling() -> Sampling:
    """QwQ-32B-Preview's own values, whatever the folder says, so that every model does the same work."""
    return Sampling(temperature=0.7, top_p=0.8, top_k=20, seed=0)


def _our_ids(module: Any, prompt: Sequence[int], n_ids: int, n_tokens: int) -> Iterable[object]:
    from qwq_mlx.engine.decoder import Decoder
    from qwq_mlx.engine.kv_cache import new_cache
    from qwq_mlx.engine.row import Row
    from qwq_mlx.engine.sampler import Sampler
    from qwq_mlx.options import NEUTRAL

    decoder = Decoder(module, n_ids=n_ids)
    row = Row(Sampler(_sampling().resolve(NEUTRAL), seed=0), cache=new_cache(module), max_tokens=n_tokens)
    for _ in decoder.prefill(row, prompt, chunk=Limits().prefill_step):
        pass
    for _ in range(n_tokens):
        yield decoder.draw(row)


def _their_sampler() -> Any:
    ours = _sampling()
    make = import_mlx_lm("mlx_lm.sample_utils").make_sampler
    return make(temp=ours.temperature, top_p=ours.top_p, top_k=ours.top_k)


def _their_ids(module: Any, prompt: Sequence[int], n_tokens: int) -> Iterable[object]:
    step = import_mlx_lm("mlx_lm.generate").generate_step
    ids = import_mlx().array(list(prompt))
    yield from step(ids, module, max_tokens=n_tokens, sampler=_their_sampler())


def _their_text(reasoner: Any, module: Any, n_tokens: int) -> Iterable[object]:
    from qwq_mlx.model.prompt import prompt_ids

    model = reasoner.model
    wrapper = import_mlx_lm("mlx_lm.tokenizer_utils").TokenizerWrapper(
        model.tokenizer.hf, eos_token_ids=sorted(model.stop_ids)
    )
    ids = prompt_ids(model.tokenizer, _QUESTION, context=model.config.max_position_embeddings)
    stream = import_mlx_lm("mlx_lm.generate").stream_generate
    yield from stream(module, wrapper, ids, max_tokens=n_tokens, sampler=_their_sampler())


def describe_machine() -> dict[str, str]:
    """Device, backend and versions, for the JSON line."""
    mx = import_mlx()
    return {
        "device": str(mx.device_info().get("device_name") or platform.machine()),
        "backend": str(mx.default_device()),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
    }
