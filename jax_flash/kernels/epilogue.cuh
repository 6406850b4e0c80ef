// Epilogue: normalises a warpgroup's rows and writes them and their log-sum-exp. Rows that are unused get 0 and -inf.
#pragma once

#include "fragment.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "mainloop.cuh"
#include "operands.cuh"
#include "params.h"
#include "softmax.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

template <typename Out>
__device__ __forceinline__ void store2(void* out, i64 offset, float low, float high) {
  if constexpr (Out::kBytes == 4) {
    *reinterpret_cast<float2*>(static_cast<float*>(out) + offset) = float2{low, high};
  } else {
    *reinterpret_cast<u32*>(static_cast<u16*>(out) + offset) = pack2<Out>(low, high);
  }
}

// A row that sees no key is known by its position: what its scores and scales made of the key range of the tile, NaN
// and infinities included, must not be stored.
__device__ __forceinline__ void store_rows(const Tile& tile, const Params& params, const Operands& operands,
                                           int warpgroup, const Output& o, const float (&factor)[kRowsPerThread],
                                           const float (&lse)[kRowsPerThread], float sink) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int row = warpgroup * kWarpgroupRows + fragment_row(r);
    if (row >= tile.rows) continue;
    const int q_index = tile.q_index + row;
    const bool used = q_index < tile.q_len;
    const bool sees = used && first_key(tile, params, q_index) < last_key(tile, params, q_index);
    const i64 row_in_all = static_cast<i64>(tile.q_group) * params.q_rows + tile.q_row + row;
    const i64 offset = (row_in_all * params.heads + tile.head) * params.head_dim_v;
#pragma unroll
    for (int piece = 0; piece < kPieces; ++piece) {
#pragma unroll
      for (int j = 0; j < spec::kTileV / 8; ++j) {
        const int column = piece * spec::kTileV + fragment_column(j);
        if (column >= params.head_dim_v) continue;
        const float low = sees ? o[piece][4 * j + 2 * r] * factor[r] : 0.0f;
        const float high = sees ? o[piece][4 * j + 2 * r + 1] * factor[r] : 0.0f;
        store2<spec::Out>(operands.out, offset + column, low, high);
      }
    }
    if constexpr (spec::kLse) {
      if (lane_index() % 4 == 0) {
        const i64 head_in_all = static_cast<i64>(tile.q_group) * params.heads + tile.head;
        const float blind = spec::kSinks && used ? sink : -kInfinity;
        operands.lse[head_in_all * params.q_rows + tile.q_row + row] = sees ? lse[r] : blind;
      }
    }
  }
}

}  // namespace jax_flash
