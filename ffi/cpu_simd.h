// Vector arithmetic: exp2 and tanh of a vector, and one small matrix product.
//
// A wheel must run on every processor of its architecture, so a kernel is compiled for several instruction sets, one of
// which is chosen at run time (cpu.cc). It is a template of an Isa, whose vectors are just as wide as its registers:
// wider ones would be split through memory, narrower ones would waste them.
#pragma once

#include <cstdint>

// The warning is that passing a vector depends on the instruction set. None is passed: the kernels are flattened.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace jax_flash::cpu {

// Multiply accumulates kRows rows of kVectors vectors in registers; a vector has kLanes floats.
constexpr int kRows = 4;

template <int lanes, int vectors>
struct InstructionSet {
  static constexpr int kLanes = lanes;
  static constexpr int kVectors = vectors;
  typedef float Float __attribute__((vector_size(lanes * sizeof(float)), may_alias));
  typedef int32_t Int __attribute__((vector_size(lanes * sizeof(int32_t)), may_alias));
  typedef uint32_t Unsigned __attribute__((vector_size(lanes * sizeof(uint32_t)), may_alias));
};

// The vector at an aligned address.
template <typename Isa>
inline typename Isa::Float& At(float* address) {
  return *reinterpret_cast<typename Isa::Float*>(address);
}
template <typename Isa>
inline typename Isa::Float At(const float* address) {
  return *reinterpret_cast<const typename Isa::Float*>(address);
}
template <typename Isa>
inline typename Isa::Int At(const int32_t* address) {
  return *reinterpret_cast<const typename Isa::Int*>(address);
}

// A matrix of scratch memory has one lane for each row of a tile: kTile floats from one of its rows to the next.
constexpr int kTile = 64;

// Calls function(vector, row, lane) for every vector of a matrix (rows, width); `lane` is the vector's first.
template <typename Isa, typename Function>
inline void ForEachVector(float* matrix, int64_t rows, int width, Function function) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int lane = 0; lane < width; lane += Isa::kLanes) {
      function(At<Isa>(matrix + row * kTile + lane), row, lane);
    }
  }
}

// 2^x within 1.2 units in the last place for x <= 127; 0 where the result would not be a normal number; NaN stays NaN.
template <typename Isa>
inline typename Isa::Float Exp2(const typename Isa::Float& x) {
  using Int = typename Isa::Int;
  // x = n + f with |f| <= 0.5: adding kRound leaves n in the low bits. The polynomial is the minimax one of 2^f with
  // constant term 1, so that the largest score has a probability of exactly 1.
  constexpr float kRound = 3 << 22;
  const typename Isa::Float shifted = x + kRound;
  const typename Isa::Float f = x - (shifted - kRound);
  typename Isa::Float power = 0.00015353362f * f + 0.0013398875f;
  power = power * f + 0.009618437f;
  power = power * f + 0.055503324f;
  power = power * f + 0.24022648f;
  power = power * f + 0.6931472f;
  power = power * f + 1.0f;
  power = (typename Isa::Float)((Int)power + ((Int)shifted << 23));
  const typename Isa::Float normal = x < -126.0f ? typename Isa::Float{} : power;
  return x == x ? normal : x;  // the addition to the exponent makes numbers of some NaN
}

// Within 1.7 units in the last place.
template <typename Isa>
inline typename Isa::Float Tanh(const typename Isa::Float& x) {
  using Float = typename Isa::Float;
  using Int = typename Isa::Int;
  const Int sign = (Int)x & INT32_MIN;
  const Float magnitude = (Float)((Int)x & INT32_MAX);
  // Near 0 the formula for large x cancels: an odd minimax polynomial there. Beyond 16 the result is 1.
  const Float square = x * x;
  Float series = -0.005704978f * square + 0.020639079f;
  series = series * square - 0.053739712f;
  series = series * square + 0.13331442f;
  series = series * square - 0.3333328f;
  const Float small = magnitude + magnitude * square * series;
  const Float power = Exp2<Isa>(2.8853901f * (magnitude > 16.0f ? Float{} + 16.0f : magnitude));
  const Float large = 1.0f - 2.0f / (power + 1.0f);
  return (Float)((Int)(magnitude < 0.625f ? small : large) | sign);
}

// The left side of a product: element (row, k) is data[row * row_step + k * k_step].
struct Left {
  const float* data;
  int64_t row_step;
  int64_t k_step;
};

// kVectors vectors of kRows rows of the product, in registers.
template <typename Isa, int kVectors>
inline void MultiplyBlock(const float* const (&left)[kRows], int64_t k_step, int64_t depth,
                          const float* __restrict right, float* __restrict result, bool add) {
  using Float = typename Isa::Float;
  Float sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) sum[i][j] = add ? At<Isa>(result + i * kTile + j * Isa::kLanes) : Float{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    for (int i = 0; i < kRows; ++i) {
      const float factor = left[i][k * k_step];
      for (int j = 0; j < kVectors; ++j) sum[i][j] += factor * At<Isa>(right + k * kTile + j * Isa::kLanes);
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < kVectors; ++j) At<Isa>(result + i * kTile + j * Isa::kLanes) = sum[i][j];
  }
}

// result (rows, width) = left (rows, depth) * right (depth, width), added to what is there if `add`. `width` is a
// multiple of kLanes. Rows are computed kRows at a time: the memory of `result` must have room for the last ones,
// which repeat the last row of `left`.
template <typename Isa>
inline void Multiply(Left left, int64_t rows, int64_t depth, const float* right, int width, float* result, bool add) {
  for (int64_t row = 0; row < rows; row += kRows) {
    const float* data[kRows];
    for (int i = 0; i < kRows; ++i) {
      data[i] = left.data + (row + i < rows ? row + i : rows - 1) * left.row_step;
    }
    int lane = 0;
    for (; lane + Isa::kVectors * Isa::kLanes <= width; lane += Isa::kVectors * Isa::kLanes) {
      MultiplyBlock<Isa, Isa::kVectors>(data, left.k_step, depth, right + lane, result + row * kTile + lane, add);
    }
    for (; lane < width; lane += Isa::kLanes) {
      MultiplyBlock<Isa, 1>(data, left.k_step, depth, right + lane, result + row * kTile + lane, add);
    }
  }
}

}  // namespace jax_flash::cpu
