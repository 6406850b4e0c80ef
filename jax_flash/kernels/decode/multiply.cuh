// Multiply: some rows of Q of each tile against its blocks of keys, by one warp.
//
// Keys, and then columns of the output, are rows of the products, 16 at a time, and rows of Q their columns, eight at a
// time: for one query there are seldom more than eight heads that share keys. mma.cuh tells who has what of a product.
#pragma once

#include "decode/join.cuh"
#include "decode/storage.cuh"
#include "hopper/barrier.cuh"
#include "hopper/matrices.cuh"
#include "hopper/mma.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "operands.cuh"
#include "params.h"
#include "rows.cuh"
#include "spec.h"
#include "tile.cuh"

namespace jax_flash {

// One warp of those that multiply: kWarpRows rows of a tile, and every kKeyWarps-th block of keys.
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
      const Share share = work.share;
      const int part = i;  // by the order of keys, whichever warp has which
      for (; i < share.count; i += kKeyWarps) {
        const int block = share.block(i);
        if (block >= share.blocks.full_begin && block < share.blocks.full_end) {
          multiply<false>(work, shared_.q[works.slot], ring, block);
        } else {
          multiply<true>(work, shared_.q[works.slot], ring, block);
        }
        __syncwarp();
        shared_.empty[ring.slot].arrive_if(lane_index() < kRingLanes);
        for (int j = 0; j < kKeyWarps; ++j) ring.advance();
      }
      i -= share.count;
      store(part);
      join_parts(shared_, work, operands_, params_, grid_);
      if constexpr (!spec::kDraws) return;
      named_sync(kConsumerBarrier, kConsumerThreads);  // what warps have left is read
      work.empty.arrive();
      works.advance();
    }
  }

 private:
  using Element = spec::Element;

  static constexpr int kEights = kWarpRows / 8;              // rows of Q of this warp, by eight
  static constexpr int kKeySixteens = spec::kTileN / 16;     // keys of a block, by sixteen,
  static constexpr int kOutSixteens = spec::kHeadDimV / 16;  // and columns of the output

  static constexpr float kLag = 8.0f;  // by which a row's largest exponent may be behind

  using Scores = float[kEights][kKeySixteens][4];
  using OfRows = float[kEights][2];  // something of each row of Q that a thread has scores of

  // This lane, as addresses in a block follow from it: anew for each, where warps that gather keys take registers.
  __device__ __forceinline__ static int own_lane() {
    constexpr int kMask = kWarpSize - 1;  // after which the compiler knows the range again
    return spec::kGathers ? opaque(lane_index()) & kMask : lane_index();
  }

  // The row of Q that numbers e and 2 + e of products are of.
  __device__ __forceinline__ int row(int eight, int e) const {
    return first_row_ + 8 * eight + lane_index() % 4 * 2 + e;
  }

  __device__ __forceinline__ void begin(const Work& work) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        scale_[n][e] = work.row[row(n, e)].scale * (spec::kSoftcap ? 2.0f * kLog2E / params_.softcap : kLog2E);
        largest_[n][e] = -kInfinity;
        sum_[n][e] = 0.0f;
      }
#pragma unroll
      for (int j = 0; j < kOutSixteens; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) o_[n][j][i] = 0.0f;
      }
    }
  }

  // Leaves what came of it for join_parts.
  __device__ __forceinline__ void store(int part) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        sum_[n][e] = column_sum(sum_[n][e]);
        if (lane_index() < 4) {
          shared_.largest[part][row(n, e)] = largest_[n][e];
          shared_.sum[part][row(n, e)] = sum_[n][e];
        }
        float* out = shared_.out[part][row(n, e)];
