// Weight matrices that are read where they lie, row by row as the checkpoint has them, and their product with rows of
// activations.
//
// Nothing is copied at load, and workers of one host share the system's pages of the file. A row of weights is the k
// values that make one output, so a vector of 64 bytes holds 16 or 32 values of K: every element of a product is summed
// in 16 lanes over K in order, and these are added up in one way, whatever the number of rows. A row's result does not
// depend on the rows beside it. It is not, to the last bit, what the same weights packed give.
#pragma once

#include <vector>

#include "matrix.h"

namespace pdmesh {

// Rows of weights and of activations multiplied at once: with a vector of each, what the machine's registers hold.
constexpr int kWeightRows = 4;
constexpr int kDotRows = 6;

// Of weights, what all rows of activations are multiplied with before the next: half of it stays in the second-level
// cache beside what comes next.
constexpr int64_t kWeightBytes = 128 * 1024;

template <class Element>
struct RowMatrix {
  using Value = typename Element::Value;
  const Value* const* rows;  // [N padded to 32], those beyond N of zeros; of k values each
  int64_t n, k;

  int64_t num_panels() const { return (n + kPanel - 1) / kPanel; }
  // Element (row, column) of the matrix as the checkpoint has it.
  float at(int64_t row, int64_t column) const { return Element::widen_one(rows[row][column]); }

  // The sums of a block of rows with one panel.
  struct Scratch {
    std::vector<float> sums;
  };
};

// What a pass over a few rows of weights asks of memory meanwhile: with each step lines from `first` on, each time
// `stride` bytes further.
struct Ahead {
  const char* first;
  int64_t stride;
};

// Of each of four vectors, the sum of its lanes: of each the same way.
inline __m128 horizontal_sums(__m512 a, __m512 b, __m512 c, __m512 d) {
  const __m512d ab = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const __m512d cd = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512 quarters = _mm512_add_ps((__m512)_mm512_unpacklo_pd(ab, cd), (__m512)_mm512_unpackhi_pd(ab, cd));
  const __m256 halves = _mm256_add_ps(_mm512_castps512_ps256(quarters), _mm512_extractf32x8_ps(quarters, 1));
  return _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf32x4_ps(halves, 1));
}

// sums[i * kPanel + r] = the product of row i with row r of weights. With each step, kLines lines are asked for.
template <class Element, int kRows, int kLines>
inline void dot_tile(const typename Element::Value* const* weights, const Ahead& ahead, const char* rows,
                     int64_t row_bytes, int64_t k, float* sums) {
  constexpr int64_t kVectorValues = 16 * Element::kPack;
  const char* weight[kWeightRows];
  for (int r = 0; r < kWeightRows; ++r) weight[r] = reinterpret_cast<const char*>(weights[r]);
  const char* asked = ahead.first;
  f32x16 lanes[kRows][kWeightRows] = {};
  auto step = [&](int64_t offset, const auto& read) __attribute__((always_inline)) {
    f32x16 columns[kWeightRows];
    for (int r = 0; r < kWeightRows; ++r) columns[r] = read(weight[r] + offset);
    for (int i = 0; i < kRows; ++i) {
      const f32x16 row = read(rows + i * row_bytes + offset);
      for (int r = 0; r < kWeightRows; ++r) lanes[i][r] = Element::dot(lanes[i][r], row, columns[r]);
    }
  };
  const int64_t whole = k / kVectorValues * 64;
  for (int64_t offset = 0; offset < whole; offset += 64) {
    for (int line = 0; line < kLines; ++line) __builtin_prefetch(asked + line * 64, 0, 2);
    asked += ahead.stride;
    step(offset, [](const char* from) { return load<f32x16>(from); });
  }
  if (const int64_t left = k % kVectorValues)
    step(whole, [left](const char* from) { return Element::load_first(from, left); });
  for (int i = 0; i < kRows; ++i)
    _mm_storeu_ps(sums + i * kPanel, horizontal_sums((__m512)lanes[i][0], (__m512)lanes[i][1], (__m512)lanes[i][2],
                                                     (__m512)lanes[i][3]));
}

// The products of `count` rows with `num_weights` rows of weights: one of `num_passes`, which share in asking for the
// weights that lie `next` rows further.
template <class Element, int kRows = kDotRows>
inline void dot_rows(int count, const typename Element::Value* const* weights, int64_t num_weights, int64_t next,
                     int64_t pass, int64_t num_passes, const char* rows, int64_t row_bytes, int64_t k, float* sums) {
  if constexpr (kRows > 1) {
    if (count < kRows)
      return dot_rows<Element, kRows - 1>(count, weights, num_weights, next, pass, num_passes, rows, row_bytes, k,
                                          sums);
  }
  // Memory gives most where it is read in order, and where that goes on all the time.
  const int64_t num_parts = num_passes >= 4 ? 4 : num_passes >= 2 ? 2 : 1;
  for (int64_t r = 0; r < num_weights; r += kWeightRows) {
    const char* first = reinterpret_cast<const char*>(weights[r + next]);
    // Of rows that do not lie side by side, the processor finds out itself.
    const bool asks = pass < num_parts && weights[r + next + 1] - weights[r + next] == k;
    const Ahead ahead = asks ? Ahead{first + k * kWeightRows * int64_t(sizeof **weights) * pass / num_parts,
                                     64 * kWeightRows / num_parts}
                             : Ahead{first, 0};
    if (num_parts == 1)
      dot_tile<Element, kRows, kWeightRows>(weights + r, ahead, rows, row_bytes, k, sums + r);
    else
      dot_tile<Element, kRows, kWeightRows / 2>(weights + r, ahead, rows, row_bytes, k, sums + r);
  }
}

// As of a packed matrix.
template <class Element, class Finish>
inline void multiply_panel(const RowMatrix<Element>& matrix, int64_t panel, const void* rows, int64_t row_bytes,
                           int64_t first, int64_t end, int64_t index, const Finish& finish,
                           typename RowMatrix<Element>::Scratch& scratch) {
  const char* from = static_cast<const char*>(rows) + first * row_bytes;
  const int64_t num_rows = end - first, num_tiles = (num_rows + kDotRows - 1) / kDotRows;
  if (int64_t(scratch.sums.size()) < num_rows * kPanel) scratch.sums.resize(num_rows * kPanel);
  int64_t num_weights = kPanel;
  while (num_weights > kWeightRows && num_weights * matrix.k * int64_t(sizeof(*matrix.rows[0])) > kWeightBytes)
    num_weights /= 2;
  for (int64_t r = 0; r < kPanel; r += num_weights) {
    const auto* weights = matrix.rows + panel * kPanel + r;
    // Behind the last panel, nothing.
    const int64_t next = panel + 1 == matrix.num_panels() && r + num_weights == kPanel ? 0 : num_weights;
    for (int64_t tile = 0; tile < num_tiles; ++tile) {
      // Of even size: a last tile of one row would cost almost as much as a full one.
      const int64_t begin = num_rows * tile / num_tiles, count = num_rows * (tile + 1) / num_tiles - begin;
      dot_rows<Element>(int(count), weights, num_weights, next, tile, num_tiles, from + begin * row_bytes,
                        row_bytes, matrix.k, &scratch.sums[begin * kPanel + r]);
    }
  }
  for (int64_t i = 0; i < num_rows; ++i) {
    const float* sums = &scratch.sums[i * kPanel];
    const f32x16 vectors[kVectors] = {load<f32x16>(sums), load<f32x16>(sums + 16)};
    finish(first + i, index, vectors);
  }
}

}  // namespace pdmesh
