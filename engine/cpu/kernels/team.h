// The threads of one call: they meet at barriers and draw work from a shared counter.
#pragma once

#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pdmesh {

// Work is drawn item by item, not dealt out: where another process takes a core for a moment, the others go on.
class Team {
 public:
  // Before the first meeting, by one thread: how many came.
  void assemble(int num_threads) { num_threads_ = num_threads; }

  int num_threads() const { return num_threads_; }

  // Waits for all, and resets the counter that the next `for_each` draws from.
  void meet() {
    if (num_threads_ == 1) {
      next_.store(0, std::memory_order_relaxed);
      return;
    }
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      next_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // Usually microseconds. Longer means that the others are off their cores, which they may want this one for.
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 10000)
        relax();
      else
        sched_yield();
    }
  }

  // Calls work(item) for each item below num_items, once over all threads, `chunk` neighbours at a time.
  template <class Work>
  void for_each(int64_t num_items, int64_t chunk, Work work) {
    for (;;) {
      const int64_t first = next_.fetch_add(chunk, std::memory_order_relaxed);
      if (first >= num_items) break;
      const int64_t end = first + chunk < num_items ? first + chunk : num_items;
      for (int64_t item = first; item < end; ++item) work(item);
    }
    meet();
  }

 private:
  static void relax() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }

  int num_threads_ = 1;
  // Apart, so that drawing work does not disturb those who wait.
  alignas(64) std::atomic<int64_t> next_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<int> round_{0};
};

// Runs body(team) on up to num_threads threads: torch's own, where torch was imported first.
template <class Body>
void run_team(int num_threads, Body body) {
  Team team;
#pragma omp parallel num_threads(num_threads)
  {
#pragma omp single
    team.assemble(omp_get_num_threads());
    body(team);
  }
}

}  // namespace pdmesh
