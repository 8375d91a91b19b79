// A mixture of experts (arXiv:1701.06538): each row goes through a few of many MLPs, and takes the weighted sum.
//
// Rows are gathered expert by expert, so that a step reads each expert's matrices once, and only of those chosen. What
// a row gets does not depend on the rows beside it: products are summed as any other's, and a row adds up its experts
// in their order.
#pragma once

#include <algorithm>
#include <vector>

#include "matrix.h"

namespace pdmesh {

constexpr int kMaxExperts = 1024;
// Rows of an expert that one thread multiplies with a panel.
constexpr int64_t kExpertRows = 4 * kMaxRows;

// Which experts a step's rows go through, and where.
class Routing {
 public:
  struct Choice {
    int64_t expert;
    float weight;
    int64_t place;  // of the row among the gathered ones
  };
  // Gathered rows [first, end), of one expert.
  struct Block {
    int64_t expert, first, end;
  };

  void begin(int64_t num_rows, int64_t num_experts, int64_t num_chosen) {
    num_experts_ = num_experts;
    num_chosen_ = num_chosen;
    choices_.resize(num_rows * num_chosen);
    sources_.resize(num_rows * num_chosen);
  }

  // Chooses the most likely experts of a row, by the softmax of its logits; of equal ones the first. Where `whole`,
  // their shares are scaled to add up to 1.
  void choose(int64_t row, const float* logits, bool whole) {
    alignas(64) float shares[kMaxExperts];
    bool taken[kMaxExperts] = {};
    std::copy_n(logits, num_experts_, shares);
    std::fill(shares + num_experts_, shares + (num_experts_ + 15) / 16 * 16, -INFINITY);
    f32x16 peaks = splat(-INFINITY), sums = {};
    for (int64_t i = 0; i < num_experts_; i += 16) peaks = maximum(peaks, load<f32x16>(shares + i));
    const float peak = horizontal_max(peaks);
    for (int64_t i = 0; i < num_experts_; i += 16) {
      const f32x16 powers = exponential(load<f32x16>(shares + i) - peak);
      store(shares + i, powers);
      sums = sums + powers;
    }
    Choice* chosen = choices_of(row);
    float total = 0.0f;
    for (int64_t i = 0; i < num_chosen_; ++i) {
      int64_t best = -1;
      for (int64_t expert = 0; expert < num_experts_; ++expert)
        if (!taken[expert] && (best < 0 || shares[expert] > shares[best])) best = expert;
      taken[best] = true;
      total += shares[best];
      chosen[i] = {best, shares[best], 0};
    }
    const float divisor = whole ? total : horizontal_sum(sums);
    for (int64_t i = 0; i < num_chosen_; ++i) chosen[i].weight /= divisor;
    std::sort(chosen, chosen + num_chosen_, [](const Choice& a, const Choice& b) { return a.expert < b.expert; });
  }

  // When all rows have chosen: gives each of their choices its place.
  void group() {
    std::vector<int64_t> places(num_experts_ + 1);
    for (const Choice& choice : choices_) ++places[choice.expert + 1];
    blocks_.clear();
    for (int64_t expert = 0; expert < num_experts_; ++expert) {
      const int64_t first = places[expert], end = places[expert + 1] += first;
      const int64_t num_blocks = (end - first + kExpertRows - 1) / kExpertRows;
      for (int64_t block = 0; block < num_blocks; ++block)
        blocks_.push_back({expert, first + (end - first) * block / num_blocks,
                           first + (end - first) * (block + 1) / num_blocks});
    }
    for (int64_t i = 0; i < num_places(); ++i) {
      choices_[i].place = places[choices_[i].expert]++;
      sources_[choices_[i].place] = i / num_chosen_;
    }
  }

  int64_t num_places() const { return int64_t(choices_.size()); }
  int64_t num_chosen() const { return num_chosen_; }
  // Of gathered rows: which of the step's each one is.
  int64_t source(int64_t place) const { return sources_[place]; }
  Choice* choices_of(int64_t row) { return choices_.data() + row * num_chosen_; }
  const std::vector<Block>& blocks() const { return blocks_; }

 private:
  int64_t num_experts_ = 0, num_chosen_ = 1;
  std::vector<Choice> choices_;  // [rows][num_chosen]
  std::vector<int64_t> sources_;
  std::vector<Block> blocks_;
};

// The product of gathered rows, `row_bytes` apart, each with its own expert's part of a matrix: the experts' outputs lie
// in it one after the other, each padded to whole panels. finish(row, panel of the expert, sums[kVectors]) as `multiply`.
template <class Element, class Matrix, class Finish>
void multiply_experts(Team& team, const Matrix& matrix, int64_t num_experts, const Routing& routing,
                      const void* rows, int64_t row_bytes, const Finish& finish) {
  typename Matrix::Scratch scratch;
  const int64_t num_panels = matrix.num_panels() / num_experts;
  team.for_each(int64_t(routing.blocks().size()) * num_panels, [&](int64_t item) {
    const Routing::Block& block = routing.blocks()[item / num_panels];
    const int64_t index = item % num_panels;
    multiply_panel<Element>(matrix, block.expert * num_panels + index, rows, row_bytes, block.first, block.end, index,
                            finish, scratch);
  });
}

}  // namespace pdmesh
