// Clear: what the values of unused keys hold, NaN perhaps, must not meet the tensor cores.
#pragma once

#include "hopper/types.cuh"
#include "spec.h"
#include "storage.cuh"

namespace jax_flash {

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
