// Products of 1 to 32 rows of bfloat16 with matrices of 4-bit codes: y = x @ (scales * codes + biases).T
//
// A warp owns RT tiles of 16 rows of a matrix; the rows of x are columns of mma.m16n8k16 (bfloat16 in, float32 sums), so
// 1 to 8 rows of x cost one read of the codes. Codes, scales and biases come to shared memory by cp.async, and while a
// warp waits for them the other warps of the processor multiply.
//
// `products`: the warps of a block split the inner dimension K, each has TURNS runs of R groups, and they read x where
// it lies. `wide_products`: a block has 128 rows of a matrix, and x comes to shared memory once for all of them; blocks
// that each read all of x would read more of it than of the matrix.
//
// What a row of x gives does not depend on how many rows there are, nor on which of the two multiplies: the sums of each
// TURNS runs are added by themselves, and then one after another.

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

// 8 values of a row of x in the order in which `unpacked` takes codes out of a word: 0 4, 1 5, 2 6, 3 7.
__device__ __forceinline__ void ordered(uint4 x, uint32_t (&pairs)[4]) {
  pairs[0] = __byte_perm(x.x, x.z, 0x5410);
  pairs[1] = __byte_perm(x.x, x.z, 0x7632);
  pairs[2] = __byte_perm(x.y, x.w, 0x5410);
  pairs[3] = __byte_perm(x.y, x.w, 0x7632);
}

// Adds a word of 8 codes of rows g and g + 8 of a tile, times x, to the sums of each column of 8 rows of x.
template <int NT>
__device__ __forceinline__ void multiply(
    float (&sums)[NT][4], uint32_t word, uint32_t other, const uint32_t (&scales)[2], const uint32_t (&biases)[2],
    const uint32_t (&x)[NT][4]) {
  const uint32_t words[2] = {word, other};
  uint32_t low[4], high[4];
  #pragma unroll
  for (int h = 0; h < 2; ++h) {
    low[h] = unpacked(words[h], scales[h], biases[h]);
    low[2 + h] = unpacked(words[h] >> 4, scales[h], biases[h]);
    high[h] = unpacked(words[h] >> 8, scales[h], biases[h]);
    high[2 + h] = unpacked(words[h] >> 12, scales[h], biases[h]);
  }
  #pragma unroll
  for (int n = 0; n < NT; ++n) {
    mma(sums[n], low, x[n][0], x[n][1]);
    mma(sums[n], high, x[n][2], x[n][3]);
  }
}

__device__ __forceinline__ uint32_t twice(const unsigned char* value) {
  return __byte_perm(*reinterpret_cast<const uint16_t*>(value), 0, 0x1010);
}

// Writes a tile's sums, as mma gives them to the lanes, to rows of shared memory.
template <int NT> __device__ __forceinline__ void keep(float (*to)[NT * 8 + 1], const float (&sums)[NT][4]) {
  const int g = (threadIdx.x & 31) >> 2, t = threadIdx.x & 3;
  #pragma unroll
  for (int n = 0; n < NT; ++n)
    #pragma unroll
    for (int e = 0; e < 4; ++e) to[g + 8 * (e / 2)][8 * n + 2 * t + e % 2] = sums[n][e];
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

// x: (n_rows, K), at most 8 * NT. shared: what `shared_bytes` of tiling.py counts. meanwhile: is called while the first
// copies are under way.
template <int K, int GROUP, int R, int TURNS, int RT, int WARPS, int NT, class Meanwhile>
__device__ Sums<RT, WARPS, NT> products(
    const bf16* x, int n_rows, const Tile (&tiles)[RT], unsigned char* shared, const Meanwhile& meanwhile) {
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
    commit_copies();
  };

  float sums[RT][NT][4] = {};
  const int last = min(RUNS, (warp + 1) * TURNS);
  if (warp * TURNS < last) fetch(warp * TURNS);
  meanwhile();
  #pragma unroll 1
  for (int run = warp * TURNS; run < last; ++run) {
    wait_for_copies<0>();
    __syncwarp();
    #pragma unroll 2
    for (int i = 0; i < R; ++i) {
      uint32_t words[RT][2][W], scales[RT][2], biases[RT][2];  // of rows g and g + 8
      #pragma unroll
      for (int r = 0; r < RT; ++r)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
          const unsigned char* row = mine + (16 * r + 8 * h + g) * STRIDE;
          using Vector = typename Words<W>::type;
          *reinterpret_cast<Vector*>(words[r][h]) = *reinterpret_cast<const Vector*>(row + (4 * i + t) * W * 4);
          scales[r][h] = twice(row + ROW + 2 * i);
          biases[r][h] = twice(row + ROW + 16 + 2 * i);
        }
      #pragma unroll
      for (int w = 0; w < W; ++w) {
        uint32_t pairs[NT][4];
        #pragma unroll
        for (int n = 0; n < NT; ++n) {
          uint4 v = make_uint4(0, 0, 0, 0);
          if (8 * n + g < n_rows)
            v = *reinterpret_cast<const uint4*>(x + (size_t)(8 * n + g) * K + (run * R + i) * GROUP + (t * W + w) * 8);
          ordered(v, pairs[n]);
        }
        #pragma unroll
        for (int r = 0; r < RT; ++r) multiply<NT>(sums[r], words[r][0][w], words[r][1][w], scales[r], biases[r], pairs);
      }
    }
    __syncwarp();
    if (run + 1 < last) fetch(run + 1);
  }

  __syncthreads();
  auto warps = reinterpret_cast<typename Sums<RT, WARPS, NT>::Shared*>(shared);
  #pragma unroll
  for (int r = 0; r < RT; ++r) keep<NT>(warps[warp] + 16 * r, sums[r]);
  __syncthreads();
  return {warps};
}

