// Storage: the tiles of Q, K and V in shared memory, the barriers around them, and what is known of each tile.
//
// Rows of 128 bytes, swizzled: Q of each consumer is [column block][64 rows][128 bytes], K and 16-bit V [column block]
// [kTileN rows][128 bytes]. FP8 V comes transposed, [box][kHeadDimV][kVBoxKeys bytes]: wgmma wants both FP8 operands
// K-major. Under a 16-bit Q, FP8 rows of 64 bytes come into the second half of a buffer, to be widened.
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

constexpr int kQBytes = kQkBlocks * kWarpgroupRows * kSwizzleBytes;  // of one consumer
constexpr int kKBytes = kQkBlocks * spec::kTileN * kSwizzleBytes;
constexpr int kVBytes = kFp8 ? spec::kTileN * spec::kHeadDimV : kVBlocks * spec::kTileN * kSwizzleBytes;
static_assert(kQBytes % 1024 == 0 && kKBytes % 1024 == 0 && kVBytes % 1024 == 0,
              "each buffer begins where swizzling does");

constexpr int kConsumers = spec::kTileM / kWarpgroupRows;
constexpr int kConsumerThreads = kConsumers * kWarpgroupSize;
constexpr int kConsumerWarps = kConsumers * kWarpgroupSize / kWarpSize;

// `full`: the buffer is written, by TMA or threads. `empty`: every warp that reads it has done so.
struct Pipe {
  Barrier full;
  Barrier empty;

  __device__ __forceinline__ void init(int readers, int writers = 1) {
    full.init(writers);
    empty.init(readers);
  }

  // All lanes of a reading warp are done with the buffer.
  __device__ __forceinline__ void release() { empty.arrive_if(lane_index() == 0); }
};

// Whether rows around the used keys may hold anything.
constexpr bool kClears = spec::kPackedK || spec::kSequsedK || spec::kCacheLeftpad;

// Whether values of a block are cleared, and whether a warp has anything to do with them before the tensor cores may.
__device__ __forceinline__ bool clears(const Tile& tile, int block) { return kClears && at_edge(tile, block); }
__device__ __forceinline__ bool prepares(const Tile& tile, int block) {
  return spec::kTransposes || spec::kWidens || clears(tile, block);
}
constexpr int kVPreparers = spec::kTransposes ? 2 : 1;  // warps that prepare one buffer of V
constexpr int kPreparers = spec::kTransposes || spec::kWidens ? 2 : kClears ? 1 : 0;  // all that prepare, of K or V

// Values are transposed in units of as many keys as columns.
constexpr int kVUnit = 32;
constexpr int kVUnitBytes = kVUnit * kVUnit;
static_assert(!spec::kTransposes || spec::kVBoxKeys == kVUnit, "one copy of TMA brings the keys of a unit");

// What is known of a tile, from the warp that finds it until all its readers are done. No rows end the work.
struct Work {
  Pipe pipe;
  Barrier located;  // where the tile and its blocks lie is known, scales not yet: loads need not wait for those
  Tile tile;
  int kv_head;
  float scale;
  float v_scale;
  float sink;
  Blocks blocks;                    // that some row sees,
  Blocks of_warpgroup[kConsumers];  // and that the 64 rows of each consumer see

  // A reading lane is done with it. Each arrives for itself, for racecheck sees no further than that.
  __device__ __forceinline__ void release() { pipe.empty.arrive(); }
};

// One whose rows are stored, one whose scores are computed, and one to come: no more, for what a CTA has drawn no other
// can work on.
constexpr int kWorkSlots = 3;

// Where a warp's 16 rows of the output wait for TMA, 64 columns in a buffer.
constexpr int kWarpRows = 16;
constexpr int kOutColumns = 64;
constexpr int kOutBytes = kWarpRows * kSwizzleBytes;
constexpr int kOutBuffers = spec::kHeadDimV > kOutColumns ? 2 : 1;

// A number of an FP8 Total takes so much, as there is less room for wide outputs.
constexpr int kTotalBytes = spec::kHeadDimV <= 128 ? 4 : 2;

// A warp's own: its Total has been taken out by the time that its rows wait.
union alignas(1024) WarpStorage {
  u8 buffers[kOutBuffers][kOutBytes];
  u8 total[spec::kDeposits ? kWarpRows * spec::kHeadDimV * kTotalBytes : 1];
};

struct alignas(1024) SharedStorage {
  u8 q[spec::kQStages][kConsumers][kQBytes];
  u8 k[spec::kKStages][kKBytes];
  u8 v[spec::kVStages][kVBytes];
  WarpStorage out[kConsumerWarps];
  Pipe q_pipe[spec::kQStages][kConsumers];
  Pipe k_pipe[spec::kKStages];
  Pipe v_pipe[spec::kVStages];
  Barrier k_landed[spec::kKStages];  // instead of `full`, where keys or values must be prepared first
  Barrier v_landed[spec::kVStages];
  Work work[kWorkSlots];

  __device__ __forceinline__ void init() {
    for (int slot = 0; slot < kWorkSlots; ++slot) {
      work[slot].pipe.full.init(kConsumers);  // each lane that wrote `of_warpgroup`
      work[slot].pipe.empty.init((kConsumerWarps + kPreparers) * kWarpSize);
      work[slot].located.init(1);
    }
    for (int stage = 0; stage < spec::kQStages; ++stage) {
      for (int consumer = 0; consumer < kConsumers; ++consumer) {
        q_pipe[stage][consumer].init(kWarpgroupSize / kWarpSize);
      }
    }
    for (int stage = 0; stage < spec::kKStages; ++stage) {
      k_pipe[stage].init(kConsumerWarps);
      k_landed[stage].init(1);
    }
    for (int stage = 0; stage < spec::kVStages; ++stage) {
      v_pipe[stage].init(kConsumerWarps, kVPreparers);
      v_landed[stage].init(1);
    }
  }
};
static_assert(sizeof(SharedStorage) == spec::kSharedBytes, "heuristics.py counts the same bytes");

// Calls `use` with each tile as it is located, until there are no more.
template <typename Use>
__device__ __forceinline__ void each_work(SharedStorage& shared, Use use) {
  Ring<kWorkSlots> ring;
  while (true) {
    Work& work = shared.work[ring.slot];
    work.located.wait(ring.phase);
    if (work.tile.rows == 0) return;
    use(work);
    ring.advance();
  }
}

}  // namespace jax_flash
