// mma: products of 16 rows by one warp, and how it reads their operands from shared memory.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"

namespace jax_flash {

// d (16 x 8, as a quarter of a wgmma accumulator's rows lies in a warp) += a (16 x 16) b (16 x 8).
template <typename Element>
__device__ __forceinline__ void mma(float* d, const u32 (&a)[4], u32 b0, u32 b1);

template <>
__device__ __forceinline__ void mma<Float16>(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

template <>
__device__ __forceinline__ void mma<BFloat16>(float* d, const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Reads four 8 x 8 matrices of 16-bit elements, lane i naming where row i % 8 of matrix i / 8 lies: word m is of matrix
// m, row lane / 4, columns 2 * (lane % 4), in the low half, and one further.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// Eight rows of eight 16-bit elements, of which each thread has two of row lane / 4, with rows for columns.
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Reductions over the 8 lanes that share columns of a product.
__device__ __forceinline__ float column_max(float x) {
  for (int distance = 4; distance < kWarpSize; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

__device__ __forceinline__ float column_sum(float x) {
  for (int distance = 4; distance < kWarpSize; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

}  // namespace jax_flash
