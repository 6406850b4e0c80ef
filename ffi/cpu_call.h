// One call of attention as the CPU kernels see it: arrays, sequences, and which query sees which key.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "ffi/cpu_convert.h"
#include "jax_flash/kernels/params.h"

namespace jax_flash::cpu {

// Positions first..last-1 of a sequence; empty when last <= first.
struct Range {
  int64_t first;
  int64_t last;

  bool empty() const { return last <= first; }
};

// The used rows of a sequence: which group of the array holds them, at which of its rows they begin, how many they are.
struct Segment {
  int64_t group;
  int64_t begin;
  int64_t len;
};

struct Sequence {
  Segment q;
  Segment kv;
  const int32_t* pages = nullptr;  // of the keys, which then lie in groups of these numbers instead of one
  int64_t leftpad = 0;             // keys before this one do not count
};

// Numbers by sequence and head; an axis of length 1 has step 0: the same number for all.
struct Table {
  const float* data = nullptr;
  int64_t sequence_step = 0;
  int64_t head_step = 0;

  float At(int64_t sequence, int64_t head) const { return data[sequence * sequence_step + head * head_step]; }
};

// Work for one thread: `rows` query rows or keys from `first` on, of one sequence and one kv head. The query heads that
// share a kv head share its tiles: query row r is head r % heads_per_kv of query r / heads_per_kv.
struct Item {
  int sequence;
  int kv_head;
  int64_t first;
  int rows;
};

struct Call {
  Params params{};
  std::vector<Sequence> sequences;
  Array q, k, v;
  Table scale, v_scale;
  Table sinks;  // no data: no sinks

  // Forward.
  Array out;
  float* lse = nullptr;  // null: not wanted

  // Backward.
  Array dout, dq, dk, dv;
  const float* saved_lse = nullptr;
  const float* delta = nullptr;

  int heads_per_kv() const { return params.heads / params.kv_heads; }

  // The row of q, out, dout and dq, seen as (groups * rows * heads, dim).
  int64_t QueryIndex(const Sequence& sequence, int64_t query, int64_t head) const {
    return (sequence.q.group * params.q_rows + sequence.q.begin + query) * params.heads + head;
  }

  // The row of k, v, dk and dv. No entry of a page table is trusted.
  int64_t KeyIndex(const Sequence& sequence, int64_t key, int64_t kv_head) const {
    int64_t group = sequence.kv.group;
    int64_t row = sequence.kv.begin + key;
    if (sequence.pages != nullptr) {
      group = std::clamp(sequence.pages[row / params.kv_rows], 0, params.kv_groups - 1);
      row %= params.kv_rows;
    }
    return (group * params.kv_rows + row) * params.kv_heads + kv_head;
  }

  // The element of the LSE and delta, (groups, heads, rows).
  int64_t LseIndex(const Sequence& sequence, int64_t query, int64_t head) const {
    return (sequence.q.group * params.heads + head) * params.q_rows + sequence.q.begin + query;
  }

  // The keys that a query sees.
  Range VisibleKeys(const Sequence& sequence, int64_t query) const {
    const int64_t position = query + sequence.kv.len - sequence.q.len;
    const int64_t first = params.window_left < 0 ? 0 : position - params.window_left;
    const int64_t last = params.window_right < 0 ? sequence.kv.len : position + params.window_right + 1;
    return {std::max(first, sequence.leftpad), std::min(last, sequence.kv.len)};
  }

  // The queries that see at least one of `keys`: the inverse of VisibleKeys, where no keys are padding.
  Range SeeingQueries(const Sequence& sequence, Range keys) const {
    const int64_t shift = sequence.kv.len - sequence.q.len;
    const int64_t first = params.window_right < 0 ? 0 : keys.first - shift - params.window_right;
    const int64_t last = params.window_left < 0 ? sequence.q.len : keys.last - shift + params.window_left;
    return {std::max<int64_t>(first, 0), std::min(last, sequence.q.len)};
  }
};

}  // namespace jax_flash::cpu
