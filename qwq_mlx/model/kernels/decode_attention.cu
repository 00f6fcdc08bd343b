// Attention of single ids, each over the keys and values of its own row: rotates, writes into the cache, attends.
//
// A block attends for the query heads of one key head of one id over one chunk of positions; the last block of an id and
// head joins the chunks. What an id gives depends on its row and its position alone, neither on other ids nor on the room
// of the cache: the size of chunks follows from the positions that it sees, and each part of a warp takes the same ones in
// any pass.
//
// Ids of one pass may be of one row, one behind the other. Their keys and values are read from the projections, never
// from the cache, so that a block may write its id's own ones there while others attend.
#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

constexpr float NOTHING = -1e30f; // the score of a position that does not count; finite, so that differences are

// Where an id is: `at` holds for each its row in the cache, its place in the pass and that of the first id of its row, and
// the positions that the row holds before the pass.
struct Id {
  int row, place, first, n_before, n_seen, chunk;
  __device__ __forceinline__ Id(const int* at, int id, int min_chunk, int max_chunks)
      : row(at[4 * id]), place(at[4 * id + 1]), first(at[4 * id + 2]), n_before(at[4 * id + 3]), chunk(min_chunk) {
    n_seen = n_before + place - first + 1;
    while (chunk * max_chunks < n_seen) chunk *= 2;
  }
  __device__ __forceinline__ int n_chunks() const { return (n_seen + chunk - 1) / chunk; }
};

__device__ __forceinline__ void as_floats(const uint4& packed, float (&floats)[8]) {
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    floats[2 * i] = __uint_as_float(words[i] << 16);
    floats[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
  }
}

__device__ __forceinline__ uint4 as_bf16(const float (&floats)[8]) {
  uint32_t words[4];
  #pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t low = __bfloat16_as_ushort(__float2bfloat16(floats[2 * i]));
    words[i] = low | (uint32_t)__bfloat16_as_ushort(__float2bfloat16(floats[2 * i + 1])) << 16;
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

__device__ __forceinline__ uint4 eight(const bf16* from) { return *reinterpret_cast<const uint4*>(from); }

// Dimensions d to d + 7 of a head behind rotary embedding; the first half of the sines is negative.
template <int WIDTH>
__device__ __forceinline__ void rotated(const bf16* head, const float* cosines, const float* sines, int d, float (&out)[8]) {
  float own[8], other[8];
  as_floats(eight(head + d), own);
  as_floats(eight(head + (d < WIDTH / 2 ? d + WIDTH / 2 : d - WIDTH / 2)), other);
  #pragma unroll
  for (int i = 0; i < 8; ++i) out[i] = fmaf(own[i], cosines[d + i], other[i] * sines[d + i]);
}

// What the pass computed of each of its ids. queries: (ids, HEADS * WIDTH). keys, values: (ids, KV_HEADS * WIDTH), not rotated.
struct Projected {
  const bf16 *queries, *keys, *values;
  const float *cosines, *sines;  // (ids, WIDTH)
};

// Whether n blocks have come here with this one; then it sees what the others wrote. All threads of a block call it.
// arrived: 0 before the launch.
__device__ __forceinline__ bool is_last_block(const uint32_t* arrived, uint32_t n) {
  __shared__ bool is_last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = atomicAdd(const_cast<uint32_t*>(arrived), 1u) == n - 1;
  __syncthreads();
  __threadfence();
  return is_last;
}

// keys, values: (rows, KV_HEADS, room, WIDTH) behind n_shared positions, (KV_HEADS, n_shared, WIDTH), that all share.
struct Cache {
  bf16 *keys, *values;
  const bf16 *shared_keys, *shared_values;
  int room, n_shared;
};

// What blocks of one launch leave each other. An id has max_chunks at most, of min_chunk positions or more, and n_chunks
// at most where no row has more room. sums: (ids, HEADS, n_chunks, WIDTH), values weighted by
// exp2(score - highest). totals: (ids, HEADS, n_chunks, 2), the highest score and the weights' sum. arrived: (ids of the
// pass, KV_HEADS), 0 before the launch.
struct Chunks {
  float *sums, *totals;
  const uint32_t* arrived;
  int min_chunk, max_chunks, n_chunks;
};

// What a query head's chunks weigh, and one over their sum: by one warp. from: of its first one.
__device__ __forceinline__ void weigh(const Chunks& chunks, size_t from, int n_chunks, float* weights, float* factor) {
  const int lane = threadIdx.x & 31;
  const bool is_own = lane < n_chunks;  // at most 32
  const float own = is_own ? __ldcg(chunks.totals + 2 * (from + lane)) : NOTHING;
  const float total = is_own ? __ldcg(chunks.totals + 2 * (from + lane) + 1) : 0.f;
  float highest = own, sum;
  #pragma unroll
  for (int other = 16; other > 0; other /= 2) highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, other));
  const float weight = exp2f(own - highest);
  sum = weight * total;
  #pragma unroll
  for (int other = 16; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
  weights[lane] = weight;
  if (lane == 0) *factor = 1.f / sum;
}

