// Forward attention on compute capability 9.0. One CTA of each SM, or two small ones, walk over tiles of kTileM query
// rows of one head: the warps of the first warpgroup find the tiles, load Q, K and V by TMA and prepare keys and
// values, each further warpgroup computes 64 of the rows.
#include "epilogue.cuh"
#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "load.cuh"
#include "mainloop.cuh"
#include "operands.cuh"
#include "order.cuh"
#include "params.h"
#include "prepare.cuh"
#include "schedule.cuh"
#include "softmax.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

constexpr int kThreads = kWarpgroupSize + kConsumerThreads;
static_assert(kThreads == spec::kThreads, "heuristics.py launches as many threads");

constexpr int kLaunchRegisters = 64 * 1024 / (spec::kCtasPerSm * kThreads) / 8 * 8;  // a thread's, of the 64 K of an SM
static_assert(kWarpgroupSize * (spec::kProducerRegisters + kConsumers * spec::kConsumerRegisters) <=
                  kThreads * kLaunchRegisters,
              "setmaxnreg waits for ever for registers that the CTA was not launched with");

__device__ __forceinline__ void describe(Work& work, const Operands& operands, const Params& params) {
  const int head = work.tile.head;
  const int kv_head = work.kv_head;
  const int sequence = max(work.tile.sequence, 0);
  work.scale = __ldg(operands.scale + sequence * params.scale_batch_stride + head * params.scale_head_stride);
  work.v_scale =
      __ldg(operands.v_scale + sequence * params.v_scale_batch_stride + kv_head * params.v_scale_head_stride);
  if constexpr (spec::kSinks) work.sink = __ldg(operands.sinks + sequence * params.sinks_batch_stride + head);
}

// The warp that finds the tiles: hands over those that see keys, and stores the rows of those that see none.
__device__ __forceinline__ void find_tiles(SharedStorage& shared, const Operands& operands, const Params& params,
                                           const Order& order) {
  Ring<kWorkSlots> ring;
  Schedule schedule(operands, params, order);
  bool more = true;
  while (more) {
    Work& work = shared.work[ring.slot];
    work.pipe.empty.wait(ring.phase ^ 1);
    more = schedule.next(work.tile);
    Blocks blocks{};
    if (more) blocks = visible_blocks(work.tile, params, 0, spec::kTileM);
    const bool handed_over = !more || !blocks.empty();
    if (!blocks.empty() && lane_index() < kConsumers) {
      const int first_row = lane_index() * kWarpgroupRows;
      work.of_warpgroup[lane_index()] = visible_blocks(work.tile, params, first_row, kWarpgroupRows);
    }
    __syncwarp();
    if (lane_index() == 0) {
      if (more) {
        work.kv_head = order.heads_of_kv.quotient(work.tile.head);
      } else {
        work.tile.rows = 0;
      }
      work.blocks = blocks;
      if (handed_over) work.located.arrive();
      if (more) describe(work, operands, params);
    }
    if (handed_over && lane_index() < kConsumers) work.pipe.full.arrive();
    __syncwarp();
    if (blocks.empty()) {
      store_blind_rows(work, params, operands, 0, spec::kTileM);
      __syncwarp();
    } else {
      ring.advance();
    }
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, spec::kCtasPerSm)
    forward(const __grid_constant__ TensorMaps maps, const __grid_constant__ Operands operands,
            const __grid_constant__ Params params, const __grid_constant__ Order order) {
  extern __shared__ __align__(1024) u8 shared_bytes[];
  SharedStorage& shared = *reinterpret_cast<SharedStorage*>(shared_bytes);
  if (threadIdx.x == 0) {
    shared.init();
    fence_barrier_init();
    tma_prefetch(maps.q);
    tma_prefetch(maps.k);
    tma_prefetch(maps.v);
  }
  __syncthreads();

  const int warp = warp_index();
  const int warpgroup = warp / (kWarpgroupSize / kWarpSize);
  if (warpgroup == 0) {
    shrink_registers<spec::kProducerRegisters>();
    if (warp == 0) find_tiles(shared, operands, params, order);
    if constexpr (kPreparers == 2) {
      // Keys and values are then loaded by two lanes of one warp, which do not wait for each other.
      if (warp == 1) {
        if (lane_index() == 0) {
          KeyLoader(shared, maps, operands, params).run();
        } else if (lane_index() == kWarpSize / 2) {
          ValueLoader(shared, maps, operands, params).run();
        }
      } else if (spec::kWidens && warp == 2) {
        prepare_keys(shared);
      } else if (warp >= 2) {
        ValuePreparer(shared, spec::kWidens ? 0 : warp - 2).run();
      }
    } else {
      if (warp == 1 && lane_index() == 0) KeyLoader(shared, maps, operands, params).run();
      if (warp == 2 && lane_index() == 0) ValueLoader(shared, maps, operands, params).run();
      if (kPreparers > 0 && warp == 3) ValuePreparer(shared, 0).run();
    }
  } else {
    grow_registers<spec::kConsumerRegisters>();
    Consumer(shared, operands, maps, params, warpgroup - 1).run();
  }
}

}  // namespace jax_flash
