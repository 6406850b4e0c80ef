// Tile: some rows of Q of one head, and the range of keys that they see.
#pragma once

#include "hopper/warp.cuh"
#include "params.h"
#include "spec.h"

namespace jax_flash {

// Rows of a tile: kTileM for each CTA of the cluster.
constexpr int kTileRows = spec::kTileM * spec::kCluster;

// The first of them that is this CTA's.
__device__ __forceinline__ int cta_first_row() { return spec::kCluster == 1 ? 0 : cluster_rank() * spec::kTileM; }

// kTileRows rows of Q of one head.
struct Tile {
  int head;
  int sequence;  // -1: rows of no sequence, whose output is zero
  int q_group;   // where the rows lie: group,
  int q_row;     // first row in it,
  int rows;      // and how many of them are this tile's to write
  int q_index;   // position of the first row in its sequence
  int q_len;     // used rows of the sequence
  int kv_group;  // where its keys lie: group,
  int kv_row;    // first row in it,
  int kv_len;    // and how many of them are used
};

// The keys that some rows see, as blocks of kTileN, counted from `origin_row`.
struct KeyRange {
  int origin_row;            // in the group
  int lead;                  // keys between the origin and the sequence's first key; they are masked
  int begin, end;            // blocks that some row sees
  int full_begin, full_end;  // of these, the ones that every row sees whole

  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

// Keys that row `q_index` of the sequence sees: [first, last). Rows past q_len get some range too: what they give is
// never stored, so blocks that every used row sees whole need no mask.
__device__ __forceinline__ int first_key(const Tile& tile, const Params& params, int q_index) {
  if constexpr (!spec::kWindowLeft) return 0;
  return max(0, q_index + tile.kv_len - tile.q_len - params.window_left);
}

__device__ __forceinline__ int last_key(const Tile& tile, const Params& params, int q_index) {
  if constexpr (!spec::kWindowRight) return tile.kv_len;
  return min(tile.kv_len, q_index + tile.kv_len - tile.q_len + params.window_right + 1);
}

// The keys that `rows` rows of a tile see, from `first_row` on.
__device__ __forceinline__ KeyRange key_range(const Tile& tile, const Params& params, int first_row, int rows) {
  KeyRange range{};
  const int top = tile.q_index + first_row;
  const int bottom = min(top + rows, min(tile.q_index + tile.rows, tile.q_len)) - 1;
  const int last = last_key(tile, params, bottom);
  const int first = first_key(tile, params, top);
  if (bottom < top || last <= first) return range;
  // Transposed FP8 values keep 16 keys in the order of P's registers, so their blocks begin at multiples of 16 rows.
  if constexpr (spec::kKeyAlignment > 1) range.lead = tile.kv_row % spec::kKeyAlignment;
  range.origin_row = tile.kv_row - range.lead;
  range.begin = (first + range.lead) / spec::kTileN;
  range.end = (last + range.lead + spec::kTileN - 1) / spec::kTileN;
  const int whole_from = first_key(tile, params, bottom) + range.lead;
  range.full_begin = (whole_from + spec::kTileN - 1) / spec::kTileN;
  range.full_end = max(0, last_key(tile, params, top) + range.lead) / spec::kTileN;
  return range;
}

}  // namespace jax_flash