// mixed: (ids, HEADS * WIDTH).
template <int WIDTH, int GROUP, int KV_HEADS, int WARPS, int UNROLL>
__device__ void attend_chunk(
    const Projected& projected, const int* at, const Cache& cache, const Chunks& chunks, bf16* mixed) {
  constexpr int LANES = WIDTH / 8;            // that share a position, 8 dimensions each
  constexpr int PARTS = WARPS * 32 / LANES;   // positions that a block reads at once
  constexpr int HEADS = KV_HEADS * GROUP;
  __shared__ float part_sums[PARTS][GROUP][WIDTH];
  __shared__ float part_totals[PARTS][GROUP][2];

  const int id = blockIdx.x / KV_HEADS, kv_head = blockIdx.x % KV_HEADS, chunk = blockIdx.y;
  const Id own(at, id, chunks.min_chunk, chunks.max_chunks);
  const int n_chunks = own.n_chunks();
  if (chunk >= n_chunks) return;
  const int begin = chunk * own.chunk, end = min(begin + own.chunk, own.n_seen);
  const int part = threadIdx.x / LANES, d = threadIdx.x % LANES * 8;
  const size_t row = ((size_t)own.row * KV_HEADS + kv_head) * cache.room * WIDTH;
  const size_t shared = (size_t)kv_head * cache.n_shared * WIDTH;

  const float scale = 1.4426950408889634f / sqrtf((float)WIDTH);  // for exp2
  float query[GROUP][8], sum[GROUP][8], highest[GROUP], total[GROUP];
  #pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    const bf16* head = projected.queries + ((size_t)own.place * HEADS + kv_head * GROUP + g) * WIDTH;
    rotated<WIDTH>(head, projected.cosines + own.place * WIDTH, projected.sines + own.place * WIDTH, d, query[g]);
    highest[g] = NOTHING;
    total[g] = 0.f;
    #pragma unroll
    for (int i = 0; i < 8; ++i) {
      query[g][i] *= scale;
      sum[g][i] = 0.f;
    }
  }

  for (int start = begin; start < end; start += PARTS * UNROLL) {
    uint4 keys[UNROLL], values[UNROLL];
    const bool is_cached = start + PARTS * UNROLL <= own.n_before && start >= cache.n_shared;
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      const int position = start + u * PARTS + part;
      if (is_cached) {  // apart, so that all of them are on their way at once
        const size_t from = row + (size_t)(position - cache.n_shared) * WIDTH + d;
        keys[u] = eight(cache.keys + from);
        values[u] = eight(cache.values + from);
      } else if (position < min(own.n_before, end)) {
        const bool is_shared = position < cache.n_shared;
        const size_t from = (is_shared ? shared + (size_t)position * WIDTH
                                       : row + (size_t)(position - cache.n_shared) * WIDTH) + d;
        keys[u] = eight((is_shared ? cache.shared_keys : cache.keys) + from);
        values[u] = eight((is_shared ? cache.shared_values : cache.values) + from);
      } else if (position < end) {  // of this pass
        const int source = own.first + position - own.n_before;
        const size_t from = ((size_t)source * KV_HEADS + kv_head) * WIDTH;
        float key[8];
        rotated<WIDTH>(projected.keys + from, projected.cosines + source * WIDTH, projected.sines + source * WIDTH, d, key);
        keys[u] = as_bf16(key);
        values[u] = eight(projected.values + from + d);
        if (position == own.n_seen - 1) {
          const size_t to = row + (size_t)(position - cache.n_shared) * WIDTH + d;
          *reinterpret_cast<uint4*>(cache.keys + to) = keys[u];
          *reinterpret_cast<uint4*>(cache.values + to) = values[u];
        }
      } else {
        keys[u] = values[u] = make_uint4(0, 0, 0, 0);
      }
    }

    float scores[UNROLL][GROUP];
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float key[8];
      as_floats(keys[u], key);
      #pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        float score = 0.f;
        #pragma unroll
        for (int i = 0; i < 8; ++i) score = fmaf(query[g][i], key[i], score);
        #pragma unroll
        for (int lane = LANES / 2; lane > 0; lane /= 2) score += __shfl_xor_sync(0xffffffffu, score, lane);
        scores[u][g] = start + u * PARTS + part < end ? score : NOTHING;
      }
    }
    #pragma unroll
    for (int g = 0; g < GROUP; ++g) {
      float now = highest[g];
      #pragma unroll
      for (int u = 0; u < UNROLL; ++u) now = fmaxf(now, scores[u][g]);
      const float kept = exp2f(highest[g] - now);
      highest[g] = now;
      total[g] *= kept;
      #pragma unroll
      for (int i = 0; i < 8; ++i) sum[g][i] *= kept;
    }
    #pragma unroll
    for (int u = 0; u < UNROLL; ++u) {
      float value[8];
      as_floats(values[u], value);
      #pragma unroll
      for (int g = 0; g < GROUP; ++g) {
        const float weight = start + u * PARTS + part < end ? exp2f(scores[u][g] - highest[g]) : 0.f;
        total[g] += weight;
        #pragma unroll
        for (int i = 0; i < 8; ++i) sum[g][i] = fmaf(weight, value[i], sum[g][i]);
      }
    }
  }

  #pragma unroll
  for (int g = 0; g < GROUP; ++g) {
    #pragma unroll
    for (int i = 0; i < 8; ++i) part_sums[part][g][d + i] = sum[g][i];
    if (d == 0) {
      part_totals[part][g][0] = highest[g];
      part_totals[part][g][1] = total[g];
    }
  }
  __syncthreads();
  for (int place = threadIdx.x; place < GROUP * WIDTH; place += WARPS * 32) {
    const int g = place / WIDTH, i = place % WIDTH;
    float now = NOTHING, value = 0.f, weights = 0.f;
    for (int p = 0; p < PARTS; ++p) now = fmaxf(now, part_totals[p][g][0]);
    for (int p = 0; p < PARTS; ++p) {
      const float kept = exp2f(part_totals[p][g][0] - now);
      value = fmaf(kept, part_sums[p][g][i], value);
      weights = fmaf(kept, part_totals[p][g][1], weights);
    }
    const size_t head = (size_t)id * HEADS + kv_head * GROUP + g, to = head * chunks.n_chunks + chunk;
    if (n_chunks == 1) {
      mixed[head * WIDTH + i] = __float2bfloat16(value / weights);
      continue;
    }
    chunks.sums[to * WIDTH + i] = value;
    if (i == 0) {
      chunks.totals[2 * to] = now;
      chunks.totals[2 * to + 1] = weights;
    }
  }
  if (n_chunks == 1 || !is_last_block(chunks.arrived + own.place * KV_HEADS + kv_head, n_chunks)) return;
  __shared__ float weights[GROUP][32];
  __shared__ float factors[GROUP];
  const size_t first = ((size_t)id * HEADS + kv_head * GROUP) * chunks.n_chunks;
  for (int g = threadIdx.x / 32; g < GROUP; g += WARPS)
    weigh(chunks, first + (size_t)g * chunks.n_chunks, n_chunks, weights[g], factors + g);
  __syncthreads();
  constexpr int OWN = (GROUP * WIDTH + WARPS * 32 - 1) / (WARPS * 32);  // places of a thread, read at once
  float values[OWN] = {};
  #pragma unroll 2
  for (int chunk = 0; chunk < n_chunks; ++chunk)
    #pragma unroll
    for (int i = 0; i < OWN; ++i) {
      const int place = threadIdx.x + i * WARPS * 32, g = min(place / WIDTH, GROUP - 1);
      const size_t from = (first + (size_t)g * chunks.n_chunks + chunk) * WIDTH + place % WIDTH;
      values[i] = fmaf(weights[g][chunk], __ldcg(chunks.sums + from), values[i]);
    }
  #pragma unroll
  for (int i = 0; i < OWN; ++i) {
    const int place = threadIdx.x + i * WARPS * 32;
    if (place < GROUP * WIDTH)
      mixed[((size_t)id * HEADS + kv_head * GROUP) * WIDTH + place] = __float2bfloat16(values[i] * factors[place / WIDTH]);
  }
}
