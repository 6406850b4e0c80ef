// Order: in which order the CTAs of a grid work on tiles, as jax_flash/order.py chose it and tells there.
#pragma once

#include "hopper/types.cuh"

namespace jax_flash {

// Divides numbers below 2^31.
struct Divisor {
  int value;
  u32 multiplier;
  int shift;

  __device__ __forceinline__ int quotient(int x) const {
    return static_cast<int>(static_cast<u64>(static_cast<u32>(x)) * multiplier >> (31 + shift));
  }
};

struct Rounds {
  int rounds;
  int ctas;
  int numbers;
  int turns;
  int mirrors;
  int first_pair;
  int per_section;
  int last_section;
  int by_pair;
  int rising;
  Divisor section;
  Divisor run;
  Divisor last_run;
};

constexpr int kParts = 2;

struct Order {
  Rounds parts[kParts];  // one after the other
  Divisor heads;
  Divisor heads_of_kv;
  int fitting_rows;
  int long_rows;
};

}  // namespace jax_flash
