// Matrices of 8 x 8 elements of 16 bits, spread over a warp: of each a thread has a word, with two neighbours of row
// lane / 4, from column 2 * (lane % 4) on, the first in the low half.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"

namespace jax_flash {

// Reads four from shared memory, lane i naming where row i % 8 of matrix i / 8 lies.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// The same, with rows for columns.
__device__ __forceinline__ void load_matrices_transposed(u32 (&x)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(shared_address(row))
               : "memory");
}

// Writes four to shared memory, lane i naming where row i % 8 of matrix i / 8 goes.
__device__ __forceinline__ void store_matrices(void* row, const u32 (&x)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(x[0]),
               "r"(x[1]), "r"(x[2]), "r"(x[3])
               : "memory");
}

// One, with rows for columns.
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace jax_flash
