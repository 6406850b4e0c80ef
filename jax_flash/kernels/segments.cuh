// Segments: packed queries as cu_seqlens cuts them. A group of n sequences is n + 2 segments of rows: before the first
// one, the sequences, after the last.
#pragma once

#include "hopper/warp.cuh"
#include "keys.cuh"
#include "operands.cuh"

namespace jax_flash {

struct Segment {
  int group;
  int number;      // in its group
  int begin, end;  // rows, counted over all groups
};

// The lane's of 32 segments that follow each other, of which `index` is its own and the first begins at `row`. Past the
// last one they are empty. All lanes take part.
__device__ __forceinline__ Segment segment_of_lane(int index, int row, const Operands& operands, int q_groups,
                                                   int q_rows, int sequences) {
  index = min(index, q_groups * (sequences + 2) - 1);
  Segment segment;
  segment.group = index / (sequences + 2);
  segment.number = index - segment.group * (sequences + 2);
  segment.end = q_rows;
  if (segment.number <= sequences) {
    const int* cu_seqlens = operands.cu_seqlens_q + static_cast<i64>(segment.group) * (sequences + 1);
    segment.end = clamp(__ldg(cu_seqlens + segment.number), 0, q_rows);
  }
  segment.end = max(warp_scan_max(segment.group * q_rows + segment.end), row);
  segment.begin = __shfl_up_sync(kAllLanes, segment.end, 1);
  if (lane_index() == 0) segment.begin = row;
  return segment;
}

// That of another lane. All lanes take part.
__device__ __forceinline__ Segment shared_by(int lane, const Segment& segment) {
  return {__shfl_sync(kAllLanes, segment.group, lane), __shfl_sync(kAllLanes, segment.number, lane),
          __shfl_sync(kAllLanes, segment.begin, lane), __shfl_sync(kAllLanes, segment.end, lane)};
}

// The sequence that a segment is, or -1.
__device__ __forceinline__ int sequence_of(const Segment& segment, int sequences) {
  const bool inside = segment.number >= 1 && segment.number <= sequences;
  return inside ? segment.group * sequences + segment.number - 1 : -1;
}

}  // namespace jax_flash