#pragma unroll
        for (int j = 0; j < kOutSixteens; ++j) {
          const float x = o_[n][j][e];
          const float y = o_[n][j][2 + e];
          if constexpr (spec::kWidens) {
            *reinterpret_cast<float2*>(out + 16 * j + lane_index() / 4 * 2) = float2{x, y};
          } else {
            out[16 * j + lane_index() / 4] = x;
            out[16 * j + lane_index() / 4 + 8] = y;
          }
        }
      }
    }
  }

  // A block of keys; at an edge some of its keys are not seen, and some of its rows may hold anything.
  template <bool kEdge>
  __device__ __forceinline__ void multiply(const Work& work, const u8 (&q)[spec::kTileM][kQStride],
                                           const Ring<spec::kStages>& ring, int block) {
    Scores s;
    shared_.full_k[ring.slot].wait(ring.phase);
    scores(s, q, shared_.k[ring.slot]);
    if constexpr (kEdge) mask(s, work, block * spec::kTileN);
    exponentiate(s);
    const Tile& tile = work.rows.tile;
    shared_.full_v[ring.slot].wait(ring.phase);
    values<kEdge>(s, shared_.v[ring.slot], first_used_in(tile, block), last_used_in(tile, block));
  }

  // The exponents of 2 that K Q^T makes. Where few products are independent there are two chains of them to a score, of
  // every other 16 columns.
  __device__ __forceinline__ void scores(Scores& s, const u8 (&q)[spec::kTileM][kQStride], const u8* k) const {
    const int lane = own_lane();
    constexpr int kChains = kEights * kKeySixteens < 8 ? 2 : 1;
    Scores chains[kChains]{};
#pragma unroll
    for (int column = 0; column < spec::kHeadDim; column += 32) {
      u32 b[kEights][4];
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
        load_matrices(b[n], q[first_row_ + 8 * n + lane % 8] + (column / 8 + lane / 8) * 16);
      }
#pragma unroll
      for (int i = 0; i < kKeySixteens; ++i) {
        const u8* keys = k + 16 * i * kSwizzleBytes;
        u32 a[2][4];
        if constexpr (spec::kWidens) {
          u32 x[4];
          load_matrices(x, keys + vector_offset(lane % 16, column / 16 + lane / 16));
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const Wide wide = widen(x[j]);
            a[j / 2][j % 2] = wide.low;
            a[j / 2][2 + j % 2] = wide.high;
          }
        } else {
          load_matrices(a[0], keys + vector_offset(lane % 16, column / 8 + lane / 16));
          load_matrices(a[1], keys + vector_offset(lane % 16, column / 8 + 2 + lane / 16));
        }
#pragma unroll
        for (int n = 0; n < kEights; ++n) {
          mma<Element>(chains[0][n][i], a[0], b[n][0], b[n][1]);
          mma<Element>(chains[kChains - 1][n][i], a[1], b[n][2], b[n][3]);
        }
      }
    }
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int i = 0; i < kKeySixteens; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          float& x = s[n][i][j] = chains[0][n][i][j];
          if constexpr (kChains > 1) x += chains[1][n][i][j];
          x *= scale_[n][j % 2];
          if constexpr (spec::kSoftcap) x = params_.softcap * kLog2E * tanh_of_exponent(x);
        }
      }
    }
  }

  // Scores of keys that a row does not see become -inf.
  __device__ __forceinline__ void mask(Scores& s, const Work& work, int first) const {
    const int own = first + lane_index() / 4;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const Row& known = work.row[row(n, e)];
        const int first_seen = known.first_key - own;
        const int last_seen = known.last_key - own;
#pragma unroll
        for (int key = 0; key < spec::kTileN; key += 8) {
          float& x = s[n][key / 16][key / 8 % 2 * 2 + e];
          x = (key >= first_seen) & (key < last_seen) ? x : -kInfinity;  // no branch
        }
      }
    }
  }

  // Turns exponents of 2 into powers, relative to a maximum that may lag behind by a factor of 2^8.
  __device__ __forceinline__ void exponentiate(Scores& s) {
    OfRows largest;
    bool grown = false;
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        largest[n][e] = s[n][0][e];
#pragma unroll
        for (int i = 0; i < kKeySixteens; ++i) {
          largest[n][e] = fmaxf(fmaxf(largest[n][e], s[n][i][e]), s[n][i][2 + e]);
        }
        grown = grown || largest[n][e] - largest_[n][e] > kLag;
      }
    }
    if (__any_sync(kAllLanes, grown)) grow(largest);
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float shift = largest_[n][e] == -kInfinity ? 0.0f : largest_[n][e];
#pragma unroll
        for (int i = 0; i < kKeySixteens; ++i) {
          s[n][i][e] = exp2_approx(s[n][i][e] - shift);
          s[n][i][2 + e] = exp2_approx(s[n][i][2 + e] - shift);
          sum_[n][e] += s[n][i][e] + s[n][i][2 + e];
        }
      }
    }
  }

  // Takes the largest of a block, of those that a thread has, for the maximum of the rows where it is far behind.
  __device__ __forceinline__ void grow(const OfRows& largest) {
#pragma unroll
    for (int n = 0; n < kEights; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float x = column_max(largest[n][e]);
        const bool grown = x - largest_[n][e] > kLag;
        const float rescale = grown ? exp2_approx(largest_[n][e] - x) : 1.0f;
        largest_[n][e] = grown ? x : largest_[n][e];
        sum_[n][e] *= rescale;
#pragma unroll
        for (int j = 0; j < kOutSixteens; ++j) {
          o_[n][j][e] *= rescale;
          o_[n][j][2 + e] *= rescale;
        }
      }
    }
  }

  // O^T += V^T P^T, of the keys of the block from `first` to `last`; others may hold anything.
  template <bool kEdge>
  __device__ __forceinline__ void values(const Scores& s, const u8* v, int first, int last) {
    const int lane = own_lane();
#pragma unroll
    for (int i = 0; i < kKeySixteens; ++i) {
      const u8* keys = v + 16 * i * kSwizzleBytes;
      u32 p[kEights][2];
#pragma unroll
      for (int n = 0; n < kEights; ++n) {
#pragma unroll
        for (int r = 0; r < 2; ++r) p[n][r] = transposed(pack2<Element>(s[n][i][2 * r], s[n][i][2 * r + 1]));
      }
      u32 used[2] = {~0u, ~0u};
      if constexpr (kEdge) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int key = 16 * i + 8 * half + lane % 4 * 2;
          used[half] = (key >= first && key < last ? 0xffffu : 0) | (key + 1 >= first && key + 1 < last ? ~0xffffu : 0);
        }
      }
      constexpr int kVectorSixteens = spec::kWidens ? 2 : 1;  // that two vectors of 16 bytes of each key make
