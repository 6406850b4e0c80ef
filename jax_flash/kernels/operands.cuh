// The arrays of one call, as pointers in the order in which the launcher passes them, and the tensor maps.
#pragma once

#include "hopper/tma.cuh"
#include "hopper/types.cuh"

namespace jax_flash {

// Operands as in spec.Operands, then the results. An absent operand must not be read.
struct Operands {
  const void* q;
  const void* k;
  const void* v;
  const float* scale;
  const float* v_scale;
  const float* sinks;
  const int* cu_seqlens_q;
  const int* cu_seqlens_k;
  const int* seqused_q;
  const int* seqused_k;
  const int* page_table;
  const int* cache_batch_idx;
  const int* cache_leftpad;
  void* out;
  float* lse;
  int* counters;  // 0 at first: of tiles drawn, null where every CTA has one at most; in decode.cu then of finished
                  // splits
  float* parts;   // in decode.cu, what splits made of their keys
};

// Of the kernel of few queries, which reads those by itself.
struct KvMaps {
  TensorMap k;
  TensorMap v;
};

struct TensorMaps {
  TensorMap q;
  TensorMap k;
  TensorMap v;
  TensorMap out;  // if that has 16 bits
};

}  // namespace jax_flash
