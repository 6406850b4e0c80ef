// Softmax: the running maximum and sum of a thread's two rows, in base 2, over blocks of scores.
#pragma once

#include "fragment.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "params.h"
#include "spec.h"

namespace jax_flash {

// P is stored times 2^kOffset: e4m3 has its range above 1 as well as below. The row sum carries the same factor.
constexpr float kOffset = spec::Element::kBytes == 1 ? 8.0f : 0.0f;

struct Softmax {
  float scale_log2;  // what a score, capped or not, is multiplied by to become an exponent of 2
  float row_max[kRowsPerThread];
  float row_sum[kRowsPerThread];  // of this thread's columns, until finish()

  __device__ __forceinline__ Softmax(float scale, const Params& params) {
    const float factor = (spec::kSoftcap ? params.softcap : fabsf(scale)) * kLog2E;
    scale_log2 = factor < 1e-30f ? 1e-30f : factor;  // never 0, for a masked score is -inf; NaN stays
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_max[r] = -kInfinity;
      row_sum[r] = 0.0f;
    }
  }

  // Turns scores into probabilities 2^(scale * (s - max)) and tells by what to multiply what was summed up before.
  template <int kCount>
  __device__ __forceinline__ void update(float (&s)[kCount], float (&rescale)[kRowsPerThread]) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      float largest = row_max[r];
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) largest = fmaxf(fmaxf(largest, s[i]), s[i + 1]);
      largest = quad_max(largest);
      const float reference = largest == -kInfinity ? 0.0f : largest;
      rescale[r] = exp2_approx((row_max[r] - reference) * scale_log2);
      row_max[r] = largest;
      const float shift = reference * scale_log2 - kOffset;
      float sum = row_sum[r] * rescale[r];
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) {
        s[i] = exp2_approx(s[i] * scale_log2 - shift);
        s[i + 1] = exp2_approx(s[i + 1] * scale_log2 - shift);
        sum += s[i];
        sum += s[i + 1];
      }
      row_sum[r] = sum;
    }
  }

  // Ends the rows: `factor` is what the accumulated output is multiplied by, `lse` the natural log-sum-exp. A sink is
  // one more logit in the sum, with no value.
  __device__ __forceinline__ void finish(float sink, float (&factor)[kRowsPerThread], float (&lse)[kRowsPerThread]) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float sum = quad_sum(row_sum[r]);
      const float largest = row_max[r] * scale_log2 - kOffset;
      if constexpr (spec::kSinks) {
        const float reference = fmaxf(largest, sink * kLog2E);
        const bool seen = reference != -kInfinity || sum != 0.0f;  // NaN is not 0
        const float weight = seen ? exp2_approx(largest - reference) : 0.0f;
        const float total = seen ? sum * weight + exp2_approx(sink * kLog2E - reference) : 1.0f;
        factor[r] = weight / total;
        lse[r] = seen ? (reference + log2_approx(total)) * kLn2 : -kInfinity;
      } else {
        factor[r] = sum == 0.0f ? 0.0f : 1.0f / sum;
        lse[r] = sum == 0.0f ? -kInfinity : (largest + log2_approx(sum)) * kLn2;
      }
    }
  }
};

// score = softcap * tanh(score / softcap), less the factor softcap, which goes into the softmax scale.
template <int kCount>
__device__ __forceinline__ void cap_scores(float (&s)[kCount], float scale_over_softcap) {
  const float double_log2 = 2.0f * kLog2E * scale_over_softcap;
#pragma unroll
  for (int i = 0; i < kCount; ++i) s[i] = 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(s[i] * double_log2));
}

}  // namespace jax_flash
