// The instructions of an NVIDIA GPU that few_row_matmul.cu is made of. Tests put their own in this file's place.
#include <cuda_bf16.h>

using bf16 = __nv_bfloat16;

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

__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;"); }

// Waits until at most N commits of copies are under way.
template <int N> __device__ __forceinline__ void wait_for_copies() { asm volatile("cp.async.wait_group %0;" :: "n"(N)); }

__device__ __forceinline__ __nv_bfloat162 as_pair(uint32_t bits) { return *reinterpret_cast<__nv_bfloat162*>(&bits); }

// Codes 0 and 4 of a word as a pair of bfloat16, times scale plus bias; scale and bias: one in both halves.
// 0x4300 is 128, and its last bits count ones.
__device__ __forceinline__ uint32_t unpacked(uint32_t word, uint32_t scale, uint32_t bias) {
  uint32_t pair;
  asm("lop3.b32 %0, %1, 0x000f000f, 0x43004300, 0xea;" : "=r"(pair) : "r"(word));
  const __nv_bfloat162 value = __hfma2(__hsub2(as_pair(pair), as_pair(0x43004300u)), as_pair(scale), as_pair(bias));
  return *reinterpret_cast<const uint32_t*>(&value);
}
