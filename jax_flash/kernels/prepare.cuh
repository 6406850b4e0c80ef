// Prepare: what is done to keys and values between TMA and the tensor cores. FP8 values may have to be transposed, and
// under a 16-bit Q both be widened; and what the values of unused keys hold, NaN perhaps, must not meet the tensor
// cores.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/matrices.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

// The bytes 0, 1, 2 and 3 of a word that the bits 0, 1, 8 and 9 keep.
__device__ __forceinline__ u32 kept_bytes(u32 bits) {
  const u32 four = (bits & 0x3) | (bits >> 6 & 0xc);
  return (four * 0x00204081u & 0x01010101u) * 0xffu;
}

// Zeroes the values of keys outside [first, last) of a block in shared memory: their probability is 0, but 0 * NaN is
// NaN, and they may belong to another sequence.
__device__ __forceinline__ void clear_values(u8* v, int first, int last) {
  auto low_bits = [](int count) { return (1u << max(0, min(count, 16))) - 1; };
  for (int i = lane_index(); i < kVBytes / 16; i += kWarpSize) {
    uint4& vector = reinterpret_cast<uint4*>(v)[i];
    if constexpr (kFp8) {
      // 16 bytes hold 16 keys of one column, word q the keys 2q, 2q + 1, 2q + 8, 2q + 9; swizzling moves whole ones.
      constexpr int kVectors = spec::kVBoxKeys / 16;
      const int within = i % kVectors ^ i / 8 % kVectors;
      const int key = i / (kVectors * spec::kHeadDimV) * spec::kVBoxKeys + within * 16;
      if (key >= first && key + 16 <= last) continue;
      const u32 kept = low_bits(last - key) & ~low_bits(first - key);
      vector.x &= kept_bytes(kept);
      vector.y &= kept_bytes(kept >> 2);
      vector.z &= kept_bytes(kept >> 4);
      vector.w &= kept_bytes(kept >> 6);
    } else {
      // Swizzling stays within a row, and a row is one key.
      const int key = i / (kSwizzleBytes / 16) % spec::kTileN;
      if (key < first || key >= last) vector = uint4{0, 0, 0, 0};
    }
  }
}

// Transposes FP8 values, in place and by units of 32 keys and columns: [key][32 bytes] become [column][32 bytes],
// within 16 keys in the order of P's registers. Bytes move in pairs of columns, which lanes then part; half of the
// lanes store even columns while the others store odd ones, for these lie in other banks. Each warp takes its units. On
// the way `clear` zeroes the values of keys outside [first, last), as clear_values does.
__device__ __forceinline__ void transpose_values(u8* v, int warp, bool clear, int first, int last) {
  const int lane = lane_index();
  const bool even_first = lane < 16;
  const u32 selectors[2] = {even_first ? 0x6420u : 0x7531u, even_first ? 0x7531u : 0x6420u};
  const int pair = lane % 8;
  const int column = 2 * pair + (even_first ? pair / 4 : 1 - pair / 4);
  const int from = lane * kVUnit + lane / 4 % 2 * 16;
  const int to = column * kVUnit + (lane / 8 % 2 ^ column / 4 % 2) * 16;
#pragma unroll 1
  for (u8* unit = v + warp * kVUnitBytes; unit < v + kVBytes; unit += kVPreparers * kVUnitBytes) {
    u32 words[2][4];  // of 16 columns each
#pragma unroll
    for (int half = 0; half < 2; ++half) load_matrices_transposed(words[half], unit + (from ^ half * 16));
    if (clear) {
      // Word m holds two columns of each of two keys.
      auto is_kept = [&](int key) { return key >= first && key < last; };
      const int key = static_cast<int>(unit - v) / (kVUnit * spec::kHeadDimV) * kVUnit + lane % 4 * 2;
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const u32 keep = (is_kept(key + 8 * m) ? 0xffffu : 0) | (is_kept(key + 8 * m + 1) ? 0xffff0000u : 0);
        words[0][m] &= keep;
        words[1][m] &= keep;
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const u32(&x)[4] = words[half];
      const u32 parted[4] = {pick_bytes(x[0], x[1], selectors[0]), pick_bytes(x[2], x[3], selectors[0]),
                             pick_bytes(x[0], x[1], selectors[1]), pick_bytes(x[2], x[3], selectors[1])};
      store_matrices(unit + half * 16 * kVUnit + to, parted);
    }
  }
}

