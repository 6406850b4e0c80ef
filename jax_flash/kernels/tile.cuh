// Tile: some rows of Q of one head, and the range of keys that they see.
#pragma once

#include "hopper/warp.cuh"
#include "keys.cuh"
#include "operands.cuh"
#include "params.h"
#include "spec.h"

namespace jax_flash {

// kTileM rows of Q of one head.
struct Tile {
  int head;
  int sequence;  // -1: rows of no sequence, whose output is zero
  int q_group;   // where the rows lie: group,
  int q_row;     // first row in it,
  int rows;      // and how many of them are this tile's to write
  int q_index;   // position of the first row in its sequence
  int q_len;     // used rows of the sequence
  Keys keys;
};

// Where some keys that follow each other lie in K and V: in a group or page, from a row on.
struct KeyPlace {
  int group;
  int row;
};

// Of those of a tile, from `key` on: past the last page of a table, somewhere in that.
__device__ __forceinline__ KeyPlace place_of(const Tile& tile, int key, const Operands& operands,
                                             const Params& params) {
  if constexpr (spec::kPageTable) {
    const int page = min(key / params.kv_rows, params.max_pages - 1);
    const int* table = operands.page_table + static_cast<i64>(max(tile.sequence, 0)) * params.max_pages;
    return {clamp(__ldg(table + page), 0, params.kv_groups - 1), key % params.kv_rows};
  } else {
    return {tile.keys.group, tile.keys.row + key};
  }
}

// The keys that some rows see, as blocks of kTileN; the first begins `lead` rows above the sequence.
struct alignas(16) Blocks {
  int begin, end;
  int full_begin, full_end;  // of these, the ones that every row sees whole

  __device__ __forceinline__ bool empty() const { return begin >= end; }
};

// Keys that row `q_index` of the sequence sees: [first, last). Rows past q_len get some range too: what they give is
// never stored, so blocks that every used row sees whole need no mask.
__device__ __forceinline__ int first_key(const Tile& tile, const Params& params, int q_index) {
  const int first = spec::kCacheLeftpad ? tile.keys.first : 0;
  if constexpr (!spec::kWindowLeft) return first;
  return max(first, q_index + tile.keys.len - tile.q_len - params.window_left);
}

__device__ __forceinline__ int last_key(const Tile& tile, const Params& params, int q_index) {
  if constexpr (!spec::kWindowRight) return tile.keys.len;
  return min(tile.keys.len, q_index + tile.keys.len - tile.q_len + params.window_right + 1);
}

// Rows before the sequence's first key with which blocks begin; they are masked. Transposed FP8 values keep 16 keys in
// the order of P's registers, so their blocks begin at multiples of 16 rows.
__device__ __forceinline__ int lead(const Tile& tile) {
  return spec::kKeyAlignment > 1 ? tile.keys.row % spec::kKeyAlignment : 0;
}

// Where the sequence's first key lies, in rows from the beginning of a block.
__device__ __forceinline__ int first_key_in(const Tile& tile, int block) { return lead(tile) - block * spec::kTileN; }

// The keys that count, likewise: [first, last).
__device__ __forceinline__ int first_used_in(const Tile& tile, int block) {
  return first_key_in(tile, block) + (spec::kCacheLeftpad ? tile.keys.first : 0);
}
__device__ __forceinline__ int last_used_in(const Tile& tile, int block) {
  return first_key_in(tile, block) + tile.keys.len;
}

// Whether a block of a tile has rows around those.
__device__ __forceinline__ bool at_edge(const Tile& tile, int block) {
  return first_used_in(tile, block) > 0 || last_used_in(tile, block) < spec::kTileN;
}

// The blocks that `rows` rows of a tile see, from `first_row` on.
__device__ __forceinline__ Blocks visible_blocks(const Tile& tile, const Params& params, int first_row, int rows) {
  const int top = tile.q_index + first_row;
  const int bottom = min(top + rows, min(tile.q_index + tile.rows, tile.q_len)) - 1;
  const int first = first_key(tile, params, top);
  const int last = last_key(tile, params, bottom);
  Blocks blocks{};
  if (bottom < top || last <= first) return blocks;
  blocks.begin = (first + lead(tile)) / spec::kTileN;
  blocks.end = (last + lead(tile) + spec::kTileN - 1) / spec::kTileN;
  blocks.full_begin = (first_key(tile, params, bottom) + lead(tile) + spec::kTileN - 1) / spec::kTileN;
  blocks.full_end = max(0, last_key(tile, params, top) + lead(tile)) / spec::kTileN;
  return blocks;
}

}  // namespace jax_flash
