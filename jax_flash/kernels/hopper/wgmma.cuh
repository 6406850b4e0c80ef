// wgmma: ordering and operand descriptors. The multiply instructions themselves, for the shapes in use, are generated
// into wgmma.h by codegen.py.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"

namespace jax_flash {

// Registers written before the next batch of wgmma are ready for it.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kPending committed batches are unfinished.
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  static_assert(kPending >= 0 && kPending <= 7, "wgmma.wait_group takes 0 to 7");
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Emits nothing; stops the compiler from moving reads or writes of the registers across this point.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

enum class Swizzle : u32 { k128Bytes = 1, k64Bytes = 2, k32Bytes = 3 };

// Of rows of that many bytes.
__device__ constexpr Swizzle swizzle_of(int row_bytes) {
  return row_bytes == 128 ? Swizzle::k128Bytes : row_bytes == 64 ? Swizzle::k64Bytes : Swizzle::k32Bytes;
}

// The descriptor of a matrix in shared memory. Its high word (stride between groups of 8 rows, swizzle) is a constant;
// its low word (address, leading stride) moves through the tile by `advance`.
__device__ constexpr u32 descriptor_high(int stride_bytes, Swizzle swizzle) {
  return static_cast<u32>(stride_bytes >> 4) | static_cast<u32>(swizzle) << 30;
}

__device__ __forceinline__ u32 descriptor_low(const void* tile, int leading_bytes) {
  return shared_address(tile) >> 4 | static_cast<u32>(leading_bytes >> 4) << 16;
}

__device__ __forceinline__ u32 advance(u32 descriptor, int bytes) { return descriptor + static_cast<u32>(bytes >> 4); }

}  // namespace jax_flash
