// Mask: scores of keys outside [first, last) of a row become -inf. Only blocks at an edge run it.
#pragma once

#include "fragment.cuh"
#include "hopper/types.cuh"
#include "params.h"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

template <int kColumns>
__device__ __forceinline__ void mask(float (&s)[kColumns / 2], const Tile& tile, const Params& params, int first_row,
                                     int block) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int q_index = tile.q_index + first_row + fragment_row(r);
    // Columns of this block that the row sees, relative to the thread's own first column.
    const int shift = first_key_in(tile, block) - fragment_column(0);
    const int first = first_key(tile, params, q_index) + shift;
    const int last = last_key(tile, params, q_index) + shift;
#pragma unroll
    for (int j = 0; j < kColumns / 8; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        bool seen = 8 * j + e < last;
        if constexpr (spec::kWindowLeft || spec::kKeyAlignment > 1) seen = seen && 8 * j + e >= first;
        if (!seen) s[4 * j + 2 * r + e] = -kInfinity;
      }
    }
  }
}

}  // namespace jax_flash
