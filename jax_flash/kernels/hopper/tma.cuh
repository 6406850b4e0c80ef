// TMA: bulk tensor copies from global to shared memory, described by a tensor map that the host encodes.
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

// The same, to the same place of both CTAs of a cluster, each of whose barriers counts the bytes.
__device__ __forceinline__ void tma_load_both(void* destination, const TensorMap& map, Barrier& barrier, int c0, int c1,
                                              int c2, int c3) {
  constexpr u16 kBoth = 3;
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%3, "
      "%4, %5, %6}], [%2], %7;" ::"r"(shared_address(destination)),
      "l"(&map), "r"(shared_address(&barrier)), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "h"(kBoth)
      : "memory");
}

}  // namespace jax_flash
