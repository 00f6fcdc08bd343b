"""What a run needs in memory, from headers alone, before a weight is read.

peak = weights + KV cache at the whole context + the larger of what prefill and a decode step (with its logits and what
the sampler makes of them) hold beside them + what more sequences or a draft model add. Weights and cache are exact:
they are counted as MLX allocates them. What a pass holds beside them is an estimate (`activations`): MLX works ahead of
itself, so what is alive at once depends a little on the machine. Scores are why a quantized cache can need more than a
plain one: with 2,048 ids a pass 8 GB at 32,768 positions of QwQ, with 256 1 GB.

On Metal the limit is the recommended working set, two thirds of the memory up to 32 GiB and three quarters above (not
measured on Metal: 16 and 32 GiB as in abetlen/llama-cpp-python#687 and ollama/ollama#434, 96 GiB as in
ggml-org/llama.cpp#3213; on the Mac itself `model.device` asks the system).

Does not: read weights, import MLX, or change a limit. A draft model is planned as mlx-lm decodes with one
(`batch_and_draft` says how close, and what is left out on a GPU).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from qwq_mlx.errors import OptionError
from qwq_mlx.facts import ModelFacts
from qwq_mlx.model.architecture import Qwen2Config, tensor_shapes
from qwq_mlx.model.folder import ModelFolder, open_model_folder
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.memory.activations import logits_bytes, n_positions, sampler_bytes
from qwq_mlx.model.memory.batch_and_draft import batch_bytes, drafted_bytes, speculative_bytes
from qwq_mlx.model.memory.sizes import (
    bytes_of_float,
    bytes_of_pass,
    load_bytes,
    planned_kv_bytes_per_token,
    weights_bytes,
)
from qwq_mlx.model.memory.workload import BACKENDS, KV_GROUP, Backend, ModelShape, Workload
from qwq_mlx.model.split import check_split
from qwq_mlx.quant.recipe import Recipe

__all__ = [
    "KV_GROUP",
    "Backend",
    "MemoryPlan",
    "ModelShape",
    "Workload",
    "can_quantize",
    "largest_where",
    "metal_limit_bytes",
    "plan_memory",
    "shape_of_facts",
    "shape_of_recipe",
]

RESERVE_BYTES = 500_000_000
"""Left free below the limit: buffers that MLX keeps for reuse, the rest of the process. A choice, not measured."""

_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The arithmetic, every part in bytes.

    backend: what the plan is for.
    workload: what was asked for.
    context: positions that are planned.
    weights_bytes: in memory, in the compute type.
    kv_bytes: the KV cache at the whole context.
    kv_bytes_per_token: of the cache.
    prefill_bytes: held beside weights and the whole cache in a prefill pass.
    decode_bytes: held beside weights and cache in a decode step.
    logits_bytes: beside a decode step.
    sampler_bytes: beside a decode step.
    batch_bytes: what other sequences hold beside this one.
    speculative_bytes: what drafts hold more; of a draft model, what mlx-lm holds.
    load_bytes: held beside the weights while they are read.
    reserve_bytes: left free below the limit.
    limit_bytes: what the device gives; None if not asked.
    largest_context: the most positions (of one sequence) that fit under the limit, 0 if none; without a limit the
      context planned.

    >>> plan = qwq_mlx.plan_memory(FOLDER, limit_bytes=1_000_000_000)
    >>> plan.fits, plan.binds, plan.largest_context
    (True, 'prefill', 4096)
    """

    backend: Backend
    workload: Workload
    context: int
    weights_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    prefill_bytes: int
    decode_bytes: int
    logits_bytes: int
    sampler_bytes: int
    batch_bytes: int
    speculative_bytes: int
    load_bytes: int
    reserve_bytes: int
    limit_bytes: int | None
    largest_context: int

    @property
    def peak_bytes(self) -> int:
        """The most that is held at any time."""
        decode = self.decode_bytes + self.logits_bytes + self.sampler_bytes
        running = self.kv_bytes + max(self.prefill_bytes, decode) + self.batch_bytes + self.speculative_bytes
        return self.weights_bytes + max(running, self.load_bytes)

    @property
    def fits(self) -> bool:
        """Whether peak and reserve stay below the limit; true where there is none."""
        return self.limit_bytes is None or self.peak_bytes + self.reserve_bytes <= self.limit_bytes

    @property
    def binds(self) -> str:
        """The largest part: "weights", "KV cache", "prefill", "decode", "batch" or "speculative"."""
        parts = {
            "weights": self.weights_bytes,
            "KV cache": self.kv_bytes,
            "prefill": self.prefill_bytes,
            "decode": self.decode_bytes + self.logits_bytes + self.sampler_bytes,
            "batch": self.batch_bytes,
            "speculative": self.speculative_bytes,
        }
        return max(parts, key=lambda name: parts[name])

    def arithmetic(self) -> str:
        """One line a part, in GB and in bytes, for people."""
        rows = [
            ("weights", self.weights_bytes, ""),
            ("KV cache", self.kv_bytes, f"{self.context:,} positions of {self.kv_bytes_per_token:,} bytes"),
            ("prefill", self.prefill_bytes, f"{self.workload.prefill_step:,} ids per pass"),
            ("decode", self.decode_bytes, "not at the same time as prefill"),
            ("logits", self.logits_bytes, "beside decode"),
            ("sampler", self.sampler_bytes, "beside decode"),
            ("batch", self.batch_bytes, _side_by_side(self.workload)),
            (
                "speculative",
                self.speculative_bytes,
                f"{self.workload.n_draft:,} ids guessed {_guessed_by(self.workload)}",
            ),
            ("peak", self.peak_bytes, ""),
            ("reserve", self.reserve_bytes, ""),
        ]
        if self.limit_bytes is not None:
            rows.append(("limit", self.limit_bytes, f"{'fits' if self.fits else 'does not fit'}, {self.backend}"))
        unused = {"batch": self.workload.n_sequences == 1, "speculative": self.speculative_bytes == 0}
        return "\n".join(
            f"{name:<11}{size / 1e9:>8.2f} GB {size:>18,} bytes  {note}".rstrip()
            for name, size, note in rows
            if not unused.get(name)
        )


