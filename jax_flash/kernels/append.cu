// Puts new keys and values into a cache, and rotates them and Q by their positions. A warp has one head of one row.
#include "hopper/tma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "params.h"
#include "spec.h"

namespace jax_flash {

constexpr int kThreads = 128;
static_assert(kThreads == spec::kThreads, "cuda.py counts the same warps");

// Operands as in spec.Append, then the results: caches are written in place.
struct Operands {
  const void* q;
  const void* k_new;
  const void* v_new;
  const void* k_cache;
  const void* v_cache;
  const int* cache_seqlens;
  const int* cu_seqlens_q;
  const int* cu_seqlens_new;
  const int* page_table;
  const int* cache_batch_idx;
  const void* rotary_cos;
  const void* rotary_sin;
  const float* k_descale;
  const float* v_descale;
  void* k_written;
  void* v_written;
  void* q_rotated;
};

// The numbers of cuda.append.
struct Layout {
  int batch, heads, kv_heads, head_dim, head_dim_v;
  int q_groups, q_rows;
  int new_groups, new_rows;
  int kv_groups, kv_rows;
  int capacity;
  int rotary_rows, rotary_pairs;           // of a table
  int cos_batch_stride, sin_batch_stride;  // in rows; as those of descales, 0 where one serves all
  int k_batch_stride, k_head_stride;
  int v_batch_stride, v_head_stride;
};

// A row of an array (groups, rows, ..): the sequence it belongs to, -1 for none, and its index there.
struct Place {
  int sequence;
  int index;
};

// Boundaries are the running maximum of cu_seqlens, clamped to [0, rows]: the segment of a row ends at the first entry
// beyond it. All lanes take part.
template <bool kPacked>
__device__ __forceinline__ Place place_of(const int* cu_seqlens, int group, int row, int groups, int batch) {
  if (!kPacked) return {group, row};
  const int sequences = batch / groups;
  cu_seqlens += static_cast<i64>(group) * (sequences + 1);
  int begin = 0;
  for (int chunk = 0; chunk <= sequences; chunk += kWarpSize) {
    const int i = chunk + lane_index();
    const int boundary = i <= sequences ? __ldg(cu_seqlens + i) : 0x7fffffff;
    const u32 beyond = __ballot_sync(kAllLanes, boundary > row);
    const int end = beyond == 0 ? kWarpSize : __ffs(beyond) - 1;
    begin = max(begin, warp_max(lane_index() < end ? boundary : 0));
    if (beyond != 0) {
      const int segment = chunk + end;  // 0: before the first sequence, sequences + 1: after the last
      const bool inside = segment >= 1 && segment <= sequences;
      return {inside ? group * sequences + segment - 1 : -1, row - begin};
    }
  }
  return {-1, 0};
}

// Cosines and sines of a row's angles, one for each pair of numbers, from their places in the tables on.
struct Angles {
  int pairs = 0;
  i64 cosine = 0;
  i64 sine = 0;
};

// A row of `count` numbers times `factor`, from one array into another, the first of them rotated in pairs. What is the
// same in both keeps its bits.
template <typename To, typename From>
__device__ __forceinline__ void move_row(void* to, i64 to_row, const void* from, i64 from_row, int count, float factor,
                                         const Operands& operands, const Angles& angles) {
  const int pairs = angles.pairs;
  to_row *= count;
  from_row *= count;
  for (int i = lane_index(); i < pairs; i += kWarpSize) {
    const int first = spec::kRotaryInterleaved ? 2 * i : i;
    const int second = spec::kRotaryInterleaved ? 2 * i + 1 : i + pairs;
    const float cosine = load_number<spec::Table>(operands.rotary_cos, angles.cosine + i);
    const float sine = load_number<spec::Table>(operands.rotary_sin, angles.sine + i);
    const float x = load_number<From>(from, from_row + first);
    const float y = load_number<From>(from, from_row + second);
    store_number<To>(to, to_row + first, (x * cosine - y * sine) * factor);
    store_number<To>(to, to_row + second, (x * sine + y * cosine) * factor);
  }
  for (int i = 2 * pairs + lane_index(); i < count; i += kWarpSize) {
    if constexpr (To::kBytes == From::kBytes && To::kBytes == 1) {
      static_cast<u8*>(to)[to_row + i] = static_cast<const u8*>(from)[from_row + i];
    } else if constexpr (To::kBytes == From::kBytes && To::kBytes == 2) {
      static_cast<u16*>(to)[to_row + i] = static_cast<const u16*>(from)[from_row + i];
    } else {
      store_number<To>(to, to_row + i, load_number<From>(from, from_row + i) * factor);
    }
  }
}

class Appender {
 public:
  __device__ __forceinline__ Appender(const Operands& operands, const Layout& layout)
      : operands_(operands), layout_(layout) {}

