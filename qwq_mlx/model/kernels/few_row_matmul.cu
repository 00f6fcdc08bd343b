// Products of 1 to 32 rows of bfloat16 with matrices of 4-bit codes: y = x @ (scales * codes + biases).T
//
// A warp owns RT tiles of 16 rows of a matrix; the rows of x are columns of mma.m16n8k16 (bfloat16 in, float32 sums), so
// 1 to 8 rows of x cost one read of the codes. The warps of a block split the inner dimension K in runs of R groups.
// A run's codes, scales and biases come to shared memory by one cp.async each, and while a warp waits for them the
// other warps of the processor multiply. What a row of x gives does not depend on how many rows there are: the order
// of its sums is that of K alone.
#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

// A tile: 16 rows of a packed matrix, from their first on.
struct Tile {
  const uint32_t* codes;
  const bf16* scales;
  const bf16* biases;
};

template <int GROUP, int K>
__device__ __forceinline__ Tile tile_at(const uint32_t* codes, const bf16* scales, const bf16* biases, int row) {
  return {codes + (size_t)row * (K / 8), scales + (size_t)row * (K / GROUP), biases + (size_t)row * (K / GROUP)};
}

template <int N> struct Words;
template <> struct Words<1> { using type = uint32_t; };
template <> struct Words<2> { using type = uint2; };
template <> struct Words<4> { using type = uint4; };

template <int BYTES> __device__ __forceinline__ void copy_async(void* to, const void* from) {
  const uint32_t at = (uint32_t)__cvta_generic_to_shared(to);
  if constexpr (BYTES == 16) asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" :: "r"(at), "l"(from));
  else asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" :: "r"(at), "l"(from), "n"(BYTES));
}

__device__ __forceinline__ void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Codes 0 and 4 of a word as a pair of bfloat16, times scale plus bias. 0x4300 is 128, and its last bits count ones.
__device__ __forceinline__ uint32_t unpacked(uint32_t word, __nv_bfloat162 scale, __nv_bfloat162 bias) {
  uint32_t pair;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(pair) : "r"(word));
  const __nv_bfloat162 code =
      __hsub2(*reinterpret_cast<__nv_bfloat162*>(&pair), __floats2bfloat162_rn(128.f, 128.f));
  const __nv_bfloat162 value = __hfma2(code, scale, bias);
  return *reinterpret_cast<const uint32_t*>(&value);
}

// The sums of a block: sums(row of its RT * 16, row of x) once the threads have met.
template <int RT, int WARPS, int NT> struct Sums {
  using Shared = float[RT * 16][NT * 8 + 1];  // one more column than there are, against conflicts of banks
  const Shared* warps;
  __device__ __forceinline__ float operator()(int row, int column) const {
    float sum = 0.f;
    #pragma unroll
    for (int warp = 0; warp < WARPS; ++warp) sum += warps[warp][row][column];
    return sum;
  }
};

