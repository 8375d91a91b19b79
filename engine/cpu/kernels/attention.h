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

#include "kv_int8.h"
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
  // What rows, queries and softmax weights, are multiplied as, and into what.
  using RowValue = Value;
  using Sums = f32x16;
  static constexpr int kPack = Element::kPack;
  static constexpr bool kScaled = false;

  Value* data;
  int64_t num_kv_heads, block_size, head_dim;
  int64_t block_stride, head_stride, layer_stride;

  Value* keys(int64_t block, int64_t layer, int64_t head) const {
    return data + block * block_stride + head * head_stride + layer * layer_stride;
  }
  Value* values(int64_t block, int64_t layer, int64_t head) const {
    return keys(block, layer, head) + block_size * head_dim;
  }
  // kPack values of each of 16 keys or dimensions.
  static f32x16 columns(const Value* from) { return load<f32x16>(from); }
  static f32x16 multiply_add(f32x16 sums, uint32_t row, f32x16 columns) {
    return Element::multiply_add(sums, row, columns);
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

// products[i][g] = row i * the 16 keys at keys[g]; neighbouring dimensions lie step_values apart.
template <class Cache, int kRows>
inline void multiply_keys(const typename Cache::RowValue* rows, int64_t head_dim,
                          const typename Cache::Value* const (&keys)[kGroups], int64_t step_values,
                          typename Cache::Sums (&products)[kRows][kGroups]) {
  using Sums = typename Cache::Sums;
  for (int i = 0; i < kRows; ++i)
    for (int g = 0; g < kGroups; ++g) products[i][g] = Sums{};
  for (int64_t step = 0; step < head_dim / Cache::kPack; ++step) {
    Sums columns[kGroups];
    for (int g = 0; g < kGroups; ++g) columns[g] = Cache::columns(keys[g] + step * step_values);
    for (int i = 0; i < kRows; ++i) {
      const uint32_t unit = row_unit(rows + i * head_dim, step);
      for (int g = 0; g < kGroups; ++g) products[i][g] = Cache::multiply_add(products[i][g], unit, columns[g]);
    }
  }
}

// output[i] = output[i] * decay[i] + weights[i] * values * weight_scale[i], over num_keys keys and 16 * kColumns
// dimensions. What is not scaled is added to the output one by one.
template <class Cache, int kRows, int kColumns>
inline void multiply_values(const typename Cache::RowValue* weights, const float* weight_scale,
                            const typename Cache::Value* const (&values)[kGroups], int64_t num_keys, int64_t head_dim,
                            const float* decay, float* output) {
  using Sums = typename Cache::Sums;
  constexpr int kPack = Cache::kPack;
  Sums sums[kRows][kColumns];
  auto decayed = [&](int i, int j) { return load<f32x16>(output + i * head_dim + 16 * j) * decay[i]; };
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) {
      if constexpr (Cache::kScaled)
        sums[i][j] = Sums{};
      else
        sums[i][j] = decayed(i, j);
    }
  for (int64_t key = 0; key < num_keys; key += kPack) {
    const typename Cache::Value* from = values[key / 16] + key % 16 * head_dim;
    Sums columns[kColumns];
    for (int j = 0; j < kColumns; ++j) columns[j] = Cache::columns(from + j * 16 * kPack);
    // Of the pair's second key nothing is written yet: its weight is 0, but 0 times garbage may be NaN.
    if constexpr (kPack == 2 && !Cache::kScaled)
      if (key + 1 == num_keys)
        for (int j = 0; j < kColumns; ++j) columns[j] = as_float(as_bits(columns[j]) & 0xffffu);
    for (int i = 0; i < kRows; ++i) {
      const uint32_t unit = row_unit(weights + i * kKeys, key / kPack);
      for (int j = 0; j < kColumns; ++j) sums[i][j] = Cache::multiply_add(sums[i][j], unit, columns[j]);
    }
  }
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kColumns; ++j) {
      f32x16 sum;
      if constexpr (Cache::kScaled)
        sum = fused_multiply_add(__builtin_convertvector(sums[i][j], f32x16), splat(weight_scale[i]), decayed(i, j));
      else
        sum = sums[i][j];
      store(output + i * head_dim + 16 * j, sum);
    }
}

// Of queries and outputs of one type, over K and V of a PagedCache of the same, or of an Int8Cache.
template <class Element, class Cache = PagedCache<Element>>
class AttentionTile {
  using Value = typename Element::Value;
  using Stored = typename Cache::Value;
  using RowValue = typename Cache::RowValue;

