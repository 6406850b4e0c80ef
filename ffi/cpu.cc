// Attention on the CPU: checks the buffers, finds the sequences, cuts them into tiles and runs those on XLA's threads.
//
// Reading order: this file, cpu_operands.h (the buffers), cpu_call.h (a call), cpu_tiles.h (the arithmetic),
// cpu_simd.h, cpu_convert.h.

#include <cstring>
#include <vector>

#include "ffi/cpu_call.h"
#include "ffi/cpu_operands.h"
#include "ffi/cpu_parallel.h"
#include "ffi/cpu_tiles.h"
#include "ffi/handlers.h"
#include "ffi/params_attr.h"
#include "ffi/status.h"

namespace jax_flash::cpu {
namespace {

// The call, from checked operands.

// The used rows of every sequence. No value of an index array is trusted: a boundary counts as the largest one so far
// in its group, kept within 0..rows, so that sequences neither overlap nor leave the array.
std::vector<Segment> SegmentsOf(const Integers& cu_seqlens, const Integers& seqused, int64_t groups, int64_t rows,
                                int64_t batch) {
  std::vector<Segment> segments;
  segments.reserve(batch);
  const bool packed = cu_seqlens.element_count() > 0;
  const int32_t* boundary = cu_seqlens.typed_data();
  for (int64_t group = 0; group < groups; ++group) {
    int64_t begin = packed ? std::clamp<int64_t>(*boundary++, 0, rows) : 0;
    for (int64_t i = 0; i < batch / groups; ++i) {
      const int64_t end = packed ? std::clamp<int64_t>(*boundary++, begin, rows) : rows;
      int64_t len = end - begin;
      if (seqused.element_count() > 0) len = std::clamp<int64_t>(seqused.typed_data()[segments.size()], 0, len);
      segments.push_back({group, begin, len});
      begin = end;
    }
  }
  return segments;
}

Array ArrayOf(const ffi::AnyBuffer& buffer) {
  const auto sizes = buffer.dimensions();
  return {buffer.untyped_data(), buffer.element_type(), sizes[0], sizes[1], sizes[2], sizes[3]};
}

// From the checked shape, not from the strides in Params, which nobody has checked.
Table TableOf(const Floats& buffer) {
  if (buffer.element_count() == 0) return {};
  const auto sizes = buffer.dimensions();
  return {buffer.typed_data(), sizes[0] == 1 ? 0 : sizes[1], sizes[1] == 1 ? 0 : 1};
}

Call CallOf(const Operands& operands, const Params& params) {
  Call call;
  call.params = params;
  const auto q = SegmentsOf(operands.cu_seqlens_q, operands.seqused_q, params.q_groups, params.q_rows, params.batch);
  // In a cache these are positions: where they lie an index array says.
  const auto kv =
      SegmentsOf(operands.cu_seqlens_k, operands.seqused_k, operands.indexed() ? params.batch : params.kv_groups,
                 int64_t{params.kv_rows} * std::max(params.max_pages, 1), params.batch);
  for (int i = 0; i < params.batch; ++i) {
    Sequence sequence{q[i], kv[i]};
    if (operands.page_table.element_count() > 0) {
      sequence.pages = operands.page_table.typed_data() + int64_t{i} * params.max_pages;
    }
    if (operands.cache_batch_idx.element_count() > 0) {
      sequence.kv.group = std::clamp(operands.cache_batch_idx.typed_data()[i], 0, params.kv_groups - 1);
    }
    if (operands.cache_leftpad.element_count() > 0) {
      sequence.leftpad = std::clamp<int64_t>(operands.cache_leftpad.typed_data()[i], 0, sequence.kv.len);
    }
    call.sequences.push_back(sequence);
  }
  call.q = ArrayOf(operands.q);
  call.k = ArrayOf(operands.k);
  call.v = ArrayOf(operands.v);
  call.scale = TableOf(operands.scale);
  call.v_scale = TableOf(operands.v_scale);
  call.sinks = TableOf(operands.sinks);
  return call;
}

// Rows that belong to no sequence, or lie behind the used rows of theirs: nothing else writes them.

// Calls function(group, begin, end) for each run of them in q (side: &Sequence::q) or in k and v (&Sequence::kv).
template <typename Function>
void ForEachUnused(const Call& call, Segment Sequence::* side, int64_t groups, int64_t rows, Function function) {
  auto sequence = call.sequences.begin();
  for (int64_t group = 0; group < groups; ++group) {
    int64_t end = 0;
    for (; sequence != call.sequences.end() && (*sequence.*side).group == group; ++sequence) {
      const Segment& used = *sequence.*side;
      function(group, end, used.begin);
      end = used.begin + used.len;
    }
    function(group, end, rows);
  }
}

void ZeroUnused(const Call& call, Segment Sequence::* side, const Array& array) {
  const int64_t row_bytes = array.heads * array.dim * static_cast<int64_t>(ffi::ByteWidth(array.type));
  ForEachUnused(call, side, array.groups, array.rows, [&](int64_t group, int64_t begin, int64_t end) {
    char* data = static_cast<char*>(array.data) + (group * array.rows + begin) * row_bytes;
    std::memset(data, 0, (end - begin) * row_bytes);
  });
}

// Tiles.

// The tiles of every kv head of every sequence, which has rows_of(sequence) rows for a kv head.
template <typename RowsOf>
std::vector<Item> TilesOf(const Call& call, RowsOf rows_of) {
  std::vector<Item> items;
  for (int i = 0; i < call.params.batch; ++i) {
    const int64_t rows = rows_of(call.sequences[i]);
    for (int kv_head = 0; kv_head < call.params.kv_heads; ++kv_head) {
      for (int64_t first = 0; first < rows; first += kTile) {
        items.push_back({i, kv_head, first, static_cast<int>(std::min<int64_t>(kTile, rows - first))});
      }
    }
  }
  return items;
}

// From last to first: under a causal mask the last queries see the most keys, and long items should not end a call.
std::vector<Item> QueryTilesOf(const Call& call) {
  auto items = TilesOf(call, [&](const Sequence& sequence) { return sequence.q.len * call.heads_per_kv(); });
  std::reverse(items.begin(), items.end());
  return items;
}

std::vector<Item> KeyTilesOf(const Call& call) {
  return TilesOf(call, [](const Sequence& sequence) { return sequence.kv.len; });
}

// The kernels, compiled for several instruction sets of which the best one is chosen at run time.

using Kernel = void (*)(const Call& call, const Item& item, Scratch& scratch);

struct Kernels {
  Kernel forward;
  Kernel query_gradient;
  Kernel key_gradient;
};

// Flattened, a kernel contains all that it calls, compiled for its instruction set.
#define JAX_FLASH_KERNELS(name, isa, attributes)                                                                  \
  struct name {                                                                                                   \
    [[gnu::flatten]] attributes static void Forward(const Call& call, const Item& item, Scratch& scratch) {       \
      ForwardTile<isa>(call, item, scratch);                                                                      \
    }                                                                                                             \
    [[gnu::flatten]] attributes static void QueryGradient(const Call& call, const Item& item, Scratch& scratch) { \
      QueryGradientTile<isa>(call, item, scratch);                                                                \
    }                                                                                                             \
    [[gnu::flatten]] attributes static void KeyGradient(const Call& call, const Item& item, Scratch& scratch) {   \
      KeyGradientTile<isa>(call, item, scratch);                                                                  \
    }                                                                                                             \
    static constexpr Kernels kKernels{Forward, QueryGradient, KeyGradient};                                       \
  }

#ifdef __x86_64__

using Sse2 = InstructionSet</*lanes=*/4, /*vectors=*/2>;
using Avx2 = InstructionSet</*lanes=*/8, /*vectors=*/2>;
using Avx512 = InstructionSet</*lanes=*/16, /*vectors=*/4>;
JAX_FLASH_KERNELS(KernelsSse2, Sse2, );
JAX_FLASH_KERNELS(KernelsAvx2, Avx2, [[gnu::target("avx2,fma")]]);
JAX_FLASH_KERNELS(KernelsAvx512, Avx512, [[gnu::target("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")]]);

Kernels BestKernels() {
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? KernelsAvx512::kKernels : avx2 ? KernelsAvx2::kKernels : KernelsSse2::kKernels;
}

#else

using Neon = InstructionSet</*lanes=*/4, /*vectors=*/4>;
JAX_FLASH_KERNELS(KernelsNeon, Neon, );

Kernels BestKernels() { return KernelsNeon::kKernels; }

#endif
#undef JAX_FLASH_KERNELS

// Handlers.

Status Forward(const Operands& operands, const Params& params, const ffi::AnyBuffer& out, const Floats& lse,
               ffi::ThreadPool pool) {
  RETURN_IF_ERROR(CheckOperands(operands, params));
  RETURN_IF_ERROR(CheckOutput("out", out, params));
  if (lse.element_count() > 0) RETURN_IF_ERROR(CheckLse("lse", lse, params));

  Call call = CallOf(operands, params);
  call.out = ArrayOf(out);
  ZeroUnused(call, &Sequence::q, call.out);
  if (lse.element_count() > 0) {
    call.lse = lse.typed_data();
    ForEachUnused(call, &Sequence::q, params.q_groups, params.q_rows, [&](int64_t group, int64_t begin, int64_t end) {
      for (int64_t head = 0; head < params.heads; ++head) {
        float* row = call.lse + (group * params.heads + head) * params.q_rows;
        std::fill(row + begin, row + end, -kInfinity);
      }
    });
  }

  const Kernels kernels = BestKernels();
  const std::vector<Item> tiles = QueryTilesOf(call);
  const auto scratch = [&] { return Scratch(params); };
  ForEachItem(pool, tiles.size(), scratch, [&](int64_t i, Scratch& own) { kernels.forward(call, tiles[i], own); });
  return Status::Ok();
}

// What the backward has beside the operands.
struct Gradients {
  ffi::AnyBuffer dout;
  Floats lse, delta;
  ffi::AnyBuffer dq, dk, dv;
};

Status Backward(const Operands& operands, const Params& params, const Gradients& gradients, ffi::ThreadPool pool) {
  RETURN_IF_ERROR(CheckOperands(operands, params));
  const ffi::DataType type = operands.q.element_type();
  if (type == ffi::F8E4M3FN) return Status::InvalidArgument("float8_e4m3fn has no gradient");
  if (operands.indexed() || operands.cache_leftpad.element_count() > 0) {
    return Status::InvalidArgument("a cache has no gradient");
  }
  RETURN_IF_ERROR(CheckOutput("dout", gradients.dout, params));
  RETURN_IF_ERROR(CheckLse("lse", gradients.lse, params));
  RETURN_IF_ERROR(CheckLse("delta", gradients.delta, params));
  RETURN_IF_ERROR(CheckArray("dq", gradients.dq, type, ShapeOf(operands.q)));
  RETURN_IF_ERROR(CheckArray("dk", gradients.dk, type, ShapeOf(operands.k)));
  RETURN_IF_ERROR(CheckArray("dv", gradients.dv, type, ShapeOf(operands.v)));

  Call call = CallOf(operands, params);
  call.dout = ArrayOf(gradients.dout);
  call.saved_lse = gradients.lse.typed_data();
  call.delta = gradients.delta.typed_data();
  call.dq = ArrayOf(gradients.dq);
  call.dk = ArrayOf(gradients.dk);
  call.dv = ArrayOf(gradients.dv);
  ZeroUnused(call, &Sequence::q, call.dq);
  ZeroUnused(call, &Sequence::kv, call.dk);
  ZeroUnused(call, &Sequence::kv, call.dv);

  // Each tile sums its own gradients, always in the same order. Scores are computed twice, once for the keys and once
  // for the queries: the price of needing neither atomics nor a sum over threads, however few the heads.
  const Kernels kernels = BestKernels();
  const std::vector<Item> key_tiles = KeyTilesOf(call);
  const std::vector<Item> query_tiles = QueryTilesOf(call);
  const int64_t keys = key_tiles.size();
  const int64_t queries = query_tiles.size();
  const auto scratch = [&] { return Scratch(params); };
  ForEachItem(pool, keys + queries, scratch, [&](int64_t i, Scratch& own) {
    if (i < keys) {
      kernels.key_gradient(call, key_tiles[i], own);
    } else {
      kernels.query_gradient(call, query_tiles[i - keys], own);
    }
  });
  return Status::Ok();
}

ffi::Error HandleForward(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Floats scale, Floats v_scale,
                         Floats sinks, Integers cu_seqlens_q, Integers cu_seqlens_k, Integers seqused_q,
                         Integers seqused_k, Integers page_table, Integers cache_batch_idx, Integers cache_leftpad,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<Floats> lse, Params params,
                         ffi::ThreadPool pool) {
  const Operands operands{
      q,         k,         v,          scale,           v_scale,      sinks, cu_seqlens_q, cu_seqlens_k,
      seqused_q, seqused_k, page_table, cache_batch_idx, cache_leftpad};
  return Forward(operands, params, *out, *lse, pool).ToError();
}

ffi::Error HandleBackward(ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v, Floats scale, Floats v_scale,
                          Floats sinks, Integers cu_seqlens_q, Integers cu_seqlens_k, Integers seqused_q,
                          Integers seqused_k, Integers page_table, Integers cache_batch_idx, Integers cache_leftpad,
                          ffi::AnyBuffer dout, Floats lse, Floats delta, ffi::Result<ffi::AnyBuffer> dq,
                          ffi::Result<ffi::AnyBuffer> dk, ffi::Result<ffi::AnyBuffer> dv, Params params,
                          ffi::ThreadPool pool) {
  const Operands operands{
      q,         k,         v,          scale,           v_scale,      sinks, cu_seqlens_q, cu_seqlens_k,
      seqused_q, seqused_k, page_table, cache_batch_idx, cache_leftpad};
  return Backward(operands, params, {dout, lse, delta, *dq, *dk, *dv}, pool).ToError();
}

auto BindOperands() {
  return ffi::Ffi::Bind()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<ffi::AnyBuffer>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Integers>()
      .Arg<Integers>();
}

auto BindForward() {
  return BindOperands().Ret<ffi::AnyBuffer>().Ret<Floats>().Attr<Params>("params").Ctx<ffi::ThreadPool>();
}

auto BindBackward() {
  return BindOperands()
      .Arg<ffi::AnyBuffer>()
      .Arg<Floats>()
      .Arg<Floats>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Ret<ffi::AnyBuffer>()
      .Attr<Params>("params")
      .Ctx<ffi::ThreadPool>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashCpuForward, HandleForward, BindForward());
XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxFlashCpuBackward, HandleBackward, BindBackward());

}  // namespace jax_flash::cpu
