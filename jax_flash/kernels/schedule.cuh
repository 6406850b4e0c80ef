// Schedule: which tile a cluster works on next. Every CTA of a cluster walks the same tiles by itself: cluster c takes
// one tile of every round of clusters, the c-th from its beginning or, in reversed rounds, its end.
//
// Heads are worked on in sections whose keys and values stay in the L2 cache together. Under a causal mask the tiles of
// the first section come from the shortest to the longest or the reverse, those of the next the other way, and of the
// last from the longest to the shortest: so lengths rise and fall along t, and every CTA gets its share of long tiles.
// Where one section is all there is, every other round of CTAs runs in reverse instead.
//
// Index arrays are read as they are defined for all platforms: the boundaries of a group are the running maximum of its
// cu_seqlens, clamped to [0, rows], and lengths are clamped to the sequence. So no value leads outside a buffer, and
// sequences never overlap.
#pragma once

#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

__device__ __forceinline__ int clamp(int x, int low, int high) { return max(low, min(x, high)); }

// Boundary i of a group that cu_seqlens cuts: the running maximum of the array. All lanes take part.
__device__ __forceinline__ int boundary(const int* cu_seqlens, int i, int rows) {
  int largest = 0;
  for (int j = lane_index(); j <= i; j += kWarpSize) largest = max(largest, __ldg(cu_seqlens + j));
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  return min(largest, rows);
}

class Schedule {
 public:
  __device__ __forceinline__ Schedule(const Operands& operands, const Params& params)
      : operands_(operands), params_(params) {
    if constexpr (!spec::kPackedQ && spec::kWindowRight) {
      constexpr i64 kL2Bytes = 16 << 20;
      const i64 pair_bytes = static_cast<i64>(params.kv_rows) * (params.head_dim + params.head_dim_v) *
                             spec::Element::kBytes * params.kv_heads / params.heads;
      const i64 fitting = max(1ll, kL2Bytes / max(1ll, pair_bytes));
      sections_ = static_cast<int>((pairs() + fitting - 1) / fitting);
      pairs_per_section_ = (pairs() + sections_ - 1) / sections_;
    }
  }

  // The next tile, if there is one, into shared memory: registers are few here. All lanes take part.
  __device__ __forceinline__ bool next(Tile& shared_tile) {
    const bool reversed = !spec::kPackedQ && spec::kWindowRight && sections_ == 1 && round_ % 2 == 1;
    const int clusters = grid_size() / spec::kCluster;
    const int cluster = blockIdx.x / spec::kCluster;
    const int index = round_ * clusters + (reversed ? clusters - 1 - cluster : cluster);
    ++round_;
    Tile tile;
    bool found;
    if constexpr (spec::kPackedQ) {
      found = find_packed(tile, index);
    } else {
      found = find_dense(tile, index);
    }
    if (!found) return false;
    if (lane_index() == 0) shared_tile = tile;
    __syncwarp();
    find_keys(shared_tile);
    return true;
  }

 private:
  // Pairs of sequence and head.
  __device__ __forceinline__ int pairs() const { return params_.batch * params_.heads; }

  __device__ __forceinline__ bool find_dense(Tile& tile, int index) {
    const int heads = opaque(params_.heads);
    const int q_rows = opaque(params_.q_rows);
    const int pairs = heads * params_.batch;
    const int m_blocks = (q_rows + kTileRows - 1) / kTileRows;
    if (index >= m_blocks * pairs) return false;
    const int pairs_per_section = opaque(pairs_per_section_);
    const int section = index / (pairs_per_section * m_blocks);
    const int first = section * pairs_per_section;
    const int width = min(pairs_per_section, pairs - first);
    const int in_section = index - first * m_blocks;
    const int pair = first + in_section % width;
    const int m_block = in_section / width;
    const bool rising = spec::kWindowRight && (sections_ - section) % 2 == 0;
    tile.sequence = pair / heads;
    tile.head = pair % heads;
    tile.q_group = tile.sequence;
    tile.q_index = tile.q_row = (rising ? m_block : m_blocks - 1 - m_block) * kTileRows;
    tile.rows = min(kTileRows, q_rows - tile.q_row);
    tile.q_len = q_rows;
    return true;
  }

