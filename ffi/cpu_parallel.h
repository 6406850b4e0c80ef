// Runs independent items of work on XLA's own threads and on the calling one.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace jax_flash::cpu {

// Calls work(item, scratch) once for each item 0..count-1, in any order; scratch is what make_scratch() returned on
// that thread. Returns when all are done.
//
// The pool may be busy with whoever waits for this very call, so nothing here waits for a helper to start: the calling
// thread works too, and a helper that comes after the last item was claimed, even after this call returned, finds
// nothing to do. `work` and `make_scratch` are touched only by a thread that has an item, and so before the return.
template <typename MakeScratch, typename Work>
void ForEachItem(xla::ffi::ThreadPool& pool, int64_t count, const MakeScratch& make_scratch, const Work& work) {
  struct State {
    std::atomic<int64_t> next{0};
    std::mutex mutex;
    std::condition_variable all_done;
    int64_t done = 0;
  };
  const auto state = std::make_shared<State>();

  const auto drain = [count, &make_scratch, &work](State& state) {
    int64_t item = state.next.fetch_add(1);
    if (item >= count) return;
    int64_t done = 0;
    {
      auto scratch = make_scratch();
      for (; item < count; item = state.next.fetch_add(1), ++done) work(item, scratch);
    }
    const std::lock_guard<std::mutex> lock(state.mutex);
    state.done += done;
    if (state.done == count) state.all_done.notify_one();
  };

  const int64_t helpers = std::min(pool.num_threads(), count) - 1;
  for (int64_t i = 0; i < helpers; ++i) {
    pool.Schedule([state, drain] { drain(*state); });
  }
  drain(*state);
  std::unique_lock<std::mutex> lock(state->mutex);
  state->all_done.wait(lock, [&] { return state->done == count; });
}

}  // namespace jax_flash::cpu
