// Main loop of a consumer warpgroup: 64 rows of Q against a range of key blocks, from the last to the first.
//
// The scores of block j are issued to the tensor cores ahead of the values of block j + 1, and the softmax of block j
// runs while those are multiplied. Warpgroups take turns to issue, so that one's softmax meets the other's products.
#pragma once

#include "clear.cuh"
#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/types.cuh"
#include "hopper/wgmma.cuh"
#include "mask.cuh"
#include "params.h"
#include "softmax.cuh"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"
#include "wgmma.h"

namespace jax_flash {

// Named barriers of a CTA; 0 is __syncthreads. Of turns and of warpgroups there is one for each consumer.
constexpr int kTurnBarrier = 1;
constexpr int kWarpgroupBarrier = kTurnBarrier + kConsumers;
constexpr int kConsumerBarrier = kWarpgroupBarrier + kConsumers;

// k steps of wgmma are 32 bytes in either type.
constexpr int kStepBytes = 32;
constexpr int kQkSteps = spec::kHeadDim * spec::Element::kBytes / kStepBytes;
constexpr int kPvSteps = spec::kTileN * spec::Element::kBytes / kStepBytes;
constexpr int kStepsPerBlock = kSwizzleBytes / kStepBytes;

// Q and K: eight rows are 1024 bytes apart. V, 16-bit: the same with keys as rows, the next columns a block further.
// V, FP8: columns are the rows, of 32 bytes, eight of them 256 bytes apart.
constexpr u32 kQkDescriptor = descriptor_high(1024, Swizzle::k128Bytes);
constexpr u32 kVDescriptor = kFp8 ? descriptor_high(256, Swizzle::k32Bytes) : descriptor_high(1024, Swizzle::k128Bytes);
constexpr int kVLeadingBytes = kFp8 ? 16 : spec::kTileN * kSwizzleBytes;
constexpr int kVStepBytes = kFp8 ? spec::kHeadDimV * kVKeyBlock : 16 * kSwizzleBytes;

// PV is multiplied in pieces of kTileV columns. Hopper's FP8 tensor cores keep about 14 bits in their accumulator, so
// an FP8 product of one block goes to a fresh accumulator and is added to the output in float32; 16-bit adds up in
// place.
constexpr int kPieces = spec::kHeadDimV / spec::kTileV;
constexpr int kPieceBytes =
    kFp8 ? spec::kTileV * kVKeyBlock : spec::kTileV / kBlockColumns * spec::kTileN * kSwizzleBytes;
static_assert(kPieces * spec::kTileV == spec::kHeadDimV && (kFp8 || kPieces == 1),
              "16-bit values are multiplied whole");

using Scores = float[spec::kTileN / 2];
using Piece = float[spec::kTileV / 2];
using Output = Piece[kPieces];

class Consumer {
 public:
  __device__ __forceinline__ Consumer(SharedStorage& shared, const Params& params, int warpgroup)
      : shared_(shared), params_(params), warpgroup_(warpgroup) {
    q_descriptor_ = descriptor_low(shared.q + warpgroup * kWarpgroupRows * kSwizzleBytes, 16);
    k_descriptor_ = descriptor_low(shared.k, 16);
    v_descriptor_ = descriptor_low(shared.v, kVLeadingBytes);
    if (kConsumers > 1 && warpgroup == 0) named_arrive(kTurnBarrier, 2 * kWarpgroupSize);
  }

  // `o` becomes the sum of P V, not yet divided by the row sums in `softmax`.
  __device__ __forceinline__ void run(const Tile& tile, const KeyRange& range, float scale, Output& o,
                                      Softmax& softmax) {
    if constexpr (spec::kSoftcap) scale_over_softcap_ = fabsf(scale) / params_.softcap;

    shared_.q_pipe.full.wait(q_ring_.phase);
    if (scale < 0.0f) negate_q();

    Scores s;
    Probabilities<spec::Element, spec::kTileN> p;
    float rescale[kRowsPerThread];

    int block = range.end - 1;
    shared_.k_pipe[k_ring_.slot].full.wait(k_ring_.phase);
    wgmma_fence();
    issue_scores(s);
    wgmma_commit();
    finish_scores<0>(s);
    probabilities<true>(s, tile, range, block, softmax, rescale);
    p.pack(s);
    clear_edge(tile, range, block);

    for (--block; block >= max(range.full_end, range.begin); --block) {
      step<true>(tile, range, block, s, p, o, softmax, rescale);
    }
    for (; block >= max(range.full_begin, range.begin); --block) {
      step<false>(tile, range, block, s, p, o, softmax, rescale);
    }
    if constexpr (spec::kWindowLeft || spec::kKeyAlignment > 1) {
      for (; block >= range.begin; --block) step<true>(tile, range, block, s, p, o, softmax, rescale);
    }
    shared_.q_pipe.release();
    q_ring_.advance();

    if (range.end - range.begin > 1) clear_edge(tile, range, range.begin);
    shared_.v_pipe[v_ring_.slot].full.wait(v_ring_.phase);
    values(p, o, rescale, [] {});
  }

 private:
  // Scores of `block`, values of the block before.
  template <bool kMasked>
  __device__ __forceinline__ void step(const Tile& tile, const KeyRange& range, int block, Scores& s,
                                       Probabilities<spec::Element, spec::kTileN>& p, Output& o, Softmax& softmax,
                                       float (&rescale)[kRowsPerThread]) {
    float next_rescale[kRowsPerThread];
    shared_.k_pipe[k_ring_.slot].full.wait(k_ring_.phase);
    if constexpr (kConsumers > 1) named_sync(kTurnBarrier + warpgroup_, 2 * kWarpgroupSize);
    wgmma_fence();
    issue_scores(s);
    wgmma_commit();
    shared_.v_pipe[v_ring_.slot].full.wait(v_ring_.phase);
    values(p, o, rescale, [&] {
      if constexpr (kConsumers > 1) named_arrive(kTurnBarrier + (warpgroup_ + 1) % kConsumers, 2 * kWarpgroupSize);
      finish_scores<1>(s);
      probabilities<kMasked>(s, tile, range, block, softmax, next_rescale);
    });
    if constexpr (!kFp8) rescale_output(o, next_rescale);
    fence_registers(s);
    p.pack(s);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) rescale[r] = next_rescale[r];
  }

