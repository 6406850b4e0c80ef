// Attention of few queries on compute capability 9.0, bound by reading keys and values once. A tile has at most kTileM
// rows of Q, of all query heads that share a key/value head, and a share of the keys that they see. A CTA of each SM
// walks over tiles: one warp finds them and fetches Q, one loads keys and values by TMA into a ring of small buffers,
// without a break between tiles (of small pages some warps do, key by key), the others multiply, up to 16 rows to a
// warp; where a tile has no more, each warp has its own keys. What they made of these is joined in shared memory; where
// CTAs share the keys of a row, by CTAs of a cluster, which send it to each other, or by the last one of them from
// global memory.
#include "decode/load.cuh"
#include "decode/multiply.cuh"
#include "decode/storage.cuh"
#include "hopper/barrier.cuh"
#include "hopper/cluster.cuh"
#include "hopper/tma.cuh"
#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "rows.cuh"
#include "spec.h"

namespace jax_flash {

// The next tile of a CTA, where there are more than CTAs.
__device__ __forceinline__ Rows draw(const Operands& operands, const Params& params, const Grid& grid) {
  int number = 0;
  if (lane_index() == 0) number = gridDim.x + atomicAdd(operands.counters, 1);
  return find_rows(uniform(number), operands, params, grid);
}

// The rows of a tile, by one warp: fetched before it waits for Q.
class KnownRows {
 public:
  __device__ __forceinline__ KnownRows(const Rows& rows, const Operands& operands, const Params& params) {
    const Tile& tile = rows.tile;
    const int sequence = max(tile.sequence, 0);
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      const int known = min(row(i), rows.count - 1);
      const int query = rows.query(known);
      const int head = rows.head(known);
      const bool used = query < tile.q_len;
      Row& own = own_[i];
      own.scale = __ldg(operands.scale + sequence * params.scale_batch_stride + head * params.scale_head_stride);
      own.sink = -kInfinity;
      if (spec::kSinks && used) own.sink = __ldg(operands.sinks + sequence * params.sinks_batch_stride + head);
      own.index = rows.index(known, params);
      own.lse_index = rows.lse_index(known, params);
      own.first_key = used ? first_key(tile, params, query) : 0;
      own.last_key = used ? last_key(tile, params, query) : 0;
    }
    v_scale_ =
        __ldg(operands.v_scale + sequence * params.v_scale_batch_stride + rows.kv_head * params.v_scale_head_stride);
  }

  __device__ __forceinline__ void store(Work& work) const {
#pragma unroll
    for (int i = 0; i < kRowsOfLane; ++i) {
      if (row(i) < spec::kTileM) work.row[row(i)] = own_[i];
    }
    if (lane_index() == 0) work.v_scale = v_scale_;
  }

 private:
  static constexpr int kRowsOfLane = (spec::kTileM + kWarpSize - 1) / kWarpSize;

  __device__ __forceinline__ static int row(int i) { return i * kWarpSize + lane_index(); }

  Row own_[kRowsOfLane];
  float v_scale_;
};

// The warp that finds tiles, but for the first one.
__device__ __forceinline__ void find_work(SharedStorage& shared, Rows rows, const Operands& operands,
                                          const Params& params, const Grid& grid) {
  Ring<kWorkSlots> ring;
  while (true) {
    Work& work = shared.work[ring.slot];
    work.empty.wait(ring.phase ^ 1);
    if (lane_index() == 0) {
      work.rows = rows;
      work.share = Share(rows, params, grid);
      work.located.arrive();
    }
    if (rows.count > 0) {
      const KnownRows known(rows, operands, params);
      load_q(shared.q[ring.slot], rows, operands, params);
      known.store(work);
    }
    work.full.arrive();
    if (!spec::kDraws || rows.count == 0) return;
    if constexpr (kDrawsLate) work.ending.wait(ring.phase);
    rows = draw(operands, params, grid);
    ring.advance();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ KvMaps maps, const __grid_constant__ Operands operands,
           const __grid_constant__ Params params, const __grid_constant__ Grid grid) {
  extern __shared__ __align__(1024) u8 shared_bytes[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  const int loader = warp_index() - kWarps;
  Rows first{};
  if (loader < 0) {
    shared.init_ring();
  } else {
    if (loader == kLoaders) shared.init_work();
    if (loader == 0 && elect_lane()) {
      tma_prefetch(maps.k);
      tma_prefetch(maps.v);
    }
    first = find_rows(blockIdx.x, operands, params, grid);
  }
  fence_barrier_init();
  __syncthreads();
  if constexpr (spec::kCluster > 1) cluster_arrive();  // those wait who send something to others
  if (loader < 0) {
    Consumer(shared, operands, params, grid).run();
  } else if (loader < kLoaders) {
    Loader(shared, maps, operands, params, loader).run(first, grid);
  } else {
    find_work(shared, first, operands, params, grid);
  }
}

}  // namespace jax_flash
