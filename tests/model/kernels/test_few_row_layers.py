"""The layers of few rows, wired as on an NVIDIA GPU, with products in float32 in place of the kernels.

What the kernels themselves compute is checked by `python -m qwq_mlx.doctor` where they run.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from attention_in_place import attend
from configs import SMALL

from qwq_mlx.bench.models import in_compute_type, random_module
from qwq_mlx.engine.kv_cache import forked_cache, new_cache
from qwq_mlx.engine.model_runner import feed_prompt, run_pass
from qwq_mlx.model import rotations
from qwq_mlx.model.architecture import tensor_shapes
from qwq_mlx.model.kernels import layer_graphs, layers
from qwq_mlx.model.kernels.few_row_matmul import ForNorm, PackedMatrix
from qwq_mlx.model.kernels.tiling import Tiling, choose_tiling, shared_bytes
from qwq_mlx.model.layout import Packing
from qwq_mlx.model.memory.activations import MAX_FEW_ROWS
from qwq_mlx.model.products import most_rows_alike
from qwq_mlx.model.row_caches import joined
from qwq_mlx.model.shared_prefix import MIN_SHARED

CONFIG = replace(SMALL, hidden_size=256, intermediate_size=512, vocab_size=64)


def _product(x: mx.array, matrix: PackedMatrix, tiling: Tiling, residual: mx.array | None = None) -> mx.array:
    y = _sums(x, matrix, tiling)
    return (y if residual is None else residual + y).astype(mx.bfloat16)


def _sums(x: mx.array, matrix: PackedMatrix, tiling: Tiling) -> mx.array:
    codes, scales, biases = matrix[0], *(each.astype(mx.float32) for each in matrix[1:])
    return x.astype(mx.float32) @ mx.dequantize(codes, scales, biases, group_size=tiling.group_size, bits=4).T


def _for_norm(x: mx.array, norm: mx.array) -> ForNorm:
    return ForNorm(x * norm, mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1] // 16, 16).sum(axis=-1))


def _product_for_norm(
    x: mx.array, matrix: PackedMatrix, tiling: Tiling, residual: mx.array, norm: mx.array
) -> tuple[mx.array, ForNorm]:
    y = _product(x, matrix, tiling, residual)
    return y, _for_norm(y, norm)


def _normed(left: ForNorm, eps: float) -> mx.array:
    mean = left.squares.sum(axis=-1) / left.weighted.shape[-1]
    return left.weighted * mx.rsqrt(mean + eps).reshape(*left.weighted.shape[:-1], 1)


def _three(
    x: ForNorm, matrices: list[tuple[PackedMatrix, mx.array]], tiling: Tiling, eps: float, n_zeros: int
) -> tuple[list[mx.array], mx.array]:
    products = [(_sums(_normed(x, eps), matrix, tiling) + bias).astype(mx.bfloat16) for matrix, bias in matrices]
    return products, mx.zeros(n_zeros, mx.uint32)


def _pair(x: ForNorm, gate: PackedMatrix, up: PackedMatrix, tiling: Tiling, eps: float) -> mx.array:
    gated, other = (_sums(_normed(x, eps), each, tiling) for each in (gate, up))
    return (gated * mx.sigmoid(gated) * other).astype(mx.bfloat16)


@pytest.fixture
def as_if_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers, "cuda_kernels_run", lambda: True)
    twins = {
        "for_norm": _for_norm,
        "linear": _product,
        "linear_for_norm": _product_for_norm,
        "linears": _three,
        "swiglu_linears": _pair,
    }
    for home in (layers, layer_graphs):
        for name in twins.keys() & vars(home).keys():
            monkeypatch.setattr(home, name, twins[name])


def _packed(packing: Packing = Packing(bits=4, group_size=64)) -> dict[str, Packing]:  # noqa: B008 - it is frozen
    return {name.removesuffix(".weight"): packing for name, shape in tensor_shapes(CONFIG).items() if len(shape) == 2}


def _module(packing: Packing = Packing(bits=4, group_size=64)) -> tuple[Any, Any]:  # noqa: B008 - it is frozen
    """A random model whose layers were exchanged, and mlx_lm's own layers on the same arrays in float32."""
    packed = _packed(packing)
    layer_graphs.layer_graphs.cache_clear()  # compiled graphs hold what they were traced with
    module = random_module(CONFIG, packed, "bfloat16", seed=3)
    return module, in_compute_type(module, CONFIG, packed, "float32")


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("n_ids", [1, 5, 33])
def test_a_model_of_exchanged_layers_computes_what_mlx_lms_own_does(n_ids: int) -> None:
    ours, theirs = _module()
    assert type(ours.layers[0]).__name__ == "FewRowBlock" and ours.lm_head.tiling is not None
    caches = [new_cache(ours), new_cache(theirs)]
    for ids in (mx.arange(n_ids)[None], mx.array([[7]])):
        found, expected = ours(ids, cache=caches[0]), theirs(ids, cache=caches[1])
        assert mx.abs(found - expected).max().item() < 0.02 * mx.abs(expected).max().item()


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_deep_copy_of_a_model_computes_by_weights_of_its_own() -> None:
    ours, _ = _module()
    before = ours(mx.array([[1, 2]]))
    twin = copy.deepcopy(ours)
    assert mx.array_equal(twin(mx.array([[1, 2]])), before)
    for layer in ours.layers:
        layer.mlp.gate_proj.scales = layer.mlp.gate_proj.scales * 2
    assert not mx.array_equal(ours(mx.array([[1, 2]])), before)
    assert mx.array_equal(twin(mx.array([[1, 2]])), before)


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_weights_that_are_exchanged_later_are_multiplied_with() -> None:
    ours, _ = _module()
    ids = mx.arange(3)[None]
    mx.eval(ours(ids))
    other = random_module(CONFIG, _packed(), "bfloat16", seed=4)
    ours.update(other.parameters())
    assert mx.array_equal(ours(ids), other(ids))


