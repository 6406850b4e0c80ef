// Fragments: how a thread of a warpgroup holds a 64-row wgmma accumulator, and how scores become the A operand of PV.
//
// Register d[4j + 2r + e] holds row 16 * warp + lane / 4 + 8r, column 8j + 2 * (lane % 4) + e.
#pragma once

#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "spec.h"

namespace jax_flash {

constexpr int kWarpgroupRows = 64;
constexpr int kRowsPerThread = 2;

__device__ __forceinline__ int fragment_row(int r) {
  return threadIdx.x % kWarpgroupSize / kWarpSize * 16 + lane_index() / 4 + 8 * r;
}

__device__ __forceinline__ int fragment_column(int j) { return 8 * j + 2 * (lane_index() % 4); }

using Scores = float[spec::kTileN / 2];
using Output = float[spec::kHeadDimV / 2];

// P as the A operand of PV, one group of four registers to each k step of 32 bytes.
template <typename Element, int kColumns>
struct Probabilities {
  static constexpr int kStepColumns = 32 / Element::kBytes;
  static constexpr int kSteps = kColumns / kStepColumns;
  static_assert(kColumns % kStepColumns == 0, "whole k steps");

  u32 steps[kSteps][4];

  __device__ __forceinline__ void pack(const float (&s)[kColumns / 2]) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      if constexpr (Element::kBytes == 2) {
        // 16 columns of the accumulator are, in order, the A fragment of one step.
#pragma unroll
        for (int a = 0; a < 4; ++a) steps[i][a] = pack2<Element>(s[8 * i + 2 * a], s[8 * i + 2 * a + 1]);
      } else {
        // 32 columns in the registers' own order: column 16h + 8i + 2q + e of P lands at position 16h + 4q + 2i + e of
        // the A operand, and cuda.py lays V's keys out the same way.
        const float* d = s + 16 * i;
        steps[i][0] = pack4_e4m3(d[0], d[1], d[4], d[5]);
        steps[i][1] = pack4_e4m3(d[2], d[3], d[6], d[7]);
        steps[i][2] = pack4_e4m3(d[8], d[9], d[12], d[13]);
        steps[i][3] = pack4_e4m3(d[10], d[11], d[14], d[15]);
      }
    }
  }
};

}  // namespace jax_flash
