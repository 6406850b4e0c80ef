// Mask: scores of keys outside [first, last) of a row become -inf. Only blocks at an edge run it.
#pragma once

#include "fragment.cuh"
#include "hopper/types.cuh"
#include "params.h"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// Of a thread's columns 8j + e, which are 2j + e of its bits, from the first of a block: those before `column`.
__device__ __forceinline__ u32 bits_before(int column) {
  const int count = column / 8 * 2 + min(column % 8, 2);
  return column <= 0 ? 0 : count >= 32 ? ~0u : (1u << count) - 1;
}

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
    // Bits, for ptxas makes predicates of seven at a time.
#pragma unroll
    for (int start = 0; start < kColumns; start += 128) {
      u32 seen = bits_before(last - start);
      if constexpr (spec::kWindowLeft || spec::kKeyAlignment > 1) seen &= ~bits_before(first - start);
#pragma unroll
      for (int j = 0; j < 16 && start + 8 * j < kColumns; ++j) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          if (!(seen >> (2 * j + e) & 1)) s[start / 2 + 4 * j + 2 * r + e] = -kInfinity;
        }
      }
    }
  }
}

}  // namespace jax_flash