  __device__ __forceinline__ void issue_scores(Scores& s) {
    const u32 k = advance(k_descriptor_, k_ring_.slot * kKBytes);
#pragma unroll
    for (int i = 0; i < kQkSteps; ++i) {
      const int block = i / kStepsPerBlock;
      const int within = i % kStepsPerBlock * kStepBytes;
      wgmma_ss<kQkDescriptor, kQkDescriptor>(s, advance(q_descriptor_, block * spec::kTileM * kSwizzleBytes + within),
                                             advance(k, block * spec::kTileN * kSwizzleBytes + within), i > 0);
    }
  }

  template <int kPending>
  __device__ __forceinline__ void finish_scores(Scores& s) {
    wgmma_wait<kPending>();
    fence_registers(s);
    shared_.k_pipe[k_ring_.slot].release();
    k_ring_.advance();
  }

  template <bool kMasked>
  __device__ __forceinline__ void probabilities(Scores& s, const Tile& tile, const KeyRange& range, int block,
                                                Softmax& softmax, float (&rescale)[kRowsPerThread]) {
    if constexpr (spec::kSoftcap) cap_scores(s, scale_over_softcap_);
    if constexpr (kMasked) mask<spec::kTileN>(s, tile, range, params_, warpgroup_, block);
    softmax.update(s, rescale);
  }

  // Adds P V to the output, runs `meanwhile` while the first piece is multiplied, and gives the buffer back.
  template <typename Meanwhile>
  __device__ __forceinline__ void values(const Probabilities<spec::Element, spec::kTileN>& p, Output& o,
                                         const float (&rescale)[kRowsPerThread], Meanwhile meanwhile) {
    const u32 v = advance(v_descriptor_, v_ring_.slot * kVBytes);
    if constexpr (kFp8) {
#pragma unroll
      for (int piece = 0; piece < kPieces; ++piece) {
        Piece product;
        wgmma_fence();
        issue_values(p, advance(v, piece * kPieceBytes), product, false);
        wgmma_commit();
        if (piece == 0) meanwhile();
        wgmma_wait<0>();
        fence_registers(product);
#pragma unroll
        for (int i = 0; i < spec::kTileV / 2; ++i) o[piece][i] = o[piece][i] * rescale[i / 2 % 2] + product[i];
      }
    } else {
      wgmma_fence();
      issue_values(p, v, o[0], true);
      wgmma_commit();
      meanwhile();
      wgmma_wait<0>();
      fence_registers(o[0]);
    }
    shared_.v_pipe[v_ring_.slot].release();
    v_ring_.advance();
  }

  __device__ __forceinline__ void issue_values(const Probabilities<spec::Element, spec::kTileN>& p, u32 v, Piece& o,
                                               bool accumulate) {
#pragma unroll
    for (int i = 0; i < kPvSteps; ++i) {
      wgmma_rs<kVDescriptor>(o, p.steps[i], advance(v, i * kVStepBytes), accumulate || i > 0);
    }
  }

  __device__ __forceinline__ void rescale_output(Output& o, const float (&rescale)[kRowsPerThread]) {
#pragma unroll
    for (int i = 0; i < spec::kTileV / 2; ++i) o[0][i] *= rescale[i / 2 % 2];
  }

  // Where rows around the used keys may hold anything: zeroes their values in the first or last block of the range.
  __device__ __forceinline__ void clear_edge(const Tile& tile, const KeyRange& range, int block) {
    if constexpr (spec::kPackedK || spec::kSequsedK) {
      const int first = range.lead - block * spec::kTileN;
      const int last = first + tile.kv_len;
      if (first <= 0 && last >= spec::kTileN) return;
      shared_.v_pipe[v_ring_.slot].full.wait(v_ring_.phase);
      clear_values(shared_.v[v_ring_.slot], first, last, warpgroup_ * kWarpgroupSize + threadIdx.x % kWarpgroupSize);
      fence_shared_for_async();
      named_sync(kConsumerBarrier, kConsumerThreads);
    }
  }

  // A negative scale would make the largest score the smallest: the scores of -Q with its absolute value are the same.
  __device__ __forceinline__ void negate_q() {
    constexpr u32 kSigns = kFp8 ? 0x80808080u : 0x80008000u;
    const int row = warpgroup_ * kWarpgroupRows + threadIdx.x % kWarpgroupSize / 2;
#pragma unroll 1
    for (int i = 0; i < kQkBlocks; ++i) {
      u32* words = reinterpret_cast<u32*>(shared_.q + (i * spec::kTileM + row) * kSwizzleBytes) + threadIdx.x % 2 * 16;
#pragma unroll 1
      for (int j = 0; j < 16; ++j) words[j] ^= kSigns;
    }
    fence_shared_for_async();
    named_sync(kWarpgroupBarrier + warpgroup_, kWarpgroupSize);
  }

  SharedStorage& shared_;
  const Params& params_;
  int warpgroup_;
  u32 q_descriptor_;
  u32 k_descriptor_;
  u32 v_descriptor_;
  Ring<1> q_ring_;
  Ring<spec::kStages> k_ring_;
  Ring<spec::kStages> v_ring_;
  float scale_over_softcap_;
};

}  // namespace jax_flash