def _side_by_side(workload: Workload) -> str:
    shared = f", {workload.n_shared:,} positions of them shared" if workload.n_shared else ""
    return f"{workload.n_sequences:,} sequences side by side{shared}"


def _guessed_by(workload: Workload) -> str:
    return "from the texts so far" if workload.draft is None else "by a draft model, as in mlx-lm"


def shape_of_facts(facts: ModelFacts, *, bits: int = 4, group_size: int = 64, context: int = 32_768) -> ModelShape:
    """The shape of a known model that is not on disk, all matrices packed alike."""
    config = Qwen2Config(
        hidden_size=facts.hidden_size,
        intermediate_size=facts.intermediate_size,
        num_hidden_layers=facts.num_hidden_layers,
        num_attention_heads=facts.num_attention_heads,
        num_key_value_heads=facts.num_key_value_heads,
        vocab_size=facts.vocab_size,
        max_position_embeddings=context,
        rms_norm_eps=1e-5,
        rope_theta=1e6,
        tie_word_embeddings=False,
        eos_token_ids=(),
    )
    packing = Packing(bits=bits, group_size=group_size)
    matrices = [name.removesuffix(".weight") for name, shape in tensor_shapes(config).items() if len(shape) == 2]
    return ModelShape(config=config, packed=dict.fromkeys(matrices, packing))


def shape_of_recipe(facts: ModelFacts, recipe: Recipe) -> ModelShape:
    """The shape of a known model converted by a recipe."""
    shape = shape_of_facts(facts)
    chosen = {path: recipe.packing_of(path, n_layers=shape.config.num_hidden_layers) for path in shape.packed}
    return replace(shape, packed={path: packing for path, packing in chosen.items() if packing is not None})


def metal_limit_bytes(ram_bytes: int) -> int:
    """The recommended working set of a Mac with this much memory (see the module's text; not measured on Metal)."""
    return ram_bytes * 2 // 3 if ram_bytes <= 32 * _GIB else ram_bytes * 3 // 4


def plan_memory(
    model: str | Path | ModelFolder | ModelShape,
    workload: Workload | None = None,
    *,
    limit_bytes: int | None = None,
    reserve_bytes: int = RESERVE_BYTES,
    backend: Backend = "metal",
) -> MemoryPlan:
    """Plan a run: what it needs, whether it fits, and the largest context that does.

    model: a folder (only headers are read) or a shape.
    workload: context, KV cache, prefill passes; None is one sequence over the model's whole context.
    limit_bytes: what the device gives; None plans without one.
    reserve_bytes: left free below the limit.
    backend: "metal" and "cuda" have fused attention and compute in bfloat16 if not told otherwise, "cpu" has none and
      computes in float32.
    Raises OptionError for a context beyond the model's, or kv_bits for heads that cannot be quantized so, the draft
    model's too; LoadError or SourceError as `open_model_folder`.

    >>> from qwq_mlx import facts
    >>> from qwq_mlx.model.memory.plan import metal_limit_bytes, shape_of_facts
    >>> plan = qwq_mlx.plan_memory(shape_of_facts(facts.QWQ_32B_PREVIEW), limit_bytes=metal_limit_bytes(32 << 30))
    >>> plan.weights_bytes, plan.largest_context
    (18431289344, 13056)
    """
    if backend not in BACKENDS:
        raise OptionError(f"backend is {backend!r}, expected one of {', '.join(BACKENDS)}.")
    workload = workload or Workload()
    files = open_model_folder(model) if isinstance(model, (str, Path)) else model
    model_context = files.config.max_position_embeddings
    context = model_context if workload.context is None else workload.context
    if context > model_context:
        raise OptionError(f"context is {context:,}, expected at most {model_context:,}, which is what the model has.")
    if workload.split is not None:
        check_split(workload.split, files.config, files.packed)
    _check_bits(files.config, workload, backend, whose="")
    if workload.draft is not None:
        _check_bits(workload.draft.config, workload, backend, whose="the draft model's ")
    plan = _plan(files, workload, context, backend, limit_bytes, reserve_bytes)
    return plan if limit_bytes is None else replace(plan, largest_context=_largest_context(files, plan, model_context))


