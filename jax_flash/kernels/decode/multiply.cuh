// Multiply: 16 rows of Q of each tile against its blocks of keys, by one warp.
#pragma once

#include "decode/join.cuh"
#include "decode/storage.cuh"
#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/mma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "mask.cuh"
#include "operands.cuh"
#include "params.h"
#include "rows.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// One warp of those that multiply: 16 rows of a tile, and every kKeyWarps-th block of keys.
class Consumer {
 public:
  __device__ __forceinline__ Consumer(SharedStorage& shared, const Operands& operands, const Params& params,
                                      const Grid& grid)
      : shared_(shared), operands_(operands), params_(params), grid_(grid) {
    first_row_ = warp_index() % kRowWarps * kWarpRows;
    key_warp_ = warp_index() / kRowWarps;
  }

  __device__ __forceinline__ void run() {
    Ring<kWorkSlots> works;
    Ring<spec::kStages> ring;
    for (int i = 0; i < key_warp_; ++i) ring.advance();
    int i = key_warp_;  // the next block of the tile that is this warp's
    while (true) {
      Work& work = shared_.work[works.slot];
      work.full.wait(works.phase);
      if (work.rows.count == 0) return;
      begin(work);
      const int part = i;  // by the order of keys, whichever warp has which
      for (; i < work.share.count; i += kKeyWarps) {
        const int block = work.share.block(i);
        shared_.full[ring.slot].wait(ring.phase);
        if (block >= work.share.blocks.full_begin && block < work.share.blocks.full_end) {
          multiply<false>(work.rows, shared_.q[works.slot], ring.slot, block);
        } else {
          multiply<true>(work.rows, shared_.q[works.slot], ring.slot, block);
        }
        __syncwarp();
        shared_.empty[ring.slot].arrive_if(lane_index() == 0);
        for (int j = 0; j < kKeyWarps; ++j) ring.advance();
      }
      i -= work.share.count;
      store(work.rows, part);
      join_parts(shared_, work, operands_, params_, grid_);
      work.empty.arrive();
      works.advance();
    }
  }

 private:
  using Element = spec::Element;

  __device__ __forceinline__ void begin(const Work& work) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int row = min(first_row_ + lane_index() / 4 + 8 * r, work.rows.count - 1);
      scale_[r] = work.scale[row] * (spec::kSoftcap ? 2.0f * kLog2E / params_.softcap : kLog2E);
      query_[r] = work.rows.query(row);
      largest_[r] = -kInfinity;
      sum_[r] = 0.0f;
    }
