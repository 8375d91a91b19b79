// The threads of one call: they meet at barriers, and each works on its own share before it helps the others.
#pragma once

#include <immintrin.h>
#include <omp.h>
#include <sched.h>

#include <atomic>
#include <cstdint>
#include <vector>

namespace pdmesh {

// Shares are the same part of every operation's items: what a thread wrote it finds in its own caches, which matters
// most where cores share none. Items are drawn one by one all the same: where another process takes a core for a
// moment, the other threads do that one's share.
class Team {
 public:
  // Before the first meeting, by one thread: how many came.
  void assemble(int num_threads) { shares_ = std::vector<Share>(num_threads); }

  int num_threads() const { return int(shares_.size()); }

  // Whether the caller is the one of its threads that speaks for all.
  bool is_first() const { return omp_get_thread_num() == 0; }

  // Calls work(item) for each item below num_items, once over all threads, then waits for all.
  template <class Work>
  void for_each(int64_t num_items, Work work) {
    const int num_shares = num_threads(), own = omp_get_thread_num();
    for (int i = 0; i < num_shares; ++i) {
      const int share = (own + i) % num_shares;
      const int64_t begin = num_items * share / num_shares, end = num_items * (share + 1) / num_shares;
      std::atomic<int64_t>& drawn = shares_[share].drawn;
      while (drawn.load(std::memory_order_relaxed) < end - begin) {
        const int64_t item = begin + drawn.fetch_add(1, std::memory_order_relaxed);
        if (item < end) work(item);
      }
    }
    meet();
  }

 private:
  // Apart, so that drawing work does not disturb the others.
  struct alignas(64) Share {
    std::atomic<int64_t> drawn{0};
  };

  // Waits for all, and hands out the shares anew.
  void meet() {
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads() - 1) {
      for (Share& share : shares_) share.drawn.store(0, std::memory_order_relaxed);
      arrived_.store(0, std::memory_order_relaxed);
      round_.store(round + 1, std::memory_order_release);
      return;
    }
    // Usually microseconds. Longer means that the others are off their cores, which they may want this one for.
    for (int spins = 0; round_.load(std::memory_order_acquire) == round; ++spins) {
      if (spins < 10000)
        _mm_pause();
      else
        sched_yield();
    }
  }

  std::vector<Share> shares_;
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
