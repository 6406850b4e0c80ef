// Schedule: which tile a CTA works on next.
//
// Heads are worked on in sections whose keys and values stay in the L2 cache together, tiles of one length after those
// of another. Where lengths are the same in all sequences, CTA c takes the c-th tile of every round. Under a causal
// mask the tiles of the last section come from the longest to the shortest, those of the one before the other way, and
// so on: lengths rise and fall along t, and every CTA gets its share of long tiles. Where few tiles make a pair of
// sequence and head, a section is a round, and tiles of a pair come one after another: neighbours share keys and
// values. Where one section of the other kind is all there is, every other round is reversed instead.
//
// Packed sequences have any lengths: there a CTA draws its next tile from a counter when it begins another. What a tile
// computes does not depend on who does.
//
// Index arrays are read as they are defined for all platforms: the boundaries of a group are the running maximum of its
// cu_seqlens, clamped to [0, rows], and lengths are clamped to the sequence. So no value leads outside a buffer, and
// sequences never overlap.
#pragma once

#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

__device__ __forceinline__ int clamp(int x, int low, int high) { return max(low, min(x, high)); }

__device__ __forceinline__ int ceil_div(int x, int y) { return (x + y - 1) / y; }

// Pairs of sequence and head whose keys and values, of so many rows each, stay in the L2 cache together. In float, for
// all of a CTA waits for it at the beginning.
__device__ __forceinline__ int fitting_pairs(const Params& params, int rows) {
  constexpr float kL2Bytes = 8 << 20;
  constexpr float kMost = 1 << 24;
  const float row_bytes = static_cast<float>((params.head_dim + params.head_dim_v) * spec::Element::kBytes) *
                          params.kv_heads / params.heads;
  return static_cast<int>(fmaxf(1.0f, fminf(kMost, kL2Bytes / (row_bytes * rows))));
}

// Where a tile stands among `pairs` pairs of m_blocks tiles each, worked on so many pairs at a time.
struct Place {
  int section;
  int pair;
  int m_block;  // counted through the section

  __device__ __forceinline__ Place(int index, int pairs, int m_blocks, int per_section, bool by_pair) {
    section = index / (per_section * m_blocks);
    const int first = section * per_section;
    const int width = min(per_section, pairs - first);
    const int in_section = index - first * m_blocks;
    pair = first + (by_pair ? in_section / m_blocks : in_section % width);
    m_block = by_pair ? in_section % m_blocks : in_section / width;
  }
};

// Boundary i of a group that cu_seqlens cuts: the running maximum of the array. All lanes take part.
__device__ __forceinline__ int boundary(const int* cu_seqlens, int i, int rows) {
  int largest = 0;
  for (int j = lane_index(); j <= i; j += kWarpSize) largest = max(largest, __ldg(cu_seqlens + j));
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    largest = max(largest, __shfl_xor_sync(kAllLanes, largest, distance));
  }
  return min(largest, rows);
}

// Dense queries: rounds.
class DenseSchedule {
 public:
  __device__ __forceinline__ DenseSchedule(const Operands&, const Params& params) : params_(params) {
    const int pairs = params.batch * params.heads;
    const int m_blocks = ceil_div(params.q_rows, spec::kTileM);
    const int fitting = fitting_pairs(params, params.kv_rows);
    if constexpr (spec::kWindowRight) {
      const int in_round = max(1, ctas_ / m_blocks);
      set_sections(pairs, in_round);
      by_pair_ = m_blocks <= kFewBlocks && fitting <= in_round && fill_rounds(pairs, m_blocks);
      if (by_pair_) {
        ctas_ = per_section_ * m_blocks;
      } else {
        set_sections(pairs, max(fitting, in_round));
      }
    } else {
      // Where fewer fit, CTAs that share keys and values had better be neighbours, as they are without sections.
      per_section_ = fitting >= ctas_ / 3 ? min(fitting, pairs) : 1;
    }
  }

