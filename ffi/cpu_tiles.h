// The three kernels: the output of a tile of queries, its gradient, and the gradients of a tile of keys and values.
//
// The rows of the tile lie in vector lanes: they are held transposed, (dim, kTile). The other side comes in blocks of
// rows, (kTile, dim). So scores are (block row, lane), every product is Multiply with a block on the left, as it lies
// or transposed by its steps, and maxima and sums over keys need no step across lanes. The memory is a fixed number of
// matrices, whatever the length.
//
// All arithmetic is float32. q is scaled so that its product with k is an exponent of 2 or, with softcap, the argument
// of tanh.
#pragma once

#include <cmath>
#include <limits>
#include <memory>
#include <new>

#include "ffi/cpu_call.h"
#include "ffi/cpu_simd.h"

namespace jax_flash::cpu {

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The factor of q for that, beside the softmax scale.
inline float ScoreUnit(const Params& params) { return params.softcap != 0 ? 1 / params.softcap : kLog2E; }

// The matrices that one thread works in: (kTile, dim), (dim, kTile) or (kTile, kTile).
class Scratch {
 public:
  explicit Scratch(const Params& params)
      : matrix_size_(kTile * RoundUp(std::max({params.head_dim, params.head_dim_v, kTile}))),
        memory_(new (kAlignment) float[kMatrices * matrix_size_]) {}

  float* operator[](int matrix) { return memory_.get() + matrix * matrix_size_; }

 private:
  static constexpr int kMatrices = 9;
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* memory) const { ::operator delete[](memory, kAlignment); }
  };

  // Multiply writes whole groups of kRows rows.
  static int64_t RoundUp(int64_t rows) { return (rows + kRows - 1) / kRows * kRows; }

  int64_t matrix_size_;
  std::unique_ptr<float[], Delete> memory_;
};

// Reads rows index(0), ..., index(rows - 1) of an array as a block, (rows, dim).
template <typename Index>
inline void ReadBlock(const Array& array, int rows, Index index, float* block) {
  for (int i = 0; i < rows; ++i) ReadRow(array, index(i), block + i * array.dim);
}

// Reads rows index(0), index(1), ... times factor(0), factor(1), ... into lanes, (dim, kTile).
template <typename Index, typename Factor>
inline void ReadLanes(const Array& array, int width, Index index, Factor factor, float* row, float* lanes) {
  for (int lane = 0; lane < width; ++lane) {
    ReadRow(array, index(lane), row);
    const float scale = factor(lane);
    for (int64_t d = 0; d < array.dim; ++d) lanes[d * kTile + lane] = row[d] * scale;
  }
}

// The reverse: writes lanes times factors.
template <typename Index, typename Factor>
inline void WriteLanes(const Array& array, int rows, Index index, Factor factor, float* row, const float* lanes) {
  for (int lane = 0; lane < rows; ++lane) {
    const float scale = factor(lane);
    for (int64_t d = 0; d < array.dim; ++d) row[d] = lanes[d * kTile + lane] * scale;
    WriteRow(array, index(lane), row);
  }
}

// The lanes that a tile needs: whole vectors. Those past the last row repeat it and are not written back.
template <typename Isa>
inline int Width(const Item& item) {
  return (item.rows + Isa::kLanes - 1) / Isa::kLanes * Isa::kLanes;
}

// Whether 0 <= offset < count: one unsigned comparison, for GCC splits a conjunction of two into scalars.
template <typename Isa>
inline typename Isa::Int Within(const typename Isa::Int& offset, const typename Isa::Int& count) {
  return (typename Isa::Unsigned)offset < (typename Isa::Unsigned)count;
}

// Where the query rows of a tile lie and what they see, by lane.
struct QueryLanes {
  int head[kTile];
  int64_t index[kTile];      // Call::QueryIndex
  int64_t lse_index[kTile];  // Call::LseIndex
  alignas(64) int32_t first_key[kTile];
  alignas(64) int32_t num_keys[kTile];
  Range some;  // keys that at least one query sees
  Range all;   // keys that all queries see

  QueryLanes(const Call& call, const Item& item, int width) {
    const Sequence& sequence = call.sequences[item.sequence];
    some = {sequence.kv.len, 0};
    all = {0, sequence.kv.len};
    for (int lane = 0; lane < width; ++lane) {
      const int64_t row = item.first + std::min(lane, item.rows - 1);
      const int64_t query = row / call.heads_per_kv();
      head[lane] = static_cast<int>(item.kv_head * call.heads_per_kv() + row % call.heads_per_kv());
      index[lane] = call.QueryIndex(sequence, query, head[lane]);
      lse_index[lane] = call.LseIndex(sequence, query, head[lane]);
      Range keys = call.VisibleKeys(sequence, query);
      if (keys.empty()) {
        keys = {0, 0};
      } else {
        some = {std::min(some.first, keys.first), std::max(some.last, keys.last)};
      }
      all = {std::max(all.first, keys.first), std::min(all.last, keys.last)};
      first_key[lane] = static_cast<int32_t>(keys.first);
      num_keys[lane] = static_cast<int32_t>(keys.last - keys.first);
    }
  }

