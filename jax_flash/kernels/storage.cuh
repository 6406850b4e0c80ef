// Storage: the tiles of Q, K and V in shared memory, the barriers around them, and what is known of each tile.
//
// Rows of 128 bytes, swizzled: Q of each consumer is [column block][64 rows][128 bytes], K and 16-bit V [column block]
// [kTileN rows][128 bytes]. FP8 V comes transposed, [block of 32 keys][kHeadDimV][32 bytes]: wgmma wants both FP8
// operands K-major.
#pragma once

#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

constexpr bool kFp8 = spec::Element::kBytes == 1;
constexpr int kSwizzleBytes = 128;
constexpr int kBlockColumns = kSwizzleBytes / spec::Element::kBytes;  // columns of one TMA box
constexpr int kQkBlocks = (spec::kHeadDim + kBlockColumns - 1) / kBlockColumns;
constexpr int kVBlocks = (spec::kHeadDimV + kBlockColumns - 1) / kBlockColumns;
constexpr int kVKeyBlock = 32;  // keys, and bytes, of one box of transposed V

constexpr int kQBytes = kQkBlocks * kWarpgroupRows * kSwizzleBytes;  // of one consumer
constexpr int kKBytes = kQkBlocks * spec::kTileN * kSwizzleBytes;
constexpr int kVBytes = kFp8 ? spec::kTileN * spec::kHeadDimV : kVBlocks * spec::kTileN * kSwizzleBytes;
static_assert(kQBytes % 1024 == 0 && kKBytes % 1024 == 0 && kVBytes % 1024 == 0,
              "each buffer begins where swizzling does");

constexpr int kConsumers = spec::kTileM / kWarpgroupRows;
constexpr int kConsumerThreads = kConsumers * kWarpgroupSize;
constexpr int kConsumerWarps = kConsumers * kWarpgroupSize / kWarpSize;

// `full`: the buffer is written, by TMA or a thread. `empty`: every warp that reads it has done so.
struct Pipe {
  Barrier full;
  Barrier empty;

  __device__ __forceinline__ void init(int readers) {
    full.init(1);
    empty.init(readers);
  }

  // All lanes of a reading warp are done with the buffer.
  __device__ __forceinline__ void release() {
    if (lane_index() == 0) empty.arrive();
  }

  // The same for a buffer that all CTAs of a cluster fill together.
  __device__ __forceinline__ void release_to_cluster() {
    if constexpr (spec::kCluster == 1) {
      release();
    } else {
      if (lane_index() < spec::kCluster) empty.arrive_at(lane_index());
    }
  }
};

// Whether rows around the used keys may hold anything.
constexpr bool kClears = spec::kPackedK || spec::kSequsedK;

// What is known of a tile, from the warp that finds it until all its readers are done. No rows end the work.
struct Work {
  Pipe pipe;
  Tile tile;
  int kv_head;
  float scale;
  float v_scale;
  float sink;
  Blocks blocks;                    // that some row sees,
  Blocks of_warpgroup[kConsumers];  // and that 64 of the rows see, those of one of this CTA's consumers

  // A reading warp is done with it, whatever its lanes did apart.
  __device__ __forceinline__ void release() {
    __syncwarp();
    pipe.release();
  }
};

// One whose rows are stored, one whose scores are computed, one to come and one that is being found.
constexpr int kWorkSlots = 4;

// Where a warp's 16 rows of the output change hands, 128 bytes of each at a time.
constexpr int kWarpRows = 16;
constexpr int kStageBytes = kWarpRows * kSwizzleBytes;

struct alignas(1024) SharedStorage {
  u8 q[spec::kQStages][kConsumers][kQBytes];
  u8 k[spec::kStages][kKBytes];
  u8 v[spec::kStages][kVBytes];
  u8 out[kConsumerWarps][kStageBytes];
  Pipe q_pipe[spec::kQStages][kConsumers];
  Pipe k_pipe[spec::kStages];
  Pipe v_pipe[spec::kStages];
  Barrier v_landed[spec::kStages];  // instead of `full`, where unused values must be cleared first
  Work work[kWorkSlots];

  __device__ __forceinline__ void init() {
    for (int slot = 0; slot < kWorkSlots; ++slot) work[slot].pipe.init(kConsumerWarps + kClears);
    for (int stage = 0; stage < spec::kQStages; ++stage) {
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        q_pipe[stage][consumer].init(kWarpgroupSize / kWarpSize);
      }
    }
    for (int stage = 0; stage < spec::kStages; ++stage) {
      k_pipe[stage].init(spec::kCluster * kConsumerWarps);
      v_pipe[stage].init(spec::kCluster * kConsumerWarps);
      v_landed[stage].init(1);
    }
  }
};
static_assert(sizeof(SharedStorage) == spec::kSharedBytes, "heuristics.py counts the same bytes");

}  // namespace jax_flash
