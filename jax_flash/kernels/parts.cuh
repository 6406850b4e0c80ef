// Parts: what different warps, CTAs and kernels made of different keys of the same rows, and how that is joined.
#pragma once

#include "hopper/types.cuh"

namespace jax_flash {

// Some columns of a row that follow each other.
constexpr int kPartColumns = 8;
struct Columns {
  float4 low, high;
};

__device__ __forceinline__ Columns scaled(const Columns& x, float factor) {
  return {float4{x.low.x * factor, x.low.y * factor, x.low.z * factor, x.low.w * factor},
          float4{x.high.x * factor, x.high.y * factor, x.high.z * factor, x.high.w * factor}};
}

__device__ __forceinline__ void add(float4& sum, const float4& x) {
  sum.x += x.x;
  sum.y += x.y;
  sum.z += x.z;
  sum.w += x.w;
}

// Of a row over some keys: the largest exponent of 2, the sum of 2^(exponent - largest), and some columns of that sum
// weighted with values.
struct Part {
  float largest;
  float sum;
  Columns out;
};

// What no keys make.
__device__ __forceinline__ Part no_part() { return {-kInfinity, 0.0f, Columns{}}; }

// All parts as one, added in their order. Those without a key have a largest exponent of -inf.
template <int kCount>
__device__ __forceinline__ Part join(const Part (&parts)[kCount]) {
  float largest = parts[0].largest;
#pragma unroll
  for (int i = 1; i < kCount; ++i) largest = fmaxf(largest, parts[i].largest);
  Part all{largest, 0.0f, Columns{}};
  const float shift = largest == -kInfinity ? 0.0f : largest;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float weight = exp2_approx(parts[i].largest - shift);
    const Columns weighted = scaled(parts[i].out, weight);
    all.sum += parts[i].sum * weight;
    add(all.out.low, weighted.low);
    add(all.out.high, weighted.high);
  }
  return all;
}

// A sink is a part of one logit that has no value.
__device__ __forceinline__ Part with_sink(const Part& part, float sink) {
  return join<2>({part, Part{sink * kLog2E, sink == -kInfinity ? 0.0f : 1.0f, Columns{}}});
}

// Columns of an array, from element `index` on.
template <typename Element>
__device__ __forceinline__ void store_columns(void* array, i64 index, const Columns& x) {
  if constexpr (Element::kBytes == 4) {
    static_cast<Columns*>(array)[index / kPartColumns] = x;
  } else {
    static_cast<uint4*>(array)[index / kPartColumns] =
        uint4{pack2<Element>(x.low.x, x.low.y), pack2<Element>(x.low.z, x.low.w), pack2<Element>(x.high.x, x.high.y),
              pack2<Element>(x.high.z, x.high.w)};
  }
}

// Ends a row: `out` becomes the average; the natural log-sum-exp.
__device__ __forceinline__ float finish(Part& part) {
  part.out = scaled(part.out, part.sum == 0.0f ? 0.0f : reciprocal_approx(part.sum));
  return part.sum == 0.0f ? -kInfinity : (part.largest + log2_approx(part.sum)) * kLn2;
}

}  // namespace jax_flash
