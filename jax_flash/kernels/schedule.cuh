// Schedule: which tile a CTA works on next.
//
// Dense queries: in rounds, as jax_flash/order.py chose. Packed sequences have any lengths: there a CTA draws its next
// tile from a counter when it begins another. What a tile computes does not depend on who does.
#pragma once

#include "hopper/warp.cuh"
#include "keys.cuh"
#include "operands.cuh"
#include "order.cuh"
#include "params.h"
#include "segments.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// Dense queries: rounds.
class DenseSchedule {
 public:
  __device__ __forceinline__ DenseSchedule(const Operands&, const Params& params, const Order& order)
      : params_(params), order_(order) {}

  // The next tile's rows, if there is one. All lanes take part.
  __device__ __forceinline__ bool next(Tile& tile) {
    for (; part_ < kParts; ++part_, round_ = 0) {
      if (next_of(order_.parts[part_], tile)) return true;
    }
    return false;
  }

 private:
  __device__ __forceinline__ bool next_of(const Rounds& rounds, Tile& tile) {
    const int round = round_++;
    const bool odd = round % 2 == 1;
    const int cta = odd && rounds.turns ? rounds.ctas - 1 - blockIdx.x : blockIdx.x;
    const int number = (rounds.mirrors ? round / 2 : round) * rounds.ctas + cta;
    if (round >= rounds.rounds || blockIdx.x >= rounds.ctas || number >= rounds.numbers) return false;

    const int section = rounds.section.quotient(number);
    int in_section = number - section * rounds.section.value;
    if (odd && rounds.mirrors) in_section = 2 * rounds.section.value - 1 - in_section;
    const Divisor& run = section == rounds.last_section ? rounds.last_run : rounds.run;
    const int quotient = run.quotient(in_section);
    const int remainder = in_section - quotient * run.value;
    const int pair = rounds.first_pair + section * rounds.per_section + (rounds.by_pair ? quotient : remainder);
    int m_block = rounds.by_pair ? remainder : quotient;
    const int q_rows = opaque(params_.q_rows);
    if (section % 2 != rounds.rising) m_block = ceil_div(q_rows, spec::kTileM) - 1 - m_block;

    tile.sequence = order_.heads.quotient(pair);
    tile.head = pair - tile.sequence * order_.heads.value;
    tile.q_group = tile.sequence;
    tile.q_index = tile.q_row = m_block * spec::kTileM;
    tile.rows = min(spec::kTileM, q_rows - tile.q_row);
    tile.q_len = q_rows;
    return true;
  }

  const Params& params_;
  const Order& order_;
  int part_ = 0;
  int round_ = 0;
};

// Packed queries: draws.
class PackedSchedule {
 public:
  __device__ __forceinline__ PackedSchedule(const Operands& operands, const Params& params, const Order& order)
      : operands_(operands), params_(params), order_(order) {}

  // The next tile's rows, if there is one. All lanes take part.
  //
  // A warp looks at a chunk of 32 segments at a time and remembers where it stands, as later tiles never lie further
  // back. If some may be long it goes over those first, in chunks that it counts from below 0, and then over the
  // others.
  __device__ __forceinline__ bool next(Tile& tile) {
    const int q_groups = opaque(params_.q_groups);
    const int q_rows = opaque(params_.q_rows);
    const int heads = opaque(params_.heads);
    const int sequences = params_.batch / q_groups;
    const int segments = q_groups * (sequences + 2);
    const int rounded = ceil_div(segments, kWarpSize) * kWarpSize;
    if (!drew_ && q_rows > order_.long_rows) chunk_ = -rounded;
    const int index = draw();
    while (chunk_ < segments) {
      const bool long_ones = chunk_ < 0;
      const int number = chunk_ + (long_ones ? rounded : 0) + lane_index();
      const Segment own = segment_of_lane(number, chunk_row_, operands_, q_groups, q_rows, sequences);
      const bool passed_over = (own.end - own.begin > order_.long_rows) != long_ones;
      const int m_blocks = passed_over ? 0 : ceil_div(own.end - own.begin, spec::kTileM);
      const int tiles_end = chunk_tiles_ + warp_scan_sum(m_blocks * heads);
      const u32 later = __ballot_sync(kAllLanes, tiles_end > index);
      if (later == 0) {
        chunk_ += kWarpSize;
        chunk_row_ = chunk_ == 0 ? 0 : __shfl_sync(kAllLanes, own.end, kWarpSize - 1);
        chunk_tiles_ = __shfl_sync(kAllLanes, tiles_end, kWarpSize - 1);
        continue;
      }
      const int owner = __ffs(later) - 1;
      const int owner_m_blocks = __shfl_sync(kAllLanes, m_blocks, owner);
      const Segment found = shared_by(owner, own);
      const int local = index - (__shfl_sync(kAllLanes, tiles_end, owner) - owner_m_blocks * heads);
      const int rows = found.end - found.begin;
      // A sequence has about as many keys as queries. All tiles are of one length where no mask cuts them.
      const int per_section = spec::kWindowRight ? clamp(order_.fitting_rows / rows, 1, heads) : 1;
      const int first_head = local / (per_section * owner_m_blocks) * per_section;
      const int width = min(per_section, heads - first_head);
      const int in_section = local - first_head * owner_m_blocks;
      tile.head = first_head + in_section % width;
      tile.q_index = (owner_m_blocks - 1 - in_section / width) * spec::kTileM;
      tile.rows = min(spec::kTileM, rows - tile.q_index);
      tile.q_group = found.group;
      tile.q_row = found.begin - found.group * q_rows + tile.q_index;
      tile.sequence = sequence_of(found, sequences);
      tile.q_len = tile.sequence >= 0 ? rows : 0;
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
      if (operands_.counters != nullptr && lane_index() == 0) index = gridDim.x + atomicAdd(operands_.counters, 1);
      index = uniform(index);
    }
    drew_ = true;
    return index;
  }

  const Operands& operands_;
  const Params& params_;
  const Order& order_;
  bool drew_ = false;
  int chunk_ = 0;        // first segment of the 32 that the warp looks at,
  int chunk_row_ = 0;    // where it begins, counted over all groups,
  int chunk_tiles_ = 0;  // and the tiles before it
};

// Whether one array cuts queries and keys, as in self-attention.
__device__ __forceinline__ bool cut_alike(const Operands& operands, const Params& params) {
  return spec::kPackedQ && spec::kPackedK && operands.cu_seqlens_q == operands.cu_seqlens_k &&
         opaque(params.q_groups) == params.kv_groups && opaque(params.q_rows) == params.kv_rows;
}

// The used lengths of the tile's sequence, and where its keys lie.
__device__ __forceinline__ void find_keys(Tile& tile, const Operands& operands, const Params& params) {
  const int sequence = tile.sequence;
  Keys keys{};
  if (sequence >= 0 && cut_alike(operands, params)) {
    keys = used_keys(sequence, {tile.q_group, tile.q_row - tile.q_index, tile.q_len}, operands);
  } else {
    keys = keys_of(sequence, operands, params);
  }
  __syncwarp();
  if (lane_index() == 0) {
    if (spec::kSequsedQ && sequence >= 0) tile.q_len = clamp(__ldg(operands.seqused_q + sequence), 0, tile.q_len);
    tile.keys = keys;
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
  __device__ __forceinline__ Schedule(const Operands& operands, const Params& params, const Order& order)
      : operands_(operands), params_(params), rows_(operands, params, order) {}

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
