"""Our attention layer beside numpy in float32, on random small shapes: a plain cache, and one of 8 and of 4 bits.

Each shape is fed as a run is: a chunk behind an empty cache, another behind that, then single ids, which attend in
place where this backend does so. numpy works with the cache's content: where it is quantized, the codes are unpacked
here, and must lie within a step of what was stored.

Does not: judge what quantizing costs in quality.
"""

from __future__ import annotations

import itertools
import time
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from qwq_mlx.doctor.check import Result, Subject
from qwq_mlx.engine.kv_cache import new_cache
from qwq_mlx.model.architecture import Qwen2Config
from qwq_mlx.model.load import build_module, default_compute_type
from qwq_mlx.model.memory.plan import KV_GROUP, can_quantize
from qwq_mlx.model.rotations import use_in_place_attention
from qwq_mlx.model.row_caches import joined
from qwq_mlx.model.upstream import import_mlx
from qwq_mlx.quant.packing import unpack_codes

__all__ = ["TOLERANCE", "Shape", "attention_error", "check_attention"]

TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest error of an output over the largest output, by compute type."""

_BUDGET_S = 60
"""After so long no further quantized cache is begun: on CUDA each compiles kernels for a minute or more."""

_CHUNKS = (21, 8, 1, 1)
# mx.quantize moves its grid so that 0 lies on it, so numbers at the far end may be cut by almost a step; scales and
# biases in bfloat16 add their rounding.
_MAX_STEPS = {"float32": 1.01, "bfloat16": 2.0}

Array = NDArray[np.float32]


class Shape(NamedTuple):
    """Heads of an attention layer, each `width` wide."""

    n_heads: int
    n_kv_heads: int
    width: int


_SHAPES = (Shape(4, 2, 64), Shape(5, 1, 128), Shape(6, 6, 128))


class Errors(NamedTuple):
    """output: largest error over the largest output. cache: the largest error of a stored number in steps of its
    group, 0 where the cache is not quantized.
    """

    output: float
    cache: float


def check_attention(subject: Subject) -> Result:
    """The largest error over all shapes and caches is within the tolerance."""
    compute_type = default_compute_type()
    tolerance, max_steps = TOLERANCE[compute_type], _MAX_STEPS[compute_type]
    errors: dict[str, Errors] = {}
    left_out = []
    start = time.monotonic()
    for kv_bits, (seed, shape) in itertools.product((None, 8, 4), enumerate(_SHAPES)):
        name = f"{shape.n_heads} heads on {shape.n_kv_heads}, {shape.width} wide, cache of {kv_bits or 'all'} bits"
        if kv_bits is not None and not can_quantize(_config(shape), subject.backend):
            left_out.append(f"{name}: not offered on {subject.backend}")
        elif kv_bits is not None and time.monotonic() - start > _BUDGET_S:
            left_out.append(f"{name}: no time, kernels were compiled for {_BUDGET_S} s")
        else:
            errors[name] = attention_error(shape, kv_bits, seed=seed)
    # written so that NaN counts as wrong
    wrong = [name for name, each in errors.items() if not (each.output <= tolerance and each.cache <= max_steps)]
    worst = max(errors, key=lambda name: errors[name].output)
    said = wrong or [worst]
    found = "; ".join(
        f"{name}: off by {errors[name].output:.1e}"
        + (f", stored numbers by {errors[name].cache:.2f} steps" if errors[name].cache else "")
        for name in said[:3]
    )
    if left_out:
        found += f"; left out {len(left_out)}, as {left_out[-1]}"
    return Result(
        outcome="failed" if wrong else "ok",
        found=f"{'' if wrong else 'worst of ' + str(len(errors)) + ': '}{found}",
        expected=f"at most {tolerance:.0e} of the largest output ({compute_type}), stored numbers {max_steps} steps",
        values={"errors": {name: list(each) for name, each in errors.items()}, "left_out": left_out},
    )


def attention_error(shape: Shape, kv_bits: int | None, *, seed: int) -> Errors:
    """Feed random hidden states to our layer and to numpy."""
    mx = import_mlx()
    config, dtype = _config(shape), getattr(mx, default_compute_type())
    module = build_module(config, {})
    attention = module.layers[0].self_attn
    random = np.random.default_rng(seed)
    for name in "qkvo":
        linear = getattr(attention, f"{name}_proj")
        rows, columns = linear.weight.shape
        linear.weight = mx.array(random.normal(size=(rows, columns)) / columns**0.5).astype(dtype)
        if name != "o":
            linear.bias = mx.array(random.normal(size=rows)).astype(dtype)
    module.layers[0].input_layernorm.weight = mx.ones(
        config.hidden_size, dtype
    )  # it says in which type a model computes
    use_in_place_attention(module)
    [cache] = new_cache(module, kv_bits)
    n_ids = sum(_CHUNKS)
    x = mx.array(random.normal(size=(1, n_ids, config.hidden_size))).astype(dtype)
    outputs, start = [], 0
    for n_chunk in _CHUNKS:
        mask = cache.make_mask(n_chunk) if kv_bits is not None else "causal" if n_chunk > 1 else None
        [row] = [cache] if n_chunk > 1 else joined([[cache]], module=module)
        outputs.append(attention(x[:, start : start + n_chunk], mask, row))
        mx.eval(outputs[-1])
        start += n_chunk
    ours = _numpy(mx.concatenate(outputs, axis=1))[0]
    queries, keys, values = _projected(attention, _numpy(x)[0], shape, config.rope_theta)
    cache_error = 0.0
    if kv_bits is not None:
        stored_keys, key_error = _unpacked(cache.keys, keys, kv_bits)
        stored_values, value_error = _unpacked(cache.values, values, kv_bits)
        keys, values, cache_error = stored_keys, stored_values, max(key_error, value_error)
    expected = _attend(queries, keys, values) @ _numpy(attention.o_proj.weight).T
    return Errors(float(np.abs(ours - expected).max() / np.abs(expected).max()), cache_error)


def _config(shape: Shape) -> Qwen2Config:
    return Qwen2Config(
        hidden_size=shape.n_heads * shape.width,
        intermediate_size=KV_GROUP,
        num_hidden_layers=1,
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        vocab_size=KV_GROUP,
        max_position_embeddings=1024,
        rms_norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_word_embeddings=False,
        eos_token_ids=(),
    )


def _projected(attention: Any, x: Array, shape: Shape, theta: float) -> tuple[Array, Array, Array]:
    """Queries (heads, n, width), keys and values (key heads, n, width) of hidden states (n, hidden)."""
    parts = []
    for name, n_heads in (("q", shape.n_heads), ("k", shape.n_kv_heads), ("v", shape.n_kv_heads)):
        linear = getattr(attention, f"{name}_proj")
        projected = x @ _numpy(linear.weight).T + _numpy(linear.bias)
        parts.append(projected.reshape(len(x), n_heads, shape.width).transpose(1, 0, 2))
    queries, keys, values = parts
    return _rotated(queries, theta), _rotated(keys, theta), values


def _rotated(heads: Array, theta: float) -> Array:
    """Rotary position embedding: the halves of a head are turned by position * theta ** (-2 i / width)."""
    n_positions, width = heads.shape[1:]
    angles = np.outer(np.arange(n_positions), theta ** (-np.arange(0, width, 2) / width)).astype(np.float32)
    low, high = heads[..., : width // 2], heads[..., width // 2 :]
    cosines, sines = np.cos(angles), np.sin(angles)
    return np.concatenate([low * cosines - high * sines, high * cosines + low * sines], axis=-1)


def _attend(queries: Array, keys: Array, values: Array) -> Array:
    """Causal attention, (n, heads * width); query heads of a key head stand one after another."""
    n_shared = len(queries) // len(keys)
    keys, values = np.repeat(keys, n_shared, axis=0), np.repeat(values, n_shared, axis=0)
    scores = queries @ keys.transpose(0, 2, 1) / np.float32(queries.shape[-1]) ** 0.5
    scores = np.where(np.tri(queries.shape[1], dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = weights / weights.sum(axis=-1, keepdims=True) @ values
    return np.asarray(mixed.transpose(1, 0, 2).reshape(queries.shape[1], -1), np.float32)


def _unpacked(parts: Any, stored: Array, bits: int) -> tuple[Array, float]:
    """What a quantized cache holds, (key heads, n, width), and its largest error in steps beside what was stored."""
    n_heads, n_positions, width = stored.shape
    codes = np.asarray(parts[0])[0, :, :n_positions]
    scales, biases = (_numpy(part)[0, :, :n_positions, :, None] for part in parts[1:])
    groups = unpack_codes(codes.reshape(-1, codes.shape[-1]), bits).reshape(n_heads, n_positions, -1, KV_GROUP)
    content = groups * scales + biases
    steps = np.abs(content - stored.reshape(content.shape)) / np.abs(scales)
    return content.reshape(n_heads, n_positions, width), float(steps.max())


def _numpy(array: Any) -> Array:
    return np.asarray(array.astype(import_mlx().float32))