def _plan(
    model: ModelFolder | ModelShape,
    workload: Workload,
    context: int,
    backend: Backend,
    limit_bytes: int | None,
    reserve_bytes: int,
) -> MemoryPlan:
    config, float_bytes = model.config, bytes_of_float(workload, backend)
    per_token = planned_kv_bytes_per_token(config, workload, backend)
    kv_bytes = n_positions(context) * per_token
    n_read = workload.n_shared or context  # what rows share is read by itself, when the cache is no longer than that
    prefill = bytes_of_pass(config, workload, min(workload.prefill_step, n_read), n_read, backend)
    prefill = max(0, prefill - (n_positions(context) - n_positions(n_read)) * per_token)
    decode = bytes_of_pass(config, workload, 1, context, backend, n_shared=workload.n_shared)
    draws = workload.rank == 0
    logits, sampler = (logits_bytes(config), sampler_bytes(config)) if draws else (0, 0)
    alone = kv_bytes + max(prefill, decode + logits + sampler)
    batch = 0
    if workload.n_sequences > 1:
        batch = batch_bytes(config, workload, context, backend) - alone
    speculative = 0
    if workload.draft is not None and draws:
        speculative = speculative_bytes(config, workload.draft, workload, context, backend) - alone - batch
    elif workload.drafts_from_texts and draws:
        more = drafted_bytes(config, workload)
        one = max(prefill, decode + logits + sampler + more) - (alone - kv_bytes)  # not while its prompt is read
        speculative = one if workload.n_sequences == 1 else more
    return MemoryPlan(
        backend=backend,
        workload=workload,
        context=context,
        weights_bytes=weights_bytes(config, model.packed, float_bytes, split=workload.split, rank=workload.rank),
        kv_bytes=kv_bytes,
        kv_bytes_per_token=per_token,
        prefill_bytes=prefill,
        decode_bytes=decode,
        logits_bytes=logits,
        sampler_bytes=sampler,
        batch_bytes=batch,
        speculative_bytes=speculative,
        load_bytes=load_bytes(model, workload, backend),
        reserve_bytes=reserve_bytes,
        limit_bytes=limit_bytes,
        largest_context=context,
    )


def _largest_context(model: ModelFolder | ModelShape, plan: MemoryPlan, model_context: int) -> int:
    """A longer context never needs less."""

    def fits(context: int) -> bool:
        return _plan(model, plan.workload, context, plan.backend, plan.limit_bytes, plan.reserve_bytes).fits

    return largest_where(fits, model_context)


def largest_where(is_so: Callable[[int], bool], most: int) -> int:
    """The largest number up to `most` for which it is so, 0 for none: for a larger one it is never so again."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if is_so(middle) else (low, middle - 1)
    return low


def can_quantize(config: Qwen2Config, backend: Backend) -> bool:
    """Whether the KV cache of such heads can be quantized, and multiplied by on this backend."""
    n_groups, rest = divmod(config.head_dim, KV_GROUP)
    return rest == 0 and (n_groups > 1 or backend != "cuda")


def _check_bits(config: Qwen2Config, workload: Workload, backend: Backend, *, whose: str) -> None:
    if workload.kv_bits is None or can_quantize(config, backend):
        return
    if config.head_dim == KV_GROUP:
        raise OptionError(
            f"kv_bits is {workload.kv_bits}, but {whose}heads of width {KV_GROUP} are a single group, by which MLX "
            "0.32.4 on CUDA multiplies wrongly (NaN, or other numbers). Leave kv_bits out."
        )
    raise OptionError(
        f"kv_bits is {workload.kv_bits}, but {whose}heads of width {config.head_dim} are no multiple of the group "
        f"{KV_GROUP}. Leave kv_bits out."
    )