  // Does the work of number `warp`: keys, then values, then Q.
  __device__ __forceinline__ void run(int warp) {
    const int new_heads = layout_.new_groups * layout_.new_rows * layout_.kv_heads;
    if (warp < new_heads) {
      append<true>(warp);
    } else if (warp < 2 * new_heads) {
      append<false>(warp - new_heads);
    } else if (spec::kRotates) {
      rotate_q(warp - 2 * new_heads);
    }
  }

 private:
  template <bool kKeys>
  __device__ __forceinline__ void append(int number) {
    const int head = number % layout_.kv_heads;
    const int row = number / layout_.kv_heads % layout_.new_rows;
    const int group = number / layout_.kv_heads / layout_.new_rows;
    const Place place =
        place_of<spec::kPackedNew>(operands_.cu_seqlens_new, group, row, layout_.new_groups, layout_.batch);
    if (place.sequence < 0) return;
    const int position = start_of(place.sequence) + place.index;
    if (position >= layout_.capacity) return;
    int to_group = place.sequence;
    int to_row = position;
    if constexpr (spec::kPageTable) {
      const int page = position / layout_.kv_rows;
      to_row = position - page * layout_.kv_rows;
      const i64 pages = layout_.capacity / layout_.kv_rows;
      to_group = __ldg(operands_.page_table + place.sequence * pages + page);
    } else if constexpr (spec::kCacheBatchIdx) {
      to_group = __ldg(operands_.cache_batch_idx + place.sequence);
    }
    if (to_group < 0 || to_group >= layout_.kv_groups) return;
    const i64 to = (static_cast<i64>(to_group) * layout_.kv_rows + to_row) * layout_.kv_heads + head;
    const float* descales = kKeys ? operands_.k_descale : operands_.v_descale;
    const int batch_stride = kKeys ? layout_.k_batch_stride : layout_.v_batch_stride;
    const int head_stride = kKeys ? layout_.k_head_stride : layout_.v_head_stride;
    float factor = 1.0f;
    if (spec::kQuantises) factor = 1.0f / __ldg(descales + place.sequence * batch_stride + head * head_stride);
    move_row<spec::Cache, spec::New>(kKeys ? operands_.k_written : operands_.v_written, to,
                                     kKeys ? operands_.k_new : operands_.v_new, number,
                                     kKeys ? layout_.head_dim : layout_.head_dim_v, factor, operands_,
                                     kKeys ? angles_of(place.sequence, position) : Angles{});
  }

  // Rows of no sequence are left as they are.
  __device__ __forceinline__ void rotate_q(int number) {
    if (number >= layout_.q_groups * layout_.q_rows * layout_.heads) return;
    const int row = number / layout_.heads % layout_.q_rows;
    const int group = number / layout_.heads / layout_.q_rows;
    const Place place = place_of<spec::kPackedQ>(operands_.cu_seqlens_q, group, row, layout_.q_groups, layout_.batch);
    Angles angles;
    if (place.sequence >= 0) {
      angles = angles_of(place.sequence, start_of(place.sequence) + (spec::kWindowed ? place.index : 0));
    }
    move_row<spec::Query, spec::Query>(operands_.q_rotated, number, operands_.q, number, layout_.head_dim, 1.0f,
                                       operands_, angles);
  }

  // The keys that a sequence has before.
  __device__ __forceinline__ int start_of(int sequence) const {
    return max(0, min(__ldg(operands_.cache_seqlens + sequence), layout_.capacity));
  }

  __device__ __forceinline__ Angles angles_of(int sequence, int position) const {
    if (!spec::kRotates) return {};
    const i64 row = min(position, layout_.rotary_rows - 1);
    const int pairs = layout_.rotary_pairs;
    return {pairs, (sequence * static_cast<i64>(layout_.cos_batch_stride) + row) * pairs,
            (sequence * static_cast<i64>(layout_.sin_batch_stride) + row) * pairs};
  }

  const Operands& operands_;
  const Layout& layout_;
};

extern "C" __global__ void __launch_bounds__(kThreads)
    append(const __grid_constant__ TensorMap, const __grid_constant__ Operands operands, const __grid_constant__ Params,
           const __grid_constant__ Layout layout) {
  Appender(operands, layout).run(blockIdx.x * (kThreads / kWarpSize) + warp_index());
}

}  // namespace jax_flash
