// Storage of a decode CTA: buffers of keys and values, Q, what is known of each tile, and what came of it.
//
// Rows of K and V are [column block][kTileN rows][128 bytes], swizzled.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "parts.cuh"
#include "rows.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

constexpr int kSwizzleBytes = 128;
constexpr int kKvBytes = spec::kWidens ? 1 : 2;        // of an element in the cache
constexpr int kBoxColumns = kSwizzleBytes / kKvBytes;  // of one TMA copy
constexpr int kKBoxes = (spec::kHeadDim + kBoxColumns - 1) / kBoxColumns;
constexpr int kVBoxes = (spec::kHeadDimV + kBoxColumns - 1) / kBoxColumns;
constexpr int kBlockBytes = spec::kTileN * kSwizzleBytes;  // of kBoxColumns columns of a block of keys
constexpr int kPieces = spec::kTileN / spec::kBoxKeys;     // of a block, each in one page
static_assert(spec::kGathers || kWarpSize % kPieces == 0, "each has a lane, and those of a block come together");

// Where 16 bytes of a row of K or V of a block lie.
__device__ __forceinline__ int vector_offset(int row, int vector) {
  return vector / 8 * kBlockBytes + row * kSwizzleBytes + (vector % 8 ^ row % 8) * 16;
}

constexpr int kWarps = 4;  // that multiply
constexpr int kWarpRows = spec::kTileM < 16 ? 8 : 16;
constexpr int kRowWarps = spec::kTileM / kWarpRows;
constexpr int kKeyWarps = kWarps / kRowWarps;
constexpr int kConsumerThreads = kWarps * kWarpSize;
constexpr int kThreads = spec::kThreads;
constexpr int kLoaders = kThreads / kWarpSize - kWarps - 1;  // warps that load keys and values; one finds tiles
static_assert(spec::kGathers || kLoaders == 1, "TMA needs one");
// A warp that waited for a buffer that others use too could take an older phase of its barriers for the one to come.
static_assert(spec::kStages % kKeyWarps == 0 && spec::kStages % kLoaders == 0, "a buffer is always the same warp's");

// Lanes of a warp that arrive at a barrier of the ring: one for TMA, and for a warp that has read what TMA brought; all
// where each has copied keys, and to give these back too: docs/sanitizer.md.
constexpr int kRingLanes = spec::kGathers ? kWarpSize : 1;

// A named barrier; 0 is __syncthreads.
constexpr int kConsumerBarrier = 1;

constexpr int kQStride = spec::kHeadDim * 2 + 16;  // bytes of a row: eight of them lie in different banks
constexpr int kOutStride = spec::kHeadDimV + 4;    // floats, likewise

// One row of a tile.
struct Row {
  i64 index;      // among those of the output,
  i64 lse_index;  // and among the log-sum-exps
  int first_key;  // of the keys that it sees: none, if it is not used
  int last_key;
  float scale;
  float sink;
};

// A tile as the warp that finds it hands it over. No rows end the work, as does the only tile of a CTA that draws none.
struct Work {
  Barrier located;  // its rows and blocks are known,
  Barrier full;     // and Q and the rest are there
  Barrier empty;    // all who read it have done so
  Barrier ending;   // few of its keys are still to be loaded; where they are gathered, all who do so have begun
  Rows rows;
  Share share;
  float v_scale;
  Row row[spec::kTileM];
};
constexpr int kWorkSlots = spec::kDraws ? 2 : 1;

// Whether a CTA draws its next tile at `ending` of the present one, not at once. Split tiles are mostly long, and may
// differ in length: so those draw more that had short ones. Others, of 16 bits, are a percent faster drawn early.
constexpr bool kDrawsLate = spec::kDraws && spec::kPartial;

// kPartColumns columns of a row of the output, counted through all of a tile's.
constexpr int kVectors = spec::kHeadDimV / kPartColumns;  // of a row
struct Vector {
  int number;
  __device__ __forceinline__ int row() const { return number / kVectors; }
  __device__ __forceinline__ int column() const { return number % kVectors * kPartColumns; }
};

// What the CTAs of a cluster made of their keys, as far as this one has to join it: it ends 32 vectors that follow each
// other of each kRound of a tile, by its rank.
struct Received {
  static constexpr int kRound = spec::kCluster * kWarpSize;
  static constexpr int kRounds = (spec::kTileM * kVectors + kRound - 1) / kRound;
  static constexpr int kVectorsOfCta = spec::kCluster > 1 ? kRounds * kWarpSize : 1;
  static constexpr int kVectorBytes = 2 * sizeof(float4) + sizeof(float2);
  float4 low[spec::kCluster][kVectorsOfCta];
  float4 high[spec::kCluster][kVectorsOfCta];
  float2 largest_and_sum[spec::kCluster][kVectorsOfCta];

  // Of a vector, the CTA that ends it, and its number among those of that CTA;
  __device__ __forceinline__ static int rank(Vector vector) { return vector.number / kWarpSize % spec::kCluster; }
  __device__ __forceinline__ static int place(Vector vector) {
    return vector.number / kRound * kWarpSize + vector.number % kWarpSize;
  }
  // the other way round; and how many of a tile's a CTA ends.
  __device__ __forceinline__ static Vector vector(int rank, int place) {
    return {place / kWarpSize * kRound + rank * kWarpSize + place % kWarpSize};
  }
  __device__ __forceinline__ static int count(int rank, int vectors) {
    return vectors / kRound * kWarpSize + clamp(vectors % kRound - rank * kWarpSize, 0, kWarpSize);
  }
};

struct alignas(1024) SharedStorage {
  u8 k[spec::kStages][kKBoxes * kBlockBytes];
  u8 v[spec::kStages][kVBoxes * kBlockBytes];
  Received received;
  alignas(16) u8 q[kWorkSlots][spec::kTileM][kQStride];
  // What warps made of their keys.
  alignas(16) float out[kKeyWarps][spec::kTileM][kOutStride];
  float largest[kKeyWarps][spec::kTileM];
  float sum[kKeyWarps][spec::kTileM];
  Barrier full_k[spec::kStages];
  Barrier full_v[spec::kStages];
  Barrier empty[spec::kStages];
  Barrier all_received;
  int last;  // whether this CTA is the last one that has worked on its rows
  Work work[kWorkSlots];

  // Barriers are prepared one after another, whichever lanes of a warp do so: the warps that multiply share those of
  // the ring,
  __device__ __forceinline__ void init_ring() {
    static_assert(spec::kStages % kWarps == 0, "each has as many");
    const int warp = warp_index();
    if (lane_index() != 0) return;
#pragma unroll
    for (int stage = 0; stage < spec::kStages; stage += kWarps) {
      full_k[stage + warp].init(kRingLanes);
      full_v[stage + warp].init(kRingLanes);
      empty[stage + warp].init(kRowWarps * kRingLanes);
    }
  }

  // and the one that finds tiles has the others.
  __device__ __forceinline__ void init_work() {
    if (lane_index() != 0) return;
    for (Work& each : work) {
      each.located.init(1);
      each.full.init(kWarpSize);
      each.empty.init(kConsumerThreads + kLoaders * kWarpSize);
      if constexpr (kDrawsLate) each.ending.init(kLoaders);
    }
    all_received.init(1);
  }
};
static_assert(sizeof(SharedStorage) == spec::kSharedBytes, "decode.py counts the same bytes");

}  // namespace jax_flash
