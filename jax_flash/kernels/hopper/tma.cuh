// TMA: bulk tensor copies between global and shared memory, described by a tensor map that the host encodes.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"

namespace jax_flash {

struct alignas(64) TensorMap {
  u8 opaque[128];
};

__device__ __forceinline__ void tma_prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Copies the map's box at these coordinates, innermost first; what lies outside the tensor arrives as zeros, and its
// bytes count for the barrier all the same.
__device__ __forceinline__ void tma_load(void* destination, const TensorMap& map, Barrier& barrier, int c0, int c1,
                                         int c2, int c3) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], "
      "[%2];" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
      : "memory");
}

// Copies a box from shared memory to these coordinates; what lies outside the tensor is left out. The thread that does
// so commits, and waits until what it committed has been read from shared memory.
__device__ __forceinline__ void tma_store(const TensorMap& map, const void* source, int c0, int c1, int c2, int c3) {
  asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(&map),
               "r"(shared_address(source)), "r"(c0), "r"(c1), "r"(c2), "r"(c3)
               : "memory");
}

__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

__device__ __forceinline__ void tma_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }

}  // namespace jax_flash