class _Hook:
    """In a layer's place: what the layer gives, changed in a new array or in place."""

    def __init__(self, layer: Any, *, is_in_place: bool) -> None:
        self._layer, self._is_in_place = layer, is_in_place

    def __call__(self, *given: Any) -> mx.array:
        x: mx.array = self._layer(*given)
        other = 20 * mx.random.normal(x.shape[-1:], x.dtype, key=mx.random.key(1))
        if not self._is_in_place:
            return x + other
        x += other
        return x


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("is_in_place", [False, True])
def test_what_a_layer_gives_may_be_changed_before_the_next_one_takes_it(is_in_place: bool) -> None:
    """A layer begins the norm of the next; who changes hidden states between them is not overlooked."""
    ours, theirs = _module()
    ids = mx.arange(3)[None]
    unchanged = ours(ids)
    for module in (ours, theirs):
        first, *rest = module.layers
        module.model.layers = [_Hook(first, is_in_place=is_in_place), *rest]
    found, expected = ours(ids), theirs(ids)
    off = mx.abs(found - expected).max().item()
    assert rest and off < 0.02 * mx.abs(expected).max().item() and off < 0.3 * mx.abs(unchanged - expected).max().item()


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_layer_begins_the_norm_of_the_next_and_the_first_one_alone_begins_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    begun = []

    def counted(x: mx.array, norm: mx.array) -> ForNorm:
        begun.append(norm)
        return _for_norm(x, norm)

    monkeypatch.setattr(layers, "for_norm", counted)
    ours, theirs = _module()
    found, expected = ours(mx.arange(3)[None]), theirs(mx.arange(3)[None])
    assert len(ours.layers) > 1 and len(begun) == 1 and begun[0] is ours.layers[0].input_layernorm.weight
    assert mx.abs(found - expected).max().item() < 0.02 * mx.abs(expected).max().item()


def _put_norm(module: Any, name: str) -> None:
    norm = nn.RMSNorm(CONFIG.hidden_size, CONFIG.rms_norm_eps)
    norm.weight = mx.full(CONFIG.hidden_size, 0.25, mx.bfloat16)
    setattr(module.layers[1], name, norm)


def _put_next_layers(module: Any, name: str) -> None:
    setattr(module.layers[0], name, getattr(module.layers[1], name))


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize(
    ("exchange", "name"),
    [
        (_put_norm, "input_layernorm"),
        (_put_norm, "post_attention_layernorm"),
        (_put_next_layers, "self_attn"),
        (_put_next_layers, "mlp"),
    ],
)
def test_a_part_of_a_layer_that_was_exchanged_is_the_one_that_counts(
    exchange: Callable[[Any, str], None], name: str
) -> None:
    ours, theirs = _module()
    ids = mx.arange(3)[None]
    mx.eval(ours(ids))
    for module in (ours, theirs):
        exchange(module, name)
    found, expected = ours(ids), theirs(ids)
    assert mx.abs(found - expected).max().item() < 0.02 * mx.abs(expected).max().item()


def _other_norm(layer: Any) -> None:
    """Its weight is in float32, as mlx.nn makes it."""
    layer.input_layernorm = nn.RMSNorm(CONFIG.hidden_size, CONFIG.rms_norm_eps)


