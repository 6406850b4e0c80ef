// Epilogue: normalises a warpgroup's rows and writes them and their log-sum-exp. Rows that are unused get 0 and -inf.
#pragma once

#include "fragment.cuh"
#include "hopper/matrices.cuh"
#include "hopper/tma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "softmax.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

// Whether every row of the output that is stored belongs to a query that sees keys of its tile.
constexpr bool kAllSee = !(spec::kWindowLeft || spec::kWindowRight || spec::kSequsedQ || spec::kPackedQ);

// Where row `row` of a tile lies among the rows of all heads of the output, and among those of the log-sum-exp.
__device__ __forceinline__ i64 output_row(const Tile& tile, const Params& params, int row) {
  return (static_cast<i64>(tile.q_group) * params.q_rows + tile.q_row + row) * params.heads + tile.head;
}

__device__ __forceinline__ i64 lse_row(const Tile& tile, const Params& params, int row) {
  return (static_cast<i64>(tile.q_group) * params.heads + tile.head) * params.q_rows + tile.q_row + row;
}

// Stores, by the warp itself, those of the 16 rows whose 64 columns lie in `buffer` that are the tile's.
__device__ __forceinline__ void copy_rows(const Tile& tile, const Params& params, const Operands& operands,
                                          int first_row, int first_column, const u8* buffer) {
  constexpr int kVectors = kSwizzleBytes / 16;
  constexpr int kRows = kWarpSize / kVectors;
  const int row = lane_index() / kVectors;
  const int vector = lane_index() % kVectors;
  const i64 row_elements = static_cast<i64>(params.heads) * params.head_dim_v;
  u16* out = static_cast<u16*>(operands.out) + output_row(tile, params, first_row + row) * params.head_dim_v +
             first_column + vector * 8;
#pragma unroll 1
  for (int i = 0; i < kWarpRows; i += kRows) {
    const uint4 values =
        *reinterpret_cast<const uint4*>(buffer + (row + i) * kSwizzleBytes + (vector ^ (row + i) % 8) * 16);
    if (first_row + row + i < tile.rows && first_column + vector * 8 < params.head_dim_v) {
      *reinterpret_cast<uint4*>(out + i * row_elements) = values;
    }
  }
}

// 16-bit rows leave through shared memory, swizzled as TMA has them, as many columns at a time as there is room for.
// TMA stores them, without what lies past the last row or column of the tensor; the last rows of a packed sequence,
// after which come those of another, are stored by the warp.
template <typename Out>
__device__ __forceinline__ void store_16_bit(const Work& work, const Params& params, const Operands& operands,
                                             const TensorMaps& maps, int first_row,
                                             const float (&scale)[kRowsPerThread], const Output& o,
                                             u8 (&buffers)[kOutBuffers][kOutBytes]) {
  constexpr int kColumns = kOutBuffers * kOutColumns;
  const Tile& tile = work.tile;
  const int lane = lane_index();
  const bool whole = !spec::kPackedQ || first_row + kWarpRows <= tile.rows;
#pragma unroll
  for (int first = 0; first < spec::kHeadDimV; first += kColumns) {
    const int end = first + kColumns < spec::kHeadDimV ? first + kColumns : spec::kHeadDimV;
    if (lane == 0) tma_wait_read();
    __syncwarp();
#pragma unroll
    for (int column = first; column < end; column += 16) {
      const float* d = o + column / 2;
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) words[i] = pack2<Out>(d[2 * i] * scale[i % 2], d[2 * i + 1] * scale[i % 2]);
      u8* const buffer = buffers[(column - first) / kOutColumns];
      const int vector = lane / 16 ^ lane % 8 ^ column % kOutColumns / 8;
      store_matrices(buffer + lane % 16 * kSwizzleBytes + vector * 16, words);
    }
    fence_shared_for_async();
    __syncwarp();
    // Not `else`: with one ptxas takes nothing for the same in all lanes any more (Barrier::arrive_if).
    if (lane == 0 && whole) {
#pragma unroll
      for (int column = first; column < end; column += kOutColumns) {
        tma_store(maps.out, buffers[(column - first) / kOutColumns], column, tile.q_row + first_row, tile.head,
                  tile.q_group);
      }
      tma_commit();
    }
    if (!whole) {
#pragma unroll
      for (int column = first; column < end; column += kOutColumns) {
        copy_rows(tile, params, operands, first_row, column, buffers[(column - first) / kOutColumns]);
      }
    }
  }
}

