// Softmax: the running maximum and sum of a thread's two rows, in base 2, over blocks of scores.
#pragma once

#include "fragment.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "params.h"
#include "softcap.cuh"
#include "spec.h"

namespace jax_flash {

// P is stored times 2^kOffset: e4m3 has its range above 1 as well as below. The row sum carries the same factor.
constexpr float kOffset = spec::Element::kBytes == 1 ? 8.0f : 0.0f;

// A row's maximum may lag behind by that much, in base 2: e4m3 ends at 448, which is 2^8.807.
constexpr float kLag = spec::Element::kBytes == 1 ? 0.0f : 8.0f;

struct Softmax {
  Softcap softcap;
  float scale_log2;  // what a score, capped or not, is multiplied by to become an exponent of 2
  float row_max[kRowsPerThread];
  float row_sum[kRowsPerThread];  // of this thread's columns, until finish()

  __device__ __forceinline__ Softmax(float scale, const Params& params) : softcap(fabsf(scale), params) {
    const float factor = (spec::kSoftcap ? params.softcap : fabsf(scale)) * kLog2E;
    scale_log2 = factor < 1e-30f ? 1e-30f : factor;  // never 0, for a masked score is -inf; NaN stays
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      row_max[r] = -kInfinity;
      row_sum[r] = 0.0f;
    }
  }

  // Turns scores into probabilities 2^(scale * (s - max)) and tells by what to multiply what was summed up before.
  // The maximum may be off by a factor of 2^kLag, so that most blocks change nothing. Calls `mask`
  // once scores are what is compared; where kPositive, there is nothing to mask. Calls `between` once the maxima are
  // known.
  template <bool kPositive, int kOverlap, int kCount, typename Mask, typename Between>
  __device__ __forceinline__ void update(float (&s)[kCount], float (&rescale)[kRowsPerThread], Mask mask,
                                         Between between) {
    float largest[kRowsPerThread];
    float shift[kRowsPerThread];
    if constexpr (spec::kSoftcap) {
      if (kPositive && softcap.all_small(s, largest)) {
#pragma unroll
        for (int r = 0; r < kRowsPerThread; ++r) {
          largest[r] = fmaxf(row_max[r], softcap.exponent(quad_max(largest[r]), 0.0f) * softcap.inverse);
        }
        grow(largest, rescale, shift);
#pragma unroll
        for (int i = 0; i < kCount; ++i) s[i] = softcap.exponent(s[i], shift[i / 2 % 2]);
      } else {
        softcap.cap(s);
        mask();
        find_largest<kPositive>(s, largest);
        grow(largest, rescale, shift);
#pragma unroll
        for (int i = 0; i < kCount; ++i) s[i] = s[i] * scale_log2 - shift[i / 2 % 2];
      }
      between();
      exponentiate<kOverlap>(s, [](float exponent, int) { return exponent; });
    } else {
      mask();
      find_largest<kPositive>(s, largest);
      grow(largest, rescale, shift);
      between();
      exponentiate<kOverlap>(s, [&](float score, int r) { return score * scale_log2 - shift[r]; });
    }
  }

  // Whether the maxima of a thread's rows are positive, as they remain then.
  __device__ __forceinline__ bool positive() const { return row_max[0] > 0.0f && row_max[1] > 0.0f; }

  // The largest score of each row, those before included. With a positive one among them, floats compare as integers
  // do, of which one instruction takes three: so one that is not, but not further off than a maximum may be, is raised
  // to where it counts as positive.
  template <bool kPositive, int kCount>
  __device__ __forceinline__ void find_largest(const float (&s)[kCount], float (&largest)[kRowsPerThread]) {
    if constexpr (kPositive) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        int bits = __float_as_int(row_max[r]);
#pragma unroll
        for (int i = 2 * r; i < kCount; i += 4) {
          bits = max(max(bits, __float_as_int(s[i])), __float_as_int(s[i + 1]));
        }
        largest[r] = __int_as_float(bits);
      }
    } else {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        largest[r] = row_max[r];
#pragma unroll
        for (int i = 2 * r; i < kCount; i += 4) largest[r] = fmaxf(fmaxf(largest[r], s[i]), s[i + 1]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      largest[r] = quad_max(largest[r]);
      const bool near = largest[r] * scale_log2 > -kLag;
      if (spec::kIntegerMax && !kPositive && near) largest[r] = fmaxf(largest[r], 1e-37f);
    }
  }

  // Takes the largest scores for the maxima, if these have grown by much; `shift` is subtracted from exponents.
  __device__ __forceinline__ void grow(const float (&largest)[kRowsPerThread], float (&rescale)[kRowsPerThread],
                                       float (&shift)[kRowsPerThread]) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float growth = (largest[r] - row_max[r]) * scale_log2;
      const bool grown = growth > kLag;
      rescale[r] = grown ? exp2_approx(-growth) : 1.0f;
      row_max[r] = grown ? largest[r] : row_max[r];
      shift[r] = reference(row_max[r]) * scale_log2 - kOffset;
      row_sum[r] *= rescale[r];
    }
  }

  // Turns scores into 2^exponent(score, row) and sums these up.
  template <int kOverlap, int kCount, typename Exponent>
  __device__ __forceinline__ void exponentiate(float (&s)[kCount], Exponent exponent) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) {
        s[i] = exp2_approx(exponent(s[i], r));
        s[i + 1] = exp2_approx(exponent(s[i + 1], r));
        row_sum[r] += s[i];
        row_sum[r] += s[i + 1];
        const int done = r * kCount / 2 + i / 4 * 2 + 2;
        if (done == kOverlap * kCount / 16 * 2) hold(row_sum[r]);
      }
    }
  }

  // What is subtracted from scores: a row that has seen no key yet has no maximum.
  __device__ __forceinline__ static float reference(float row_max) { return row_max == -kInfinity ? 0.0f : row_max; }

  // Ends the rows: `factor` is what the accumulated output is multiplied by, `lse` the natural log-sum-exp. A sink is
  // one more logit in the sum, with no value.
  __device__ __forceinline__ void finish(float sink, float (&factor)[kRowsPerThread], float (&lse)[kRowsPerThread]) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const float sum = quad_sum(row_sum[r]);
      const float largest = row_max[r] * scale_log2 - kOffset;
      if constexpr (spec::kSinks) {
        const float most = fmaxf(largest, sink * kLog2E);
        const bool seen = most != -kInfinity || sum != 0.0f;  // NaN is not 0
        const float weight = seen ? exp2_approx(largest - most) : 0.0f;
        const float total = seen ? sum * weight + exp2_approx(sink * kLog2E - most) : 1.0f;
        factor[r] = weight * reciprocal_approx(total);
        lse[r] = seen ? (most + log2_approx(total)) * kLn2 : -kInfinity;
      } else {
        factor[r] = sum == 0.0f ? 0.0f : reciprocal_approx(sum);
        lse[r] = sum == 0.0f ? -kInfinity : (largest + log2_approx(sum)) * kLn2;
      }
    }
  }
};

}  // namespace jax_flash