 public:
  // Attends a tile's rows of one KV head. `queries` and `outputs` are [T, num_heads * head_dim], rows query_bytes and
  // output_bytes apart. A row sees the last `window` keys up to its own; 0: all of them.
  void attend(const Cache& cache, int64_t layer, int64_t kv_head, int64_t group, int64_t window, const Scores& rule,
              const QueryTile& tile, const char* queries, int64_t query_bytes, char* outputs,
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
      take_query(row, reinterpret_cast<const Value*>(queries + place(row, sequence.first_row, query_bytes)), head_dim);
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
  void take_query(int row, const Value* query, int64_t head_dim) {
    RowValue* to = queries_ + row * head_dim;
    if constexpr (Cache::kScaled) {
      u32x16 bits = {};
      for (int64_t i = 0; i < head_dim; i += 16) bits = largest_bits(bits, Element::widen(query + i));
      const Quantization quantization(bits, kLargestInt16);
      for (int64_t i = 0; i < head_dim; i += 16)
        store(to + i, _mm512_cvtepi32_epi16(quantization.integers(Element::widen(query + i))));
      query_scale_[row] = quantization.scale;
    } else {
      std::memcpy(to, query, head_dim * sizeof(Value));
    }
  }

  void add_keys(const Cache& cache, int64_t layer, int64_t kv_head, const int64_t* block_table, int64_t start,
                int64_t num_keys, int rows, const Scores& rule) {
    const int64_t head_dim = cache.head_dim, block_size = cache.block_size;
    const Stored *keys[kGroups], *values[kGroups];
    for (int g = 0; g < kGroups; ++g) {
      // Keys past the end are masked: any that can be read will do.
      const int64_t token = 16 * g < num_keys ? start + 16 * g : start;
      const int64_t block = block_table[token / block_size], offset = token % block_size;
      keys[g] = cache.keys(block, layer, kv_head) + offset * Cache::kPack;
      values[g] = cache.values(block, layer, kv_head) + offset * head_dim;
      if constexpr (Cache::kScaled) {
        key_scales_[g] = load<f32x16>(cache.key_scales(block, layer, kv_head) + offset);
        value_scales_[g] = load<f32x16>(cache.value_scales(block, layer, kv_head) + offset);
      }
    }
    for (int row = 0; row < rows; row += kAttentionRows)
      weigh_rows<kAttentionRows>(std::min(kAttentionRows, rows - row), row, keys, block_size, start, head_dim, rule);
    for (int row = 0; row < rows; row += kAttentionRows)
      add_rows<kAttentionRows>(std::min(kAttentionRows, rows - row), row, values, num_keys, head_dim);
  }

  // Softmax weights of 64 keys for `count` rows from `row` on, relative to 2^peak of what was seen so far.
  template <int kRows>
  void weigh_rows(int count, int row, const Stored* const (&keys)[kGroups], int64_t block_size, int64_t start,
                  int64_t head_dim, const Scores& rule) {
    if constexpr (kRows > 1) {
      if (count < kRows) return weigh_rows<kRows - 1>(count, row, keys, block_size, start, head_dim, rule);
    }
    typename Cache::Sums products[kRows][kGroups];
    multiply_keys<Cache, kRows>(queries_ + row * head_dim, head_dim, keys, block_size * Cache::kPack, products);
    f32x16 scores[kRows][kGroups];
    for (int i = 0; i < kRows; ++i)
      for (int g = 0; g < kGroups; ++g) {
        if constexpr (Cache::kScaled)
          scores[i][g] = __builtin_convertvector(products[i][g], f32x16) * (key_scales_[g] * query_scale_[row + i]);
        else
          scores[i][g] = products[i][g];
      }
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
        scores[i][g] = power_of_two(fused_multiply_add(scores[i][g], splat(scale), splat(-base[i])));
        sum = sum + scores[i][g];
      }
      total_[row + i] = sum;
      take_weights(row + i, scores[i]);
      peak_[row + i] = peaks[i];
      decay_[row + i] = decays[i];
    }
  }

  void take_weights(int row, f32x16 (&weights)[kGroups]) {
    RowValue* to = weights_ + row * kKeys;
    if constexpr (Cache::kScaled) {
      u32x16 bits = {};
      for (int g = 0; g < kGroups; ++g) {
        // Scales of keys that are not there yet may be NaN.
        weights[g] = weights[g] > f32x16{} ? weights[g] * value_scales_[g] : f32x16{};
        bits = largest_bits(bits, weights[g]);
      }
      const Quantization quantization(bits, kLargestInt16);
      for (int g = 0; g < kGroups; ++g)
        store(to + 16 * g, _mm512_cvtepi32_epi16(quantization.integers(weights[g])));
      weight_scale_[row] = quantization.scale;
    } else {
      for (int g = 0; g < kGroups; ++g) Element::narrow(to + 16 * g, weights[g]);
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
  void add_rows(int count, int row, const Stored* const (&values)[kGroups], int64_t num_keys, int64_t head_dim) {
    if constexpr (kRows > 1) {
      if (count < kRows) return add_rows<kRows - 1>(count, row, values, num_keys, head_dim);
    }
    const RowValue* weights = weights_ + row * kKeys;
    const float *weight_scale = weight_scale_ + row, *decay = decay_ + row;
    float* output = outputs_ + row * head_dim;
    const Stored* columns[kGroups];
    for (int64_t first = 0; first < head_dim;) {
      for (int g = 0; g < kGroups; ++g) columns[g] = values[g] + first * Cache::kPack;
      if (head_dim - first >= 64) {
        multiply_values<Cache, kRows, 4>(weights, weight_scale, columns, num_keys, head_dim, decay, output + first);
        first += 64;
      } else {
        multiply_values<Cache, kRows, 1>(weights, weight_scale, columns, num_keys, head_dim, decay, output + first);
        first += 16;
      }
    }
  }

  alignas(64) RowValue queries_[kTileRows * kMaxHeadDim];
  alignas(64) RowValue weights_[kTileRows * kKeys];
  alignas(64) float outputs_[kTileRows * kMaxHeadDim];
  alignas(64) f32x16 total_[kTileRows];
  // Where K and V have scales: of the 64 keys at hand, of their values, and of rows.
  f32x16 key_scales_[kGroups], value_scales_[kGroups];
  float query_scale_[kTileRows], weight_scale_[kTileRows];
  // Read by sixteen.
  float peak_[kTileRows + 16] = {};
  float decay_[kTileRows];
  int64_t head_[kTileRows];
  // Keys from the first to before the last of these.
  int64_t first_visible_[kTileRows], visible_[kTileRows];
};

}  // namespace pdmesh
