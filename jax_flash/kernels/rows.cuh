// Rows: which rows of Q a CTA has. The query heads that share a key/value head are rows of the same tile: row r of a
// sequence is query r / group of its head r % group.
#pragma once

#include "hopper/warp.cuh"
#include "keys.cuh"
#include "operands.cuh"
#include "order.cuh"
#include "params.h"
#include "segments.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// How the grid is counted, as cuda.py chose it: by tile of a sequence, or of all packed ones, head and split.
struct Grid {
  int numbers;  // that stand for these
  Divisor splits;
  Divisor m_blocks;  // tiles of a sequence, where Q is dense
  Divisor kv_heads;
  Divisor group;  // query heads of a key/value head
};

// Some rows of a sequence, and one of the parts that their keys are split into.
struct Rows {
  Tile tile;  // the queries that they are of
  int kv_head;
  int first;  // of the rows of the sequence
  int count;
  int item;  // number of these rows and their head, without the split
  int split;
  Divisor group;

  // The query of a row, and its head, of all heads.
  __device__ __forceinline__ int query(int row) const { return group.quotient(first + row); }
  __device__ __forceinline__ int head(int row) const {
    return kv_head * group.value + first + row - query(row) * group.value;
  }

  // Where a row lies among the rows of all heads of Q and the output, and among those of the log-sum-exp.
  __device__ __forceinline__ i64 index(int row, const Params& params) const {
    return (static_cast<i64>(tile.q_group) * params.q_rows + q_row(row)) * params.heads + head(row);
  }
  __device__ __forceinline__ i64 lse_index(int row, const Params& params) const {
    return (static_cast<i64>(tile.q_group) * params.heads + head(row)) * params.q_rows + q_row(row);
  }

 private:
  __device__ __forceinline__ int q_row(int row) const { return tile.q_row + query(row) - tile.q_index; }
};

// Finds tile `index` of packed queries, if there are so many. All lanes take part.
__device__ __forceinline__ bool find_packed(int index, Rows& rows, const Operands& operands, const Params& params) {
  const int sequences = params.batch / params.q_groups;
  const int segments = params.q_groups * (sequences + 2);
  int row = 0;    // where the segments of a chunk of 32 begin,
  int tiles = 0;  // and the tiles before them
  for (int chunk = 0; chunk < segments; chunk += kWarpSize) {
    const Segment own = segment_of_lane(chunk + lane_index(), row, operands, params.q_groups, params.q_rows, sequences);
    const int tiles_end = tiles + warp_scan_sum(ceil_div((own.end - own.begin) * rows.group.value, spec::kTileM));
    const u32 later = __ballot_sync(kAllLanes, tiles_end > index);
    if (later != 0) {
      const int owner = __ffs(later) - 1;
      const int before = owner == 0 ? tiles : __shfl_sync(kAllLanes, tiles_end, owner - 1);
      const Segment found = shared_by(owner, own);
      rows.tile.q_group = found.group;
      rows.tile.q_row = found.begin - found.group * params.q_rows;
      rows.tile.sequence = sequence_of(found, sequences);
      rows.tile.q_len = found.end - found.begin;
      rows.first = (index - before) * spec::kTileM;
      return true;
    }
    row = __shfl_sync(kAllLanes, own.end, kWarpSize - 1);
    tiles = __shfl_sync(kAllLanes, tiles_end, kWarpSize - 1);
  }
  return false;
}

// The rows of a number; none from grid.numbers on, or from some smaller number. All lanes take part.
__device__ __forceinline__ Rows find_rows(int number, const Operands& operands, const Params& params,
                                          const Grid& grid) {
  Rows rows{};
  if (number >= grid.numbers) return rows;
  const int item = rows.item = grid.splits.quotient(number);
  rows.split = number - item * grid.splits.value;
  rows.group = grid.group;
  Tile& tile = rows.tile;
  if constexpr (spec::kPackedQ) {
    const int index = grid.kv_heads.quotient(item);
    rows.kv_head = item - index * grid.kv_heads.value;
    if (!find_packed(index, rows, operands, params)) return rows;
  } else {
    const int pair = grid.m_blocks.quotient(item);
    tile.sequence = tile.q_group = grid.kv_heads.quotient(pair);
    rows.kv_head = pair - tile.sequence * grid.kv_heads.value;
    rows.first = (item - pair * grid.m_blocks.value) * spec::kTileM;
    tile.q_row = 0;
    tile.q_len = params.q_rows;
  }
  rows.count = min(spec::kTileM, tile.q_len * rows.group.value - rows.first);
  tile.q_index = rows.query(0);
  tile.q_row += tile.q_index;
  tile.rows = rows.query(rows.count - 1) + 1 - tile.q_index;

  if (tile.sequence < 0) tile.q_len = 0;
  if (spec::kSequsedQ && tile.sequence >= 0) {
    tile.q_len = clamp(__ldg(operands.seqused_q + tile.sequence), 0, tile.q_len);
  }
  tile.keys = keys_of(tile.sequence, operands, params);
  return rows;
}

// The blocks of keys that a split has of those that its rows see: every `step`-th, so that CTAs that share them read
// neighbours at a time. Which ones depends on nothing but the sequence.
struct Share {
  Blocks blocks;
  int begin;  // the first one
  int step;
  int count;

  __device__ __forceinline__ Share(const Rows& rows, const Params& params, const Grid& grid)
      : blocks(visible_blocks(rows.tile, params, 0, rows.tile.rows)), step(grid.splits.value) {
    begin = blocks.begin + rows.split;
    count = max(0, grid.splits.quotient(max(0, blocks.end - begin) + step - 1));
  }

  __device__ __forceinline__ int block(int i) const { return begin + i * step; }
};

}  // namespace jax_flash
