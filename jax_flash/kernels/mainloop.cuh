// Main loop of a consumer warpgroup: 64 rows of Q of each tile against the tile's range of key blocks, from the last to
// the first, tile after tile without a break.
//
// The scores of one block are issued to the tensor cores ahead of the values of the block before, and the softmax of
// the one runs while the other is multiplied; the two may belong to different tiles. Warpgroups take turns to issue, so
// that one's softmax, and its stores at the end of a tile, meet the other's products.
#pragma once

#include "epilogue.cuh"
#include "fragment.cuh"
#include "hopper/barrier.cuh"
#include "hopper/types.cuh"
#include "hopper/warp.cuh"
#include "hopper/wgmma.cuh"
#include "mask.cuh"
#include "operands.cuh"
#include "params.h"
#include "softmax.cuh"
#include "spec.h"
#include "storage.cuh"
#include "total.cuh"
#include "wgmma.h"

namespace jax_flash {

// Named barriers of a CTA, of either kind one for each consumer; 0 is __syncthreads.
constexpr int kTurnBarrier = 1;
constexpr int kWarpgroupBarrier = kTurnBarrier + kConsumers;

// k steps of wgmma are 32 bytes in either type.
constexpr int kStepBytes = 32;
constexpr int kQkSteps = spec::kHeadDim * spec::Element::kBytes / kStepBytes;
constexpr int kPvSteps = spec::kTileN * spec::Element::kBytes / kStepBytes;
constexpr int kStepsPerBlock = kSwizzleBytes / kStepBytes;

// Q and K: eight rows are 1024 bytes apart. V, 16-bit: the same with keys as rows, the next columns a block further.
// V, FP8: columns are the rows, of a byte for each key of a box.
constexpr u32 kQkDescriptor = descriptor_high(1024, Swizzle::k128Bytes);
constexpr u32 kVDescriptor = kFp8 ? descriptor_high(8 * spec::kVBoxKeys, swizzle_of(spec::kVBoxKeys))
                                  : descriptor_high(1024, Swizzle::k128Bytes);
constexpr int kVLeadingBytes = kFp8 ? 16 : spec::kTileN * kSwizzleBytes;

// Where the keys of a k step begin in V.
__device__ constexpr int v_step_bytes(int i) {
  if (!kFp8) return i * 16 * kSwizzleBytes;
  const int key = i * kStepBytes;
  return key / spec::kVBoxKeys * (spec::kVBoxKeys * spec::kHeadDimV) + key % spec::kVBoxKeys;
}

static_assert(spec::kKStages >= 2, "a consumer holds one block while it waits for the next");

class Consumer {
 public:
  __device__ __forceinline__ Consumer(SharedStorage& shared, const Operands& operands, const TensorMaps& maps,
                                      const Params& params, int warpgroup)
      : shared_(shared),
        operands_(operands),
        maps_(maps),
        params_(params),
        warpgroup_(warpgroup),
        total_(shared.out[warp_index() - kWarpgroupSize / kWarpSize].total) {
    q_descriptor_ = descriptor_low(shared.q[0][warpgroup], 16);
    k_descriptor_ = descriptor_low(shared.k, 16);
    v_descriptor_ = descriptor_low(shared.v, kVLeadingBytes);
    if (spec::kPingPong && warpgroup == 0) named_arrive(kTurnBarrier, 2 * kWarpgroupSize);
  }

  // Works until the producer hands over no more tiles.
  __device__ __forceinline__ void run() {
    Scores s;
    Probabilities<spec::Element, spec::kTileN> p;
    Output o;
    float rescale[kRowsPerThread];
    bool more = take();
    while (more) {
      if (block_ < begin_) {
        release_q();
        skip(work_->blocks.end - work_->blocks.begin);
        store_blind();
        work_->release();
        more = take();
        continue;
      }
      skip(leading_);
      Softmax softmax(scale_, params_);
      begin_scores(s);
      end_turn();
      finish_scores<0>(s);
      probabilities<true, false, spec::kOverlap>(s, softmax, rescale, [] {});
      begin_output(rescale);
      p.pack(s);

      while (true) {
        other_blocks(s, p, o, softmax, rescale);
        Work& work = *work_;
        float factor[kRowsPerThread], lse[kRowsPerThread];
        softmax.finish(work.sink, factor, lse);
        const int trailing = spec::kWindowLeft ? begin_ - work.blocks.begin : 0;
        // Blocks skipped ahead of the next tile's Q hold both buffers of K while this tile's last values are
        // unmultiplied and turns are owed: one may, two may not.
        more = take(trailing <= 1);
        const int skipped = trailing + leading_;
        const bool joined = more && block_ >= begin_ && skipped <= 1;
        if (!joined) {
          shared_.v_pipe[v_ring_.slot].full.wait(v_ring_.phase);
          begin_values(p, o, rescale);
          finish_values(o);
          skip(trailing);
          if (more && trailing > 1) wait_q();
          store(work, factor, lse, o);
          break;
        }
        softmax = Softmax(scale_, params_);
        if (skipped > 0) skip_keys();
        step<true>(s, p, o, softmax, rescale);
        if (skipped > 0) skip_values();
        store(work, factor, lse, o);
        begin_output(rescale);
      }
    }
    if (lane_index() == 0) tma_wait_read();  // shared memory ends with the CTA
  }

