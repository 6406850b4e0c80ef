// Mask: scores of keys outside [first, last) of a row become -inf. Only blocks at an edge run it.
#pragma once

#include "fragment.cuh"
#include "hopper/types.cuh"
#include "params.h"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// Whether the first keys of a block may be hidden from a row.
constexpr bool kFirstMayHide = spec::kWindowLeft || spec::kCacheLeftpad || spec::kKeyAlignment > 1;

// Of a thread's columns 8j + e, which are 2j + e of its bits, from the first of a block: those before `column`.
__device__ __forceinline__ u32 bits_before(int column) {
  const int count = column / 8 * 2 + min(column % 8, 2);
  return column <= 0 ? 0 : count >= 32 ? ~0u : (1u << count) - 1;
}

// Those of the thread's row r outside [first, last), counted from the first column of the block.
template <int kColumns>
__device__ __forceinline__ void mask_row(float (&s)[kColumns / 2], int r, int first, int last) {
  first -= fragment_column(0);
  last -= fragment_column(0);
  // Bits, for ptxas makes predicates of seven at a time.
#pragma unroll
  for (int start = 0; start < kColumns; start += 128) {
    u32 seen = bits_before(last - start);
    if constexpr (kFirstMayHide) seen &= ~bits_before(first - start);
#pragma unroll
    for (int j = 0; j < 16 && start + 8 * j < kColumns; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (!(seen >> (2 * j + e) & 1)) s[start / 2 + 4 * j + 2 * r + e] = -kInfinity;
      }
    }
  }
}

template <int kColumns>
__device__ __forceinline__ void mask(float (&s)[kColumns / 2], const Tile& tile, const Params& params, int first_row,
                                     int block) {
#pragma unroll
  for (int r = 0; r < kRowsPerThread; ++r) {
    const int q_index = tile.q_index + first_row + fragment_row(r);
    const int start = first_key_in(tile, block);
    mask_row<kColumns>(s, r, first_key(tile, params, q_index) + start, last_key(tile, params, q_index) + start);
  }
}

}  // namespace jax_flash
