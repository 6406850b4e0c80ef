// Parts: what different warps, CTAs and kernels made of different keys of the same rows, and how that is joined.
#pragma once

#include "hopper/types.cuh"

namespace jax_flash {

// Of a row over some keys: the largest exponent of 2, the sum of 2^(exponent - largest), and some columns of that sum
// weighted with values.
struct Part {
  float largest;
  float sum;
  float4 out;
};

__device__ __forceinline__ float4 scaled(float4 x, float factor) {
  return float4{x.x * factor, x.y * factor, x.z * factor, x.w * factor};
}

// All parts as one, added in their order. Those without a key have a largest exponent of -inf.
template <int kCount>
__device__ __forceinline__ Part join(const Part (&parts)[kCount]) {
  Part all = parts[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) all.largest = fmaxf(all.largest, parts[i].largest);
  const float shift = all.largest == -kInfinity ? 0.0f : all.largest;
  float weight = exp2_approx(parts[0].largest - shift);
  all.sum = parts[0].sum * weight;
  all.out = scaled(parts[0].out, weight);
#pragma unroll
  for (int i = 1; i < kCount; ++i) {
    weight = exp2_approx(parts[i].largest - shift);
    all.sum += parts[i].sum * weight;
    all.out.x += parts[i].out.x * weight;
    all.out.y += parts[i].out.y * weight;
    all.out.z += parts[i].out.z * weight;
    all.out.w += parts[i].out.w * weight;
  }
  return all;
}

// A sink is a part of one logit that has no value.
__device__ __forceinline__ Part with_sink(const Part& part, float sink) {
  return join<2>({part, Part{sink * kLog2E, sink == -kInfinity ? 0.0f : 1.0f, float4{}}});
}

// Four columns of an array, from element `index` on.
template <typename Element>
__device__ __forceinline__ void store_columns(void* array, i64 index, float4 x) {
  if constexpr (Element::kBytes == 4) {
    static_cast<float4*>(array)[index / 4] = x;
  } else {
    static_cast<uint2*>(array)[index / 4] = uint2{pack2<Element>(x.x, x.y), pack2<Element>(x.z, x.w)};
  }
}

// Ends a row: `out` becomes the average; the natural log-sum-exp.
__device__ __forceinline__ float finish(Part& part) {
  part.out = scaled(part.out, part.sum == 0.0f ? 0.0f : reciprocal_approx(part.sum));
  return part.sum == 0.0f ? -kInfinity : (part.largest + log2_approx(part.sum)) * kLn2;
}

}  // namespace jax_flash