#pragma unroll
    for (int i = 0; i < spec::kHeadDimV / 2; ++i) o_[i] = 0.0f;
  }

  // Leaves what came of it for join_parts.
  __device__ __forceinline__ void store(const Rows& rows, int part) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      const int row = first_row_ + lane_index() / 4 + 8 * r;
      const float sum = quad_sum(sum_[r]);
      if (row >= rows.count) continue;
      if (lane_index() % 4 == 0) {
        shared_.largest[part][row] = largest_[r];
        shared_.sum[part][row] = sum;
      }
      float* out = shared_.out[part][row];
      if constexpr (spec::kWidens) {
#pragma unroll
        for (int j = 0; j < spec::kHeadDimV / 16; ++j) {
          const float* d = o_ + 8 * j + 2 * r;
          *reinterpret_cast<float4*>(out + 16 * j + lane_index() % 4 * 4) = float4{d[0], d[4], d[1], d[5]};
        }
      } else {
#pragma unroll
        for (int j = 0; j < spec::kHeadDimV / 8; ++j) {
          const float* d = o_ + 4 * j + 2 * r;
          *reinterpret_cast<float2*>(out + fragment_column(j)) = float2{d[0], d[1]};
        }
      }
    }
  }

  // A tile; at an edge some of its keys are not seen, and some of its rows may hold anything.
  template <bool kEdge>
  __device__ __forceinline__ void multiply(const Rows& rows, const u8 (&q)[spec::kTileM][kQStride], int slot,
                                           int block) {
    float s[spec::kTileN / 2];
#pragma unroll
    for (int i = 0; i < spec::kTileN / 2; ++i) s[i] = 0.0f;
    scores(s, q, shared_.k[slot]);
#pragma unroll
    for (int i = 0; i < spec::kTileN / 2; ++i) {
      s[i] *= scale_[i / 2 % 2];
      if constexpr (spec::kSoftcap) {
        s[i] = params_.softcap * kLog2E * (1.0f - 2.0f * reciprocal_approx(1.0f + exp2_approx(s[i])));
      }
    }
    const int first_key = block * spec::kTileN;
    if constexpr (kEdge) {
#pragma unroll
      for (int r = 0; r < kRowsPerThread; ++r) {
        mask_row<spec::kTileN>(s, r, jax_flash::first_key(rows.tile, params_, query_[r]) - first_key,
                               last_key(rows.tile, params_, query_[r]) - first_key);
      }
    }
    float rescale[kRowsPerThread];
    exponentiate(s, rescale);
    if (!__all_sync(kAllLanes, rescale[0] == 1.0f && rescale[1] == 1.0f)) {
#pragma unroll
      for (int i = 0; i < spec::kHeadDimV / 2; ++i) o_[i] *= rescale[i / 2 % 2];
    }
    Probabilities<Element, spec::kTileN> p;
    p.pack(s);
    values<kEdge>(p, shared_.v[slot], first_used_in(rows.tile, block), last_used_in(rows.tile, block));
  }

  // Where 16 bytes of a row of a tile lie.
  __device__ __forceinline__ static const u8* vector_of(const u8* tile, int row, int vector) {
    return tile + vector / 8 * kBlockBytes + row * kSwizzleBytes + (vector % 8 ^ row % 8) * 16;
  }

  // s += Q K^T
  __device__ __forceinline__ void scores(float (&s)[spec::kTileN / 2], const u8 (&q)[spec::kTileM][kQStride],
                                         const u8* k) const {
    const int lane = lane_index();
    const u8* row = q[first_row_ + lane % 16] + lane / 16 * 16;
    constexpr int kSteps = spec::kWidens ? 2 : 1;  // that 32 bytes of a row of K make
#pragma unroll
    for (int i = 0; i < spec::kHeadDim / 16; i += kSteps) {
      u32 a[kSteps][4];
#pragma unroll
      for (int step = 0; step < kSteps; ++step) load_matrices(a[step], row + (i + step) * 32);
#pragma unroll
      for (int key = 0; key < spec::kTileN; key += 16) {
        u32 b[4];
        load_matrices(b, vector_of(k, key + lane / 16 * 8 + lane % 8, 2 * i / kSteps + lane / 8 % 2));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float* d = s + (key / 8 + half) * 4;
          if constexpr (spec::kWidens) {
#pragma unroll
            for (int step = 0; step < 2; ++step) {
              const u32 word = b[2 * half + step];
              mma<Element>(d, a[step], widen2(word), widen2(word >> 16));
            }
          } else {
            mma<Element>(d, a[0], b[2 * half], b[2 * half + 1]);
          }
        }
      }
    }
  }

  // Turns exponents of 2 into powers, relative to a maximum that may lag behind by a factor of 2^8.
  __device__ __forceinline__ void exponentiate(float (&s)[spec::kTileN / 2], float (&rescale)[kRowsPerThread]) {
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) {
      float largest = s[2 * r];
#pragma unroll
      for (int i = 2 * r; i < spec::kTileN / 2; i += 4) largest = fmaxf(fmaxf(largest, s[i]), s[i + 1]);
      largest = quad_max(largest);
      const bool grown = largest - largest_[r] > 8.0f;
      rescale[r] = grown ? exp2_approx(largest_[r] - largest) : 1.0f;
      largest_[r] = grown ? largest : largest_[r];
      const float shift = largest_[r] == -kInfinity ? 0.0f : largest_[r];
      sum_[r] *= rescale[r];
#pragma unroll
      for (int i = 2 * r; i < spec::kTileN / 2; i += 4) {
        s[i] = exp2_approx(s[i] - shift);
        s[i + 1] = exp2_approx(s[i + 1] - shift);
        sum_[r] += s[i] + s[i + 1];
      }
    }
  }

  // O += P V, of the keys of the tile from `first` to `last`; others may hold anything.
  template <bool kEdge>
  __device__ __forceinline__ void values(const Probabilities<Element, spec::kTileN>& p, const u8* v, int first,
                                         int last) {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < spec::kTileN / 16; ++i) {
      u32 used[2] = {~0u, ~0u};
      if constexpr (kEdge) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = 16 * i + 8 * half + lane % 4 * 2;
          used[half] = (key >= first && key < last ? 0xffffu : 0) | (key + 1 >= first && key + 1 < last ? ~0xffffu : 0);
        }
      }
#pragma unroll
      for (int j = 0; j < spec::kHeadDimV * kKvBytes / 16; j += 2) {
        u32 b[4];
        load_matrices_transposed(b, vector_of(v, 16 * i + lane % 16, j + lane / 16));
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          u32 b0 = b[2 * half] & used[0];
          u32 b1 = b[2 * half + 1] & used[1];
          if constexpr (spec::kWidens) {
            // Bytes of columns 2c and 2c + 1 of two keys: the pairs of keys of each column.
            float* d = o_ + (j + half) * 8;
            b0 = pick_bytes(b0, b0, 0x3120);
            b1 = pick_bytes(b1, b1, 0x3120);
            mma<Element>(d, p.steps[i], widen2(b0), widen2(b1));
            mma<Element>(d + 4, p.steps[i], widen2(b0 >> 16), widen2(b1 >> 16));
          } else {
            mma<Element>(o_ + (j + half) * 4, p.steps[i], b0, b1);
          }
        }
      }
    }
  }

  SharedStorage& shared_;
  const Operands& operands_;
  const Params& params_;
  const Grid& grid_;
  int first_row_;
  int key_warp_;
  float scale_[kRowsPerThread];  // by which a score becomes an exponent of 2, or the argument of exp2 in tanh
  int query_[kRowsPerThread];
  float largest_[kRowsPerThread];
  float sum_[kRowsPerThread];
  float o_[spec::kHeadDimV / 2];
};

}  // namespace jax_flash
