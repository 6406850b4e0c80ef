// Load: fetches Q of a tile, and its keys and values by TMA or, from small pages, one by one.
#pragma once

#include "decode/storage.cuh"
#include "hopper/async.cuh"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "rows.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// Q as it is multiplied. Under FP8 keys, 16 columns come in the order in which a thread holds those: columns 4q, 4q +
// 1, 4q + 2, 4q + 3 of lane q of four at positions 2q, 2q + 1, 2q + 8, 2q + 9.
__device__ __forceinline__ void store_q(u8* row, int word, u32 value) {
  if (spec::kWidens) word = word / 8 * 8 + word % 2 * 4 + word % 8 / 2;
  *reinterpret_cast<u32*>(row + word * 4) = value;
}

// By one warp, some vectors of 16 bytes at a time. Rows that a tile lacks are those of its last one. Vectors are
// counted from a constant on, so that the compiler sees which there are: else it moves loads behind branches.
__device__ __forceinline__ void load_q(u8 (&q)[spec::kTileM][kQStride], const Rows& rows, const Operands& operands,
                                       const Params& params) {
  constexpr int kColumns = 16 / spec::Query::kBytes;  // of a vector
  constexpr int kVectorsOfRow = spec::kHeadDim / kColumns;
  constexpr int kVectorsOfLane = (spec::kTileM * kVectorsOfRow + kWarpSize - 1) / kWarpSize;
  constexpr int kAtOnce = kVectorsOfLane < 8 ? kVectorsOfLane : 8;
#pragma unroll 1
  for (int first = 0; first < kVectorsOfLane; first += kAtOnce) {
    uint4 vectors[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int vector = (first + i) * kWarpSize + lane_index();
      const int row = min(vector / kVectorsOfRow, rows.count - 1);
      const int column = vector % kVectorsOfRow * kColumns;
      const u8* from = static_cast<const u8*>(operands.q);
      from +=
          (rows.index(row, params) * params.head_dim + min(column, params.head_dim - kColumns)) * spec::Query::kBytes;
      vectors[i] = __ldg(reinterpret_cast<const uint4*>(from));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int vector = (first + i) * kWarpSize + lane_index();
      const int row = vector / kVectorsOfRow;
      const int column = vector % kVectorsOfRow * kColumns;
      if (row >= spec::kTileM) break;
      const bool there = column < params.head_dim;
      const u32 words[4] = {vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 word = there ? words[j] : 0;
        if constexpr (spec::Query::kBytes == 1) {
          const Wide wide = widen(word);
          store_q(q[row], column / 2 + 2 * j, wide.low);
          store_q(q[row], column / 2 + 2 * j + 1, wide.high);
        } else {
          store_q(q[row], column / 2 + j, spec::kConvertsQ ? float16_of_bfloat16(word) : word);
        }
      }
    }
  }
}

// Where the pieces of kBoxKeys keys that blocks consist of lie. Of a page table every lane looks up one of 32 pieces
// that follow each other, and the next 32 are on their way.
class Pieces {
 public:
  __device__ __forceinline__ Pieces(const Rows& rows, const Share& share, const Operands& operands,
                                    const Params& params)
      : rows_(rows), share_(share), operands_(operands), params_(params) {
    if constexpr (spec::kPageTable) look_up();
  }

  // Those of block i of a share, one after another. All lanes take part.
  __device__ __forceinline__ void locate(int i, KeyPlace (&places)[kPieces]) {
    if constexpr (spec::kPageTable) {
      if (i * kPieces >= end_) {
        own_ = next_;
        end_ += kWarpSize;
        look_up();
      }
      for (int piece = 0; piece < kPieces; ++piece) {
        const int lane = i * kPieces + piece - (end_ - kWarpSize);
        places[piece] = {__shfl_sync(kAllLanes, own_.group, lane), __shfl_sync(kAllLanes, own_.row, lane)};
      }
    } else {
      static_assert(kPieces == 1 || spec::kPageTable, "a block lies together");
      places[0] = place_of(rows_.tile, share_.block(i) * spec::kTileN, operands_, params_);
    }
  }

 private:
  __device__ __forceinline__ void look_up() {
    const int piece = end_ + lane_index();
    const int key = share_.block(piece / kPieces) * spec::kTileN + piece % kPieces * spec::kBoxKeys;
    next_ = place_of(rows_.tile, key, operands_, params_);
  }

  const Rows& rows_;
  const Share& share_;
  const Operands& operands_;
  const Params& params_;
  int end_ = 0;  // of the pieces of the lanes
  KeyPlace own_, next_;
};

// A warp that loads keys and values.
class Loader {
 public:
  __device__ __forceinline__ Loader(SharedStorage& shared, const KvMaps& maps, const Operands& operands,
                                    const Params& params, int warp)
      : shared_(shared), maps_(maps), operands_(operands), params_(params), block_(warp) {
    for (int i = 0; i < warp; ++i) ring_.advance();
  }

  // The first tile of the CTA it knows without being told.
  __device__ __forceinline__ void run(const Rows& first, const Grid& grid) {
    Ring<kWorkSlots> works;
    if (first.count > 0) load(first, Share(first, params_, grid), shared_.work[works.slot].ending);
    if constexpr (!spec::kDraws) return;
    for (bool is_first = true;; is_first = false) {
      Work& work = shared_.work[works.slot];
      work.located.wait(works.phase);
      if (work.rows.count == 0) return;
      if (!is_first) load(work.rows, work.share, work.ending);
      work.empty.arrive();
      works.advance();
    }
  }

