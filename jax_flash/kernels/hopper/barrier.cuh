// Barriers: mbarriers in shared memory (transactions and phases) and the 16 named barriers of a CTA.
#pragma once

#include "hopper/types.cuh"

namespace jax_flash {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

struct Barrier {
  u64 state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }

  // The same barrier of another CTA of the cluster.
  __device__ __forceinline__ void arrive_at(int rank) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}" ::"r"(shared_address(this)),
        "r"(rank)
        : "memory");
  }

  // One arrival that also announces the bytes that TMA will write before the phase ends.
  __device__ __forceinline__ void arrive_expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }

  // Waits until the phase of that parity has ended; a new barrier has already ended a phase of parity 1.
  __device__ __forceinline__ void wait(u32 parity) {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@done bra over;\n"
        "bra again;\n"
        "over:\n"
        "}" ::"r"(shared_address(this)),
        "r"(parity)
        : "memory");
  }
};

// Makes initialised mbarriers visible to TMA; a barrier of the CTA or cluster must follow.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Waits until `threads` threads have synced with or arrived at the named barrier.
__device__ __forceinline__ void named_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

__device__ __forceinline__ void named_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// A ring of kStages buffers between one producer and its consumers: slot and phase of the next step, in one register.
template <int kStages>
struct Ring {
  int step = 0;

  __device__ __forceinline__ int slot() const { return step < kStages ? step : step - kStages; }
  __device__ __forceinline__ u32 phase() const { return step < kStages ? 0 : 1; }

  __device__ __forceinline__ void advance() {
    if (++step == 2 * kStages) step = 0;
  }
};

}  // namespace jax_flash
