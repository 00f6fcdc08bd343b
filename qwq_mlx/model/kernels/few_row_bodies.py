"""The bodies of the kernels of few rows: what each hands to few_row_matmul.cu, and does with the sums.

Does not: launch them (`few_row_matmul` does).
"""

from __future__ import annotations

__all__ = ["BODIES", "FILES", "INPUTS", "OUTPUTS"]

FILES = ("tensor_cores.cu", "few_row_matmul.cu")

_PACKED, _PAIR = ("x", "w0", "s0", "b0"), ("x", "squares", "w0", "s0", "b0", "w1", "s1", "b1")
INPUTS = {
    "for_norm": ("x", "norm"),
    "join": ("slices", "added"),
    "join_for_norm": ("slices", "added", "norm"),
    "linear": (*_PACKED, "added"),
    "linear_for_norm": (*_PACKED, "added", "norm"),
    "linears": ("x", "squares", *(f"{name}{part}" for part in range(3) for name in ("w", "s", "b", "bias"))),
    "swiglu_linears": _PAIR,
    "wide_linear": (*_PACKED, "added"),
    "wide_slices": _PACKED,
    "wide_swiglu_linears": _PAIR,
}
OUTPUTS = dict.fromkeys(INPUTS, ("y0",)) | {
    "for_norm": ("weighted", "squares"),
    "join_for_norm": ("y0", "weighted", "squares"),
    "linear_for_norm": ("y0", "weighted", "squares"),
    "linears": ("y0", "y1", "y2", "zeros"),
    "wide_slices": ("slices",),
}