 private:
  // Waits for the next tile, and for its Q if that can come already; false when there is none.
  __device__ __forceinline__ bool take(bool q_can_come = true) {
    work_ = &shared_.work[work_ring_.slot];
    work_->pipe.full.wait(work_ring_.phase);
    work_ring_.advance();
    const Blocks blocks = work_->of_warpgroup[warpgroup_];  // all loads at once
    const int end = work_->blocks.end;
    const int rows = work_->tile.rows;
    scale_ = work_->scale;
    begin_ = uniform(blocks.begin);
    block_ = uniform(blocks.end) - 1;
    leading_ = uniform(end) - 1 - block_;
    if constexpr (kLeftEdge) full_begin_ = uniform(blocks.full_begin);
    full_end_ = uniform(blocks.full_end);
    if (uniform(rows) == 0) return false;
    if (q_can_come) wait_q();
    return true;
  }

  __device__ __forceinline__ void wait_q() {
    shared_.q_pipe[q_ring_.slot][warpgroup_].full.wait(q_ring_.phase);
    if constexpr (spec::kConvertsQ) rewrite_q(float16_of_bfloat16);
    if (scale_ < 0.0f) {
      // The largest score would be the smallest: those of -Q with its absolute value are the same.
      rewrite_q([](u32 word) { return word ^ (kFp8 ? 0x80808080u : 0x80008000u); });
    }
  }

  __device__ __forceinline__ void release_q() {
    shared_.q_pipe[q_ring_.slot][warpgroup_].release();
    q_ring_.advance();
  }

  // The blocks of a tile that are left, down to the first one in memory.
  __device__ __forceinline__ void other_blocks(Scores& s, Probabilities<spec::Element, spec::kTileN>& p, Output& o,
                                               Softmax& softmax, float (&rescale)[kRowsPerThread]) {
    const int last = kLeftEdge ? max(full_begin_, begin_) : begin_;
    while (block_ > last && (block_ > full_end_ || (spec::kIntegerMax && !all_positive(softmax)))) {
      --block_;
      step<true>(s, p, o, softmax, rescale);
      deposit_if_full(o);
    }
    if constexpr (spec::kDeposits) {
      while (block_ > last) {
        // The last blocks of a tile are one more at most.
        const int next = block_ - total_.room() + 1;
        whole_blocks(next > last + 1 ? next : last, s, p, o, softmax, rescale);
        if (block_ > last) {
          total_.open();
          --block_;
          step<false, spec::kIntegerMax, true>(s, p, o, softmax, rescale);
        }
      }
    } else {
      whole_blocks(last, s, p, o, softmax, rescale);
    }
    if constexpr (kLeftEdge) {
      while (block_ > begin_) {
        --block_;
        step<true>(s, p, o, softmax, rescale);
        deposit_if_full(o);
      }
    }
  }

  // Blocks that every row sees whole, down to one.
  __device__ __forceinline__ void whole_blocks(int last, Scores& s, Probabilities<spec::Element, spec::kTileN>& p,
                                               Output& o, Softmax& softmax, float (&rescale)[kRowsPerThread]) {
    while (block_ > last) {
      --block_;
      step<false, spec::kIntegerMax>(s, p, o, softmax, rescale);
    }
  }

  __device__ __forceinline__ void deposit_if_full(Output& o) {
    if (!spec::kDeposits || total_.room() > 0) return;
    total_.open();
    total_.deposit(o);
  }