// x: (n_rows, K), at most 8 * NT. shared: what `shared_bytes` of few_row_matmul.py counts.
template <int K, int GROUP, int R, int RT, int WARPS, int NT>
__device__ Sums<RT, WARPS, NT> products(const bf16* x, int n_rows, const Tile (&tiles)[RT], unsigned char* shared) {
  constexpr int W = GROUP / 32;                        // words of a row and group that one lane multiplies
  constexpr int GROUPS = K / GROUP, RUNS = GROUPS / R;
  constexpr int ROW = R * GROUP / 2;                   // bytes of codes of a row in a run
  constexpr int STRIDE = ROW + 32;                     // scales and biases stand behind them
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const int g = lane >> 2, t = lane & 3;               // as mma names a lane's row and column
  unsigned char* mine = shared + warp * (16 * RT * STRIDE);

  auto fetch = [&](int run) {
    #pragma unroll
    for (int r = 0; r < RT; ++r) {
      const unsigned char* codes = reinterpret_cast<const unsigned char*>(tiles[r].codes) + run * ROW;
      #pragma unroll
      for (int j = 0; j < ROW / 32; ++j) {
        const int piece = lane + 32 * j, row = piece / (ROW / 16), at = piece % (ROW / 16) * 16;
        copy_async<16>(mine + (16 * r + row) * STRIDE + at, codes + (size_t)row * (K / 2) + at);
      }
      const int row = lane & 15;
      const bf16* floats = (lane < 16 ? tiles[r].scales : tiles[r].biases) + (size_t)row * GROUPS + run * R;
      copy_async<2 * R>(mine + (16 * r + row) * STRIDE + ROW + (lane < 16 ? 0 : 16), floats);
    }
    asm volatile("cp.async.commit_group;");
  };

  float sums[RT][NT][4] = {};
  if (warp < RUNS) fetch(warp);
  #pragma unroll 1
  for (int run = warp; run < RUNS; run += WARPS) {
    asm volatile("cp.async.wait_group 0;");
    __syncwarp();
    #pragma unroll 2
    for (int i = 0; i < R; ++i) {
      uint32_t words[RT][2][W];  // of rows g and g + 8
      __nv_bfloat162 scales[RT][2], biases[RT][2];
      #pragma unroll
      for (int r = 0; r < RT; ++r)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
          const unsigned char* row = mine + (16 * r + 8 * h + g) * STRIDE;
          using Vector = typename Words<W>::type;
          *reinterpret_cast<Vector*>(words[r][h]) = *reinterpret_cast<const Vector*>(row + (4 * i + t) * W * 4);
          scales[r][h] = __bfloat162bfloat162(*reinterpret_cast<const bf16*>(row + ROW + 2 * i));
          biases[r][h] = __bfloat162bfloat162(*reinterpret_cast<const bf16*>(row + ROW + 16 + 2 * i));
        }
      #pragma unroll
      for (int w = 0; w < W; ++w) {
        uint32_t b[NT][4];  // x in the order in which `unpacked` takes codes out of a word: 0 4, 1 5, 2 6, 3 7
        #pragma unroll
        for (int n = 0; n < NT; ++n) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (8 * n + g < n_rows)
            v = *reinterpret_cast<const uint4*>(x + (size_t)(8 * n + g) * K + (run * R + i) * GROUP + (t * W + w) * 8);
          b[n][0] = __byte_perm(v.x, v.z, 0x5410);
          b[n][1] = __byte_perm(v.x, v.z, 0x7632);
          b[n][2] = __byte_perm(v.y, v.w, 0x5410);
          b[n][3] = __byte_perm(v.y, v.w, 0x7632);
        }
        #pragma unroll
        for (int r = 0; r < RT; ++r) {
          uint32_t low[4], high[4];
          #pragma unroll
          for (int h = 0; h < 2; ++h) {
            const uint32_t word = words[r][h][w];
            low[h] = unpacked(word, scales[r][h], biases[r][h]);
            low[2 + h] = unpacked(word >> 4, scales[r][h], biases[r][h]);
            high[h] = unpacked(word >> 8, scales[r][h], biases[r][h]);
            high[2 + h] = unpacked(word >> 12, scales[r][h], biases[r][h]);
          }
          #pragma unroll
          for (int n = 0; n < NT; ++n) {
            mma(sums[r][n], low, b[n][0], b[n][1]);
            mma(sums[r][n], high, b[n][2], b[n][3]);
          }
        }
      }
    }
    __syncwarp();
    if (run + WARPS < RUNS) fetch(run + WARPS);
  }

  __syncthreads();
  auto warps = reinterpret_cast<typename Sums<RT, WARPS, NT>::Shared*>(shared);
  #pragma unroll
  for (int r = 0; r < RT; ++r)
    #pragma unroll
    for (int n = 0; n < NT; ++n)
      #pragma unroll
      for (int e = 0; e < 4; ++e) warps[warp][16 * r + g + 8 * (e / 2)][8 * n + 2 * t + e % 2] = sums[r][n][e];
  __syncthreads();
  return {warps};
}
