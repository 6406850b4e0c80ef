// Warps and warpgroups: who am I, registers, shuffles, generic writes seen by the tensor cores.
#pragma once

#include "hopper/types.cuh"

namespace jax_flash {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr u32 kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }

// The same in all lanes, and known to be so by the compiler.
__device__ __forceinline__ int warp_index() { return __shfl_sync(kAllLanes, threadIdx.x / kWarpSize, 0); }

template <int kRegisters>
__device__ __forceinline__ void grow_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes multiples of 8");
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void shrink_registers() {
  static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "setmaxnreg takes multiples of 8");
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Makes this thread's writes to shared memory visible to TMA and wgmma; a barrier among the threads must follow.
__device__ __forceinline__ void fence_shared_for_async() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Reductions over the 4 lanes that share an accumulator row.
__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, 1));
  return fmaxf(x, __shfl_xor_sync(kAllLanes, x, 2));
}

__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(kAllLanes, x, 1);
  return x + __shfl_xor_sync(kAllLanes, x, 2);
}

// Inclusive scans over the lanes of a warp.
__device__ __forceinline__ int warp_scan_max(int x) {
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_index() >= distance) x = max(x, other);
  }
  return x;
}

__device__ __forceinline__ int warp_scan_sum(int x) {
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, x, distance);
    if (lane_index() >= distance) x += other;
  }
  return x;
}

}  // namespace jax_flash
