// Clusters: CTAs that run side by side and write to each other's shared memory.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"

namespace jax_flash {

// A barrier of all threads of the cluster, each of which arrives: a CTA whose warps end instead may be waited for
// without end. It orders no memory accesses by generic addresses, which would take as long as one to global memory.
__device__ __forceinline__ void cluster_arrive() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.aligned;" ::: "memory"); }

// Where `pointer`, of this CTA's shared memory, lies in that of CTA `rank` of the cluster.
__device__ __forceinline__ u32 cluster_address(const void* pointer, int rank) {
  u32 address;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(pointer)), "r"(rank));
  return address;
}

// Writes to the shared memory of CTA `rank`, whose barrier counts the bytes once they are there. Nobody waits.
__device__ __forceinline__ void cluster_store(float2* pointer, float2 x, Barrier& barrier, int rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(
                   cluster_address(pointer, rank)),
               "f"(x.x), "f"(x.y), "r"(cluster_address(&barrier, rank))
               : "memory");
}

__device__ __forceinline__ void cluster_store(float4* pointer, float4 x, Barrier& barrier, int rank) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(
                   cluster_address(pointer, rank)),
               "f"(x.x), "f"(x.y), "f"(x.z), "f"(x.w), "r"(cluster_address(&barrier, rank))
               : "memory");
}

}  // namespace jax_flash
