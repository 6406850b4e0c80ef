// The buffers of one call on the CPU, and their checks. Python refuses what a user can do wrong, in a user's words;
// these keep any other caller from crashing.
#pragma once

#include <string>
#include <vector>

#include "ffi/status.h"
#include "jax_flash/kernels/params.h"
#include "xla/ffi/api/ffi.h"

namespace jax_flash::cpu {

namespace ffi = xla::ffi;

using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;
using Shape = std::vector<int64_t>;

// In the order of spec.Operands. An absent one has no elements.
struct Operands {
  ffi::AnyBuffer q, k, v;
  Floats scale, v_scale, sinks;
  Integers cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k;
  Integers page_table, cache_batch_idx, cache_leftpad;

  // Whether an index array says which groups of k and v hold the keys of a sequence.
  bool indexed() const { return page_table.element_count() > 0 || cache_batch_idx.element_count() > 0; }
};

template <typename Buffer>
inline Shape ShapeOf(const Buffer& buffer) {
  return Shape(buffer.dimensions().begin(), buffer.dimensions().end());
}

inline Status CheckShape(const std::string& name, const Shape& shape, const Shape& expected) {
  if (shape == expected) return Status::Ok();
  const auto text = [](const Shape& sizes) {
    std::string list;
    for (int64_t size : sizes) list += (list.empty() ? "" : ", ") + std::to_string(size);
    return "(" + list + ")";
  };
  return Status::InvalidArgument(name + " must have shape " + text(expected) + " and has " + text(shape));
}

inline Status CheckArray(const char* name, const ffi::AnyBuffer& array, ffi::DataType type, const Shape& expected) {
  if (array.element_type() != type) return Status::InvalidArgument(std::string(name) + " has a wrong element type");
  return CheckShape(name, ShapeOf(array), expected);
}

// A leading 1 stands for every sequence, a trailing 1 for every head.
inline Status CheckTable(const char* name, const Floats& table, int64_t batch, int64_t heads) {
  const Shape shape = ShapeOf(table);
  const bool same_batch = !shape.empty() && shape.front() == 1;
  const bool same_heads = !shape.empty() && shape.back() == 1;
  return CheckShape(name, shape, {same_batch ? 1 : batch, same_heads ? 1 : heads});
}

// An array with an entry for each sequence.
inline Status CheckBySequence(const std::string& name, const Integers& array, int64_t batch) {
  return array.element_count() == 0 ? Status::Ok() : CheckShape(name, ShapeOf(array), {batch});
}

// The index arrays of q, or of k and v, which have `groups` groups.
inline Status CheckSequences(const std::string& side, const Integers& cu_seqlens, const Integers& seqused,
                             int64_t groups, int64_t batch) {
  if (cu_seqlens.element_count() == 0) {
    if (groups != batch) return Status::InvalidArgument(side + " is dense and must have one group for each sequence");
  } else {
    if (groups == 0 || batch % groups != 0) return Status::InvalidArgument(side + " has groups that cannot be alike");
    RETURN_IF_ERROR(CheckShape("cu_seqlens_" + side, ShapeOf(cu_seqlens), {groups, batch / groups + 1}));
  }
  return CheckBySequence("seqused_" + side, seqused, batch);
}

// The index arrays of a cache.
inline Status CheckCache(const Operands& operands, const Params& p) {
  if (operands.page_table.element_count() > 0 || p.max_pages != 0) {
    RETURN_IF_ERROR(CheckShape("page_table", ShapeOf(operands.page_table), {p.batch, p.max_pages}));
  }
  RETURN_IF_ERROR(CheckBySequence("cache_batch_idx", operands.cache_batch_idx, p.batch));
  RETURN_IF_ERROR(CheckBySequence("cache_leftpad", operands.cache_leftpad, p.batch));
  if (operands.indexed() && (p.kv_groups <= 0 || p.kv_rows <= 0 || operands.cu_seqlens_k.element_count() > 0)) {
    return Status::InvalidArgument("a cache must have rows and must not be packed");
  }
  return Status::Ok();
}

inline Status CheckOperands(const Operands& operands, const Params& p) {
  const ffi::DataType type = operands.q.element_type();
  if (type != ffi::F32 && type != ffi::F16 && type != ffi::BF16 && type != ffi::F8E4M3FN) {
    return Status::InvalidArgument("q must be float32, float16, bfloat16 or float8_e4m3fn");
  }
  const ffi::DataType kv_type = operands.k.element_type() == ffi::F8E4M3FN ? ffi::F8E4M3FN : type;
  if (p.kv_heads <= 0 || p.heads % p.kv_heads != 0) return Status::InvalidArgument("kv_heads must divide heads");
  RETURN_IF_ERROR(CheckArray("q", operands.q, type, {p.q_groups, p.q_rows, p.heads, p.head_dim}));
  RETURN_IF_ERROR(CheckArray("k", operands.k, kv_type, {p.kv_groups, p.kv_rows, p.kv_heads, p.head_dim}));
  RETURN_IF_ERROR(CheckArray("v", operands.v, kv_type, {p.kv_groups, p.kv_rows, p.kv_heads, p.head_dim_v}));
  RETURN_IF_ERROR(CheckTable("scale", operands.scale, p.batch, p.heads));
  RETURN_IF_ERROR(CheckTable("v_scale", operands.v_scale, p.batch, p.kv_heads));
  if (operands.sinks.element_count() > 0) RETURN_IF_ERROR(CheckTable("sinks", operands.sinks, p.batch, p.heads));
  RETURN_IF_ERROR(CheckSequences("q", operands.cu_seqlens_q, operands.seqused_q, p.q_groups, p.batch));
  RETURN_IF_ERROR(CheckCache(operands, p));
  const int64_t kv_groups = operands.indexed() ? p.batch : p.kv_groups;
  return CheckSequences("k", operands.cu_seqlens_k, operands.seqused_k, kv_groups, p.batch);
}

// out or its cotangent.
inline Status CheckOutput(const char* name, const ffi::AnyBuffer& array, const Params& p) {
  const ffi::DataType type = array.element_type();
  if (type != ffi::F32 && type != ffi::F16 && type != ffi::BF16) {
    return Status::InvalidArgument(std::string(name) + " must be float32, float16 or bfloat16");
  }
  return CheckShape(name, ShapeOf(array), {p.q_groups, p.q_rows, p.heads, p.head_dim_v});
}

inline Status CheckLse(const char* name, const Floats& array, const Params& p) {
  return CheckShape(name, ShapeOf(array), {p.q_groups, p.heads, p.q_rows});
}

}  // namespace jax_flash::cpu
