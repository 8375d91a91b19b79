// Choosing tokens from rows of logits, one row per thread at a time. What is chosen, and why so: engine/sampling_ops.py.
// The C interface is mirrored in engine/cpu/sampling.py.

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "simd.h"
#include "team.h"

namespace pdmesh {

typedef double f64x8 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));

constexpr int64_t kLanes = 16;
// Tokens looked at together: whether they hold anything of interest is asked once for all.
constexpr int64_t kBlock = 4 * kLanes;
// engine/sampling_ops.py, NEVER.
constexpr float kNever = 26.5f;

struct Logits {
  const float* values;
  int64_t num_rows, vocab_size;
  int64_t stride;  // from one row to the next

  const float* row(int64_t index) const { return values + index * stride; }
};

struct Draws {
  int64_t num_draws;
  const int64_t* rows;
  const float* temperatures;
  const float* floors;
  const int64_t* top_ks;
  const double* top_ps;
  const uint64_t* keys;
  const uint64_t* counters;
  float* scratch;  // for each thread two rows of `scratch_stride`, a multiple of kBlock that holds the vocabulary
  int64_t scratch_stride;
};

inline bool any(i32x16 mask) {
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}

// The greatest value, and where it is first. NaN where there is one.
struct Greatest {
  float value;
  int64_t index;
};

Greatest greatest(const float* row, int64_t size) {
  constexpr int64_t kPart = 16 * kBlock;
  Greatest best{-std::numeric_limits<float>::infinity(), 0};
  for (int64_t first = 0; first < size; first += kPart) {
    const int64_t end = std::min(first + kPart, size);
    const float lowest = -std::numeric_limits<float>::infinity();
    f32x16 a = splat(lowest), b = a, c = a, d = a;
    i32x16 is_nan{};
    int64_t i = first;
    for (; i + kBlock <= end; i += kBlock) {
      const f32x16 w = load<f32x16>(row + i), x = load<f32x16>(row + i + kLanes);
      const f32x16 y = load<f32x16>(row + i + 2 * kLanes), z = load<f32x16>(row + i + 3 * kLanes);
      a = maximum(a, w), b = maximum(b, x), c = maximum(c, y), d = maximum(d, z);
      // A sum is no number where one of its parts is none, or where infinities meet: an error, too.
      const f32x16 sum = (w + x) + (y + z);
      is_nan |= sum != sum;
    }
    float part = horizontal_max(maximum(maximum(a, b), maximum(c, d)));
    bool found_nan = any(is_nan);
    for (; i < end; ++i) {
      part = row[i] > part ? row[i] : part;
      found_nan |= row[i] != row[i];
    }
    if (found_nan) return {std::numeric_limits<float>::quiet_NaN(), first};
    if (part > best.value) best = {part, std::find(row + first, row + end, part) - row};
  }
  return best;
}

// The generator "squares": engine/counter_rng.py. 32 bits in each of 8 lanes.
inline u64x8 squares32(u64x8 counters, uint64_t key) {
  u64x8 x = counters * key;
  const u64x8 y = x, z = y + key;
  x = x * x + y;
  x = (x >> 32) | (x << 32);
  x = x * x + z;
  x = (x >> 32) | (x << 32);
  x = x * x + y;
  x = (x >> 32) | (x << 32);
  return (x * x + z) >> 32;
}

inline double gumbel(uint64_t counter, uint64_t key) {
  const double uniform = (double(squares32(counter - u64x8{}, key)[0]) + 0.5) * 0x1p-32;
  return -std::log(-std::log(uniform));
}

