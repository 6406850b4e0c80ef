// Load: the producer, which fills the tiles of Q, K and V.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "operands.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

// The producer, one thread: keeps the rings full, from the last block of keys to the first, tile after tile.
struct Producer {
  SharedStorage& shared;
  const TensorMaps& maps;
  Ring<1> q_ring;
  Ring<spec::kStages> ring;  // of K and of V alike

  __device__ __forceinline__ void load(const Tile& tile, const KeyRange& range, int kv_head) {
    load_q(tile);
    for (int block = range.end - 1; block >= range.begin; --block) {
      const int row = range.origin_row + block * spec::kTileN;
      load_k(tile, row, kv_head);
      load_v(tile, row, kv_head);
      ring.advance();
    }
  }

 private:
  __device__ __forceinline__ void load_q(const Tile& tile) {
    Pipe& pipe = shared.q_pipe;
    pipe.empty.wait(q_ring.phase ^ 1);
    pipe.full.arrive_expect(kQBytes);
    for (int i = 0; i < kQkBlocks; ++i) {
      tma_load(shared.q + i * spec::kTileM * kSwizzleBytes, maps.q, pipe.full, i * kBlockColumns, tile.q_row, tile.head,
               tile.q_group);
    }
    q_ring.advance();
  }

  __device__ __forceinline__ void load_k(const Tile& tile, int row, int kv_head) {
    Pipe& pipe = shared.k_pipe[ring.slot];
    pipe.empty.wait(ring.phase ^ 1);
    pipe.full.arrive_expect(kKBytes);
    for (int i = 0; i < kQkBlocks; ++i) {
      tma_load(shared.k[ring.slot] + i * spec::kTileN * kSwizzleBytes, maps.k, pipe.full, i * kBlockColumns, row,
               kv_head, tile.kv_group);
    }
  }

  __device__ __forceinline__ void load_v(const Tile& tile, int row, int kv_head) {
    Pipe& pipe = shared.v_pipe[ring.slot];
    u8* destination = shared.v[ring.slot];
    pipe.empty.wait(ring.phase ^ 1);
    pipe.full.arrive_expect(kVBytes);
    if constexpr (kFp8) {
      for (int i = 0; i < spec::kTileN / kVKeyBlock; ++i) {
        tma_load(destination + i * kVKeyBlock * spec::kHeadDimV, maps.v, pipe.full, row + i * kVKeyBlock, 0, kv_head,
                 tile.kv_group);
      }
    } else {
      for (int i = 0; i < kVBlocks; ++i) {
        tma_load(destination + i * spec::kTileN * kSwizzleBytes, maps.v, pipe.full, i * kBlockColumns, row, kv_head,
                 tile.kv_group);
      }
    }
  }
};

}  // namespace jax_flash