// A block of `wide_products`: WARPS warps of two tiles each, which come in steps of S codes of each row; one step is
// fetched while one is multiplied. PAIR: half of the rows are of one matrix, half of another.
template <int K, int GROUP, int S, int WARPS, int NT> struct Wide {
  static constexpr int ROWS = 32 * WARPS, THREADS = 32 * WARPS;
  static constexpr int R = S / GROUP, W = GROUP / 32, GROUPS = K / GROUP;
  static constexpr int STRIDE = S / 2 + 32, X_STRIDE = 2 * S + 16;  // bytes of a row; 16 and 32 against conflicts
  static constexpr int STEP = ROWS * STRIDE + 8 * NT * X_STRIDE;    // bytes
  static constexpr int CODES = S / 32, VALUES = S / 8;              // copies of 16 bytes of a row
  static_assert(THREADS % CODES == 0 && THREADS % VALUES == 0 && R >= 2 && R <= 8);
};

// The sums of a block over STEPS steps from `first` on: [row of its tiles][row of x] once the threads have met. The sums
// of each PART steps are added by themselves. Of a PAIR, rows of `tile` and of `other` each follow one another.
// shared: two steps, or the sums. meanwhile: as of `products`.
template <int K, int GROUP, int S, int STEPS, int PART, int WARPS, int NT, bool PAIR, class Meanwhile>
__device__ auto wide_products(
    const bf16* x, int n_rows, const Tile& tile, const Tile& other, int first, unsigned char* shared,
    const Meanwhile& meanwhile) -> float (*)[NT * 8 + 1] {
  using B = Wide<K, GROUP, S, WARPS, NT>;
  constexpr int R = B::R, W = B::W, HALF = PAIR ? B::ROWS / 2 : B::ROWS;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3;
  const int row = threadIdx.x / B::CODES, at = threadIdx.x % B::CODES * 16;
  const int x_row = threadIdx.x / B::VALUES, x_at = threadIdx.x % B::VALUES * 8;
  unsigned char* const xs = shared + B::ROWS * B::STRIDE;

  auto fetch = [&](int own) {
    const int buffer = own % 2 * B::STEP, step = first + own;
    #pragma unroll
    for (int j = 0; j < B::ROWS; j += B::THREADS / B::CODES) {
      const uint32_t* codes = PAIR && j >= HALF ? other.codes : tile.codes;
      copy_async<16>(
          shared + buffer + (row + j) * B::STRIDE + at,
          reinterpret_cast<const unsigned char*>(codes) + (size_t)(row + j % HALF) * (K / 2) + step * (S / 2) + at);
    }
    #pragma unroll
    for (int j = 0; j < 2; ++j) {  // each thread the scales of a row, and the biases
      const int row = threadIdx.x % HALF;
      const bool is_other = PAIR && threadIdx.x >= HALF;
      const bf16* floats = j ? is_other ? other.biases : tile.biases : is_other ? other.scales : tile.scales;
      copy_async<2 * R>(
          shared + buffer + threadIdx.x * B::STRIDE + S / 2 + 16 * j, floats + (size_t)row * B::GROUPS + step * R);
    }
    #pragma unroll
    for (int j = 0; j < 8 * NT; j += B::THREADS / B::VALUES)
      if (x_row + j < n_rows)
        copy_async<16>(
            xs + buffer + (x_row + j) * B::X_STRIDE + 2 * x_at, x + (size_t)(x_row + j) * K + step * S + x_at);
    commit_copies();
  };

  for (int i = n_rows * B::VALUES + threadIdx.x; i < 8 * NT * B::VALUES; i += B::THREADS)  // rows that there are not
    for (int buffer = 0; buffer < 2; ++buffer)
      *reinterpret_cast<uint4*>(xs + buffer * B::STEP + i / B::VALUES * B::X_STRIDE + i % B::VALUES * 16) =
          make_uint4(0, 0, 0, 0);
  const unsigned char* tiles[2];  // row g of each
  #pragma unroll
  for (int r = 0; r < 2; ++r) tiles[r] = shared + ((PAIR ? r * HALF + 16 * warp : 16 * (2 * warp + r)) + g) * B::STRIDE;

  float sums[2][NT][4] = {}, parts[2][NT][4] = {};
  fetch(0);
  meanwhile();
  #pragma unroll 1
  for (int step = 0; step < STEPS; ++step) {
    wait_for_copies<0>();
    __syncthreads();
    if (step + 1 < STEPS) fetch(step + 1);
    const int buffer = step % 2 * B::STEP;
    #pragma unroll
    for (int i = 0; i < R; ++i) {
      uint32_t words[2][2][W], scales[2][2], biases[2][2];  // of rows g and g + 8
      #pragma unroll
      for (int r = 0; r < 2; ++r)
        #pragma unroll
        for (int h = 0; h < 2; ++h) {
          const unsigned char* from = tiles[r] + buffer + 8 * h * B::STRIDE;
          using Vector = typename Words<W>::type;
          *reinterpret_cast<Vector*>(words[r][h]) = *reinterpret_cast<const Vector*>(from + (4 * i + t) * W * 4);
          scales[r][h] = twice(from + S / 2 + 2 * i);
          biases[r][h] = twice(from + S / 2 + 16 + 2 * i);
        }
      #pragma unroll
      for (int w = 0; w < W; ++w) {
        uint32_t pairs[NT][4];
        #pragma unroll
        for (int n = 0; n < NT; ++n)
          ordered(
              *reinterpret_cast<const uint4*>(
                  xs + buffer + (8 * n + g) * B::X_STRIDE + 2 * i * GROUP + (t * W + w) * 16),
              pairs[n]);
        #pragma unroll
        for (int r = 0; r < 2; ++r) multiply<NT>(sums[r], words[r][0][w], words[r][1][w], scales[r], biases[r], pairs);
      }
    }
    if (PART < STEPS && ((step + 1) % PART == 0 || step + 1 == STEPS)) {
      #pragma unroll
      for (int i = 0; i < 8 * NT; ++i) {
        float& sum = sums[i / (4 * NT)][i / 4 % NT][i % 4];
        parts[i / (4 * NT)][i / 4 % NT][i % 4] += sum;
        sum = 0.f;
      }
    }
  }

  __syncthreads();
  auto all = reinterpret_cast<float(*)[NT * 8 + 1]>(shared);
  #pragma unroll
  for (int r = 0; r < 2; ++r) keep<NT>(all + (PAIR ? r * HALF + 16 * warp : 16 * (2 * warp + r)), PART < STEPS ? parts[r] : sums[r]);
  __syncthreads();
  return all;
}