// One row on its way to a token: every logit's distance from the greatest, over the temperature, and its weight.
class Candidates {
 public:
  // `scores` and `weights` are memory for a row, padded to whole blocks.
  Candidates(const float* row, int64_t size, float temperature, float* scores, float* weights)
      : scores_(scores), weights_(weights), size_(size), padded_((size + kBlock - 1) / kBlock * kBlock) {
    const Greatest best = greatest(row, size);
    likeliest_ = best.index;
    const int64_t whole = size / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes)
      store(scores + i, (load<f32x16>(row + i) - best.value) / splat(temperature));
    for (int64_t i = whole; i < size; ++i) scores[i] = (row[i] - best.value) / temperature;
    std::fill(scores + size, scores + padded_, -std::numeric_limits<float>::infinity());
    for (int64_t i = 0; i < padded_; i += kLanes) store(weights + i, exponential(load<f32x16>(scores + i)));
  }

  // The least score that top_k, and top_p over what top_k leaves, keep: never less than -kNever.
  float truncation(int64_t top_k, double top_p) const {
    Mass kept;  // what top_k leaves, ties cut off
    float threshold = -kNever;
    if (top_k > 0 && top_k < size_) {
      const auto enough = [=](Mass mass) { return mass.count >= top_k; };
      threshold = least_score(enough, &kept);
    } else {
      kept = mass_from(-std::numeric_limits<float>::infinity());
    }
    if (top_p < 1.0) {
      const double target = top_p * kept.weight;
      const auto enough = [=](Mass mass) { return mass.weight >= target; };
      threshold = std::max(threshold, least_score(enough, nullptr));
    }
    return threshold;
  }

  // The token with the greatest score plus noise, of those that score at least `threshold`.
  int64_t draw(float threshold, uint64_t first_counter, uint64_t key) const {
    int64_t chosen = likeliest_;
    double best = scores_[chosen] + gumbel(first_counter + chosen, key);
    // With u = 1 - v uniform: score - ln(-ln u) >= best where -ln u <= weight * e^-best, and v < -ln u. So a small
    // enough v, which costs no logarithm, is what a token needs to be looked at; rounding is allowed for.
    float limit = float(std::exp(-best)) * 1.0001f;
    u64x8 counters = first_counter + u64x8{0, 1, 2, 3, 4, 5, 6, 7};
    for (int64_t block = 0; block < padded_; block += kBlock) {
      i32x16 found{};
      for (int64_t i = block; i < block + kBlock; i += kLanes) found |= load<f32x16>(scores_ + i) >= splat(threshold);
      if (!any(found)) continue;
      i32x16 promising[kBlock / kLanes];
      found = i32x16{};
      for (int64_t part = 0; part < kBlock / kLanes; ++part) {
        const int64_t i = block + part * kLanes;
        const u64x8 low = squares32(counters + uint64_t(i), key), high = squares32(counters + uint64_t(i + 8), key);
        const f32x16 v = uniform_complement(low, high);
        promising[part] =
            (load<f32x16>(scores_ + i) >= splat(threshold)) & (v <= load<f32x16>(weights_ + i) * splat(limit));
        found |= promising[part];
      }
      if (!any(found)) continue;
      for (int64_t i = block; i < block + kBlock; ++i) {
        if (!promising[(i - block) / kLanes][i % kLanes]) continue;
        const double score = scores_[i] + gumbel(first_counter + i, key);
        if (score > best || (score == best && i < chosen)) {
          best = score;
          chosen = i;
          limit = float(std::exp(-best)) * 1.0001f;
        }
      }
    }
    return chosen;
  }

 private:
  // Of the tokens from some score on: how many, and their weights' sum.
  struct Mass {
    int64_t count = 0;
    double weight = 0.0;
  };

  static f32x16 uniform_complement(u64x8 low, u64x8 high) {
    const u32x8 a = __builtin_convertvector(low, u32x8), b = __builtin_convertvector(high, u32x8);
    const u32x16 bits = ~__builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (__builtin_convertvector(bits, f32x16) + 0.5f) * 0x1p-32f;
  }

  // In doubles, always in one order: a lower score never has less mass.
  Mass mass_from(float score) const {
    i32x16 counts{};
    f64x8 low{}, high{};
    for (int64_t i = 0; i < padded_; i += kLanes) {
      const i32x16 inside = load<f32x16>(scores_ + i) >= splat(score);
      counts -= inside;
      const f32x16 weights = inside ? load<f32x16>(weights_ + i) : splat(0.0f);
      low += __builtin_convertvector(__builtin_shufflevector(weights, weights, 0, 1, 2, 3, 4, 5, 6, 7), f64x8);
      high += __builtin_convertvector(__builtin_shufflevector(weights, weights, 8, 9, 10, 11, 12, 13, 14, 15), f64x8);
    }
    Mass mass;
    low += high;
    for (int lane = 0; lane < kLanes; ++lane) mass.count += counts[lane];
    for (int lane = 0; lane < 8; ++lane) mass.weight += low[lane];
    // Padding scores -inf, and weighs nothing.
    mass.count = std::min(mass.count, size_);
    return mass;
  }

  // The score of the token, first to last in order of score, with which it is enough; -kNever if tokens that score
  // less are needed. `reached` is set to the mass up to and with that token.
  template <class Enough>
  float least_score(Enough enough, Mass* reached) const {
    // Halving the interval until few tokens lie in it, and then sorting these. It is enough at `low`, not at `high`.
    constexpr int64_t kFew = 512;
    float low = -kNever, high = std::numeric_limits<float>::min();
    Mass at_low = mass_from(low), at_high;
    if (!enough(at_low)) {
      if (reached) *reached = mass_from(-std::numeric_limits<float>::infinity());
      return low;
    }
    // Tokens that all tie cannot be parted: they are sorted, after as many halvings as tell floats apart.
    for (int halvings = 0; halvings < 32 && at_low.count - at_high.count > kFew; ++halvings) {
      const float middle = low + (high - low) / 2;
      const Mass mass = mass_from(middle);
      if (enough(mass)) {
        low = middle;
        at_low = mass;
      } else {
        high = middle;
        at_high = mass;
      }
    }
    std::vector<std::pair<float, float>> between;
    between.reserve(at_low.count - at_high.count);
    for (int64_t block = 0; block < padded_; block += kLanes) {
      const f32x16 scores = load<f32x16>(scores_ + block);
      if (!any((scores >= splat(low)) & (scores < splat(high)))) continue;
      for (int64_t i = block; i < block + kLanes; ++i)
        if (scores_[i] >= low && scores_[i] < high) between.emplace_back(scores_[i], weights_[i]);
    }
    std::sort(between.begin(), between.end(), std::greater<>());
    Mass mass = at_high;
    for (const auto& [score, weight] : between) {
      mass.count += 1;
      mass.weight += weight;
      if (enough(mass)) {
        if (reached) *reached = mass;
        return score;
      }
    }
    // Sums in another order may round to a little less.
    return low;
  }

  const float* scores_;
  const float* weights_;
  int64_t size_, padded_, likeliest_;
};