_BEGIN = """
  extern __shared__ __align__(16) unsigned char shared[];
  const int n_rows = x_shape[0] * x_shape[1];
"""
_PRODUCTS = "  const auto sums = products<K, GROUP, R, TURNS, RT, WARPS, NT>(x, n_rows, tiles, shared, meanwhile);\n"
_NOTHING = "  const auto meanwhile = [] {};\n"
_FACTORS = """
  __shared__ float factors[8 * NT];
  const float eps = __uint_as_float((uint32_t)EPS);
  const auto meanwhile = [&] { norm_factors<K, WARPS, 8 * NT>(squares, n_rows, eps, factors); };
"""
_LINEAR = f"""{_BEGIN}{_NOTHING}
  Tile tiles[RT];
  const int first = blockIdx.x * 16 * RT;
  for (int r = 0; r < RT; ++r) tiles[r] = tile_at<GROUP, K>(w0, s0, b0, first + 16 * r);
{_PRODUCTS}"""
_WIDE_LINEAR = f"""{_BEGIN}{_NOTHING}
  constexpr int ROWS = 32 * WARPS, STEPS = K / S / SLICES, PART = SLICES > 1 ? STEPS : TURNS * R * GROUP / S;
  const int slice = blockIdx.x % SLICES, first = blockIdx.x / SLICES * ROWS;
  const Tile tile = tile_at<GROUP, K>(w0, s0, b0, first);
  const auto sums = wide_products<K, GROUP, S, STEPS, PART, WARPS, NT, false>(
      x, n_rows, tile, tile, slice * STEPS, shared, meanwhile);
  for (int i = threadIdx.x; i < ROWS * n_rows; i += ROWS) {{
    const int row = i % ROWS, m = i / ROWS;
"""
_JOIN = """
  const int n_rows = slices_shape[1], at = blockIdx.x * THREADS + threadIdx.x;
  const bool is_value = at < n_rows * N0;
  float sum = 0.f;
  #pragma unroll
  for (int slice = 0; slice < SLICES; ++slice) sum += is_value ? slices[(size_t)slice * n_rows * N0 + at] : 0.f;
  const bf16 y = __float2bfloat16(sum + (ADD && is_value ? __bfloat162float(added[at]) : 0.f));
  if (is_value) y0[at] = y;
"""
BODIES = {
    "for_norm": """
  const int n = x_shape[0] * x_shape[1] * N0, at = blockIdx.x * THREADS + threadIdx.x;
  leave_for_norm({norm, weighted, squares}, at < n, at < n ? __bfloat162float(x[at]) : 0.f, at % N0, at);
""",
    "join": _JOIN,
    "join_for_norm": f"""{_JOIN}
  leave_for_norm({{norm, weighted, squares}}, is_value, __bfloat162float(y), at % N0, at);
""",
    "linear": f"""{_LINEAR}
  for (int i = threadIdx.x; i < 16 * RT * n_rows; i += 32 * WARPS) {{
    const int row = i % (16 * RT), m = i / (16 * RT);
    const size_t at = (size_t)m * N0 + first + row;
    y0[at] = __float2bfloat16(sums(row, m) + (ADD ? __bfloat162float(added[at]) : 0.f));
  }}
""",
    "linear_for_norm": f"""{_LINEAR}
  const int n = 16 * RT * n_rows;
  for (int i = threadIdx.x; i < (n + 31) / 32 * 32; i += 32 * WARPS) {{
    const int row = i % (16 * RT), m = i / (16 * RT);
    const size_t at = (size_t)m * N0 + first + row;
    const bf16 y = i < n ? __float2bfloat16(sums(row, m) + __bfloat162float(added[at])) : bf16{{}};
    if (i < n) y0[at] = y;
    leave_for_norm({{norm, weighted, squares}}, i < n, __bfloat162float(y), first + row, at);
  }}
""",
    "linears": f"""{_BEGIN}{_FACTORS}
  if (blockIdx.x == 0)
    for (int i = threadIdx.x; i < ZEROS; i += 32 * WARPS) zeros[i] = 0;
  Tile tiles[RT];
  const int place = blockIdx.x * 16 * RT;
  const int part = place < N0 ? 0 : place < N0 + N1 ? 1 : 2;
  const int first = place - (part == 0 ? 0 : part == 1 ? N0 : N0 + N1), n_out = part == 0 ? N0 : part == 1 ? N1 : N2;
  const uint32_t* w = part == 0 ? w0 : part == 1 ? w1 : w2;
  const bf16* s = part == 0 ? s0 : part == 1 ? s1 : s2;
  const bf16* b = part == 0 ? b0 : part == 1 ? b1 : b2;
  const bf16* bias = part == 0 ? bias0 : part == 1 ? bias1 : bias2;
  bf16* y = part == 0 ? y0 : part == 1 ? y1 : y2;
  for (int r = 0; r < RT; ++r) tiles[r] = tile_at<GROUP, K>(w, s, b, first + 16 * r);
{_PRODUCTS}
  for (int i = threadIdx.x; i < 16 * RT * n_rows; i += 32 * WARPS) {{
    const int row = i % (16 * RT), m = i / (16 * RT);
    const float value = sums(row, m) * factors[m] + __bfloat162float(bias[first + row]);
    y[(size_t)m * n_out + first + row] = __float2bfloat16(value);
  }}
""",
    "swiglu_linears": f"""{_BEGIN}{_FACTORS}
  const int first = blockIdx.x * 16;
  const Tile tiles[2] = {{tile_at<GROUP, K>(w0, s0, b0, first), tile_at<GROUP, K>(w1, s1, b1, first)}};
{_PRODUCTS}
  for (int i = threadIdx.x; i < 16 * n_rows; i += 32 * WARPS) {{
    const int row = i % 16, m = i / 16;
    const float value = swiglu(sums(row, m) * factors[m], sums(16 + row, m) * factors[m]);
    y0[(size_t)m * N0 + first + row] = __float2bfloat16(value);
  }}
""",
    "wide_linear": f"""{_WIDE_LINEAR}
    const size_t at = (size_t)m * N0 + first + row;
    y0[at] = __float2bfloat16(sums[row][m] + (ADD ? __bfloat162float(added[at]) : 0.f));
  }}
""",
    "wide_slices": f"""{_WIDE_LINEAR}
    slices[((size_t)slice * n_rows + m) * N0 + first + row] = sums[row][m];
  }}
""",
    "wide_swiglu_linears": f"""{_BEGIN}{_FACTORS}
  constexpr int HALF = 16 * WARPS, PART = TURNS * R * GROUP / S;
  const int first = blockIdx.x * HALF;
  const Tile gate = tile_at<GROUP, K>(w0, s0, b0, first), up = tile_at<GROUP, K>(w1, s1, b1, first);
  const auto sums =
      wide_products<K, GROUP, S, K / S, PART, WARPS, NT, true>(x, n_rows, gate, up, 0, shared, meanwhile);
  for (int i = threadIdx.x; i < HALF * n_rows; i += 2 * HALF) {{
    const int row = i % HALF, m = i / HALF;
    const float value = swiglu(sums[row][m] * factors[m], sums[HALF + row][m] * factors[m]);
    y0[(size_t)m * N0 + first + row] = __float2bfloat16(value);
  }}
""",
}