  // A group of n sequences is n + 2 segments of rows: before the first, the sequences, after the last. A warp looks at
  // a chunk of 32 segments at a time and remembers where it stands, as later tiles never lie further back.
  __device__ __forceinline__ bool find_packed(Tile& tile, int index) {
    const int q_groups = opaque(params_.q_groups);
    const int q_rows = opaque(params_.q_rows);
    const int heads = opaque(params_.heads);
    const int sequences = params_.batch / q_groups;
    const int segments = q_groups * (sequences + 2);
    while (chunk_ < segments) {
      const int segment = chunk_ + lane_index();
      const int group = min(segment, segments - 1) / (sequences + 2);
      const int in_group = min(segment, segments - 1) - group * (sequences + 2);
      int end = q_rows;
      if (in_group <= sequences) {
        end = clamp(__ldg(operands_.cu_seqlens_q + static_cast<i64>(group) * (sequences + 1) + in_group), 0, end);
      }
      end = max(warp_scan_max(group * q_rows + end), chunk_row_);
      int begin = __shfl_up_sync(kAllLanes, end, 1);
      if (lane_index() == 0) begin = chunk_row_;
      const int m_blocks = (end - begin + kTileRows - 1) / kTileRows;
      const int tiles_end = chunk_tiles_ + warp_scan_sum(m_blocks * heads);
      const u32 later = __ballot_sync(kAllLanes, tiles_end > index);
      if (later == 0) {
        chunk_ += kWarpSize;
        chunk_row_ = __shfl_sync(kAllLanes, end, kWarpSize - 1);
        chunk_tiles_ = __shfl_sync(kAllLanes, tiles_end, kWarpSize - 1);
        continue;
      }
      const int owner = __ffs(later) - 1;
      const int owner_m_blocks = __shfl_sync(kAllLanes, m_blocks, owner);
      const int owner_begin = __shfl_sync(kAllLanes, begin, owner);
      const int owner_end = __shfl_sync(kAllLanes, end, owner);
      const int owner_group = __shfl_sync(kAllLanes, group, owner);
      const int owner_in_group = __shfl_sync(kAllLanes, in_group, owner);
      const int local = index - (__shfl_sync(kAllLanes, tiles_end, owner) - owner_m_blocks * heads);
      tile.head = local / owner_m_blocks;
      tile.q_index = (owner_m_blocks - 1 - local % owner_m_blocks) * kTileRows;
      tile.rows = min(kTileRows, owner_end - owner_begin - tile.q_index);
      tile.q_group = owner_group;
      tile.q_row = owner_begin - owner_group * q_rows + tile.q_index;
      const bool in_sequence = owner_in_group >= 1 && owner_in_group <= sequences;
      tile.sequence = in_sequence ? owner_group * sequences + owner_in_group - 1 : -1;
      tile.q_len = in_sequence ? owner_end - owner_begin : 0;
      return true;
    }
    return false;
  }

  // The used lengths of the tile's sequence, and where its keys lie.
  __device__ __forceinline__ void find_keys(Tile& tile) {
    const int sequence = tile.sequence;
    if (spec::kSequsedQ && sequence >= 0 && lane_index() == 0) {
      tile.q_len = clamp(__ldg(operands_.seqused_q + sequence), 0, tile.q_len);
    }
    int kv_group = 0;
    int kv_row = 0;
    int kv_len = 0;
    if (sequence >= 0) {
      kv_group = sequence;
      kv_len = params_.kv_rows;
      if constexpr (spec::kPackedK) {
        const int sequences = opaque(params_.batch) / params_.kv_groups;
        kv_group = sequence / sequences;
        const int in_group = sequence - kv_group * sequences;
        const int* cu_seqlens = operands_.cu_seqlens_k + static_cast<i64>(kv_group) * (sequences + 1);
        kv_row = boundary(cu_seqlens, in_group, params_.kv_rows);
        kv_len = max(kv_row, min(__ldg(cu_seqlens + in_group + 1), params_.kv_rows)) - kv_row;
      }
      if constexpr (spec::kSequsedK) kv_len = clamp(__ldg(operands_.seqused_k + sequence), 0, kv_len);
    }
    if (lane_index() == 0) {
      tile.kv_group = kv_group;
      tile.kv_row = kv_row;
      tile.kv_len = kv_len;
    }
    __syncwarp();
  }

  const Operands& operands_;
  const Params& params_;
  int round_ = 0;
  // Used under a causal mask or another right window alone:
  int pairs_per_section_ = 1;  // pairs are worked on in sections of so many,
  int sections_ = 1;           // and how many sections there are.
  // Used with packed queries alone:
  int chunk_ = 0;        // first segment of the 32 that the warp looks at,
  int chunk_row_ = 0;    // where it begins, counted over all groups,
  int chunk_tiles_ = 0;  // and the tiles before it
};

}  // namespace jax_flash