  // Scores of a block, and values of the block before.
  template <bool kMasked, bool kPositive = false, bool kDeposits = false>
  __device__ __forceinline__ void step(Scores& s, Probabilities<spec::Element, spec::kTileN>& p, Output& o,
                                       Softmax& softmax, float (&rescale)[kRowsPerThread]) {
    float next_rescale[kRowsPerThread];
    begin_scores(s);
    shared_.v_pipe[v_ring_.slot].full.wait(v_ring_.phase);
    begin_values(p, o, rescale);
    end_turn();
    finish_scores<1>(s);
    if constexpr (kDeposits) {  // beside the exponentials, which wait for the values too
      probabilities<kMasked, kPositive, 0>(s, softmax, next_rescale, [&] {
        finish_values(o);
        fence_registers(s);
        total_.deposit(o);
      });
    } else {
      probabilities<kMasked, kPositive, spec::kOverlap>(s, softmax, next_rescale, [] {});
      finish_values(o);
    }
    fence_registers(s);
    p.pack(s);
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) rescale[r] = next_rescale[r];
  }

  // Whether it holds of the whole warpgroup, for all its warps must take the same way to wgmma.
  __device__ __forceinline__ bool all_positive(const Softmax& softmax) const {
    return uniform(named_all(kWarpgroupBarrier + warpgroup_, kWarpgroupSize, softmax.positive())) != 0;
  }

  // Every block takes one turn of each warpgroup, to be multiplied or to be skipped.
  __device__ __forceinline__ void begin_turn() {
    if constexpr (spec::kPingPong) named_sync(kTurnBarrier + warpgroup_, 2 * kWarpgroupSize);
  }

  __device__ __forceinline__ void end_turn() {
    if constexpr (spec::kPingPong) named_arrive(kTurnBarrier + (warpgroup_ + 1) % kConsumers, 2 * kWarpgroupSize);
  }

  // Blocks that only other warpgroups' rows see.
  __device__ __forceinline__ void skip(int count) {
#pragma unroll 1
    for (; count > 0; --count) {
      skip_keys();
      skip_values();
    }
  }

  __device__ __forceinline__ void skip_keys() {
    shared_.k_pipe[k_ring_.slot].full.wait(k_ring_.phase);
    begin_turn();
    end_turn();
    shared_.k_pipe[k_ring_.slot].release();
    k_ring_.advance();
  }

  __device__ __forceinline__ void skip_values() {
    shared_.v_pipe[v_ring_.slot].full.wait(v_ring_.phase);
    shared_.v_pipe[v_ring_.slot].release();
    v_ring_.advance();
  }

  __device__ __forceinline__ void begin_scores(Scores& s) {
    shared_.k_pipe[k_ring_.slot].full.wait(k_ring_.phase);
    begin_turn();
    wgmma_fence();
    issue_scores(s);
    wgmma_commit();
  }

  __device__ __forceinline__ void issue_scores(Scores& s) {
    const u32 q = advance(q_descriptor_, q_ring_.slot * static_cast<int>(sizeof(shared_.q[0])));
    const u32 k = advance(k_descriptor_, k_ring_.slot * kKBytes);
#pragma unroll
    for (int i = 0; i < kQkSteps; ++i) {
      const int block = i / kStepsPerBlock;
      const int within = i % kStepsPerBlock * kStepBytes;
      wgmma_ss<kQkDescriptor, kQkDescriptor>(s, advance(q, block * kWarpgroupRows * kSwizzleBytes + within),
                                             advance(k, block * spec::kTileN * kSwizzleBytes + within), i > 0);
    }
  }

  template <int kPending>
  __device__ __forceinline__ void finish_scores(Scores& s) {
    wgmma_wait<kPending>();
    fence_registers(s);
    shared_.k_pipe[k_ring_.slot].release();
    k_ring_.advance();
    if (block_ == begin_) release_q();
  }

  template <bool kMasked, bool kPositive, int kOverlap, typename Between>
  __device__ __forceinline__ void probabilities(Scores& s, Softmax& softmax, float (&rescale)[kRowsPerThread],
                                                Between between) {
    auto mask_scores = [&] {
      if (kMasked && ((kLeftEdge && block_ < full_begin_) || block_ >= full_end_)) {
        mask<spec::kTileN>(s, work_->tile, params_, first_row(), block_);
      }
    };
    softmax.template update<kPositive, kOverlap>(s, rescale, mask_scores, between);
  }

