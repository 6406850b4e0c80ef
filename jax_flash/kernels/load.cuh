// Load: fills the tiles of Q, K and V.
#pragma once

#include "hopper/barrier.cuh"
#include "hopper/tma.cuh"
#include "operands.cuh"
#include "params.h"
#include "spec.h"
#include "storage.cuh"
#include "tile.cuh"

namespace jax_flash {

// The first key of a block, which lies before that of the tile if the block has a lead.
__device__ __forceinline__ int first_key_of(const Tile& tile, int block) { return -first_key_in(tile, block); }

// A block of keys or values, kBoxKeys at a time, into a buffer of shared memory; those to be widened into its second
// half.
template <int kColumnBlocks>
__device__ __forceinline__ void load_rows(const TensorMap& map, Barrier& barrier, u8* buffer, const Work& work,
                                          int block, const Operands& operands, const Params& params) {
  constexpr int kRowBytes = spec::kWidens ? kSwizzleBytes / 2 : kSwizzleBytes;
  constexpr int kBlockBytes = spec::kTileN * kRowBytes;
  constexpr int kBytes = kColumnBlocks * kBlockBytes;
  static_assert(spec::kTileN % spec::kBoxKeys == 0, "whole copies");
  u8* destination = buffer + (spec::kWidens ? kBytes : 0);
  for (int key = 0; key < spec::kTileN; key += spec::kBoxKeys) {
    const KeyPlace place = place_of(work.tile, first_key_of(work.tile, block) + key, operands, params);
    for (int i = 0; i < kColumnBlocks; ++i) {
      tma_load(destination + i * kBlockBytes + key * kRowBytes, map, barrier, i * kBlockColumns, place.row,
               work.kv_head, place.group);
    }
  }
  barrier.arrive_expect(kBytes);  // last: only what a thread reads before it arrives is ordered for racecheck
}

// One thread: loads Q and K, from the last block of keys to the first, tile after tile.
class KeyLoader {
 public:
  __device__ __forceinline__ KeyLoader(SharedStorage& shared, const TensorMaps& maps, const Operands& operands,
                                       const Params& params)
      : shared_(shared), maps_(maps), operands_(operands), params_(params) {}

  __device__ __forceinline__ void run() {
    each_work(shared_, [&](const Work& work) { load(work); });
  }

 private:
  // The first keys go ahead of Q if that must wait until the tile before has multiplied its last scores.
  __device__ __forceinline__ void load(const Work& work) {
    const int begin = work.blocks.begin;  // all of it before the last block may have been used
    const int last = work.blocks.end - 1;
    if (spec::kQStages > 1) load_q(work.tile);
#pragma unroll 1
    for (int block = last; block >= begin; --block) {
      Pipe& pipe = shared_.k_pipe[ring_.slot];
      pipe.empty.wait(ring_.phase ^ 1);
      Barrier& barrier = spec::kWidens ? shared_.k_landed[ring_.slot] : pipe.full;
      load_rows<kQkBlocks>(maps_.k, barrier, shared_.k[ring_.slot], work, block, operands_, params_);
      ring_.advance();
      if (spec::kQStages == 1 && block == last) load_q(work.tile);
    }
  }

  __device__ __forceinline__ void load_q(const Tile& tile) {
    for (int consumer = 0; consumer < kConsumers; ++consumer) {
      Pipe& pipe = shared_.q_pipe[q_ring_.slot][consumer];
      pipe.empty.wait(q_ring_.phase ^ 1);
      pipe.full.arrive_expect(kQBytes);
      for (int i = 0; i < kQkBlocks; ++i) {
        tma_load(shared_.q[q_ring_.slot][consumer] + i * kWarpgroupRows * kSwizzleBytes, maps_.q, pipe.full,
                 i * kBlockColumns, tile.q_row + consumer * kWarpgroupRows, tile.head, tile.q_group);
      }
    }
    q_ring_.advance();
  }

  SharedStorage& shared_;
  const TensorMaps& maps_;
  const Operands& operands_;
  const Params& params_;
  Ring<spec::kQStages> q_ring_;
  Ring<spec::kKStages> ring_;
};

// One thread: loads V, in the same order. By itself, for a buffer of K is free earlier than one of V. The first values
// let the first keys pass: all CTAs begin at once, and memory is what they wait for then. They wait for a limited time,
// for the barrier may have gone on by two phases before this thread looks.
class ValueLoader {
 public:
  __device__ __forceinline__ ValueLoader(SharedStorage& shared, const TensorMaps& maps, const Operands& operands,
                                         const Params& params)
      : shared_(shared), maps_(maps), operands_(operands), params_(params) {}

  __device__ __forceinline__ void run() {
    bool first = true;
    each_work(shared_, [&](const Work& work) {
      if (first) (spec::kWidens ? shared_.k_landed[0] : shared_.k_pipe[0].full).wait_briefly(0);
      first = false;
      const int begin = work.blocks.begin;  // not to be read once the last block may have been used
#pragma unroll 1
      for (int block = work.blocks.end - 1; block >= begin; --block) load(work, block);
    });
  }

 private:
  __device__ __forceinline__ void load(const Work& work, int block) {
    const int slot = ring_.slot;
    const int first_key = first_key_of(work.tile, block);
    shared_.v_pipe[slot].empty.wait(ring_.phase ^ 1);
    Barrier& barrier = prepares(work.tile, block) ? shared_.v_landed[slot] : shared_.v_pipe[slot].full;
    if constexpr (spec::kTransposes) {
      // All units of 32 keys at once: those of one head and of the next follow each other.
      const int first_unit = work.kv_head * (params_.head_dim_v / kVUnit);
      for (int key = 0; key < spec::kTileN; key += kVUnit) {
        const KeyPlace place = place_of(work.tile, first_key + key, operands_, params_);
        tma_load(shared_.v[slot] + key * spec::kHeadDimV, maps_.v, barrier, 0, place.row, first_unit, place.group);
      }
    } else if constexpr (kFp8) {
      static_assert(!kFp8 || spec::kTransposes || !spec::kPageTable, "what comes transposed lies in no pages");
      const int row = work.tile.keys.row + first_key;
      for (int key = 0; key < spec::kTileN; key += spec::kVBoxKeys) {
        tma_load(shared_.v[slot] + key * spec::kHeadDimV, maps_.v, barrier, row + key, 0, work.kv_head,
                 work.tile.keys.group);
      }
    } else {
      load_rows<kVBlocks>(maps_.v, barrier, shared_.v[slot], work, block, operands_, params_);
    }
    if constexpr (kFp8) barrier.arrive_expect(kVBytes);
    ring_.advance();
  }

  SharedStorage& shared_;
  const TensorMaps& maps_;
  const Operands& operands_;
  const Params& params_;
  Ring<spec::kVStages> ring_;
};

}  // namespace jax_flash
