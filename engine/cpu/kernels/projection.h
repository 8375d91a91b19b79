// Where the sums of the product that makes q, k and v go: queries to rows, keys and values to the cache, q and k turned
// by their positions' angles.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention.h"

namespace pdmesh {

// The angles by which pairs of a head's dimensions turn at each position.
struct Rotation {
  const float* cosines;  // [positions, head_dim / 2], and 16 values beyond
  const float* sines;
  int64_t stride;      // from one position's to the next one's; 0: all turn alike
  int64_t num_turned;  // pairs of a head's dimensions that turn at all
};

// Where one token's K and V go: to the cache, as they come.
template <class Element>
struct CacheSink {
  using Value = typename Element::Value;
  static constexpr int kPack = Element::kPack;

  const PagedCache<Element>& cache;
  int64_t layer, slot;

  // Lanes [begin, end) of the values, as dimensions from `dim` on of a key.
  void key(int64_t head, int64_t dim, f32x16 values, int64_t begin, int64_t end) const {
    Value narrowed[16];
    Element::narrow(narrowed, values);
    Value* tile = cache.keys(slot / cache.block_size, layer, head) + slot % cache.block_size * kPack;
    const int64_t step_values = cache.block_size * kPack;
    if (dim % kPack || (end - begin) % kPack) {
      // An odd number of pairs turns: neighbours in the cache come from unlike places.
      for (int64_t i = begin; i < end; ++i, ++dim) tile[dim / kPack * step_values + dim % kPack] = narrowed[i];
      return;
    }
    Value* to = tile + dim / kPack * step_values;
    for (int64_t i = begin; i < end; i += kPack, to += step_values) std::copy_n(narrowed + i, kPack, to);
  }

  // 16 dimensions of a value; `column` counts those of all heads.
  void value(int64_t column, f32x16 values) const {
    const int64_t head = column / cache.head_dim, offset = slot % cache.block_size;
    if (head >= cache.num_kv_heads) return;
    Value narrowed[16];
    Element::narrow(narrowed, values);
    Value* to = cache.values(slot / cache.block_size, layer, head) +
                (offset / kPack * cache.head_dim + column % cache.head_dim) * kPack + offset % kPack;
    for (int64_t i = 0; i < 16; ++i) to[i * kPack] = narrowed[i];
  }
};

// Or side by side in float32, [num_kv_heads * head_dim] each and a panel beyond, until heads are there whole.
struct HeadsSink {
  float* keys;
  float* values;
  int64_t head_dim;

  void key(int64_t head, int64_t dim, f32x16 of_key, int64_t begin, int64_t end) const {
    float lanes[16];
    store(lanes, of_key);
    std::copy(lanes + begin, lanes + end, keys + head * head_dim + dim);
  }
  void value(int64_t column, f32x16 of_value) const { store(values + column, of_value); }
};

// A panel of q or k holds 16 dimensions of one head's first half beside the 16 that they turn with, half a head further
// (GPT-NeoX's order, that of Hugging Face's Llama); the last panel of a head may be filled up with zeros. Where but the
// first dimensions of a head turn, pairs of those come first; what is left is halved likewise, and its angles are 0.
// Behind them, panels of v hold its dimensions as they come.
template <class Element>
struct Projection {
  using Value = typename Element::Value;

  int64_t num_heads, num_kv_heads, head_dim;
  Rotation rotation;

  // One row's two vectors of a panel. `queries` [num_heads * head_dim] is the row's.
  template <class Sink>
  void store_sums(int64_t panel, int64_t position, f32x16 left, f32x16 right, Value* queries, const Sink& sink) const {
    const int64_t half = head_dim / 2, panels_of_head = (half + 15) / 16;
    const int64_t head = panel / panels_of_head, first = panel % panels_of_head * 16;
    if (head >= num_heads + num_kv_heads) {
      const int64_t column = (panel - (num_heads + num_kv_heads) * panels_of_head) * kPanel;
      sink.value(column, left);
      sink.value(column + 16, right);
      return;
    }
    const f32x16 cosine = load<f32x16>(rotation.cosines + position * rotation.stride + first);
    const f32x16 sine = load<f32x16>(rotation.sines + position * rotation.stride + first);
    const f32x16 turned_left = left * cosine - right * sine, turned_right = right * cosine + left * sine;
    auto put = [&](int64_t dim, f32x16 values, int64_t begin, int64_t end) __attribute__((always_inline)) {
      if (head < num_heads)
        store_query(queries + head * head_dim + dim, values, begin, end);
      else
        sink.key(head - num_heads, dim, values, begin, end);
    };
    // Lanes of pairs that turn, and behind them lanes of pairs that do not; few panels hold both.
    const int64_t count = std::min<int64_t>(16, half - first);
    const int64_t num_turned = std::clamp<int64_t>(rotation.num_turned - first, 0, count);
    if (num_turned == 16) {
      // Most panels, and a whole vector's stores are short.
      put(first, turned_left, 0, 16);
      put(rotation.num_turned + first, turned_right, 0, 16);
      return;
    }
    if (num_turned > 0) {
      put(first, turned_left, 0, num_turned);
      put(rotation.num_turned + first, turned_right, 0, num_turned);
    }
    if (num_turned < count) {
      put(rotation.num_turned + first + num_turned, turned_left, num_turned, count);
      put(half + first + num_turned, turned_right, num_turned, count);
    }
  }

  // The n sums of a row whose heads are there whole. With scales, each head of q and k is first brought to unit root mean
  // square: those of q's heads and behind them those of k's lie as a head's panels do.
  template <class Sink>
  void store_row(const float* sums, int64_t n, const float* scales, float epsilon, int64_t position, Value* queries,
                 const Sink& sink) const {
    const int64_t num_turned_heads = num_heads + num_kv_heads, num_panels = (n + kPanel - 1) / kPanel;
    const int64_t panels_of_head = (head_dim / 2 + 15) / 16, size = panels_of_head * kPanel;
    for (int64_t head = 0; scales && head < num_turned_heads; ++head) {
      const float* of_head = sums + head * size;
      const float* scale = scales + (head < num_heads ? 0 : size);
      f32x16 squares = {};
      for (int64_t i = 0; i < size; i += 16) {
        const f32x16 values = load<f32x16>(of_head + i);
        squares = fused_multiply_add(values, values, squares);
      }
      const float factor = 1.0f / std::sqrt(horizontal_sum(squares) / float(head_dim) + epsilon);
      for (int64_t i = 0; i < size; i += kPanel)
        store_sums(head * panels_of_head + i / kPanel, position,
                   load<f32x16>(of_head + i) * factor * load<f32x16>(scale + i),
                   load<f32x16>(of_head + i + 16) * factor * load<f32x16>(scale + i + 16), queries, sink);
    }
    for (int64_t panel = scales ? num_turned_heads * panels_of_head : 0; panel < num_panels; ++panel)
      store_sums(panel, position, load<f32x16>(sums + panel * kPanel), load<f32x16>(sums + panel * kPanel + 16),
                 queries, sink);
  }

 private:
  // Lanes [begin, end) of the values.
  void store_query(Value* to, f32x16 values, int64_t begin, int64_t end) const {
    if (end - begin == 16) return Element::narrow(to, values);
    Value narrowed[16];
    Element::narrow(narrowed, values);
    std::copy_n(narrowed + begin, end - begin, to);
  }
};

}  // namespace pdmesh
