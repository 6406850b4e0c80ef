// Keys: which rows of K and V are a sequence's.
//
// Index arrays are read as they are defined for all platforms: the boundaries of a group are the running maximum of its
// cu_seqlens, clamped to [0, rows], lengths are clamped to the sequence, groups and pages to those that exist. So no
// value leads outside a buffer, and sequences never overlap.
#pragma once

#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "spec.h"

namespace jax_flash {

__device__ __forceinline__ int clamp(int x, int low, int high) { return max(low, min(x, high)); }

__device__ __forceinline__ int ceil_div(int x, int y) { return (x + y - 1) / y; }

// Boundary i of a group that cu_seqlens cuts: the running maximum of the array. All lanes take part.
__device__ __forceinline__ int boundary(const int* cu_seqlens, int i, int rows) {
  int largest = 0;
  for (int j = lane_index(); j <= i; j += kWarpSize) largest = max(largest, __ldg(cu_seqlens + j));
  return min(warp_max(largest), rows);
}

// Those of one sequence. A paged one lies in no group, and its rows are counted over its pages.
struct Keys {
  int group;
  int row;    // the first,
  int len;    // how many are used,
  int first;  // and the first of these that counts
};

// The used ones of those that a sequence has.
__device__ __forceinline__ Keys used_keys(int sequence, Keys keys, const Operands& operands) {
  if constexpr (spec::kSequsedK) keys.len = clamp(__ldg(operands.seqused_k + sequence), 0, keys.len);
  if constexpr (spec::kCacheLeftpad) keys.first = clamp(__ldg(operands.cache_leftpad + sequence), 0, keys.len);
  return keys;
}

// The keys of a sequence, which may be -1. All lanes take part.
__device__ __forceinline__ Keys keys_of(int sequence, const Operands& operands, const Params& params) {
  Keys keys{};
  if (sequence < 0) return keys;
  keys.group = sequence;
  keys.len = spec::kPageTable ? params.max_pages * params.kv_rows : params.kv_rows;
  if constexpr (spec::kCacheBatchIdx) {
    keys.group = clamp(__ldg(operands.cache_batch_idx + sequence), 0, params.kv_groups - 1);
  }
  if constexpr (spec::kPackedK) {
    const int sequences = opaque(params.batch) / params.kv_groups;
    keys.group = sequence / sequences;
    const int in_group = sequence - keys.group * sequences;
    const int* cu_seqlens = operands.cu_seqlens_k + static_cast<i64>(keys.group) * (sequences + 1);
    keys.row = boundary(cu_seqlens, in_group, params.kv_rows);
    keys.len = max(keys.row, min(__ldg(cu_seqlens + in_group + 1), params.kv_rows)) - keys.row;
  }
  return used_keys(sequence, keys, operands);
}

}  // namespace jax_flash
