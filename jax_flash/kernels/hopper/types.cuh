// Numbers: short names for integers, element types, and packing float32 into them.
#pragma once

namespace jax_flash {

using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using u64 = unsigned long long;
using i64 = long long;
static_assert(sizeof(int) == 4 && sizeof(float) == 4 && sizeof(u64) == 8, "sizes that the host relies on");

constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;

// Element types are named only; values live packed in 32-bit registers.
struct Float16 {
  static constexpr int kBytes = 2;
};
struct BFloat16 {
  static constexpr int kBytes = 2;
};
struct Float8E4M3 {
  static constexpr int kBytes = 1;
};
struct Float32 {
  static constexpr int kBytes = 4;
};

// Two float32 into one register of 16-bit elements, `low` in the low half.
template <typename Element>
__device__ __forceinline__ u32 pack2(float low, float high);

template <>
__device__ __forceinline__ u32 pack2<Float16>(float low, float high) {
  u32 packed;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

template <>
__device__ __forceinline__ u32 pack2<BFloat16>(float low, float high) {
  u32 packed;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(packed) : "f"(high), "f"(low));
  return packed;
}

// Four float32 into one register of e4m3, the first in the lowest byte; values past 448 saturate.
__device__ __forceinline__ u32 pack4_e4m3(float a, float b, float c, float d) {
  u32 packed;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.satfinite.e4m3x2.f32 low, %2, %1;\n"
      "cvt.rn.satfinite.e4m3x2.f32 high, %4, %3;\n"
      "mov.b32 %0, {low, high};\n"
      "}"
      : "=r"(packed)
      : "f"(a), "f"(b), "f"(c), "f"(d));
  return packed;
}

// Two bfloat16 into two float16, infinite from 65520 on.
__device__ __forceinline__ u32 float16_of_bfloat16(u32 pair) {
  return pack2<Float16>(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}

// Four e4m3 into float16: those in the lower half of a word, and in the upper half.
struct Wide {
  u32 low, high;
};
__device__ __forceinline__ Wide widen(u32 narrow) {
  Wide wide;
  asm("{\n"
      ".reg .b16 low, high;\n"
      "mov.b32 {low, high}, %2;\n"
      "cvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n"
      "}"
      : "=r"(wide.low), "=r"(wide.high)
      : "r"(narrow));
  return wide;
}

template <typename Element>
__device__ __forceinline__ float number_of(u16 bits);

template <>
__device__ __forceinline__ float number_of<Float16>(u16 bits) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
  return x;
}

template <>
__device__ __forceinline__ float number_of<BFloat16>(u16 bits) {
  return __uint_as_float(static_cast<u32>(bits) << 16);
}

// One number of an array.
template <typename Element>
__device__ __forceinline__ float load_number(const void* array, i64 i) {
  if constexpr (Element::kBytes == 4) {
    return static_cast<const float*>(array)[i];
  } else if constexpr (Element::kBytes == 2) {
    return number_of<Element>(static_cast<const u16*>(array)[i]);
  } else {
    return number_of<Float16>(static_cast<u16>(widen(static_cast<const u8*>(array)[i]).low));
  }
}

template <typename Element>
__device__ __forceinline__ void store_number(void* array, i64 i, float x) {
  if constexpr (Element::kBytes == 4) {
    static_cast<float*>(array)[i] = x;
  } else if constexpr (Element::kBytes == 2) {
    static_cast<u16*>(array)[i] = static_cast<u16>(pack2<Element>(x, 0.0f));
  } else {
    static_cast<u8*>(array)[i] = static_cast<u8>(pack4_e4m3(x, 0.0f, 0.0f, 0.0f));
  }
}

// Four of the eight bytes of two words: hex digit i of the selector tells which one byte i is.
__device__ __forceinline__ u32 pick_bytes(u32 low, u32 high, u32 selector) {
  u32 bytes;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "r"(low), "r"(high), "r"(selector));
  return bytes;
}

// The upper halves of two words, the first in the low half.
__device__ __forceinline__ u32 upper_halves(float low, float high) {
  return pick_bytes(__float_as_uint(low), __float_as_uint(high), 0x7632);
}

__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// tanh of a number, from that times 2 * log2(e).
__device__ __forceinline__ float tanh_of_exponent(float exponent) {
  return 1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(exponent));
}

}  // namespace jax_flash
