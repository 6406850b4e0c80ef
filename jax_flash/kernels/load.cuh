// Load: the tiles of Q, K and V in shared memory, the barriers around them, and the producer that fills them.
//
// Rows of 128 bytes, swizzled: Q is [column block][kTileM][128 bytes], K and 16-bit V [column block][kTileN][128
// bytes]. FP8 V comes transposed, [block of 32 keys][kHeadDimV][32 bytes]: wgmma wants both FP8 operands K-major.
#pragma once

#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

constexpr bool kFp8 = spec::Element::kBytes == 1;
constexpr int kSwizzleBytes = 128;
constexpr int kBlockColumns = kSwizzleBytes / spec::Element::kBytes;  // columns of one TMA box
constexpr int kQkBlocks = (spec::kHeadDim + kBlockColumns - 1) / kBlockColumns;
constexpr int kVBlocks = (spec::kHeadDimV + kBlockColumns - 1) / kBlockColumns;
constexpr int kVKeyBlock = 32;  // keys, and bytes, of one box of transposed V

constexpr int kQBytes = kQkBlocks * spec::kTileM * kSwizzleBytes;
constexpr int kKBytes = kQkBlocks * spec::kTileN * kSwizzleBytes;
constexpr int kVBytes = kFp8 ? spec::kTileN * spec::kHeadDimV : kVBlocks * spec::kTileN * kSwizzleBytes;
static_assert(kQBytes % 1024 == 0 && kKBytes % 1024 == 0 && kVBytes % 1024 == 0,
              "each buffer begins where swizzling does");

constexpr int kConsumers = spec::kTileM / kWarpgroupRows;
constexpr int kConsumerThreads = kConsumers * kWarpgroupSize;
constexpr int kConsumerWarps = kConsumers * kWarpgroupSize / kWarpSize;

// `full`: TMA has written the buffer. `empty`: every consumer warp has read it.
struct Pipe {
  Barrier full;
  Barrier empty;

  __device__ __forceinline__ void init() {
    full.init(1);
    empty.init(kConsumerWarps);
  }

  // All lanes of a consumer warp have read the buffer.
  __device__ __forceinline__ void release() {
    if (lane_index() == 0) empty.arrive();
  }
};

struct alignas(1024) SharedStorage {
  u8 q[kQBytes];
  u8 k[spec::kStages][kKBytes];
  u8 v[spec::kStages][kVBytes];
  Pipe q_pipe;
  Pipe k_pipe[spec::kStages];
  Pipe v_pipe[spec::kStages];

  __device__ __forceinline__ void init() {
    q_pipe.init();
    for (int stage = 0; stage < spec::kStages; ++stage) {
      k_pipe[stage].init();
      v_pipe[stage].init();
    }
  }
};
static_assert(sizeof(SharedStorage) == spec::kSharedBytes, "heuristics.py counts the same bytes");

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

// Zeroes the values of keys outside [first, last) of a block in shared memory: their probability is 0, but 0 * NaN is
// NaN, and they may belong to another sequence. The consumers share the work; `thread` is one of kConsumerThreads.
__device__ __forceinline__ void clear_values(u8* v, int first, int last, int thread) {
  if constexpr (kFp8) {
    // 16 bytes hold 16 keys of one column, word q the keys 2q, 2q + 1, 2q + 8, 2q + 9; swizzling swaps whole halves.
    for (int i = thread; i < kVBytes / 16; i += kConsumerThreads) {
      const int half = i % 2 ^ i / 8 % 2;
      const int key = i / (2 * spec::kHeadDimV) * kVKeyBlock + half * 16;
      if (key >= first && key + 16 <= last) continue;
      u32* words = reinterpret_cast<u32*>(v + i * 16);
      for (int q = 0; q < 4; ++q) {
        u32 keep = 0;
        for (int byte = 0; byte < 4; ++byte) {
          const int of_byte = key + 2 * q + byte % 2 + byte / 2 * 8;
          if (of_byte >= first && of_byte < last) keep |= 0xffu << 8 * byte;
        }
        words[q] &= keep;
      }
    }
  } else {
    // Swizzling stays within a row, and a row is one key.
    constexpr int kVectors = kSwizzleBytes / 16;
    for (int i = thread; i < kVBytes / 16; i += kConsumerThreads) {
      const int key = i / kVectors % spec::kTileN;
      if (key < first || key >= last) reinterpret_cast<uint4*>(v)[i] = uint4{0, 0, 0, 0};
    }
  }
}

}  // namespace jax_flash