  // Whether the queries from `lane` on see a key.
  template <typename Isa>
  typename Isa::Int See(int64_t key, int lane) const {
    return Within<Isa>(static_cast<int32_t>(key) - At<Isa>(first_key + lane), At<Isa>(num_keys + lane));
  }

  // Zeroes the lanes that see no key: probabilities of 0 times infinities of keys that other lanes see make NaN there.
  void ZeroBlind(int64_t dim, float* lanes, int rows) const {
    for (int lane = 0; lane < rows; ++lane) {
      if (num_keys[lane] > 0) continue;
      for (int64_t d = 0; d < dim; ++d) lanes[d * kTile + lane] = 0;
    }
  }
};

// Softmax over blocks of keys: the running maximum and sum of each lane.
struct OnlineSoftmax {
  alignas(64) float maximum[kTile];
  alignas(64) float sum[kTile];
  alignas(64) float decay[kTile];  // what the maximum of the latest block leaves of earlier blocks

  // Turns the scores of a block into probabilities relative to the maximum so far.
  template <typename Isa>
  void Add(int keys, int width, float* scores) {
    using Float = typename Isa::Float;
    for (int lane = 0; lane < width; lane += Isa::kLanes) {
      const Float before = At<Isa>(maximum + lane);
      Float top = before;
      ForEachVector<Isa>(scores + lane, keys, Isa::kLanes,
                         [&](Float& score, int64_t, int) { top = score > top ? score : top; });
      // While a lane has seen no key its maximum is -inf, and -inf - -inf would be NaN.
      const Float base = top == -kInfinity ? Float{} : top;
      const Float remains = Exp2<Isa>(before - base);
      Float total = At<Isa>(sum + lane) * remains;
      ForEachVector<Isa>(scores + lane, keys, Isa::kLanes, [&](Float& score, int64_t, int) {
        score = Exp2<Isa>(score - base);
        total += score;
      });
      At<Isa>(maximum + lane) = top;
      At<Isa>(sum + lane) = total;
      At<Isa>(decay + lane) = remains;
    }
  }
};

// The output and LSE of a tile of queries: queries in lanes, keys in blocks.
template <typename Isa>
inline void ForwardTile(const Call& call, const Item& item, Scratch& scratch) {
  using Float = typename Isa::Float;
  const Params& params = call.params;
  const Sequence& sequence = call.sequences[item.sequence];
  float *q = scratch[0], *out = scratch[1], *k = scratch[2], *v = scratch[3], *scores = scratch[4], *row = scratch[5];

  const int width = Width<Isa>(item);
  const QueryLanes lanes(call, item, width);
  const auto index = [&](int lane) { return lanes.index[lane]; };
  const auto q_scale = [&](int lane) { return call.scale.At(item.sequence, lanes.head[lane]) * ScoreUnit(params); };
  ReadLanes(call.q, width, index, q_scale, row, q);
  std::fill_n(out, int64_t{params.head_dim_v} * kTile, 0.0f);
  OnlineSoftmax softmax;
  for (int lane = 0; lane < width; ++lane) {
    // A sink is a score like that of a key, seen before all others, with no value.
    softmax.maximum[lane] = call.sinks.data ? call.sinks.At(item.sequence, lanes.head[lane]) * kLog2E : -kInfinity;
    softmax.sum[lane] = call.sinks.data ? 1 : 0;
  }

  for (int64_t first = lanes.some.first; first < lanes.some.last; first += kTile) {
    const int keys = static_cast<int>(std::min<int64_t>(kTile, lanes.some.last - first));
    const auto key_index = [&](int i) { return call.KeyIndex(sequence, first + i, item.kv_head); };
    ReadBlock(call.k, keys, key_index, k);
    Multiply<Isa>({k, params.head_dim, 1}, keys, params.head_dim, q, width, scores, /*add=*/false);
    if (params.softcap != 0) {
      ForEachVector<Isa>(scores, keys, width,
                         [&](Float& score, int64_t, int) { score = params.softcap * kLog2E * Tanh<Isa>(score); });
    }
    if (first < lanes.all.first || first + keys > lanes.all.last) {
      ForEachVector<Isa>(scores, keys, width, [&](Float& score, int64_t i, int lane) {
        score = lanes.See<Isa>(first + i, lane) ? score : Float{} - kInfinity;
      });
    }
    softmax.Add<Isa>(keys, width, scores);
    ForEachVector<Isa>(out, params.head_dim_v, width,
                       [&](Float& value, int64_t, int lane) { value *= At<Isa>(softmax.decay + lane); });
    ReadBlock(call.v, keys, key_index, v);
    Multiply<Isa>({v, 1, params.head_dim_v}, params.head_dim_v, keys, scores, width, out, /*add=*/true);
  }

  const float v_scale = call.v_scale.At(item.sequence, item.kv_head);
  const auto normalise = [&](int lane) {
    return lanes.num_keys[lane] == 0 || softmax.sum[lane] == 0 ? 0 : v_scale / softmax.sum[lane];
  };
  lanes.ZeroBlind(params.head_dim_v, out, item.rows);
  WriteLanes(call.out, item.rows, index, normalise, row, out);
  if (call.lse == nullptr) return;
  for (int lane = 0; lane < item.rows; ++lane) {
    call.lse[lanes.lse_index[lane]] = softmax.maximum[lane] * kLn2 + std::log(softmax.sum[lane]);
  }
}

