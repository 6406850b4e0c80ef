// Clear: what the values of unused keys hold, NaN perhaps, must not meet the tensor cores.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

// Zeroes the values of keys outside [first, last) of a block in shared memory: their probability is 0, but 0 * NaN is
// NaN, and they may belong to another sequence. One warp does it.
__device__ __forceinline__ void clear_values(u8* v, int first, int last) {
  if constexpr (kFp8) {
    // 16 bytes hold 16 keys of one column, word q the keys 2q, 2q + 1, 2q + 8, 2q + 9; swizzling swaps whole halves.
    for (int i = lane_index(); i < kVBytes / 16; i += kWarpSize) {
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
    for (int i = lane_index(); i < kVBytes / 16; i += kWarpSize) {
      const int key = i / kVectors % spec::kTileN;
      if (key < first || key >= last) reinterpret_cast<uint4*>(v)[i] = uint4{0, 0, 0, 0};
    }
  }
}

// The warp that clears blocks at the edge, between the loader of V, whose bytes it waits for, and the consumers.
class Clearer {
 public:
  __device__ __forceinline__ explicit Clearer(SharedStorage& shared) : shared_(shared) {}

  __device__ __forceinline__ void run() {
    each_work(shared_, [&](Work& work) {
#pragma unroll 1
      for (int block = work.blocks.end - 1; block >= work.blocks.begin; --block) {
        if (at_edge(work.tile, block)) clear(work.tile, block);
        ring_.advance();
      }
      work.release();
    });
  }

 private:
  __device__ __forceinline__ void clear(const Tile& tile, int block) {
    const int slot = ring_.slot;
    shared_.v_landed[slot].wait(phases_ >> slot & 1);
    phases_ ^= 1 << slot;
    const int first = first_key_in(tile, block);
    clear_values(shared_.v[slot], first, first + tile.kv_len);
    fence_shared_for_async();
    __syncwarp();
    if (lane_index() == 0) shared_.v_pipe[slot].full.arrive();
  }

  SharedStorage& shared_;
  Ring<spec::kStages> ring_;
  u32 phases_ = 0;  // of each stage's v_landed, a bit
};

}  // namespace jax_flash
