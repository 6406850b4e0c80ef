// Total: the sum of an FP8 output beyond what the tensor cores add up exactly. Their FP8 accumulator keeps about 14
// bits: of every product it loses what lies below 2^-13 of the accumulator. So of a long row they add up some blocks,
// which the accumulator then deposits here.
#pragma once

#include "fragment.cuh"
#include "hopper/tma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "spec.h"
#include "storage.cuh"

namespace jax_flash {

// Blocks that an accumulator takes before a tile's first deposit, and before later ones: whole blocks of that many
// keys.
constexpr int kFirstDeposit = 384 / spec::kTileN;
constexpr int kLaterDeposits = 768 / spec::kTileN;
static_assert(kFirstDeposit >= 1, "a block at least");

// Of one tile after another; each lane keeps its own registers of the accumulator.
class Total {
 public:
  __device__ __forceinline__ explicit Total(u8* of_warp) : mine_(reinterpret_cast<Group*>(of_warp) + lane_index()) {}

  // A tile begins.
  __device__ __forceinline__ void begin() {
    deposited_ = false;
    start(kFirstDeposit);
  }

  // What was added up before is worth that much less.
  __device__ __forceinline__ void rescale(const float (&rescale)[kRowsPerThread]) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) rescale_[r] *= rescale[r];
  }

  // The accumulator has taken one more block.
  __device__ __forceinline__ void count() { --room_; }

  // Blocks that it may still take.
  __device__ __forceinline__ int room() const { return room_; }

  // Before a deposit: a tile's first one finds 0.
  __device__ __forceinline__ void open() {
    if (deposited_) return;
    tma_wait_read();  // the rows of the tile before
    __syncwarp();
#pragma unroll
    for (int i = 0; i < spec::kHeadDimV / 2 / kGroup; ++i) mine_[i * kWarpSize] = Group{};
    deposited_ = true;
  }

  // Takes the accumulator, and kAhead of it in advance, which leaves minus that: so the accumulator passes through 0 on
  // its way to the next deposit, and stays smaller. What a narrow total cannot hold stays in the accumulator too.
  __device__ __forceinline__ void deposit(Output& o) {
#pragma unroll
    for (int i = 0; i < spec::kHeadDimV / 2; i += kGroup) {
      Group& group = mine_[i / kGroup * kWarpSize];
      const Group before = group;
      Group after;
#pragma unroll
      for (int j = 0; j < kGroup; j += 2) {
        const float low = o[i + j] + before.low(j) * rescale_[j / 2 % 2];
        const float high = o[i + j + 1] + before.high(j) * rescale_[j / 2 % 2];
        after.put(j, low, high);
        o[i + j] *= -kAhead;
        o[i + j + 1] *= -kAhead;
        if constexpr (kTotalBytes == 2) {
          o[i + j] += (1 + kAhead) * (low - after.low(j));
          o[i + j + 1] += (1 + kAhead) * (high - after.high(j));
        }
      }
      group = after;
    }
    start(kLaterDeposits);
  }

  // Adds what was deposited to the accumulator.
  __device__ __forceinline__ void withdraw(Output& o) const {
    if (!deposited_) return;
    const float factor[kRowsPerThread] = {(1 + kAhead) * rescale_[0], (1 + kAhead) * rescale_[1]};
#pragma unroll
    for (int i = 0; i < spec::kHeadDimV / 2; i += kGroup) {
      const Group group = mine_[i / kGroup * kWarpSize];
#pragma unroll
      for (int j = 0; j < kGroup; j += 2) {
        o[i + j] += group.low(j) * factor[j / 2 % 2];
        o[i + j + 1] += group.high(j) * factor[j / 2 % 2];
      }
    }
  }

 private:
  static constexpr float kAhead = 0.75f;
  static constexpr int kGroup = 16 / kTotalBytes;

  // What a lane reads and writes at a time, in units of 1 + kAhead: pairs of floats or, narrow, their upper halves, of
  // which the second is read together with the first as the bits that follow it.
  struct alignas(16) Group {
    u32 words[4];

    __device__ __forceinline__ float low(int j) const {
      return __uint_as_float(kTotalBytes == 4 ? words[j] : words[j / 2] << 16);
    }
    __device__ __forceinline__ float high(int j) const {
      return __uint_as_float(kTotalBytes == 4 ? words[j + 1] : words[j / 2]);
    }
    __device__ __forceinline__ void put(int j, float low, float high) {
      if constexpr (kTotalBytes == 4) {
        words[j] = __float_as_uint(low);
        words[j + 1] = __float_as_uint(high);
      } else {
        words[j / 2] = upper_halves(low, high);
      }
    }
  };

  __device__ __forceinline__ void start(int room) {
    room_ = room;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) rescale_[r] = 1.0f;
  }

  Group* mine_;
  bool deposited_ = false;
  int room_ = 0;
  float rescale_[kRowsPerThread];  // of what was deposited, since then
};

}  // namespace jax_flash
