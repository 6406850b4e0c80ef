// Storage: the tiles of Q, K and V in shared memory, and the barriers around them.
//
// Rows of 128 bytes, swizzled: Q is [column block][kTileM][128 bytes], K and 16-bit V [column block][kTileN][128
// bytes]. FP8 V comes transposed, [block of 32 keys][kHeadDimV][32 bytes]: wgmma wants both FP8 operands K-major.
#pragma once

#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "spec.h"

namespace jax_flash {

constexpr bool kFp8 = spec::Element::kBytes == 1;
constexpr int kSwizzleBytes = 128;
constexpr int kBlockColumns = kSwizzleBytes / spec::Element::kBytes;  // columns of one TMA box
constexpr int kQkBlocks = (spec::kHeadDim + kBlockColumns - 1) / kBlockColumns;
constexpr int kVBlocks = (spec::kHeadDimV + kBlockColumns - 1) / kBlockColumns;
constexpr int kVKeyBlock = 32;  // keys, and bytes, of one box of transposed V

constexpr int kQBytes = kQkBlocks * spec::kTileM * kSwizzleBytes;
constexpr int kKBytes = kQkBlocks * spec::kTileN * kSwizzleBytes;
constexpr int kVBytes = kFp8 ? spec::kTileN * spec::kHeadDimV : kVBlocks * spec::kTileN * kSwizzleBytes;
static_assert(kQBytes % 1024 == 0 && kKBytes % 1024 == 0 && kVBytes % 1024 == 0,
              "each buffer begins where swizzling does");

constexpr int kConsumers = spec::kTileM / kWarpgroupRows;
constexpr int kConsumerThreads = kConsumers * kWarpgroupSize;
constexpr int kConsumerWarps = kConsumers * kWarpgroupSize / kWarpSize;

// `full`: TMA has written the buffer. `empty`: every consumer warp has read it.
struct Pipe {
  Barrier full;
  Barrier empty;

  __device__ __forceinline__ void init() {
    full.init(1);
    empty.init(kConsumerWarps);
  }

  // All lanes of a consumer warp have read the buffer.
  __device__ __forceinline__ void release() {
    if (lane_index() == 0) empty.arrive();
  }
};

struct alignas(1024) SharedStorage {
  u8 q[kQBytes];
  u8 k[spec::kStages][kKBytes];
  u8 v[spec::kStages][kVBytes];
  Pipe q_pipe;
  Pipe k_pipe[spec::kStages];
  Pipe v_pipe[spec::kStages];

  __device__ __forceinline__ void init() {
    q_pipe.init();
    for (int stage = 0; stage < spec::kStages; ++stage) {
      k_pipe[stage].init();
      v_pipe[stage].init();
    }
  }
};
static_assert(sizeof(SharedStorage) == spec::kSharedBytes, "heuristics.py counts the same bytes");

}  // namespace jax_flash
