// Number formats of arrays in memory: rows are widened to float32 when read and rounded to nearest even when written.
// Everything is branch-free integer arithmetic, so that the loops over a row vectorise on every machine.
#pragma once

#include <cstdint>
#include <cstring>

#include "xla/ffi/api/ffi.h"

namespace jax_flash::cpu {

namespace ffi = xla::ffi;

template <typename To, typename From>
inline To BitCast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// The value of a format of 1 sign bit, kExponent exponent bits and kMantissa mantissa bits (float16 or float8_e4m3fn).
template <int kExponent, int kMantissa>
inline float Widen(uint32_t bits) {
  constexpr uint32_t kMagnitude = (1u << (kExponent + kMantissa)) - 1;
  constexpr uint32_t kRebias = (128u - (1u << (kExponent - 1))) << 23;
  // Magnitudes from here on are not finite. e4m3fn has no infinity: only its largest magnitude is NaN.
  constexpr uint32_t kSpecial = kExponent == 4 ? kMagnitude << (23 - kMantissa) : ((1u << kExponent) - 1) << 23;
  const uint32_t magnitude = (bits & kMagnitude) << (23 - kMantissa);
  // A subnormal is read as a normal number of the lowest exponent, minus the implicit one: unlike a multiplication of
  // a float32 subnormal it is exact where the processor flushes those to zero, as XLA has it do.
  constexpr uint32_t kLowest = kRebias + (1u << 23);
  const float subnormal = BitCast<float>(magnitude + kLowest) - BitCast<float>(kLowest);
  const uint32_t normal = magnitude >= kSpecial ? magnitude | 0x7f800000u : magnitude + kRebias;
  const uint32_t unsigned_bits = magnitude < (1u << 23) ? BitCast<uint32_t>(subnormal) : normal;
  return BitCast<float>(unsigned_bits | (bits >> (kExponent + kMantissa)) << 31);
}

inline uint16_t ToFloat16(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 0.5 leaves multiples of 2^-24, float16's smallest step, in the low bits of the mantissa, rounded.
  const uint32_t subnormal = BitCast<uint32_t>(BitCast<float>(magnitude) + 0.5f) - BitCast<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return static_cast<uint16_t>((magnitude >= (143u << 23) ? special : finite) | (bits >> 16 & 0x8000u));
}

inline uint16_t ToBfloat16(float value) {
  const uint32_t bits = BitCast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  const uint32_t quiet_nan = (bits >> 16) | 0x40u;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded);
}

// An array (groups, rows, heads, dim) in one of the formats. ReadRow and WriteRow see it as (groups * rows * heads,
// dim).
struct Array {
  void* data = nullptr;
  ffi::DataType type = ffi::F32;
  int64_t groups = 0;
  int64_t rows = 0;
  int64_t heads = 0;
  int64_t dim = 0;
};

inline void ReadRow(const Array& array, int64_t row, float* __restrict out) {
  const int64_t begin = row * array.dim;
  switch (array.type) {
    case ffi::F16: {
      const uint16_t* in = static_cast<const uint16_t*>(array.data) + begin;
      for (int64_t i = 0; i < array.dim; ++i) out[i] = Widen<5, 10>(in[i]);
      break;
    }
    case ffi::BF16: {
      const uint16_t* in = static_cast<const uint16_t*>(array.data) + begin;
      for (int64_t i = 0; i < array.dim; ++i) out[i] = BitCast<float>(uint32_t{in[i]} << 16);
      break;
    }
    case ffi::F8E4M3FN: {
      const uint8_t* in = static_cast<const uint8_t*>(array.data) + begin;
      for (int64_t i = 0; i < array.dim; ++i) out[i] = Widen<4, 3>(in[i]);
      break;
    }
    default: {
      const float* in = static_cast<const float*>(array.data) + begin;
      for (int64_t i = 0; i < array.dim; ++i) out[i] = in[i];
    }
  }
}

inline void WriteRow(const Array& array, int64_t row, const float* __restrict in) {
  const int64_t begin = row * array.dim;
  switch (array.type) {
    case ffi::F16: {
      uint16_t* out = static_cast<uint16_t*>(array.data) + begin;
      for (int64_t i = 0; i < array.dim; ++i) out[i] = ToFloat16(in[i]);
      break;
    }
    case ffi::BF16: {
      uint16_t* out = static_cast<uint16_t*>(array.data) + begin;
      for (int64_t i = 0; i < array.dim; ++i) out[i] = ToBfloat16(in[i]);
      break;
    }
    default: {
      float* out = static_cast<float*>(array.data) + begin;
      for (int64_t i = 0; i < array.dim; ++i) out[i] = in[i];
    }
  }
}

}  // namespace jax_flash::cpu
