// Join: what warps, CTAs of a cluster or splits made of their keys becomes rows of the output.
#pragma once

#include "decode/storage.cuh"
#include "hopper/barrier.cuh"
#include "hopper/cluster.cuh"
#include "hopper/types.cuh"
#include "operands.cuh"
#include "params.h"
#include "parts.cuh"
#include "rows.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// The end of a row, by whoever has all of its parts.
__device__ __forceinline__ void finish_vector(Part part, Vector vector, const Work& work, const Operands& operands,
                                              const Params& params) {
  const int column = vector.column();
  if (column >= params.head_dim_v) return;
  const Row& row = work.row[vector.row()];
  if constexpr (spec::kSinks) part = with_sink(part, row.sink);
  float lse = finish(part);
  part.out = scaled(part.out, work.v_scale);
  if (row.first_key >= row.last_key) {
    part.out = Columns{};
    lse = row.sink;
  }
  store_columns<spec::Out>(operands.out, row.index * params.head_dim_v + column, part.out);
  if (spec::kLse && column == 0) operands.lse[row.lse_index] = lse;
}

// Calls `use` with those vectors of a tile that are this thread's of those that multiply.
template <typename Use>
__device__ __forceinline__ void each_vector(const Rows& rows, Use use) {
  for (int number = threadIdx.x; number < rows.count * kVectors; number += kConsumerThreads) use(Vector{number});
}

// What a split made of its keys, in global memory: sums of values, then of each row the largest exponent and the sum.
constexpr int kPartFloats = spec::kTileM * (spec::kHeadDimV + 2);
static_assert(kPartFloats == spec::kPartFloats, "cuda.py makes room for as many");
constexpr int kPartsAtOnce = 8;

__device__ __forceinline__ void store_part(float* split, Vector vector, const Part& part) {
  reinterpret_cast<Columns*>(split)[vector.number] = part.out;
  if (vector.column() == 0) {
    float* largest = split + spec::kTileM * spec::kHeadDimV + vector.row() * 2;
    *reinterpret_cast<float2*>(largest) = float2{part.largest, part.sum};
  }
}

__device__ __forceinline__ Part load_part(const float* split, Vector vector) {
  const float* largest = split + spec::kTileM * spec::kHeadDimV + vector.row() * 2;
  const float2 x = __ldcg(reinterpret_cast<const float2*>(largest));
  const float4* out = reinterpret_cast<const float4*>(split) + vector.number * 2;
  return {x.x, x.y, {__ldcg(out), __ldcg(out + 1)}};
}

// Hands what this CTA made of its keys to the CTA of the cluster that ends a vector.
__device__ __forceinline__ void send_part(SharedStorage& shared, int sender, Vector vector, const Part& part) {
  const int place = Received::place(vector);
  const int receiver = Received::rank(vector);
  Received& received = shared.received;
  cluster_store(&received.low[sender][place], part.out.low, shared.all_received, receiver);
  cluster_store(&received.high[sender][place], part.out.high, shared.all_received, receiver);
  cluster_store(&received.largest_and_sum[sender][place], float2{part.largest, part.sum}, shared.all_received,
                receiver);
}

// Joins what the consumer warps made of their keys. Ends the rows, if no other CTA has keys of them.
__device__ __forceinline__ void join_warps(SharedStorage& shared, const Rows& rows, const Work& work,
                                           const Operands& operands, const Params& params, float* split) {
  each_vector(rows, [&](Vector vector) {
    Part parts[kKeyWarps];
#pragma unroll
    for (int i = 0; i < kKeyWarps; ++i) {
      parts[i] = {shared.largest[i][vector.row()], shared.sum[i][vector.row()],
                  *reinterpret_cast<const Columns*>(&shared.out[i][vector.row()][vector.column()])};
    }
    const Part part = join(parts);
    if constexpr (spec::kPartial) {
      store_part(split, vector, part);
    } else if constexpr (spec::kCluster > 1) {
      send_part(shared, rows.split, vector, part);
    } else {
      finish_vector(part, vector, work, operands, params);
    }
  });
}

// Joins what the CTAs of a cluster made of theirs, of the vectors that this one ends: once, for a CTA has one tile
// then, and the split that it has is its rank.
static_assert(spec::kCluster == 1 || (!spec::kDraws && !spec::kPartial), "one way to join");
__device__ __forceinline__ void join_cluster(SharedStorage& shared, const Rows& rows, const Work& work,
                                             const Operands& operands, const Params& params) {
  const int rank = rows.split;
  const int own = Received::count(rank, rows.count * kVectors);
  if (own == 0) return;
  const Received& received = shared.received;
  if (threadIdx.x == 0) {
    shared.all_received.arrive_expect(own * spec::kCluster * Received::kVectorBytes);
  }
  shared.all_received.wait_for_cluster(0);
  for (int place = threadIdx.x; place < own; place += kConsumerThreads) {
    Part parts[spec::kCluster];
#pragma unroll
    for (int cta = 0; cta < spec::kCluster; ++cta) {
      const float2 x = received.largest_and_sum[cta][place];
      parts[cta] = {x.x, x.y, {received.low[cta][place], received.high[cta][place]}};
    }
    finish_vector(join(parts), Received::vector(rank, place), work, operands, params);
  }
}

// Joins what splits made of theirs, in the same order whoever is the last one and does so.
__device__ __forceinline__ void join_splits(SharedStorage& shared, const Rows& rows, const Work& work,
                                            const Operands& operands, const Params& params, const float* first_split,
                                            int splits) {
  __threadfence();
  named_sync(kConsumerBarrier, kConsumerThreads);
  if (threadIdx.x == 0) {
    shared.last = atomicAdd(operands.counters + 1 + rows.item, 1) == splits - 1;
    __threadfence();
  }
  named_sync(kConsumerBarrier, kConsumerThreads);
  if (shared.last == 0) return;
  each_vector(rows, [&](Vector vector) {
    Part all = no_part();
    for (int split = 0; split < splits; split += kPartsAtOnce) {
      Part parts[kPartsAtOnce];
#pragma unroll
      for (int i = 0; i < kPartsAtOnce; ++i) {
        const bool there = split + i < splits;
        parts[i] = there ? load_part(first_split + i64{split + i} * kPartFloats, vector) : no_part();
      }
      all = join<2>({all, join(parts)});
    }
    finish_vector(all, vector, work, operands, params);
  });
}

// What the consumer warps have stored becomes rows of the output, here or in another CTA.
__device__ __forceinline__ void join_parts(SharedStorage& shared, const Work& work, const Operands& operands,
                                           const Params& params, const Grid& grid) {
  const Rows rows = work.rows;  // read ahead of the barrier, so that nothing waits for it behind
  named_sync(kConsumerBarrier, kConsumerThreads);
  if constexpr (spec::kCluster > 1) cluster_wait();  // by now all have begun, and may be sent something
  const int splits = grid.splits.value;
  float* first_split = operands.parts + i64{rows.item} * splits * kPartFloats;
  join_warps(shared, rows, work, operands, params, first_split + i64{rows.split} * kPartFloats);
  if constexpr (spec::kPartial) join_splits(shared, rows, work, operands, params, first_split, splits);
  if constexpr (spec::kCluster > 1) join_cluster(shared, rows, work, operands, params);
}

}  // namespace jax_flash
