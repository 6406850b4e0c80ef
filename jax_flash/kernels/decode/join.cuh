// Join: what warps, CTAs of a cluster or splits made of their keys becomes rows of the output.
#pragma once

#include "decode/storage.cuh"
#include "hopper/barrier.cuh"
#include "hopper/cluster.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "parts.cuh"
#include "rows.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// The end of a row, by whoever has all of its parts.
__device__ __forceinline__ void finish_row(Part part, int row, int column, const Work& work, const Operands& operands,
                                           const Params& params) {
  if (column >= params.head_dim_v) return;
  const Rows& rows = work.rows;
  const Tile& tile = rows.tile;
  const int query = rows.query(row);
  const bool used = query < tile.q_len;
  const bool sees = used && first_key(tile, params, query) < last_key(tile, params, query);
  const float sink = spec::kSinks ? work.sink[row] : -kInfinity;
  if constexpr (spec::kSinks) part = with_sink(part, sink);
  float lse = finish(part);
  part.out = scaled(part.out, work.v_scale);
  if (!sees) {
    part.out = float4{};
    lse = used ? sink : -kInfinity;
  }
  store_columns<spec::Out>(operands.out, rows.index(row, params) * params.head_dim_v + column, part.out);
  if (spec::kLse && column == 0) operands.lse[rows.lse_index(row, params)] = lse;
}

// Calls `use` with a row and the first of four columns, for all of a tile that are this thread's of `threads`.
template <typename Use>
__device__ __forceinline__ void each_vector(const Rows& rows, int thread, int threads, Use use) {
  constexpr int kVectors = spec::kHeadDimV / 4;
  for (int i = thread; i < rows.count * kVectors; i += threads) use(i / kVectors, i % kVectors * 4);
}

// What a split made of its keys, in global memory: sums of values, then of each row the largest exponent and the sum.
constexpr int kPartFloats = spec::kTileM * (spec::kHeadDimV + 2);
static_assert(kPartFloats == spec::kPartFloats, "cuda.py makes room for as many");
constexpr int kPartsAtOnce = 8;

__device__ __forceinline__ void store_part(float* split, int row, int column, const Part& part) {
  *reinterpret_cast<float4*>(split + row * spec::kHeadDimV + column) = part.out;
  if (column == 0) {
    *reinterpret_cast<float2*>(split + spec::kTileM * spec::kHeadDimV + row * 2) = float2{part.largest, part.sum};
  }
}

__device__ __forceinline__ Part load_part(const float* split, int row, int column) {
  const float2 x = __ldcg(reinterpret_cast<const float2*>(split + spec::kTileM * spec::kHeadDimV + row * 2));
  return {x.x, x.y, __ldcg(reinterpret_cast<const float4*>(split + row * spec::kHeadDimV + column))};
}

// Joins what the consumer warps made of their keys. Ends the rows, if no other CTA has keys of them.
__device__ __forceinline__ void join_warps(SharedStorage& shared, const Work& work, const Operands& operands,
                                           const Params& params, float* split) {
  each_vector(work.rows, threadIdx.x, kConsumerThreads, [&](int row, int column) {
    Part parts[kKeyWarps];
#pragma unroll
    for (int i = 0; i < kKeyWarps; ++i) {
      parts[i] = {shared.largest[i][row], shared.sum[i][row],
                  *reinterpret_cast<const float4*>(&shared.out[i][row][column])};
    }
    const Part part = join(parts);
    if constexpr (spec::kPartial) {
      store_part(split, row, column, part);
    } else if constexpr (spec::kCluster > 1) {
      *reinterpret_cast<float4*>(&shared.out[0][row][column]) = part.out;
      if (column == 0) shared.joined[row] = {part.largest, part.sum};
    } else {
      finish_row(part, row, column, work, operands, params);
    }
  });
}

// Joins what the CTAs of a cluster made of theirs; each ends some of the columns. Cluster barriers go before and after.
__device__ __forceinline__ void join_cluster(SharedStorage& shared, const Work& work, const Operands& operands,
                                             const Params& params) {
  const int thread = work.rows.split * kConsumerThreads + threadIdx.x;
  each_vector(work.rows, thread, spec::kCluster * kConsumerThreads, [&](int row, int column) {
    Part parts[spec::kCluster];
#pragma unroll
    for (int cta = 0; cta < spec::kCluster; ++cta) {
      const float2 joined = cluster_load(&shared.joined[row], cta);
      parts[cta] = {joined.x, joined.y,
                    cluster_load(reinterpret_cast<const float4*>(&shared.out[0][row][column]), cta)};
    }
    finish_row(join(parts), row, column, work, operands, params);
  });
}

// Joins what splits made of theirs, in the same order whoever is the last one and does so.
__device__ __forceinline__ void join_splits(SharedStorage& shared, const Work& work, const Operands& operands,
                                            const Params& params, const float* first_split, int splits) {
  __threadfence();
  named_sync(kConsumerBarrier, kConsumerThreads);
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(operands.counters + 1 + work.rows.item, 1) == splits - 1;
    __threadfence();
  }
  named_sync(kConsumerBarrier, kConsumerThreads);
  if (shared.last == 0) return;
  each_vector(work.rows, threadIdx.x, kConsumerThreads, [&](int row, int column) {
    Part all{-kInfinity, 0.0f, float4{}};
    for (int split = 0; split < splits; split += kPartsAtOnce) {
      Part parts[kPartsAtOnce];
#pragma unroll
      for (int i = 0; i < kPartsAtOnce; ++i) {
        parts[i] = {-kInfinity, 0.0f, float4{}};
        if (split + i < splits) parts[i] = load_part(first_split + i64{split + i} * kPartFloats, row, column);
      }
      all = join<2>({all, join(parts)});
    }
    finish_row(all, row, column, work, operands, params);
  });
}

__device__ __forceinline__ void join_parts(SharedStorage& shared, const Work& work, const Operands& operands,
                                           const Params& params, const Grid& grid) {
  const int splits = grid.splits.value;
  float* first_split = operands.parts + i64{work.rows.item} * splits * kPartFloats;
  join_warps(shared, work, operands, params, first_split + i64{work.rows.split} * kPartFloats);
  if constexpr (spec::kPartial) join_splits(shared, work, operands, params, first_split, splits);
}

}  // namespace jax_flash
