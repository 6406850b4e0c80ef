// Load: fills the tiles of Q, K and V.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "operands.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

// One thread: keeps the rings full, from the last block of keys to the first, tile after tile.
class Loader {
 public:
  __device__ __forceinline__ Loader(SharedStorage& shared, const TensorMaps& maps) : shared_(shared), maps_(maps) {}

  __device__ __forceinline__ void run() {
    while (true) {
      Work& work = shared_.work[work_ring_.slot()];
      work.pipe.full.wait(work_ring_.phase());
      if (work.tile.rows == 0) return;
      load(work);
      work_ring_.advance();
    }
  }

 private:
  // The first keys go ahead of Q if that must wait until the tile before has multiplied its last scores.
  __device__ __forceinline__ void load(const Work& work) {
    const int begin = work.blocks.begin;
    const int last = work.blocks.end - 1;
    if (spec::kQStages > 1) load_q(work.tile);
#pragma unroll 1
    for (int block = last; block >= begin; --block) {
      const int row = work.tile.kv_row - first_key_in(work.tile, block);
      load_k(row, work.kv_head, work.tile.kv_group);
      if (spec::kQStages == 1 && block == last) load_q(work.tile);
      load_v(row, work.kv_head, work.tile.kv_group, kClears && at_edge(work.tile, block));
      ring_.advance();
    }
  }

  __device__ __forceinline__ void load_q(const Tile& tile) {
    const int first_row = tile.q_row + cta_first_row();
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      Pipe& pipe = shared_.q_pipe[q_ring_.slot()][consumer];
      pipe.empty.wait(q_ring_.phase() ^ 1);
      pipe.full.arrive_expect(kQBytes);
      for (int i = 0; i < kQkBlocks; ++i) {
        tma_load(shared_.q[q_ring_.slot()][consumer] + i * kWarpgroupRows * kSwizzleBytes, maps_.q, pipe.full,
                 i * kBlockColumns, first_row + consumer * kWarpgroupRows, tile.head, tile.q_group);
      }
    }
    q_ring_.advance();
  }

  __device__ __forceinline__ void load_k(int row, int kv_head, int kv_group) {
    Pipe& pipe = shared_.k_pipe[ring_.slot()];
    pipe.empty.wait(ring_.phase() ^ 1);
    pipe.full.arrive_expect(kKBytes);
    load_rows(maps_.k, pipe.full, shared_.k[ring_.slot()], kQkBlocks, row, kv_head, kv_group);
  }

  __device__ __forceinline__ void load_v(int row, int kv_head, int kv_group, bool clears) {
    const int slot = ring_.slot();
    shared_.v_pipe[slot].empty.wait(ring_.phase() ^ 1);
    Barrier& barrier = clears ? shared_.v_landed[slot] : shared_.v_pipe[slot].full;
    barrier.arrive_expect(kVBytes);
    if constexpr (kFp8) {
      for (int i = rank_; i < spec::kTileN / kVKeyBlock; i += spec::kCluster) {
        load_shared(shared_.v[slot] + i * kVKeyBlock * spec::kHeadDimV, maps_.v, barrier, row + i * kVKeyBlock, 0,
                    kv_head, kv_group);
      }
    } else {
      load_rows(maps_.v, barrier, shared_.v[slot], kVBlocks, row, kv_head, kv_group);
    }
  }

  // Rows of K or V: each CTA of a cluster loads its part of them.
  __device__ __forceinline__ void load_rows(const TensorMap& map, Barrier& barrier, u8* destination, int column_blocks,
                                            int row, int kv_head, int kv_group) {
    const int first = rank_ * (spec::kTileN / spec::kCluster);
    for (int i = 0; i < column_blocks; ++i) {
      load_shared(destination + (i * spec::kTileN + first) * kSwizzleBytes, map, barrier, i * kBlockColumns,
                  row + first, kv_head, kv_group);
    }
  }

  __device__ __forceinline__ void load_shared(u8* destination, const TensorMap& map, Barrier& barrier, int c0, int c1,
                                              int c2, int c3) {
    if constexpr (spec::kCluster == 1) {
      tma_load(destination, map, barrier, c0, c1, c2, c3);
    } else {
      tma_load_both(destination, map, barrier, c0, c1, c2, c3);
    }
  }

  const int rank_ = spec::kCluster == 1 ? 0 : cluster_rank();
  SharedStorage& shared_;
  const TensorMaps& maps_;
  Ring<spec::kQStages> q_ring_;
  Ring<kWorkSlots> work_ring_;
  Ring<spec::kStages> ring_;  // of K and of V alike
};

}  // namespace jax_flash