  // O = O * rescale + P V.
  __device__ __forceinline__ void begin_values(const Probabilities<spec::Element, spec::kTileN>& p, Output& o,
                                               const float (&rescale)[kRowsPerThread]) {
    if (__any_sync(kAllLanes, rescale[0] != 1.0f || rescale[1] != 1.0f)) {
#pragma unroll
      for (int i = 0; i < spec::kHeadDimV / 2; ++i) o[i] *= rescale[i / 2 % 2];
      if constexpr (spec::kDeposits) total_.rescale(rescale);
    }
    wgmma_fence();
    issue_values(p, advance(v_descriptor_, v_ring_.slot * kVBytes), o, !replaces_);
    wgmma_commit();
  }

  __device__ __forceinline__ void finish_values(Output& o) {
    wgmma_wait<0>();
    fence_registers(o);
    replaces_ = false;
    if constexpr (spec::kDeposits) total_.count();
    shared_.v_pipe[v_ring_.slot].release();
    v_ring_.advance();
  }

  __device__ __forceinline__ void issue_values(const Probabilities<spec::Element, spec::kTileN>& p, u32 v, Output& o,
                                               bool accumulate) {
#pragma unroll
    for (int i = 0; i < kPvSteps; ++i) {
      wgmma_rs<kVDescriptor>(o, p.steps[i], advance(v, v_step_bytes(i)), accumulate || i > 0);
    }
  }

  // Before a tile's first values, which replace what the output holds.
  __device__ __forceinline__ void begin_output(float (&rescale)[kRowsPerThread]) {
    replaces_ = true;
    if constexpr (spec::kDeposits) total_.begin();
#pragma unroll
    for (int r = 0; r < kRowsPerThread; ++r) rescale[r] = 1.0f;
  }

  // The first row of a tile that is this warpgroup's.
  __device__ __forceinline__ int first_row() const { return warpgroup_ * kWarpgroupRows; }

  // Its number among the warps of this warpgroup.
  __device__ __forceinline__ int warp() const { return threadIdx.x % kWarpgroupSize / kWarpSize; }

  // Ends a tile: stores its rows.
  __device__ __forceinline__ void store(Work& work, float (&factor)[kRowsPerThread], float (&lse)[kRowsPerThread],
                                        Output& o) {
    if constexpr (spec::kDeposits) total_.withdraw(o);
    store_rows(work, params_, operands_, maps_, first_row() + warp() * kWarpRows, factor, lse, o,
               shared_.out[warpgroup_ * (kWarpgroupSize / kWarpSize) + warp()].buffers);
    work.release();
  }

  // This warpgroup's rows of a tile of which they see nothing.
  __device__ __forceinline__ void store_blind() {
    store_blind_rows(*work_, params_, operands_, first_row() + warp() * kWarpRows, kWarpRows);
  }

  // Changes each word of this warpgroup's Q in shared memory.
  template <typename Change>
  __device__ __forceinline__ void rewrite_q(Change change) {
    uint4* vectors = reinterpret_cast<uint4*>(shared_.q[q_ring_.slot][warpgroup_]);
#pragma unroll 1
    for (int i = threadIdx.x % kWarpgroupSize; i < kQBytes / 16; i += kWarpgroupSize) {
      const uint4 x = vectors[i];
      vectors[i] = uint4{change(x.x), change(x.y), change(x.z), change(x.w)};
    }
    fence_shared_for_async();
    named_sync(kWarpgroupBarrier + warpgroup_, kWarpgroupSize);
  }

  SharedStorage& shared_;
  const Operands& operands_;
  const TensorMaps& maps_;
  const Params& params_;
  int warpgroup_;
  u32 q_descriptor_;
  u32 k_descriptor_;
  u32 v_descriptor_;
  Ring<spec::kQStages> q_ring_;
  Ring<kWorkSlots> work_ring_;
  Ring<spec::kKStages> k_ring_;
  Ring<spec::kVStages> v_ring_;
  // Whether blocks begin with keys that some row does not see.
  static constexpr bool kLeftEdge = spec::kWindowLeft || spec::kKeyAlignment > 1;

  Total total_;
  bool replaces_;  // whether the values to come replace what the output holds

  Work* work_;                 // the tile of the scores,
  float scale_;                // its softmax scale,
  int leading_;                // its blocks that come before this warpgroup's first,
  int block_;                  // their block in it,
  int begin_;                  // the last to come that this warpgroup's rows see; of those it sees,
  int full_begin_, full_end_;  // the ones that every row sees whole
};

}  // namespace jax_flash