  // The next tile's rows, if there is one. All lanes take part.
  __device__ __forceinline__ bool next(Tile& tile) {
    const int heads = opaque(params_.heads);
    const int q_rows = opaque(params_.q_rows);
    const int pairs = heads * params_.batch;
    const int m_blocks = ceil_div(q_rows, spec::kTileM);
    const bool reversed = spec::kWindowRight && sections_ == 1 && round_ % 2 == 1;
    const int cta = blockIdx.x;
    const int index = round_ * ctas_ + (reversed ? ctas_ - 1 - cta : cta);
    ++round_;
    if (cta >= ctas_ || index >= m_blocks * pairs) return false;
    const Place place(index, pairs, m_blocks, opaque(per_section_), by_pair_);
    const bool rising = spec::kWindowRight && (sections_ - place.section) % 2 == 0;
    tile.sequence = place.pair / heads;
    tile.head = place.pair % heads;
    tile.q_group = tile.sequence;
    tile.q_index = tile.q_row = (rising ? place.m_block : m_blocks - 1 - place.m_block) * spec::kTileM;
    tile.rows = min(spec::kTileM, q_rows - tile.q_row);
    tile.q_len = q_rows;
    return true;
  }

 private:
  // With more blocks than that a tile's own loads count, and even loads of CTAs, which sections of many rounds give.
  static constexpr int kFewBlocks = 16;

  // Sections of about so many pairs: one or an even number, for lengths rise in one what they fall in the next; of many
  // sections one does not matter.
  __device__ __forceinline__ void set_sections(int pairs, int width) {
    per_section_ = min(pairs, width);
    sections_ = ceil_div(pairs, per_section_);
    while (sections_ % 2 == 1 && sections_ > 1 && per_section_ < 2 * width) {
      per_section_ = ceil_div(pairs, sections_ - 1);
      sections_ = ceil_div(pairs, per_section_);
    }
  }

  // Whether each section is a round, and no more than a tenth of the CTAs have nothing to do in them.
  __device__ __forceinline__ bool fill_rounds(int pairs, int m_blocks) const {
    return per_section_ * m_blocks <= ctas_ && (sections_ == 1 || 10ll * pairs * m_blocks >= 9ll * sections_ * ctas_);
  }

  const Params& params_;
  int ctas_ = gridDim.x;  // that take part in a round
  int round_ = 0;
  int per_section_;  // pairs
  bool by_pair_ = false;
  int sections_;  // known under a right window, where alone lengths differ
};

// Packed queries: draws.
class PackedSchedule {
 public:
  __device__ __forceinline__ PackedSchedule(const Operands& operands, const Params& params)
      : operands_(operands), params_(params) {}

  // The next tile's rows, if there is one. All lanes take part.
  //
  // A group of n sequences is n + 2 segments of rows: before the first, the sequences, after the last. A warp looks at
  // a chunk of 32 segments at a time and remembers where it stands, as later tiles never lie further back.
  __device__ __forceinline__ bool next(Tile& tile) {
    const int index = draw();
    const int q_groups = opaque(params_.q_groups);
    const int q_rows = opaque(params_.q_rows);
    const int heads = opaque(params_.heads);
    const int sequences = params_.batch / q_groups;
    const int segments = q_groups * (sequences + 2);
    while (chunk_ < segments) {
      const int segment = chunk_ + lane_index();
      const int group = min(segment, segments - 1) / (sequences + 2);
      const int in_group = min(segment, segments - 1) - group * (sequences + 2);
      int end = q_rows;
      if (in_group <= sequences) {
        end = clamp(__ldg(operands_.cu_seqlens_q + static_cast<i64>(group) * (sequences + 1) + in_group), 0, end);
      }
      end = max(warp_scan_max(group * q_rows + end), chunk_row_);
      int begin = __shfl_up_sync(kAllLanes, end, 1);
      if (lane_index() == 0) begin = chunk_row_;
      const int m_blocks = ceil_div(end - begin, spec::kTileM);
      const int tiles_end = chunk_tiles_ + warp_scan_sum(m_blocks * heads);
      const u32 later = __ballot_sync(kAllLanes, tiles_end > index);
      if (later == 0) {
        chunk_ += kWarpSize;
        chunk_row_ = __shfl_sync(kAllLanes, end, kWarpSize - 1);
        chunk_tiles_ = __shfl_sync(kAllLanes, tiles_end, kWarpSize - 1);
        continue;
      }
      const int owner = __ffs(later) - 1;
      const int owner_m_blocks = __shfl_sync(kAllLanes, m_blocks, owner);
      const int owner_begin = __shfl_sync(kAllLanes, begin, owner);
      const int owner_end = __shfl_sync(kAllLanes, end, owner);
      const int owner_group = __shfl_sync(kAllLanes, group, owner);
      const int owner_in_group = __shfl_sync(kAllLanes, in_group, owner);
      const int local = index - (__shfl_sync(kAllLanes, tiles_end, owner) - owner_m_blocks * heads);
      // A sequence has about as many keys as queries. All tiles are of one length where no mask cuts them.
      const int per_section = spec::kWindowRight ? min(heads, fitting_pairs(params_, owner_end - owner_begin)) : 1;
      const Place place(local, heads, owner_m_blocks, per_section, false);
      tile.head = place.pair;
      tile.q_index = (owner_m_blocks - 1 - place.m_block) * spec::kTileM;
      tile.rows = min(spec::kTileM, owner_end - owner_begin - tile.q_index);
      tile.q_group = owner_group;
      tile.q_row = owner_begin - owner_group * q_rows + tile.q_index;
      const bool in_sequence = owner_in_group >= 1 && owner_in_group <= sequences;
      tile.sequence = in_sequence ? owner_group * sequences + owner_in_group - 1 : -1;
      tile.q_len = in_sequence ? owner_end - owner_begin : 0;
      return true;
    }
    return false;
  }

