// Weight matrices packed for reading once, and their product with rows of activations.
//
// A packed matrix [N, K] lies in panels of 32 output columns:
//
//     [N / 32][K / kPack][32][kPack]        N padded to 32 and K to kPack, with zeros
//
// so that a product streams through each panel front to back. Every element of a product is summed over K in order, in
// one accumulator, whatever the number of rows: a row's result does not depend on the rows beside it.
#pragma once

#include <algorithm>

#include "simd.h"
#include "team.h"

namespace pdmesh {

constexpr int kPanel = 32;
constexpr int kVectors = kPanel / 16;

// Rows multiplied at once: with two columns of vectors, what the machine's registers hold.
constexpr int kMaxRows = 12;

// Bytes of activations that one pass over the panels may come back to: they stay in the second-level cache, and of the
// longest rows enough are there to be worth a pass.
constexpr int64_t kRowBlockBytes = 512 * 1024;
constexpr int64_t kMinRowsOfThread = 4 * kMaxRows;

template <class Element>
struct PackedMatrix {
  using Value = typename Element::Value;
  const Value* data;
  int64_t n, k;

  int64_t num_panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t num_steps() const { return (k + Element::kPack - 1) / Element::kPack; }
  const Value* panel(int64_t index) const { return data + index * num_steps() * kPanel * Element::kPack; }
  // Element (row, column) of the matrix as the checkpoint has it.
  float at(int64_t row, int64_t column) const {
    const Value* step = panel(row / kPanel) + column / Element::kPack * kPanel * Element::kPack;
    return Element::widen_one(step[row % kPanel * Element::kPack + column % Element::kPack]);
  }

  // What a thread keeps of a block of rows from panel to panel.
  struct Scratch {};
};

// sums[i][j] = rows[i] * panel column vector j, over num_steps.
template <class Element, int kRows>
inline void multiply_tile(const void* rows, int64_t row_bytes, const typename Element::Value* panel, int64_t num_steps,
                          f32x16 (&sums)[kRows][kVectors]) {
  // Streaming through memory, a core waits less the earlier it asks; beyond the panel lies the next one.
  constexpr int64_t kAhead = 16 * kPanel * Element::kPack;
  const char* row = static_cast<const char*>(rows);
  // Whose address nobody takes: these stay in registers.
  f32x16 totals[kRows][kVectors] = {};
  for (int64_t step = 0; step < num_steps; ++step) {
    f32x16 columns[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      columns[j] = load<f32x16>(panel + j * 16 * Element::kPack);
      __builtin_prefetch(panel + kAhead + j * 16 * Element::kPack);
    }
    panel += kPanel * Element::kPack;
    for (int i = 0; i < kRows; ++i) {
      const uint32_t unit = row_unit(row + i * row_bytes, step);
      for (int j = 0; j < kVectors; ++j) totals[i][j] = Element::multiply_add(totals[i][j], unit, columns[j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) sums[i][j] = totals[i][j];
}

// Rows [first, first + count) times one panel; finish(row, index, sums of the row) for each.
template <class Element, int kRows = kMaxRows, class Finish>
inline void multiply_rows(int count, const void* rows, int64_t row_bytes, const typename Element::Value* panel,
                          int64_t num_steps, int64_t first, int64_t index, const Finish& finish) {
  if constexpr (kRows > 1) {
    if (count < kRows) {
      multiply_rows<Element, kRows - 1>(count, rows, row_bytes, panel, num_steps, first, index, finish);
      return;
    }
  }
  f32x16 sums[kRows][kVectors];
  multiply_tile<Element, kRows>(rows, row_bytes, panel, num_steps, sums);
  for (int i = 0; i < kRows; ++i) finish(first + i, index, sums[i]);
}

// Rows [first, end) of `rows` times one of a matrix' panels, which `finish` knows as `index`.
template <class Element, class Finish>
inline void multiply_panel(const PackedMatrix<Element>& matrix, int64_t panel, const void* rows, int64_t row_bytes,
                           int64_t first, int64_t end, int64_t index, const Finish& finish,
                           typename PackedMatrix<Element>::Scratch&) {
  const int64_t num_tiles = (end - first + kMaxRows - 1) / kMaxRows;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    // Of even size: a last tile of one row would cost almost as much as a full one.
    const int64_t begin = first + (end - first) * tile / num_tiles;
    const int64_t count = first + (end - first) * (tile + 1) / num_tiles - begin;
    multiply_rows<Element>(int(count), static_cast<const char*>(rows) + begin * row_bytes, row_bytes,
                           matrix.panel(panel), matrix.num_steps(), begin, index, finish);
  }
}

// Of many rows each thread multiplies its own with all panels, which it then finds in its caches; of few, all threads
// multiply all rows with panels of their own, so that the matrix is read once.
inline int64_t num_row_blocks(int64_t num_rows, int64_t row_bytes, int num_threads) {
  const int64_t num_shares = num_rows < kMinRowsOfThread * num_threads ? 1 : num_threads;
  return num_shares * std::max<int64_t>(1, (num_rows / num_shares * row_bytes + kRowBlockBytes - 1) / kRowBlockBytes);
}

// The product of `num_rows` rows, `row_bytes` apart, with a matrix. finish(row, panel index, sums[kVectors]) is called
// once for each row and panel.
template <class Element, class Matrix, class Finish>
void multiply(Team& team, const Matrix& matrix, const void* rows, int64_t row_bytes, int64_t num_rows,
              const Finish& finish) {
  typename Matrix::Scratch scratch;
  const int64_t num_panels = matrix.num_panels();
  const int64_t num_blocks = num_row_blocks(num_rows, row_bytes, team.num_threads());
  team.for_each(num_blocks * num_panels, [&](int64_t item) {
    const int64_t block = item / num_panels, index = item % num_panels;
    const int64_t first = num_rows * block / num_blocks, end = num_rows * (block + 1) / num_blocks;
    multiply_panel<Element>(matrix, index, rows, row_bytes, first, end, index, finish, scratch);
  });
}

}  // namespace pdmesh