__device__ __forceinline__ void store_32_bit(const Work& work, const Params& params, const Operands& operands,
                                             int first_row, const float (&scale)[kRowsPerThread], const Output& o) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int row = first_row + lane_index() / 4 + 8 * r;
    float* out = static_cast<float*>(operands.out) + output_row(work.tile, params, row) * params.head_dim_v;
#pragma unroll
    for (int j = 0; j < spec::kHeadDimV / 8; ++j) {
      const float* d = o + 4 * j;
      const int column = fragment_column(j);
      if (row < work.tile.rows && column < params.head_dim_v) {
        *reinterpret_cast<float2*>(out + column) = float2{d[2 * r] * scale[r], d[2 * r + 1] * scale[r]};
      }
    }
  }
}

// A row that sees no key is known by its position: what its scores and scales made of the key range of the tile, NaN
// and infinities included, must not be stored.
template <typename Out = spec::Out>
__device__ __forceinline__ void store_rows(const Work& work, const Params& params, const Operands& operands,
                                           const TensorMaps& maps, int first_row, float (&scale)[kRowsPerThread],
                                           float (&lse)[kRowsPerThread], Output& o,
                                           u8 (&buffers)[kOutBuffers][kOutBytes]) {
  const Tile& tile = work.tile;
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int row = first_row + lane_index() / 4 + 8 * r;
    const int q_index = tile.q_index + row;
    const bool used = q_index < tile.q_len;
    const bool sees = kAllSee || (used && first_key(tile, params, q_index) < last_key(tile, params, q_index));
    scale[r] *= work.v_scale;
    if (!__all_sync(kAllLanes, sees)) {
      if (!sees) {
        scale[r] = 0.0f;
        lse[r] = spec::kSinks && used ? work.sink : -kInfinity;
#pragma unroll
        for (int i = 2 * r; i < spec::kHeadDimV / 2; i += 4) o[i] = o[i + 1] = 0.0f;
      }
    }
    if constexpr (spec::kLse) {
      if (row < tile.rows && lane_index() % 4 == 0) operands.lse[lse_row(tile, params, row)] = lse[r];
    }
  }
  if constexpr (Out::kBytes == 4) {
    store_32_bit(work, params, operands, first_row, scale, o);
  } else {
    store_16_bit<Out>(work, params, operands, maps, first_row, scale, o, buffers);
  }
}

// Rows of a tile that see no key, by one warp.
__device__ __forceinline__ void store_blind_rows(const Work& work, const Params& params, const Operands& operands,
                                                 int first_row, int count) {
  const Tile& tile = work.tile;
  const int end = min(first_row + count, tile.rows);
  const int row_vectors = opaque(params.head_dim_v) * spec::Out::kBytes / 16;
#pragma unroll 1
  for (int row = first_row; row < end; ++row) {
    uint4* out = static_cast<uint4*>(operands.out) + output_row(tile, params, row) * row_vectors;
#pragma unroll 1
    for (int i = lane_index(); i < row_vectors; i += kWarpSize) out[i] = uint4{0, 0, 0, 0};
  }
  if constexpr (spec::kLse) {
#pragma unroll 1
    for (int row = first_row + lane_index(); row < end; row += kWarpSize) {
      const bool used = tile.q_index + row < tile.q_len;
      operands.lse[lse_row(tile, params, row)] = spec::kSinks && used ? work.sink : -kInfinity;
    }
  }
}

}  // namespace jax_flash