def _other_eps(layer: Any) -> None:
    norm, layer.post_attention_layernorm = layer.post_attention_layernorm, nn.RMSNorm(CONFIG.hidden_size, eps=300.0)
    layer.post_attention_layernorm.weight = norm.weight


def _other_linear(layer: Any) -> None:
    layer.mlp.down_proj = nn.Linear(CONFIG.intermediate_size, CONFIG.hidden_size, bias=False)
    layer.mlp.down_proj.weight = mx.random.normal(layer.mlp.down_proj.weight.shape, mx.bfloat16, key=mx.random.key(1))


class _NoMlp(nn.Module):  # type: ignore[misc]
    def __call__(self, x: mx.array) -> mx.array:
        return -x


def _other_mlp(layer: Any) -> None:
    layer.mlp = _NoMlp()


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("exchange", [_other_norm, _other_eps, _other_linear, _other_mlp])
@pytest.mark.parametrize("place", [0, 1])
def test_a_layer_with_a_part_that_the_kernels_do_not_know_is_mlx_lms_own_again(
    exchange: Callable[[Any], None], place: int
) -> None:
    ours, theirs = _module()
    ids = mx.arange(3)[None]
    unchanged = ours(ids)
    for module in (ours, theirs):
        exchange(module.layers[place])
    found, expected = ours(ids), theirs(ids)
    assert mx.abs(found - expected).max().item() < 0.05 * mx.abs(expected).max().item()
    assert mx.abs(unchanged - expected).max().item() > 0.05 * mx.abs(expected).max().item()


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_rows_of_a_pass_go_through_the_exchanged_layers_with_their_own_caches() -> None:
    ours, theirs = _module()
    rows = [new_cache(ours), new_cache(ours)]
    for row, ids in zip(rows, ([1, 2, 3], [4]), strict=True):
        ours(mx.array([ids]), cache=row)
    found = ours(mx.array([[5], [6]]), cache=joined(rows))
    for place, ids in enumerate(([1, 2, 3, 5], [4, 6])):
        expected = theirs(mx.array([ids]))[0, -1]
        assert mx.abs(found[place, -1] - expected).max().item() < 0.02 * mx.abs(expected).max().item()


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_a_layer_whose_rows_attend_in_place_is_one_graph_of_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotations, "cuda_kernels_run", lambda: True)
    monkeypatch.setattr(layer_graphs, "decode_attention", attend)
    monkeypatch.setattr(layers, "_LAYERS_AT_ONCE", 1)
    handed_over, async_eval = [], mx.async_eval
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: (handed_over.append(arrays[0].shape), async_eval(*arrays)))
    mx.disable_compile()  # the twin writes, which cannot be traced
    try:
        ours, theirs = _module()
        rows = [new_cache(ours), new_cache(ours)]
        for row, ids in zip(rows, ([1, 2, 3], [4]), strict=True):
            mx.eval(ours(mx.array([ids]), cache=row))
        assert handed_over == []  # a prompt is not
        found = run_pass(ours, mx.array([[5], [7], [6]]), rows, [2, 1], batches_from=None)
    finally:
        mx.enable_compile()
    assert handed_over == [*[(3, 1, 256)] * len(ours.layers), (3, 1, 64)]  # each layer as it is described, and logits
    for place, ids in enumerate(([1, 2, 3, 5], [1, 2, 3, 5, 7], [4, 6])):
        expected = theirs(mx.array([ids]))[0, -1]
        assert mx.abs(found[place, -1] - expected).max().item() < 0.02 * mx.abs(expected).max().item()


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_rows_that_share_their_beginning_attend_in_one_graph_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotations, "cuda_kernels_run", lambda: True)
    monkeypatch.setattr(layer_graphs, "decode_attention", attend)
    mx.disable_compile()  # the twin writes, which cannot be traced
    try:
        ours, theirs = _module()
        prompt, tails = [7 * place % 60 for place in range(MIN_SHARED)], [[1, 2], [3]]
        whole = new_cache(ours)
        feed_prompt(ours, whole, prompt)
        rows = [forked_cache(ours, whole, MIN_SHARED) for _ in tails]
        for row, tail in zip(rows, tails, strict=True):
            feed_prompt(ours, row, tail)
        found = run_pass(ours, mx.array([[5], [6]]), rows, [1, 1], batches_from=1)
    finally:
        mx.enable_compile()
    assert all(row[0].n_shared == MIN_SHARED for row in rows)
    for place, tail in enumerate(([1, 2, 5], [3, 6])):
        expected = theirs(mx.array([[*prompt, *tail]]))[0, -1]
        assert mx.abs(found[place, -1] - expected).max().item() < 0.02 * mx.abs(expected).max().item()


