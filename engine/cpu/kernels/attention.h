// Attention over the paged KV cache: prefill chunks and decodes in one call, nothing padded, nothing gathered.
//
// K and V of a block, a layer and a KV head are two tiles, in the order in which dot products take them:
//
//     K  [head_dim / kPack][block_size][kPack]        16 keys side by side: scores of 16 keys at once
//     V  [block_size / kPack][head_dim][kPack]        16 dimensions side by side
//
// The query heads that share a KV head and the tokens of a chunk are rows alike; a tile of rows reads each key once.
// Keys are taken 64 at a time from position 0 on, with a running maximum (FlashAttention, arXiv:2205.14135). The grid
// of 64 is by absolute position: a row's result does not depend on the chunk or the batch that it is computed in. With a
// window, 64 keys that a tile reads for others of its rows leave a row as it was: it is as if it began where its window
// does.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "matrix.h"
#include "scores.h"

namespace pdmesh {

constexpr int kKeys = 64;
constexpr int kGroups = kKeys / 16;
constexpr int kTileRows = 24;
constexpr int kMaxHeadDim = 256;
// Rows multiplied at once with four columns of vectors.
constexpr int kAttentionRows = kMaxRows / 2;

// Where K and V lie: a tile of K and behind it one of V for each block, KV head and layer, which lie strides apart, in
// values. These may be some of the heads and layers that a block holds.
template <class Element>
struct PagedCache {
  using Value = typename Element::Value;
  Value* data;
  int64_t num_kv_heads, block_size, head_dim;
  int64_t block_stride, head_stride, layer_stride;

