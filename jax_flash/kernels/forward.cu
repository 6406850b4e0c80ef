// Forward attention on compute capability 9.0. One CTA per SM walks over tiles of kTileM query rows of one head: the
// first warpgroup loads Q, K and V by TMA, each further one computes 64 of the rows.
#include "epilogue.cuh"
#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "load.cuh"
#include "mainloop.cuh"
#include "operands.cuh"
#include "params.h"
#include "schedule.cuh"
#include "softmax.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

constexpr int kThreads = kWarpgroupSize + kConsumerThreads;
static_assert(kThreads == spec::kThreads, "heuristics.py launches as many threads");

constexpr int kLaunchRegisters = 64 * 1024 / kThreads / 8 * 8;  // a thread's, of the 64 K that an SM has
static_assert(kWarpgroupSize * (spec::kProducerRegisters + kConsumers * spec::kConsumerRegisters) <=
                  kThreads * kLaunchRegisters,
              "setmaxnreg waits for ever for registers that the CTA was not launched with");

__device__ __forceinline__ void produce(SharedStorage& shared, const TensorMaps& maps, const Operands& operands,
                                        const Params& params) {
  Producer producer{shared, maps};
  Schedule schedule(operands, params);
  Tile tile;
  while (schedule.next(tile)) {
    const KeyRange range = key_range(tile, params);
    if (range.empty()) continue;
    if (lane_index() == 0) producer.load(tile, range, tile.head / (params.heads / params.kv_heads));
    __syncwarp();
  }
}

__device__ __forceinline__ void consume(SharedStorage& shared, const Operands& operands, const Params& params,
                                        int warpgroup) {
  Consumer consumer(shared, params, warpgroup);
  Schedule schedule(operands, params);
  Tile tile;
  while (schedule.next(tile)) {
    const KeyRange range = key_range(tile, params);
    const int sequence = max(tile.sequence, 0);
    const int kv_head = tile.head / (params.heads / params.kv_heads);
    const float scale =
        __ldg(operands.scale + sequence * params.scale_batch_stride + tile.head * params.scale_head_stride);
    const float v_scale =
        __ldg(operands.v_scale + sequence * params.v_scale_batch_stride + kv_head * params.v_scale_head_stride);
    float sink = 0.0f;
    if constexpr (spec::kSinks) sink = __ldg(operands.sinks + sequence * params.sinks_batch_stride + tile.head);

    Output o = {};
    Softmax softmax(scale, params);
    if (!range.empty()) consumer.run(tile, range, scale, o, softmax);

    float factor[kRowsPerThread];
    float lse[kRowsPerThread];
    softmax.finish(sink, factor, lse);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) factor[r] *= v_scale;
    store_rows(tile, params, operands, warpgroup, o, factor, lse, sink);
  }
}

extern "C" __global__ void __launch_bounds__(kThreads, 1)
    forward(const __grid_constant__ TensorMaps maps, const __grid_constant__ Operands operands,
            const __grid_constant__ Params params) {
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
    if (warp == 0) produce(shared, maps, operands, params);
  } else {
    grow_registers<spec::kConsumerRegisters>();
    consume(shared, operands, params, warpgroup - 1);
  }
}

}  // namespace jax_flash