// What the gradient of a score needs from its query, and whether that sees the key.
template <typename Isa>
struct QueryContext {
  typename Isa::Float lse;  // in log2
  typename Isa::Float delta;
  typename Isa::Int visible;
};

// Turns products q k into probabilities and, in `gradients`, products dout v into gradients of q k. `context` gives
// the QueryContext of a vector of scores.
template <typename Isa, typename Context>
inline void ScoreGradients(float softcap, int rows, int width, Context context, float* scores, float* gradients) {
  using Float = typename Isa::Float;
  ForEachVector<Isa>(scores, rows, width, [=](Float& score, int64_t row, int lane) {
    const QueryContext<Isa> query = context(row, lane);
    Float exponent = score;
    Float slope = Float{} + 1.0f;
    if (softcap != 0) {
      const Float capped = Tanh<Isa>(score);
      exponent = softcap * kLog2E * capped;
      slope = 1.0f - capped * capped;
    }
    const Float probability = Exp2<Isa>(exponent - query.lse);
    Float& gradient = At<Isa>(gradients + row * kTile + lane);
    score = query.visible ? probability : Float{};
    gradient = query.visible ? probability * (gradient - query.delta) * slope : Float{};
  });
}

// The gradient of a tile of queries: queries in lanes, keys in blocks.
template <typename Isa>
inline void QueryGradientTile(const Call& call, const Item& item, Scratch& scratch) {
  const Params& params = call.params;
  const Sequence& sequence = call.sequences[item.sequence];
  float *q = scratch[0], *dout = scratch[1], *dq = scratch[2], *k = scratch[3], *v = scratch[4];
  float *scores = scratch[5], *gradients = scratch[6], *row = scratch[7];

  const int width = Width<Isa>(item);
  const QueryLanes lanes(call, item, width);
  const auto index = [&](int lane) { return lanes.index[lane]; };
  const auto scale = [&](int lane) { return call.scale.At(item.sequence, lanes.head[lane]); };
  const auto q_scale = [&](int lane) { return scale(lane) * ScoreUnit(params); };
  const auto v_scale = [&](int) { return call.v_scale.At(item.sequence, item.kv_head); };
  ReadLanes(call.q, width, index, q_scale, row, q);
  ReadLanes(call.dout, width, index, v_scale, row, dout);
  std::fill_n(dq, int64_t{params.head_dim} * kTile, 0.0f);
  alignas(64) float lse[kTile];
  alignas(64) float delta[kTile];
  for (int lane = 0; lane < width; ++lane) {
    lse[lane] = call.saved_lse[lanes.lse_index[lane]] * kLog2E;
    delta[lane] = call.delta[lanes.lse_index[lane]];
  }

  for (int64_t first = lanes.some.first; first < lanes.some.last; first += kTile) {
    const int keys = static_cast<int>(std::min<int64_t>(kTile, lanes.some.last - first));
    const auto key_index = [&](int i) { return call.KeyIndex(sequence, first + i, item.kv_head); };
    ReadBlock(call.k, keys, key_index, k);
    ReadBlock(call.v, keys, key_index, v);
    Multiply<Isa>({k, params.head_dim, 1}, keys, params.head_dim, q, width, scores, /*add=*/false);
    Multiply<Isa>({v, params.head_dim_v, 1}, keys, params.head_dim_v, dout, width, gradients, /*add=*/false);
    const auto context = [&](int64_t i, int lane) -> QueryContext<Isa> {
      return {At<Isa>(lse + lane), At<Isa>(delta + lane), lanes.See<Isa>(first + i, lane)};
    };
    ScoreGradients<Isa>(params.softcap, keys, width, context, scores, gradients);
    Multiply<Isa>({k, 1, params.head_dim}, params.head_dim, keys, gradients, width, dq, /*add=*/true);
  }

  lanes.ZeroBlind(params.head_dim, dq, item.rows);
  WriteLanes(call.dq, item.rows, index, scale, row, dq);
}

