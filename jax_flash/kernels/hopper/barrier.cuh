// Barriers: mbarriers in shared memory (transactions and phases) and the 16 named barriers of a CTA.
#pragma once

#include "hopper/types.cuh"

namespace jax_flash {

__device__ __forceinline__ u32 shared_address(const void* pointer) {
  return static_cast<u32>(__cvta_generic_to_shared(pointer));
}

// Waits for a phase of a barrier, and acquires what was written before it ended: by the CTA unless named.
#define JAX_FLASH_WAIT(acquire, parity)    \
  asm volatile(                            \
      "{\n"                                \
      ".reg .pred done;\n"                 \
      "again:\n"                           \
      "mbarrier.try_wait.parity" acquire   \
      ".shared::cta.b64 done, [%0], %1;\n" \
      "@done bra over;\n"                  \
      "bra again;\n"                       \
      "over:\n"                            \
      "}" ::"r"(shared_address(this)),     \
      "r"(parity)                          \
      : "memory")

struct Barrier {
  u64 state;

  __device__ __forceinline__ void init(int arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)), "r"(arrivals) : "memory");
  }

  __device__ __forceinline__ void arrive() {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this)) : "memory");
  }

  // By threads of which this holds: without a branch, after which ptxas would take nothing for the same in all lanes
  // and keep what wgmma and barriers need in registers of each lane.
  __device__ __forceinline__ void arrive_if(bool condition) {
    asm volatile(
        "{\n"
        ".reg .pred arrives;\n"
        "setp.ne.b32 arrives, %1, 0;\n"
        "@arrives mbarrier.arrive.shared::cta.b64 _, [%0];\n"
        "}" ::"r"(shared_address(this)),
        "r"(static_cast<int>(condition))
        : "memory");
  }

  // One arrival that also announces the bytes that TMA, or CTAs of the cluster, will write before the phase ends.
  __device__ __forceinline__ void arrive_expect(int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)), "r"(bytes)
                 : "memory");
  }

  // Waits until the phase of that parity has ended; a new barrier has already ended a phase of parity 1.
  __device__ __forceinline__ void wait(u32 parity) { JAX_FLASH_WAIT("", parity); }

  // The same, where CTAs of the cluster write.
  __device__ __forceinline__ void wait_for_cluster(u32 parity) { JAX_FLASH_WAIT(".acquire.cluster", parity); }

  // Waits for that, but some microseconds at most.
  __device__ __forceinline__ void wait_briefly(u32 parity) {
    constexpr int kTries = 256;
#pragma unroll 1
    for (int i = 0; i < kTries && !ended(parity); ++i) continue;
  }

  __device__ __forceinline__ bool ended(u32 parity) {
    int ended;
    asm volatile(
        "{\n"
        ".reg .pred ended;\n"
        "mbarrier.test_wait.parity.shared::cta.b64 ended, [%1], %2;\n"
        "selp.b32 %0, 1, 0, ended;\n"
        "}"
        : "=r"(ended)
        : "r"(shared_address(this)), "r"(parity)
        : "memory");
    return ended != 0;
  }
};

#undef JAX_FLASH_WAIT

// Makes initialised mbarriers visible to TMA and the cluster; a barrier among the threads must follow.
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

// Whether the condition holds in each of the `threads` threads that sync with the named barrier.
__device__ __forceinline__ bool named_all(int barrier, int threads, bool condition) {
  int all;
  asm volatile(
      "{\n"
      ".reg .pred mine, all;\n"
      "setp.ne.b32 mine, %3, 0;\n"
      "bar.red.and.pred all, %1, %2, mine;\n"
      "selp.b32 %0, 1, 0, all;\n"
      "}"
      : "=r"(all)
      : "r"(barrier), "r"(threads), "r"(static_cast<int>(condition))
      : "memory");
  return all != 0;
}

// A ring of kStages buffers between one producer and its consumers: slot and phase of the next step.
template <int kStages>
struct Ring {
  int slot = 0;
  u32 phase = 0;

  __device__ __forceinline__ void advance() {
    if (++slot == kStages) {
      slot = 0;
      phase ^= 1;
    }
  }
};

}  // namespace jax_flash