// Widens rows of 64 FP8 columns, which lie in the second half of a buffer, into the whole of it: [row][64 bytes] become
// [row][128 bytes], each swizzled. What is written never overtakes what is still to be read, for the rows of a unit are
// all read before. Eight lanes that access memory together are eight rows, which lie in different banks either way.
template <int kBytes>
__device__ __forceinline__ void widen_rows(u8* buffer) {
  constexpr int kRowBytes = kSwizzleBytes / 2;
  // Many reads at a time hide their latency, if there are registers for what they bring.
  constexpr int kUnitRows = spec::kProducerRegisters >= 64 && kBytes % (64 * kSwizzleBytes) == 0 ? 64 : 32;
  static_assert(!spec::kWidens || kBytes % (kUnitRows * kSwizzleBytes) == 0, "whole units");
  const int row = lane_index() % 8;
  const int vector = lane_index() / 8;
  const u8* from = buffer + kBytes / 2 + row * kRowBytes + (vector ^ row / 2) * 16;
  u8* to = buffer + row * kSwizzleBytes;
  const int low = (2 * vector ^ row) * 16;
#pragma unroll 1
  for (int unit = 0; unit < kBytes / (kUnitRows * kSwizzleBytes); ++unit) {
    uint4 narrow[kUnitRows / 8];
#pragma unroll
    for (int i = 0; i < kUnitRows / 8; ++i) narrow[i] = *reinterpret_cast<const uint4*>(from + i * 8 * kRowBytes);
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kUnitRows / 8; ++i) {
      const uint4 x = narrow[i];
      u8* wide = to + i * 8 * kSwizzleBytes;
      const Wide words[4] = {widen(x.x), widen(x.y), widen(x.z), widen(x.w)};
      *reinterpret_cast<uint4*>(wide + low) = uint4{words[0].low, words[0].high, words[1].low, words[1].high};
      *reinterpret_cast<uint4*>(wide + (low ^ 16)) = uint4{words[2].low, words[2].high, words[3].low, words[3].high};
    }
    from += kUnitRows * kRowBytes;
    to += kUnitRows * kSwizzleBytes;
  }
}

// This warp has prepared what the buffer holds.
__device__ __forceinline__ void hand_over(Pipe& pipe) {
  fence_shared_for_async();
  __syncwarp();
  if (lane_index() == 0) pipe.full.arrive();
}

// The warp between the loader of K and the consumers: widens all keys.
__device__ __forceinline__ void prepare_keys(SharedStorage& shared) {
  Ring<spec::kKStages> ring;
  each_work(shared, [&](Work& work) {
#pragma unroll 1
    for (int block = work.blocks.end - 1; block >= work.blocks.begin; --block) {
      shared.k_landed[ring.slot].wait(ring.phase);
      widen_rows<kKBytes>(shared.k[ring.slot]);
      hand_over(shared.k_pipe[ring.slot]);
      ring.advance();
    }
    work.release();
  });
}

// A warp between the loader of V and the consumers, one of kVPreparers.
class ValuePreparer {
 public:
  __device__ __forceinline__ ValuePreparer(SharedStorage& shared, int warp) : shared_(shared), warp_(warp) {}

  __device__ __forceinline__ void run() {
    each_work(shared_, [&](Work& work) {
#pragma unroll 1
      for (int block = work.blocks.end - 1; block >= work.blocks.begin; --block) {
        if (prepares(work.tile, block)) prepare(work.tile, block);
        ring_.advance();
      }
      work.release();
    });
  }

 private:
  __device__ __forceinline__ void prepare(const Tile& tile, int block) {
    const int slot = ring_.slot;
    shared_.v_landed[slot].wait(phases_ >> slot & 1);
    phases_ ^= 1 << slot;
    const bool clear = clears(tile, block);
    const int first = first_used_in(tile, block);
    const int last = last_used_in(tile, block);
    if constexpr (spec::kTransposes) {
      transpose_values(shared_.v[slot], warp_, clear, first, last);
    } else {
      if constexpr (spec::kWidens) {
        widen_rows<kVBytes>(shared_.v[slot]);
        __syncwarp();
      }
      if (clear) clear_values(shared_.v[slot], first, last);
    }
    hand_over(shared_.v_pipe[slot]);
  }

  SharedStorage& shared_;
  int warp_;
  Ring<spec::kVStages> ring_;
  u32 phases_ = 0;  // of each stage's v_landed, a bit
};

}  // namespace jax_flash
