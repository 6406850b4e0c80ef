// Warps and warpgroups: who am I, registers, shuffles, generic writes seen by the tensor cores.
#pragma once

#include "hopper/types.cuh"

namespace jax_flash {

constexpr int kWarpSize = 32;
constexpr int kWarpgroupSize = 128;
constexpr u32 kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return threadIdx.x % kWarpSize; }

// What is the same in all lanes, known to be so by the compiler.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kAllLanes, x, 0); }

__device__ __forceinline__ int warp_index() { return uniform(threadIdx.x / kWarpSize); }

// True in one lane. Unlike a comparison of numbers of lanes, this tells the compiler that it is one: TMA then needs no
// loop over lanes. All lanes take part.
__device__ __forceinline__ bool elect_lane() {
  int chosen;
  asm volatile(
      "{\n"
      ".reg .pred chosen;\n"
      "elect.sync _|chosen, %1;\n"
      "selp.b32 %0, 1, 0, chosen;\n"
      "}"
      : "=r"(chosen)
      : "r"(kAllLanes));
  return chosen != 0;
}

// A value that the compiler cannot trace: what follows from it stays in the loop instead of in registers outside.
__device__ __forceinline__ int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

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

// Whatever x takes, which is never less than 0, is computed above this, and most of what comes after below: a branch
// around a fence that is never reached. Else ptxas moves arithmetic freely across waits for the tensor cores.
__device__ __forceinline__ void hold(float x) {
  asm volatile(
      "{\n"
      ".reg .pred never;\n"
      "setp.lt.f32 never, %0, 0f00000000;\n"
      "@never fence.proxy.async.shared::cta;\n"
      "}" ::"f"(x)
      : "memory");
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

// Likewise over the 8 lanes, every fourth, that share columns of a product of mma.cuh.
__device__ __forceinline__ float column_max(float x) {
  for (int distance = 4; distance < kWarpSize; distance *= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, distance));
  return x;
}

__device__ __forceinline__ float column_sum(float x) {
  for (int distance = 4; distance < kWarpSize; distance *= 2) x += __shfl_xor_sync(kAllLanes, x, distance);
  return x;
}

// The largest of a warp, for all lanes.
__device__ __forceinline__ int warp_max(int x) {
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    x = max(x, __shfl_xor_sync(kAllLanes, x, distance));
  }
  return x;
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