 private:
  __device__ __forceinline__ void load(const Rows& rows, const Share& share, Barrier& ending) {
    if constexpr (spec::kGathers) {
      if constexpr (kDrawsLate) ending.arrive_if(lane_index() == 0);  // early, for warps are at different blocks
      gather(rows, share);
    } else {
      copy(rows, share, ending);
    }
  }

  // By TMA. A warp takes some cycles for each instruction here, and is to have filled the ring soon.
  __device__ __forceinline__ void copy(const Rows& rows, const Share& share, Barrier& ending) {
    Pieces pieces(rows, share, operands_, params_);
    const int last_ring = max(0, share.count - spec::kStages);
#pragma unroll 1
    for (int i = 0;; ++i) {
      if (kDrawsLate && i == last_ring) ending.arrive_if(lane_index() == 0);
      if (i == share.count) break;
      KeyPlace places[kPieces];
      pieces.locate(i, places);
      shared_.empty[ring_.slot].wait(ring_.phase ^ 1);
      if (elect_lane()) {
        copy_boxes<kKBoxes>(shared_.k[ring_.slot], maps_.k, shared_.full_k[ring_.slot], rows.kv_head, places);
        copy_boxes<kVBoxes>(shared_.v[ring_.slot], maps_.v, shared_.full_v[ring_.slot], rows.kv_head, places);
      }
      ring_.advance();
    }
  }

  template <int kBoxes>
  __device__ __forceinline__ static void copy_boxes(u8* buffer, const TensorMap& map, Barrier& barrier, int head,
                                                    const KeyPlace (&places)[kPieces]) {
    barrier.arrive_expect(kBoxes * kBlockBytes);
    for (int piece = 0; piece < kPieces; ++piece) {
      u8* to = buffer + piece * spec::kBoxKeys * kSwizzleBytes;
      for (int box = 0; box < kBoxes; ++box) {
        tma_load(to + box * kBlockBytes, map, barrier, box * kBoxColumns, places[piece].row, head, places[piece].group);
      }
    }
  }

  // Key by key, where pages are small: every kLoaders-th block, of whose keys a lane has some, and knows the next ones.
  __device__ __forceinline__ void gather(const Rows& rows, const Share& share) {
    int keys[kKeysOfLane], next[kKeysOfLane];
    look_up(rows, share, block_, next);
    for (; block_ < share.count; block_ += kLoaders) {
#pragma unroll
      for (int i = 0; i < kKeysOfLane; ++i) keys[i] = next[i];
      look_up(rows, share, block_ + kLoaders, next);
      shared_.empty[ring_.slot].wait(ring_.phase ^ 1);
      gather_rows<kKBoxes>(shared_.k[ring_.slot], operands_.k, params_.head_dim * kKvBytes, keys);
      arrive_after_copies(shared_.full_k[ring_.slot]);
      gather_rows<kVBoxes>(shared_.v[ring_.slot], operands_.v, params_.head_dim_v * kKvBytes, keys);
      arrive_after_copies(shared_.full_v[ring_.slot]);
      for (int i = 0; i < kLoaders; ++i) ring_.advance();
    }
    block_ -= share.count;
  }

  static constexpr int kKeysOfLane = (spec::kTileN + kWarpSize - 1) / kWarpSize;

  // Where the lane's keys of a block lie, in rows of one head.
  __device__ __forceinline__ void look_up(const Rows& rows, const Share& share, int block, int (&keys)[kKeysOfLane]) {
#pragma unroll
    for (int i = 0; i < kKeysOfLane; ++i) {
      const int key = share.block(block) * spec::kTileN + i * kWarpSize + lane_index();
      const KeyPlace place = place_of(rows.tile, key, operands_, params_);
      keys[i] = (place.group * params_.kv_rows + place.row) * params_.kv_heads + rows.kv_head;
    }
  }

  template <int kBoxes>
  __device__ __forceinline__ void gather_rows(u8* buffer, const void* array, int row_bytes,
                                              const int (&keys)[kKeysOfLane]) {
    constexpr int kVectorsOfRow = kBoxes * kSwizzleBytes / 16;
#pragma unroll 8
    for (int first = 0; first < spec::kTileN * kVectorsOfRow; first += kWarpSize) {
      const int key = (first + lane_index()) / kVectorsOfRow;
      const int vector = (first + lane_index()) % kVectorsOfRow;
      int row = __shfl_sync(kAllLanes, keys[0], key % kWarpSize);
      if constexpr (kKeysOfLane > 1) {
        const int other = __shfl_sync(kAllLanes, keys[kKeysOfLane - 1], key % kWarpSize);
        if (key >= kWarpSize) row = other;
      }
      u8* to = buffer + vector_offset(key, vector);
      const u8* from = static_cast<const u8*>(array) + static_cast<i64>(row) * row_bytes + vector * 16;
      copy_async(to, from, vector * 16 < row_bytes);
    }
  }

  SharedStorage& shared_;
  const KvMaps& maps_;
  const Operands& operands_;
  const Params& params_;
  Ring<spec::kStages> ring_;
  int block_;  // of those of a tile, the next that is this warp's; TMA has one warp for all
};

}  // namespace jax_flash