 private:
  // The first tile of a CTA is its own; without a counter there are no more.
  __device__ __forceinline__ int draw() {
    int index = blockIdx.x;
    if (drew_) {
      index = 0x7fffffff;
      if (operands_.draws != nullptr && lane_index() == 0) index = gridDim.x + atomicAdd(operands_.draws, 1);
      index = uniform(index);
    }
    drew_ = true;
    return index;
  }

  const Operands& operands_;
  const Params& params_;
  bool drew_ = false;
  int chunk_ = 0;        // first segment of the 32 that the warp looks at,
  int chunk_row_ = 0;    // where it begins, counted over all groups,
  int chunk_tiles_ = 0;  // and the tiles before it
};

// The used lengths of the tile's sequence, and where its keys lie.
__device__ __forceinline__ void find_keys(Tile& tile, const Operands& operands, const Params& params) {
  const int sequence = tile.sequence;
  if (spec::kSequsedQ && sequence >= 0 && lane_index() == 0) {
    tile.q_len = clamp(__ldg(operands.seqused_q + sequence), 0, tile.q_len);
  }
  int kv_group = 0;
  int kv_row = 0;
  int kv_len = 0;
  if (sequence >= 0) {
    kv_group = sequence;
    kv_len = params.kv_rows;
    if constexpr (spec::kPackedK) {
      const int sequences = opaque(params.batch) / params.kv_groups;
      kv_group = sequence / sequences;
      const int in_group = sequence - kv_group * sequences;
      const int* cu_seqlens = operands.cu_seqlens_k + static_cast<i64>(kv_group) * (sequences + 1);
      kv_row = boundary(cu_seqlens, in_group, params.kv_rows);
      kv_len = max(kv_row, min(__ldg(cu_seqlens + in_group + 1), params.kv_rows)) - kv_row;
    }
    if constexpr (spec::kSequsedK) kv_len = clamp(__ldg(operands.seqused_k + sequence), 0, kv_len);
  }
  if (lane_index() == 0) {
    tile.kv_group = kv_group;
    tile.kv_row = kv_row;
    tile.kv_len = kv_len;
  }
  __syncwarp();
}

template <bool kPacked>
struct ScheduleOf {
  using Type = DenseSchedule;
};
template <>
struct ScheduleOf<true> {
  using Type = PackedSchedule;
};

// Finds tile after tile, into shared memory: registers are few here.
class Schedule {
 public:
  __device__ __forceinline__ Schedule(const Operands& operands, const Params& params)
      : operands_(operands), params_(params), rows_(operands, params) {}

  // Whether there is a next tile. All lanes take part.
  __device__ __forceinline__ bool next(Tile& shared_tile) {
    Tile tile;
    if (!rows_.next(tile)) return false;
    if (lane_index() == 0) shared_tile = tile;
    __syncwarp();
    find_keys(shared_tile, operands_, params_);
    return true;
  }

 private:
  const Operands& operands_;
  const Params& params_;
  ScheduleOf<spec::kPackedQ>::Type rows_;
};

}  // namespace jax_flash
