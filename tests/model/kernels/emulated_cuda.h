// What the CUDA kernels of qwq_mlx/model/kernels use of CUDA, on a CPU: the threads of a block are threads, one block
// runs after another, and shared memory is static.
#pragma once
#include <algorithm>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

using std::max;
using std::min;

#define __device__
#define __forceinline__ inline
#define __shared__ static

struct Dim3 { unsigned x, y, z; };
inline thread_local Dim3 threadIdx, blockIdx, blockDim, gridDim;

struct uint4 { uint32_t x, y, z, w; };
struct float4 { float x, y, z, w; };
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __uint_as_float(uint32_t bits) { float value; memcpy(&value, &bits, 4); return value; }
inline __nv_bfloat16 __float2bfloat16(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
inline uint16_t __bfloat16_as_ushort(__nv_bfloat16 value) { return value.bits; }

struct Block {
  std::barrier<> all;
  std::vector<std::unique_ptr<std::barrier<>>> warps;
  std::vector<float> lanes;
  explicit Block(int n_threads) : all(n_threads), lanes(n_threads) {
    for (int warp = 0; warp < n_threads / 32; ++warp) warps.push_back(std::make_unique<std::barrier<>>(32));
  }
};
inline Block* block;

inline void __syncthreads() { block->all.arrive_and_wait(); }
inline float __shfl_xor_sync(unsigned, float value, int lane) {
  auto& warp = *block->warps[threadIdx.x / 32];
  block->lanes[threadIdx.x] = value;
  warp.arrive_and_wait();
  const float other = block->lanes[threadIdx.x ^ lane];
  warp.arrive_and_wait();
  return other;
}

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __ldcg(const float* from) { return *from; }
inline void __threadfence() {}
inline uint32_t atomicAdd(uint32_t* to, uint32_t value) { return (*to += value) - value; }  // blocks do not overlap

inline bool is_backwards = false;  // the order of blocks

template <class Kernel> void launch(int grid_x, int grid_y, int n_threads, Kernel kernel) {
  Block own(n_threads);
  block = &own;
  std::vector<std::thread> threads;
  for (int thread = 0; thread < n_threads; ++thread)
    threads.emplace_back([&, thread] {
      threadIdx = {(unsigned)thread, 0, 0};
      blockDim = {(unsigned)n_threads, 1, 1};
      gridDim = {(unsigned)grid_x, (unsigned)grid_y, 1};
      for (int y = 0; y < grid_y; ++y)
        for (int x = 0; x < grid_x; ++x) {
          blockIdx = {(unsigned)(is_backwards ? grid_x - 1 - x : x), (unsigned)(is_backwards ? grid_y - 1 - y : y), 0};
          kernel();
          own.all.arrive_and_wait();
        }
    });
  for (auto& thread : threads) thread.join();
}
