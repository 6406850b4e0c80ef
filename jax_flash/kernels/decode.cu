// Attention of few queries on compute capability 9.0, bound by reading keys and values once. A tile has at most kTileM
// rows of Q, of all query heads that share a key/value head, and a share of the keys that they see. A CTA of each SM
// walks over tiles: one warp finds them and fetches Q, one loads keys and values by TMA into a ring of small buffers,
// without a break between tiles, the others multiply, 16 rows to a warp; where there are fewer rows than that takes,
// each warp has its own keys. What they made of these is joined in shared memory; over CTAs that share the keys of a
// row, by the CTAs of a cluster from each other's, or by the last one of them from global memory.
#include "decode/join.cuh"
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

// The next tile of a CTA, if there are more than CTAs.
__device__ __forceinline__ int draw(const Operands& operands, const Grid& grid) {
  int item = grid.items;
  if (spec::kDraws && lane_index() == 0) item = gridDim.x + atomicAdd(operands.counters, 1);
  return uniform(item);
}

// What belongs to the rows of a tile, by one warp, so that nobody else waits for global memory.
__device__ __forceinline__ void describe(Work& work, const Rows& rows, const Operands& operands, const Params& params) {
  const int sequence = max(rows.tile.sequence, 0);
  for (int row = lane_index(); row < rows.count; row += kWarpSize) {
    const int head = rows.head(row);
    work.scale[row] = __ldg(operands.scale + sequence * params.scale_batch_stride + head * params.scale_head_stride);
    if constexpr (spec::kSinks) {
      work.sink[row] = __ldg(operands.sinks + sequence * params.sinks_batch_stride + head);
    }
  }
  if (lane_index() == 0) {
    work.v_scale =
        __ldg(operands.v_scale + sequence * params.v_scale_batch_stride + rows.kv_head * params.v_scale_head_stride);
  }
}

// The warp that finds tiles. The first one of a CTA is its own, others are drawn.
__device__ __forceinline__ void find_work(SharedStorage& shared, const Operands& operands, const Params& params,
                                          const Grid& grid) {
  Ring<kWorkSlots> ring;
  bool more = true;
  for (int item = blockIdx.x; more; item = draw(operands, grid)) {
    Work& work = shared.work[ring.slot];
    Rows rows;
    more = item < grid.items && find_rows(item, rows, operands, params, grid);
    if (!more) rows.count = 0;
    work.empty.wait(ring.phase ^ 1);
    if (lane_index() == 0) {
      work.rows = rows;
      if (more) work.share = Share(rows, params, grid);
      work.located.arrive();
    }
    if (more) {
      load_q(shared.q[ring.slot], rows, operands, params);
      describe(work, rows, operands, params);
    }
    work.full.arrive();
    ring.advance();
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    decode(const __grid_constant__ KvMaps maps, const __grid_constant__ Operands operands,
           const __grid_constant__ Params params, const __grid_constant__ Grid grid) {
  extern __shared__ __align__(1024) u8 shared_bytes[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  // The first warp that loads prepares the barriers, and waits for nobody: all begins with what it brings.
  const int loader = warp_index() - kWarps;
  if (loader == 0) {
    if (lane_index() == 0) {
      tma_prefetch(maps.k);
      tma_prefetch(maps.v);
    }
    shared.init();
    fence_barrier_init();
    __syncwarp();
    named_arrive(kStartBarrier, kThreads);
  } else {
    named_sync(kStartBarrier, kThreads);
  }
  if (loader == kLoaders) {
    find_work(shared, operands, params, grid);
  } else if (loader >= 0) {
    Loader(shared, maps, operands, params, loader).run(grid);
  } else {
    Consumer(shared, operands, params, grid).run();
  }
  if constexpr (spec::kCluster > 1) {  // then a CTA has one tile at most
    cluster_sync();
    if (warp_index() < kWarps) join_cluster(shared, shared.work[0], operands, params);
    cluster_sync();  // no CTA may end while another reads its memory
  }
}

}  // namespace jax_flash
