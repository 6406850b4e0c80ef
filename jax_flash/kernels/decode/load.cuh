// Load: fetches Q of a tile, and its keys and values by TMA.
#pragma once

#include "decode/storage.cuh"
#include "hopper/async.cuh"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "keys.cuh"
#include "operands.cuh"
#include "params.h"
#include "rows.cuh"
#include "spec.h"

namespace jax_flash {

// Q as it is multiplied. Under FP8 keys, 16 columns come in the order in which a thread holds those: columns 4q, 4q +
// 1, 4q + 2, 4q + 3 of lane q of four at positions 2q, 2q + 1, 2q + 8, 2q + 9.
__device__ __forceinline__ void store_q(u8* row, int word, u32 value) {
  if (spec::kWidens) word = word / 8 * 8 + word % 2 * 4 + word % 8 / 2;
  *reinterpret_cast<u32*>(row + word * 4) = value;
}

// By one warp, some vectors of 16 bytes at a time. Rows that a tile lacks are those of its last one.
__device__ __forceinline__ void load_q(u8 (&q)[spec::kTileM][kQStride], const Rows& rows, const Operands& operands,
                                       const Params& params) {
  constexpr int kColumns = 16 / spec::Query::kBytes;  // of a vector
  constexpr int kVectors = spec::kHeadDim / kColumns;
  constexpr int kAtOnce = 8;
#pragma unroll 1
  for (int first = lane_index(); first < spec::kTileM * kVectors; first += kAtOnce * kWarpSize) {
    uint4 vectors[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = min((first + i * kWarpSize) / kVectors, rows.count - 1);
      const int column = (first + i * kWarpSize) % kVectors * kColumns;
      const u8* from = static_cast<const u8*>(operands.q);
      from +=
          (rows.index(row, params) * params.head_dim + min(column, params.head_dim - kColumns)) * spec::Query::kBytes;
      vectors[i] = __ldg(reinterpret_cast<const uint4*>(from));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = (first + i * kWarpSize) / kVectors;
      const int column = (first + i * kWarpSize) % kVectors * kColumns;
      if (row >= spec::kTileM) break;
      const bool there = column < params.head_dim;
      const u32 words[4] = {vectors[i].x, vectors[i].y, vectors[i].z, vectors[i].w};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const u32 word = there ? words[j] : 0;
        if constexpr (spec::Query::kBytes == 1) {
          store_q(q[row], column / 2 + 2 * j, widen2(word));
          store_q(q[row], column / 2 + 2 * j + 1, widen2(word >> 16));
        } else {
          store_q(q[row], column / 2 + j, spec::kConvertsQ ? float16_of_bfloat16(word) : word);
        }
      }
    }
  }
}

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
    if (first.count > 0) load(first, Share(first, params_, grid));
    Ring<kWorkSlots> works;
    for (bool is_first = true;; is_first = false) {
      Work& work = shared_.work[works.slot];
      work.located.wait(works.phase);
      if (work.rows.count == 0) return;
      if (!is_first) load(work.rows, work.share);
      work.empty.arrive();
      works.advance();
    }
  }

 private:
  __device__ __forceinline__ void load(const Rows& rows, const Share& share) {
    if constexpr (spec::kGathers) {
      gather(rows, share);
    } else {
      copy(rows, share);
    }
  }

  // By TMA. Every lane has a piece of kBoxKeys keys, of 32 that follow each other, and knows where these lie; the next
  // ones are on their way.
  __device__ __forceinline__ void copy(const Rows& rows, const Share& share) {
    int piece = 0;  // after those of the lanes
    int page, row;
    int next_key = key_of(share, lane_index());
    int next_page = page_of(rows, next_key);
#pragma unroll 1
    for (int i = 0; i < share.count; ++i) {
      if (i * kPieces >= piece) {
        page = next_page;
        row = spec::kPageTable ? next_key % params_.kv_rows : rows.tile.kv_row + next_key;
        piece += kWarpSize;
        next_key = key_of(share, piece + lane_index());
        next_page = page_of(rows, next_key);
      }
      Barrier& barrier = shared_.full[ring_.slot];
      shared_.empty[ring_.slot].wait(ring_.phase ^ 1);
      if (elect_lane()) barrier.arrive_expect((kKBoxes + kVBoxes) * kBlockBytes);
#pragma unroll
      for (int own = 0; own < kPieces; ++own) {
        const int lane = i * kPieces + own - (piece - kWarpSize);
        const int its_page = __shfl_sync(kAllLanes, page, lane);
        const int its_row = __shfl_sync(kAllLanes, row, lane);
        if (elect_lane()) {
          const int offset = own * spec::kBoxKeys * kSwizzleBytes;
          for (int box = 0; box < kKBoxes; ++box) {
            tma_load(shared_.ring.k[ring_.slot] + box * kBlockBytes + offset, maps_.k, barrier, box * kBoxColumns,
                     its_row, rows.kv_head, its_page);
          }
          for (int box = 0; box < kVBoxes; ++box) {
            tma_load(shared_.ring.v[ring_.slot] + box * kBlockBytes + offset, maps_.v, barrier, box * kBoxColumns,
                     its_row, rows.kv_head, its_page);
          }
        }
      }
      ring_.advance();
    }
  }

  // Key by key, where pages are small: every kLoaders-th block, of whose keys a lane has some, and knows the next ones.
  __device__ __forceinline__ void gather(const Rows& rows, const Share& share) {
    int keys[kKeysOfLane], next[kKeysOfLane];
    locate(rows, share, block_, next);
    for (; block_ < share.count; block_ += kLoaders) {
#pragma unroll
      for (int i = 0; i < kKeysOfLane; ++i) keys[i] = next[i];
      locate(rows, share, block_ + kLoaders, next);
      shared_.empty[ring_.slot].wait(ring_.phase ^ 1);
      gather_rows<kKBoxes>(shared_.ring.k[ring_.slot], operands_.k, params_.head_dim * kKvBytes, keys);
      gather_rows<kVBoxes>(shared_.ring.v[ring_.slot], operands_.v, params_.head_dim_v * kKvBytes, keys);
      arrive_after_copies(shared_.full[ring_.slot]);
      for (int i = 0; i < kLoaders; ++i) ring_.advance();
    }
    block_ -= share.count;
  }

  static constexpr int kKeysOfLane = (spec::kTileN + kWarpSize - 1) / kWarpSize;

  // Where the lane's keys of a block lie, in rows of one head.
  __device__ __forceinline__ void locate(const Rows& rows, const Share& share, int block, int (&keys)[kKeysOfLane]) {
#pragma unroll
    for (int i = 0; i < kKeysOfLane; ++i) {
      const int key = share.block(block) * spec::kTileN + i * kWarpSize + lane_index();
      const int row = page_of(rows, key) * params_.kv_rows + key % params_.kv_rows;
      keys[i] = row * params_.kv_heads + rows.kv_head;
    }
  }

  template <int kBoxes>
  __device__ __forceinline__ void gather_rows(u8* buffer, const void* array, int row_bytes,
                                              const int (&keys)[kKeysOfLane]) {
    constexpr int kVectors = kBoxes * kSwizzleBytes / 16;
#pragma unroll 8
    for (int first = 0; first < spec::kTileN * kVectors; first += kWarpSize) {
      const int key = (first + lane_index()) / kVectors;
      const int vector = (first + lane_index()) % kVectors;
      int row = __shfl_sync(kAllLanes, keys[0], key % kWarpSize);
      if constexpr (kKeysOfLane > 1) {
        const int other = __shfl_sync(kAllLanes, keys[kKeysOfLane - 1], key % kWarpSize);
        if (key >= kWarpSize) row = other;
      }
      u8* to = buffer + vector / 8 * kBlockBytes + key * kSwizzleBytes + (vector % 8 ^ key % 8) * 16;
      const u8* from = static_cast<const u8*>(array) + static_cast<i64>(row) * row_bytes + vector * 16;
      copy_async(to, from, vector * 16 < row_bytes);
    }
  }

  // The first key of a piece.
  __device__ __forceinline__ static int key_of(const Share& share, int piece) {
    return share.block(piece / kPieces) * spec::kTileN + piece % kPieces * spec::kBoxKeys;
  }

  // The page of a key, or the group: past the last one, some other.
  __device__ __forceinline__ int page_of(const Rows& rows, int key) const {
    if constexpr (!spec::kPageTable) return rows.tile.kv_group;
    return jax_flash::page_of(rows.tile.sequence, key, operands_, params_);
  }

  SharedStorage& shared_;
  const KvMaps& maps_;
  const Operands& operands_;
  const Params& params_;
  Ring<spec::kStages> ring_;
  int block_;  // of those of a tile, the next that is this warp's; TMA has one warp for all
};

}  // namespace jax_flash