#pragma unroll
      for (int j = 0; j < kOutSixteens; j += kVectorSixteens) {
        u32 x[4];  // words of two vectors of the first eight keys, and of the others
        load_matrices_transposed(
            x, keys + vector_offset(lane / 16 * 8 + lane % 8, 2 * j / kVectorSixteens + lane / 8 % 2));
#pragma unroll
        for (int word = 0; word < 4; ++word) x[word] &= used[word / 2];
        if constexpr (spec::kWidens) {
#pragma unroll
          for (int vector = 0; vector < 2; ++vector) {
            // Bytes of columns 2c and 2c + 1 of two keys: the pairs of keys of each column.
            const Wide lower = widen(pick_bytes(x[vector], 0, 0x3120));
            const Wide upper = widen(pick_bytes(x[2 + vector], 0, 0x3120));
            const u32 a[4] = {lower.low, lower.high, upper.low, upper.high};
#pragma unroll
            for (int n = 0; n < kEights; ++n) mma<Element>(o_[n][j + vector], a, p[n][0], p[n][1]);
          }
        } else {
#pragma unroll
          for (int n = 0; n < kEights; ++n) mma<Element>(o_[n][j], x, p[n][0], p[n][1]);
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
  OfRows scale_;  // by which a score becomes an exponent of 2, or the argument of exp2 in tanh
  OfRows largest_;
  OfRows sum_;  // of the thread's keys
  float o_[kEights][kOutSixteens][4];
};

}  // namespace jax_flash
