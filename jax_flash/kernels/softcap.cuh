// Softcap: score = softcap * tanh(score / softcap).
//
// tanh takes two special functions where softmax takes one, and those bound the loop. So scores nearer to 0 than a
// quarter of the cap become exponents by an odd polynomial: a score times a polynomial of its square, of degree 2,
// whose relative error is least there, 4e-7.
#pragma once

#include "fragment.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "params.h"

namespace jax_flash {

struct Softcap {
  static constexpr int kTerms = 3;

  float argument;       // of tanh, by score
  float terms[kTerms];  // of an exponent of 2, by rising powers of a score's square
  float inverse;        // by which an exponent becomes a capped score
  float limit;          // scores nearer to 0 are small; 0 where terms would leave the range of numbers

  __device__ __forceinline__ Softcap(float scale, const Params& params) {
    constexpr float kTerm[kTerms] = {0.999999602f, -0.333219081f, 0.128416136f};
    argument = scale * reciprocal_approx(params.softcap);
    limit = argument > 1e-4f && argument < 1e4f ? 0.25f * reciprocal_approx(argument) : 0.0f;
    inverse = kLn2 * reciprocal_approx(params.softcap);
    float power = params.softcap * kLog2E * argument;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      terms[i] = kTerm[i] * power;
      power *= argument * argument;
    }
  }

  // Scores capped, less the factor softcap.
  template <int kCount>
  __device__ __forceinline__ void cap(float (&s)[kCount]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      s[i] = tanh_of_exponent(s[i] * (2.0f * kLog2E * argument));
    }
  }

  // Of 2, for a small score.
  __device__ __forceinline__ float exponent(float score, float shift) const {
    const float square = score * score;
    float ratio = terms[kTerms - 1];
#pragma unroll
    for (int i = kTerms - 2; i >= 0; --i) ratio = ratio * square + terms[i];
    return score * ratio - shift;
  }

  // Whether all scores of a warp are small, and the largest of each row, or 0. Floats compare as integers do where they
  // are positive; as unsigned ones, the largest is the one furthest below 0.
  template <int kCount>
  __device__ __forceinline__ bool all_small(const float (&s)[kCount], float (&largest)[kRowsPerThread]) const {
    int highest[kRowsPerThread] = {};
    u32 lowest = 0;
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
#pragma unroll
      for (int i = 2 * r; i < kCount; i += 4) {
        highest[r] = max(max(highest[r], __float_as_int(s[i])), __float_as_int(s[i + 1]));
        lowest = max(max(lowest, __float_as_uint(s[i])), __float_as_uint(s[i + 1]));
      }
      largest[r] = __int_as_float(highest[r]);
    }
    const bool small = max(highest[0], highest[1]) < __float_as_int(limit) && lowest < __float_as_uint(-limit);
    return __all_sync(kAllLanes, small);
  }
};

}  // namespace jax_flash
