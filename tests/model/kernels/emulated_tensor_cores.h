// What qwq_mlx/model/kernels/tensor_cores.cu gives the kernels, on the CPU of emulated_cuda.h: the lanes of a warp show
// each other what they hold, and each adds up its own sums, one product after another.
#pragma once
#include "emulated_cuda.h"

using bf16 = __nv_bfloat16;
struct uint2 { uint32_t x, y; };

inline float __bfloat162float(bf16 value) { return __uint_as_float((uint32_t)value.bits << 16); }
inline float __expf(float x) { return std::exp(x); }
inline void __syncwarp() { block->warps[threadIdx.x / 32]->arrive_and_wait(); }
inline uint32_t __byte_perm(uint32_t x, uint32_t y, uint32_t selector) {
  const uint64_t both = (uint64_t)y << 32 | x;
  uint32_t result = 0;
  for (int byte = 0; byte < 4; ++byte) result |= (uint32_t)(both >> 8 * (selector >> 4 * byte & 7) & 255) << 8 * byte;
  return result;
}

template <int BYTES> void copy_async(void* to, const void* from) { memcpy(to, from, BYTES); }
inline void commit_copies() {}
template <int N> void wait_for_copies() {}

inline uint32_t unpacked(uint32_t word, uint32_t scale, uint32_t bias) {
  uint32_t pair = 0;
  for (int half = 0; half < 2; ++half) {
    const float code = word >> 16 * half & 15;
    const float value = std::fma(code, __uint_as_float(scale & 0xffff0000u), __uint_as_float(bias & 0xffff0000u));
    pair |= (uint32_t)__float2bfloat16(value).bits << 16 * half;
  }
  return pair;
}

struct Held { uint32_t a[4], b[2]; };
inline Held held[1024];  // of each thread of a block

inline float half_of(uint32_t pair, int at) { return __uint_as_float(at ? pair & 0xffff0000u : pair << 16); }

inline void mma(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  Held* warp = held + threadIdx.x / 32 * 32;
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  warp[lane] = {{a[0], a[1], a[2], a[3]}, {b0, b1}};
  __syncwarp();
  for (int e = 0; e < 4; ++e)
    for (int k = 0; k < 16; ++k) {
      const int part = k / 8, from = k % 8 / 2;
      sums[e] += half_of(warp[4 * g + from].a[2 * part + e / 2], k % 2) *
                 half_of(warp[4 * (2 * t + e % 2) + from].b[part], k % 2);
    }
  __syncwarp();
}