int64_t draw(const Logits& logits, const Draws& draws, int64_t index, float* scratch) {
  const Candidates candidates(logits.row(draws.rows[index]), logits.vocab_size, draws.temperatures[index], scratch,
                              scratch + draws.scratch_stride);
  float threshold = std::max(draws.floors[index], -kNever);
  if (draws.top_ks[index] > 0 || draws.top_ps[index] < 1.0)
    threshold = std::max(threshold, candidates.truncation(draws.top_ks[index], draws.top_ps[index]));
  return candidates.draw(threshold, draws.counters[index], draws.keys[index]);
}

// Writes the row's `num_top` greatest values, the greatest first, of equal ones the first; returns ln sum e^x.
double log_normalizer_and_top(const float* row, int64_t size, int64_t num_top, float* top_values, int64_t* top_ids) {
  const float best = greatest(row, size).value;
  double sum = 0.0;
  int64_t num_found = 0;
  for (int64_t block = 0; block < size; block += kLanes) {
    const int64_t end = std::min(block + kLanes, size);
    f32x16 values = splat(-std::numeric_limits<float>::infinity());
    std::memcpy(&values, row + block, (end - block) * sizeof(float));
    sum += horizontal_sum(exponential(values - best));
    if (!num_top || (num_found == num_top && !any(values > splat(top_values[num_top - 1])))) continue;
    for (int64_t i = block; i < end; ++i) {
      if (num_found == num_top && row[i] <= top_values[num_top - 1]) continue;
      int64_t place = num_found < num_top ? num_found++ : num_top - 1;
      for (; place > 0 && top_values[place - 1] < row[i]; --place) {
        top_values[place] = top_values[place - 1];
        top_ids[place] = top_ids[place - 1];
      }
      top_values[place] = row[i];
      top_ids[place] = i;
    }
  }
  return best + std::log(sum);
}

}  // namespace pdmesh

extern "C" {

// Writes the first of the likeliest tokens of each row; returns how many rows have none, for want of finite logits.
int64_t pdmesh_likeliest(const pdmesh::Logits* logits, int64_t* token_ids, int32_t num_threads) {
  std::atomic<int64_t> num_bad{0};
  pdmesh::run_team(num_threads, [&](pdmesh::Team& team) {
    team.for_each(logits->num_rows, [&](int64_t row) {
      const pdmesh::Greatest best = pdmesh::greatest(logits->row(row), logits->vocab_size);
      if (!std::isfinite(best.value)) num_bad.fetch_add(1);
      token_ids[row] = best.index;
    });
  });
  return num_bad.load();
}

void pdmesh_draw(const pdmesh::Logits* logits, const pdmesh::Draws* draws, int64_t* token_ids, int32_t num_threads) {
  pdmesh::run_team(num_threads, [&](pdmesh::Team& team) {
    float* scratch = draws->scratch + 2 * draws->scratch_stride * omp_get_thread_num();
    team.for_each(draws->num_draws,
                  [&](int64_t index) { token_ids[index] = pdmesh::draw(*logits, *draws, index, scratch); });
  });
}

// `chosen` [R]: log-probabilities of `token_ids`; `top_ids` and `top_logprobs` [R, num_top].
void pdmesh_logprobs(const pdmesh::Logits* logits, const int64_t* token_ids, float* chosen, int64_t num_top,
                     int64_t* top_ids, float* top_logprobs, int32_t num_threads) {
  pdmesh::run_team(num_threads, [&](pdmesh::Team& team) {
    team.for_each(logits->num_rows, [&](int64_t index) {
      const float* row = logits->row(index);
      float* top = top_logprobs + index * num_top;
      const double normalizer =
          pdmesh::log_normalizer_and_top(row, logits->vocab_size, num_top, top, top_ids + index * num_top);
      for (int64_t i = 0; i < num_top; ++i) top[i] = float(top[i] - normalizer);
      chosen[index] = float(row[token_ids[index]] - normalizer);
    });
  });
}
}
