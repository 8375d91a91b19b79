// Where the sums of the product that makes q, k and v go: queries to rows, keys and values to the cache, q and k turned
// by their positions' angles.
#pragma once

#include "attention.h"

namespace pdmesh {

// Where one token's K and V go: to the cache, as they come.
template <class Element>
struct CacheSink {
  using Value = typename Element::Value;
  static constexpr int kPack = Element::kPack;

  const PagedCache<Element>& cache;
  int64_t layer, slot;

  // `count` dimensions from `first` on of a key.
  void key(int64_t head, int64_t first, f32x16 values, int64_t count) const {
    Value narrowed[16];
    Element::narrow(narrowed, values);
    Value* to = cache.keys(slot / cache.block_size, layer, head) +
                (first / kPack * cache.block_size + slot % cache.block_size) * kPack;
    for (int64_t i = 0; i < count; i += kPack, to += cache.block_size * kPack) std::copy_n(narrowed + i, kPack, to);
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

// Or side by side in float32, until all of a head are there.
struct HeadsSink {
  float* keys;    // [num_kv_heads * head_dim], and 16 values beyond
  float* values;  // [num_kv_heads * head_dim], and a panel beyond
  int64_t head_dim;

  void key(int64_t head, int64_t first, f32x16 of_key, int64_t count) const {
    float wide[16];
    store(wide, of_key);
    std::copy_n(wide, count, keys + head * head_dim + first);
  }
  void value(int64_t column, f32x16 of_value) const { store(values + column, of_value); }
};

// Where the sums of the product that makes q, k and v go. A panel of q or k holds 16 dimensions of one head's first half
// beside the 16 that they turn with, half a head further (GPT-NeoX's order, that of Hugging Face's Llama); the last
// panel of a head may be filled up with zeros. Where but the first dimensions of a head turn, panels of those come first;
// what is left is halved likewise. Behind them, panels of v hold its dimensions as they come.
template <class Element, class Sink>
struct Projection {
  using Value = typename Element::Value;

  int64_t num_heads, num_kv_heads, head_dim;
  int64_t num_turned;  // pairs of a head's dimensions: half of it, or a multiple of 16
  const float* cosines;  // [positions, head_dim / 2], and 16 values beyond
  const float* sines;

  // One row's two vectors of a panel. `queries` [num_heads * head_dim] is the row's.
  void store_sums(int64_t panel, int64_t position, f32x16 left, f32x16 right, Value* queries, Sink sink) const {
    const int64_t half = head_dim / 2, panels_of_head = (half + 15) / 16;
    const int64_t head = panel / panels_of_head, first = panel % panels_of_head * 16;
    if (head >= num_heads + num_kv_heads) {
      const int64_t column = (panel - (num_heads + num_kv_heads) * panels_of_head) * kPanel;
      sink.value(column, left);
      sink.value(column + 16, right);
      return;
    }
    const f32x16 cosine = load<f32x16>(cosines + position * half + first);
    const f32x16 sine = load<f32x16>(sines + position * half + first);
    const f32x16 turned_left = left * cosine - right * sine, turned_right = right * cosine + left * sine;
    const int64_t count = std::min<int64_t>(16, half - first);
    const int64_t at_left = first < num_turned ? first : num_turned + first;
    const int64_t at_right = first < num_turned ? num_turned + first : half + first;
    if (head < num_heads) {
      store_query(queries + head * head_dim + at_left, turned_left, count);
      store_query(queries + head * head_dim + at_right, turned_right, count);
    } else {
      sink.key(head - num_heads, at_left, turned_left, count);
      sink.key(head - num_heads, at_right, turned_right, count);
    }
  }

 private:
  void store_query(Value* to, f32x16 values, int64_t count) const {
    if (count == 16) return Element::narrow(to, values);
    Value narrowed[16];
    Element::narrow(narrowed, values);
    std::copy_n(narrowed, count, to);
  }
};

}  // namespace pdmesh