__device__ __forceinline__ float swiglu(float gate, float up) { return gate / (1.f + __expf(-gate)) * up; }

// RMSNorm between two products: the first leaves y times the norm's weight and sums of squares, (n_rows, K / 16) over 16
// values of a row each; the second multiplies its sums by what the norm divides a row by.
struct ForNorm {
  const bf16* weight;
  bf16* weighted;
  float* squares;
};

// All lanes of a warp call it, each 16 of them for values of y that follow one another. at: of a value in y.
__device__ __forceinline__ void leave_for_norm(const ForNorm& norm, bool is_value, float value, int column, size_t at) {
  float sum = is_value ? value * value : 0.f;
  #pragma unroll
  for (int lane = 8; lane > 0; lane /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, lane);
  if (is_value) norm.weighted[at] = __float2bfloat16(value * __bfloat162float(norm.weight[column]));
  if (is_value && at % 16 == 0) norm.squares[at / 16] = sum;
}

// 1 / root mean square of each row; a row is added up by one warp, in an order that no kernel changes. MOST: rows, at most;
// what a warp reads of several is on its way at once.
template <int K, int WARPS, int MOST>
__device__ __forceinline__ void norm_factors(const float* squares, int n_rows, float eps, float* factors) {
  static_assert(K % 64 == 0);
  constexpr int OWN = (MOST + WARPS - 1) / WARPS, QUADS = K / 64;
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  float sums[OWN] = {};
  #pragma unroll 2
  for (int quad = lane; quad < QUADS; quad += 32)
    #pragma unroll
    for (int i = 0; i < OWN; ++i)
      if (warp + i * WARPS < n_rows) {
        const float4 four = reinterpret_cast<const float4*>(squares)[(warp + i * WARPS) * QUADS + quad];
        sums[i] += (four.x + four.y) + (four.z + four.w);
      }
  #pragma unroll
  for (int i = 0; i < OWN; ++i) {
    #pragma unroll
    for (int other = 16; other > 0; other /= 2) sums[i] += __shfl_xor_sync(0xffffffffu, sums[i], other);
    if (lane == 0 && warp + i * WARPS < n_rows) factors[warp + i * WARPS] = rsqrtf(sums[i] / K + eps);
  }
}
