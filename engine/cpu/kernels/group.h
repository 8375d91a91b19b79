// Ranks of one host, processes that each hold a part of every layer: how they meet, and how they add up partial results.
//
// All memory here is shared between them. Each rank writes its own partial rows into a slot, says so, and then adds up
// everybody's, in the order of the ranks: all come to the same bits. Slots alternate, so that one meeting for each sum is
// enough: who writes slot s again has met the others since, and they had read it before they came to that meeting.
#pragma once

#include <immintrin.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <cstdint>
#include <cstring>

#include "team.h"

namespace pdmesh {

// A word that one process writes and others wait for, alone in its cache line.
using Word = std::atomic<uint32_t>;
static_assert(sizeof(Word) == 4 && Word::is_always_lock_free);
constexpr int kWordsPerLine = 16;

// Waits until `word` has come to `value`, counting around zero. Returns false if the group was given up meanwhile.
// Usually it is microseconds. Who waits longer may keep its core from the very rank that it waits for: it yields, which
// costs as little as spinning where nobody else wants the core, and after some milliseconds sleeps.
inline bool wait_for(const Word& word, uint32_t value, const Word& given_up) {
  for (int spins = 0; int32_t(word.load(std::memory_order_acquire) - value) < 0; ++spins) {
    if (spins % 256 == 255 && given_up.load(std::memory_order_relaxed)) return false;
    if (spins < 1000)
      _mm_pause();
    else
      spins < 10000 ? void(sched_yield()) : void(usleep(50));
  }
  return true;
}

constexpr int kSlots = 3;

struct Group {
  const Word* given_up;
  Word* met;         // [size] lines: how often each rank has come
  char* slots;       // [kSlots][size], slot_bytes each
  int64_t slot_bytes;
  int32_t rank, size;
  uint32_t num_meetings;  // of this rank so far

  char* slot(int64_t index, int64_t of_rank) const { return slots + (index * size + of_rank) * slot_bytes; }

  // Says that this rank has written its part of meeting `number`.
  void come(uint32_t number) const { met[rank * kWordsPerLine].store(number, std::memory_order_release); }

  // Waits for everybody to have come; at once if the group was given up.
  void wait(uint32_t number) const {
    for (int other = 0; other < size; ++other)
      if (!wait_for(met[other * kWordsPerLine], number, *given_up)) return;
  }
};

// values[n] = the sum of everybody's, by one thread.
inline bool all_reduce(Group& group, float* values, int64_t n) {
  const int64_t most = group.slot_bytes / int64_t(sizeof(float));
  for (int64_t first = 0; first < n; first += most) {
    const int64_t count = std::min(most, n - first);
    const uint32_t number = ++group.num_meetings;
    const int64_t slot = number % 2;
    float* own = values + first;
    std::memcpy(group.slot(slot, group.rank), own, count * sizeof(float));
    group.come(number);
    group.wait(number);
    const float* part = reinterpret_cast<const float*>(group.slot(slot, 0));
    for (int64_t i = 0; i < count; ++i) own[i] = part[i];
    for (int rank = 1; rank < group.size; ++rank) {
      part = reinterpret_cast<const float*>(group.slot(slot, rank));
      for (int64_t i = 0; i < count; ++i) own[i] += part[i];
    }
  }
  return !group.given_up->load(std::memory_order_relaxed);
}

}  // namespace pdmesh