// The gradients of a tile of keys and values: keys in lanes, the queries of one head after the other in blocks.
template <typename Isa>
inline void KeyGradientTile(const Call& call, const Item& item, Scratch& scratch) {
  using Float = typename Isa::Float;
  using Int = typename Isa::Int;
  const Params& params = call.params;
  const Sequence& sequence = call.sequences[item.sequence];
  float *k = scratch[0], *v = scratch[1], *dk = scratch[2], *dv = scratch[3], *q = scratch[4], *dout = scratch[5];
  float *scores = scratch[6], *gradients = scratch[7], *row = scratch[8];

  const int width = Width<Isa>(item);
  const auto key_index = [&](int lane) {
    return call.KeyIndex(sequence, item.first + std::min(lane, item.rows - 1), item.kv_head);
  };
  const auto v_scale = [&](int) { return call.v_scale.At(item.sequence, item.kv_head); };
  ReadLanes(call.k, width, key_index, [](int) { return 1.0f; }, row, k);
  ReadLanes(call.v, width, key_index, v_scale, row, v);
  std::fill_n(dk, int64_t{params.head_dim} * kTile, 0.0f);
  std::fill_n(dv, int64_t{params.head_dim_v} * kTile, 0.0f);
  float lse[kTile], delta[kTile];
  int32_t first_key[kTile], num_keys[kTile];
  alignas(64) int32_t position[kTile];
  for (int lane = 0; lane < width; ++lane) position[lane] = static_cast<int32_t>(item.first) + lane;

  const Range seeing = call.SeeingQueries(sequence, {item.first, item.first + item.rows});
  const int heads = call.heads_per_kv();
  for (int head = item.kv_head * heads; head < (item.kv_head + 1) * heads; ++head) {
    const float q_scale = call.scale.At(item.sequence, head) * ScoreUnit(params);
    for (int64_t first = seeing.first; first < seeing.last; first += kTile) {
      const int queries = static_cast<int>(std::min<int64_t>(kTile, seeing.last - first));
      const auto index = [&](int i) { return call.QueryIndex(sequence, first + i, head); };
      ReadBlock(call.q, queries, index, q);
      ReadBlock(call.dout, queries, index, dout);
      for (int64_t i = 0; i < int64_t{queries} * params.head_dim; ++i) q[i] *= q_scale;
      Multiply<Isa>({q, params.head_dim, 1}, queries, params.head_dim, k, width, scores, /*add=*/false);
      Multiply<Isa>({dout, params.head_dim_v, 1}, queries, params.head_dim_v, v, width, gradients, /*add=*/false);
      for (int i = 0; i < queries; ++i) {
        const int64_t lse_index = call.LseIndex(sequence, first + i, head);
        const Range keys = call.VisibleKeys(sequence, first + i);
        lse[i] = call.saved_lse[lse_index] * kLog2E;
        delta[i] = call.delta[lse_index];
        first_key[i] = static_cast<int32_t>(keys.first);
        num_keys[i] = static_cast<int32_t>(keys.last - keys.first);
      }
      const auto context = [&](int64_t i, int lane) -> QueryContext<Isa> {
        return {Float{} + lse[i], Float{} + delta[i],
                Within<Isa>(At<Isa>(position + lane) - first_key[i], Int{} + num_keys[i])};
      };
      ScoreGradients<Isa>(params.softcap, queries, width, context, scores, gradients);
      Multiply<Isa>({q, 1, params.head_dim}, params.head_dim, queries, gradients, width, dk, /*add=*/true);
      Multiply<Isa>({dout, 1, params.head_dim_v}, params.head_dim_v, queries, scores, width, dv, /*add=*/true);
    }
  }

  WriteLanes(call.dk, item.rows, key_index, [&](int) { return 1 / ScoreUnit(params); }, row, dk);
  WriteLanes(call.dv, item.rows, key_index, v_scale, row, dv);
}

}  // namespace jax_flash::cpu
