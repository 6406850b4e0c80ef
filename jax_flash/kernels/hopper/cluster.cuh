// Clusters: CTAs that run side by side and read each other's shared memory.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"

namespace jax_flash {

// All threads of all CTAs of the cluster; what they wrote to shared memory before is seen after.
__device__ __forceinline__ void cluster_sync() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Where `pointer`, of this CTA's shared memory, lies in that of CTA `rank` of the cluster.
__device__ __forceinline__ u32 cluster_address(const void* pointer, int rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

__device__ __forceinline__ float2 cluster_load(const float2* pointer, int rank) {
  float2 x;
  asm volatile("ld.shared::cluster.v2.f32 {%0, %1}, [%2];"
               : "=f"(x.x), "=f"(x.y)
               : "r"(cluster_address(pointer, rank))
               : "memory");
  return x;
}

__device__ __forceinline__ float4 cluster_load(const float4* pointer, int rank) {
  float4 x;
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w)
               : "r"(cluster_address(pointer, rank))
               : "memory");
  return x;
}

}  // namespace jax_flash