  Value* keys(int64_t block, int64_t layer, int64_t head) const {
    return data + block * block_stride + head * head_stride + layer * layer_stride;
  }
  Value* values(int64_t block, int64_t layer, int64_t head) const {
    return keys(block, layer, head) + block_size * head_dim;
  }
};

// Query tokens of one sequence, its last ones: they are rows from first_row on of the queries, and their results rows
// from first_output on.
struct Sequence {
  int64_t first_row, first_output, query_len, seq_len;
  const int64_t* block_table;
};

// Rows of one sequence that one thread attends at once; row r is query token r / group, head r % group of a KV head.
struct QueryTile {
  const Sequence* sequence;
  int64_t first, count;
};

// Costly ones first, so that the threads finish together.
inline std::vector<QueryTile> query_tiles(const std::vector<Sequence>& sequences, int64_t group) {
  std::vector<QueryTile> tiles;
  for (const Sequence& sequence : sequences)
    for (int64_t first = 0; first < sequence.query_len * group; first += kTileRows)
      tiles.push_back({&sequence, first, std::min<int64_t>(kTileRows, sequence.query_len * group - first)});
  auto cost = [group](const QueryTile& tile) {
    return tile.count * (tile.sequence->seq_len - tile.sequence->query_len + (tile.first + tile.count) / group);
  };
  std::sort(tiles.begin(), tiles.end(), [&](const auto& a, const auto& b) { return cost(a) > cost(b); });
  return tiles;
}

// scores[i][g] = row i * the 16 keys at keys[g]; neighbouring dimensions lie step_values apart.
template <class Element, int kRows>
inline void multiply_keys(const typename Element::Value* rows, int64_t head_dim,
                          const typename Element::Value* const (&keys)[kGroups], int64_t step_values,
                          f32x16 (&scores)[kRows][kGroups]) {
  for (int i = 0; i < kRows; ++i)
    for (int g = 0; g < kGroups; ++g) scores[i][g] = f32x16{};
  for (int64_t step = 0; step < head_dim / Element::kPack; ++step) {
    f32x16 columns[kGroups];
    for (int g = 0; g < kGroups; ++g) columns[g] = load<f32x16>(keys[g] + step * step_values);
    for (int i = 0; i < kRows; ++i) {
      const uint32_t unit = row_unit(rows + i * head_dim, step);
      for (int g = 0; g < kGroups; ++g) scores[i][g] = Element::multiply_add(scores[i][g], unit, columns[g]);
    }
  }
}

// output[i] = output[i] * decay[i] + weights[i] * values, over num_keys keys and 16 * kColumns dimensions.
template <class Element, int kRows, int kColumns>
inline void multiply_values(const typename Element::Value* weights, const typename Element::Value* const (&values)[kGroups],
                            int64_t num_keys, int64_t head_dim, const float* decay, float* output) {
  constexpr int kPack = Element::kPack;
  f32x16 sums[kRows][kColumns];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) sums[i][j] = load<f32x16>(output + i * head_dim + 16 * j) * decay[i];
  for (int64_t key = 0; key < num_keys; key += kPack) {
    const typename Element::Value* from = values[key / 16] + key % 16 * head_dim;
    f32x16 columns[kColumns];
    for (int j = 0; j < kColumns; ++j) columns[j] = load<f32x16>(from + j * 16 * kPack);
    // Of the pair's second key nothing is written yet: its weight is 0, but 0 times garbage may be NaN.
    if (kPack == 2 && key + 1 == num_keys)
      for (int j = 0; j < kColumns; ++j) columns[j] = as_float(as_bits(columns[j]) & 0xffffu);
    for (int i = 0; i < kRows; ++i) {
      const uint32_t unit = row_unit(weights + i * kKeys, key / kPack);
      for (int j = 0; j < kColumns; ++j) sums[i][j] = Element::multiply_add(sums[i][j], unit, columns[j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) store(output + i * head_dim + 16 * j, sums[i][j]);
}

template <class Element>
class AttentionTile {
  using Value = typename Element::Value;

 public:
  // Attends a tile's rows of one KV head. `queries` and `outputs` are [T, num_heads * head_dim], rows query_bytes and
  // output_bytes apart. A row sees the last `window` keys up to its own; 0: all of them.
  void attend(const PagedCache<Element>& cache, int64_t layer, int64_t kv_head, int64_t group, int64_t window,
              const Scores& rule, const QueryTile& tile, const char* queries, int64_t query_bytes, char* outputs,
              int64_t output_bytes) {
    const Sequence& sequence = *tile.sequence;
    const int64_t head_dim = cache.head_dim, context = sequence.seq_len - sequence.query_len;
    const int rows = int(tile.count);
    auto place = [&](int row, int64_t first_row, int64_t row_bytes) {
      const int64_t index = tile.first + row;
      return (first_row + index / group) * row_bytes +
             (kv_head * group + index % group) * head_dim * int64_t(sizeof(Value));
    };
    for (int row = 0; row < rows; ++row) {
      std::memcpy(queries_ + row * head_dim, queries + place(row, sequence.first_row, query_bytes), head_dim * sizeof(Value));
      // Rows see the keys up to their own.
      visible_[row] = context + (tile.first + row) / group + 1;
      head_[row] = kv_head * group + (tile.first + row) % group;
      first_visible_[row] = window ? std::max<int64_t>(0, visible_[row] - window) : 0;
      peak_[row] = -INFINITY;
      total_[row] = f32x16{};
    }
    std::fill_n(outputs_, rows * head_dim, 0.0f);
    const int64_t end = visible_[rows - 1];
    for (int64_t start = first_visible_[0] / kKeys * kKeys; start < end; start += kKeys)
      add_keys(cache, layer, kv_head, sequence.block_table, start, std::min<int64_t>(kKeys, end - start), rows, rule);
    for (int row = 0; row < rows; ++row) {
      const float share = 1.0f / horizontal_sum(total_[row]);
      Value* output = reinterpret_cast<Value*>(outputs + place(row, sequence.first_output, output_bytes));
      for (int64_t i = 0; i < head_dim; i += 16)
        Element::narrow(output + i, load<f32x16>(outputs_ + row * head_dim + i) * share);
    }
  }

 private:
  void add_keys(const PagedCache<Element>& cache, int64_t layer, int64_t kv_head, const int64_t* block_table,
                int64_t start, int64_t num_keys, int rows, const Scores& rule) {
    const int64_t head_dim = cache.head_dim, block_size = cache.block_size;
    const Value *keys[kGroups], *values[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      // Keys past the end are masked: any that can be read will do.
      const int64_t token = 16 * g < num_keys ? start + 16 * g : start;
      const int64_t block = block_table[token / block_size], offset = token % block_size;
      keys[g] = cache.keys(block, layer, kv_head) + offset * Element::kPack;
      values[g] = cache.values(block, layer, kv_head) + offset * head_dim;
    }
    for (int row = 0; row < rows; row += kAttentionRows)
      weigh_rows<kAttentionRows>(std::min(kAttentionRows, rows - row), row, keys, block_size, start, head_dim, rule);
    for (int row = 0; row < rows; row += kAttentionRows)
      add_rows<kAttentionRows>(std::min(kAttentionRows, rows - row), row, values, num_keys, head_dim);
  }

  // Softmax weights of 64 keys for `count` rows from `row` on, relative to 2^peak of what was seen so far.
  template <int kRows>
  void weigh_rows(int count, int row, const Value* const (&keys)[kGroups], int64_t block_size, int64_t start,
                  int64_t head_dim, const Scores& rule) {
    if constexpr (kRows > 1) {
      if (count < kRows) return weigh_rows<kRows - 1>(count, row, keys, block_size, start, head_dim, rule);
    }
    f32x16 scores[kRows][kGroups];
    multiply_keys<Element, kRows>(queries_ + row * head_dim, head_dim, keys, block_size * Element::kPack, scores);
    if (!rule.scale_only())
      for (int i = 0; i < kRows; ++i)
        for (int g = 0; g < kGroups; ++g)
          scores[i][g] = rule.of(scores[i][g], head_[row + i], start + 16 * g - (visible_[row + i] - 1));
    // Softmax in powers of two.
    const float scale = 1.44269504f * (rule.scale_only() ? rule.scale : 1.0f);
    f32x16 peaks = load<f32x16>(peak_ + row);
    const f32x16 before = peaks;
    for (int i = 0; i < kRows; ++i) {
      if (visible_[row + i] < start + kKeys || first_visible_[row + i] > start)
        hide(scores[i], first_visible_[row + i] - start, visible_[row + i] - start);
      const f32x16 most = maximum(maximum(scores[i][0], scores[i][1]), maximum(scores[i][2], scores[i][3]));
      peaks[i] = std::max(peaks[i], horizontal_max(most) * scale);
    }
    // Before a row's window its scores are -inf, and so are its peaks: its weights are 0. A row that saw no other score,
    // or NaN, ends as NaN, which the logits then show.
    const f32x16 base = peaks == splat(-INFINITY) ? f32x16{} : peaks;
    const f32x16 decays = power_of_two(before - base);
    for (int i = 0; i < kRows; ++i) {
      f32x16 sum = total_[row + i] * decays[i];
      for (int g = 0; g < kGroups; ++g) {
        const f32x16 weight = power_of_two(fused_multiply_add(scores[i][g], splat(scale), splat(-base[i])));
        Element::narrow(weights_ + (row + i) * kKeys + 16 * g, weight);
        sum = sum + weight;
      }
      total_[row + i] = sum;
      peak_[row + i] = peaks[i];
      decay_[row + i] = decays[i];
    }
  }

  // Scores of keys outside [first, end): -inf.
  static void hide(f32x16 (&scores)[kGroups], int64_t first, int64_t end) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    for (int g = 0; g < kGroups; ++g) {
      const int32_t first_lane = int32_t(std::clamp<int64_t>(first - 16 * g, 0, 16));
      const int32_t end_lane = int32_t(std::clamp<int64_t>(end - 16 * g, 0, 16));
      scores[g] = (lanes >= first_lane) & (lanes < end_lane) ? scores[g] : splat(-INFINITY);
    }
  }

  template <int kRows>
  void add_rows(int count, int row, const Value* const (&values)[kGroups], int64_t num_keys, int64_t head_dim) {
    if constexpr (kRows > 1) {
      if (count < kRows) return add_rows<kRows - 1>(count, row, values, num_keys, head_dim);
    }
    const Value* weights = weights_ + row * kKeys;
    float* output = outputs_ + row * head_dim;
    const Value* columns[kGroups];
    for (int64_t first = 0; first < head_dim;) {
      for (int g = 0; g < kGroups; ++g) columns[g] = values[g] + first * Element::kPack;
      if (head_dim - first >= 64) {
        multiply_values<Element, kRows, 4>(weights, columns, num_keys, head_dim, decay_ + row, output + first);
        first += 64;
      } else {
        multiply_values<Element, kRows, 1>(weights, columns, num_keys, head_dim, decay_ + row, output + first);
        first += 16;
      }
    }
  }

  alignas(64) Value queries_[kTileRows * kMaxHeadDim];
  alignas(64) Value weights_[kTileRows * kKeys];
  alignas(64) float outputs_[kTileRows * kMaxHeadDim];
  alignas(64) f32x16 total_[kTileRows];
  // Read by sixteen.
  float peak_[kTileRows + 16] = {};
  float decay_[kTileRows];
  int64_t head_[kTileRows];
  // Keys from the first to before the last of these.
  int64_t first_visible_[kTileRows], visible_[kTileRows];
};

}  // namespace pdmesh