def test_of_caches_of_ever_other_shapes_a_graph_holds_few_traces() -> None:
    held, n_traces = 40_000, 0

    def whole(x: mx.array, rotation: list[mx.array], at: mx.array, cache: list[mx.array]) -> mx.array:
        nonlocal n_traces
        n_traces += 1
        return x * rotation[0] + at + cache[0].sum() + mx.array([0.0] * (held // 4)).sum()  # a constant of the trace

    graph = layer_graphs.BoundedGraph(whole)

    def run(n: int) -> None:
        cache = [mx.ones((1, 1, n, 1))] * 2
        assert graph(mx.ones(2), [mx.ones(2)], mx.ones(2), cache).tolist() == [2 + n] * 2

    before = mx.get_active_memory()
    for n in [*range(1, graph.MAX_SHAPES + 1)] * 2:
        run(n)
    assert n_traces == graph.MAX_SHAPES, "each shape is traced once while they are few"
    for n in range(1, 3 * graph.MAX_SHAPES):
        run(n)
    assert mx.get_active_memory() - before < 1.2 * graph.MAX_SHAPES * held


@pytest.mark.usefixtures("as_if_on_a_gpu")
@pytest.mark.parametrize("n_ids", [5, 33])
def test_layers_of_other_packings_multiply_few_rows_by_mlx_and_many_with_the_unpacked_matrix(
    n_ids: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packing = Packing(bits=8, group_size=64)
    ours, theirs = _module(packing)
    if n_ids <= MAX_FEW_ROWS:  # MLX's product of packed bfloat16 on a CPU is off by several percent
        theirs = in_compute_type(ours, CONFIG, _packed(packing), "bfloat16")
    assert type(ours.layers[0]).__name__ == "TransformerBlock" and ours.lm_head.tiling is None
    expected, n_packed = theirs(mx.arange(n_ids)[None]), 0
    product = mx.quantized_matmul

    def counted(*arrays: mx.array, **packing: object) -> mx.array:
        nonlocal n_packed
        n_packed += 1
        return product(*arrays, **packing)

    monkeypatch.setattr(mx, "quantized_matmul", counted)
    found = ours(mx.arange(n_ids)[None])
    assert mx.abs(found - expected).max().item() < 0.05 * mx.abs(expected).max().item()
    assert (n_packed == 0) == (n_ids > MAX_FEW_ROWS)


def test_no_layer_is_exchanged_on_the_cpu() -> None:
    assert not layers.cuda_kernels_run()
    ours, _ = _module()
    assert type(ours.layers[0]).__name__ == "TransformerBlock"


@pytest.mark.parametrize(
    ("n_out", "n_in", "group_size"),
    [(40, 512, 64), (64, 500, 64), (64, 320, 64), (64, 512, 16), (16_400, 512, 64)],
)
def test_shapes_that_the_kernels_do_not_cover_are_left_to_mlx(n_out: int, n_in: int, group_size: int) -> None:
    assert choose_tiling(n_out, n_in, group_size) is None


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("n_in", [512, 896, 1536, 3584, 4864, 5120, 8960, 13_824, 18_944, 27_648, 29_568])
def test_the_warps_of_a_block_cover_every_run_within_the_limits_of_a_block(n_in: int, group_size: int) -> None:
    tiling = choose_tiling(4096, n_in, group_size)
    if tiling is None:
        assert (n_in // group_size) % 2 == 1
        return
    n_runs = n_in // group_size // tiling.groups_a_run
    assert tiling.n_warps * tiling.n_turns >= n_runs > (tiling.n_warps - 1) * tiling.n_turns
    # alignment of a copy of 16, 8 or 4 bytes of scales, and of 16 bytes of codes
    assert n_in // group_size % tiling.groups_a_run == 0 and tiling.groups_a_run * group_size % 64 == 0
    for n_rows in (1, 8, 16, MAX_FEW_ROWS):
        for is_wide in (False, True):
            assert shared_bytes(tiling, n_rows, is_wide=is_wide, n_tiles=2 if n_rows > 16 else 1) <= 99 << 10


@pytest.mark.usefixtures("as_if_on_a_gpu")
def test_32_rows_of_exchanged_layers_are_computed_alike_and_of_others_one() -> None:
    ours, theirs = _module()
    assert (most_rows_alike(ours), most_rows_alike(theirs)) == (32, 1)
    ours.lm_head.tiling = None
    assert most_rows_alike(ours) == 1
