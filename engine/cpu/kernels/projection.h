// Where the sums of the product that makes q, k and v go: queries to rows, keys and values to the cache, q and k turned
// by their positions' angles.
#pragma once

#include <algorithm>

#include "attention.h"

namespace pdmesh {

// The angles by which pairs of a head's dimensions turn at each position.
struct Rotation {
  const float* cosines;  // [positions, head_dim / 2], and 16 values beyond
  const float* sines;
  int64_t stride;      // from one position's to the next one's; 0: all turn alike
  int64_t num_turned;  // pairs of a head's dimensions that turn at all
};

// A panel of q or k holds 16 dimensions of one head's first half beside the 16 that they turn with, half a head further
// (GPT-NeoX's order, that of Hugging Face's Llama); the last panel of a head may be filled up with zeros. Where but the
// first dimensions of a head turn, pairs of those come first; what is left is halved likewise, and its angles are 0.
// Behind them, panels of v hold its dimensions as they come.
template <class Element>
struct Projection {
  using Value = typename Element::Value;
  static constexpr int kPack = Element::kPack;

  PagedCache<Element> cache;
  int64_t layer, num_heads;
  Rotation rotation;

  // One row's two vectors of a panel. `queries` [num_heads * head_dim] is the row's.
  void store_sums(int64_t panel, int64_t position, int64_t slot, f32x16 left, f32x16 right, Value* queries) const {
    const int64_t half = cache.head_dim / 2, panels_of_head = (half + 15) / 16;
    const int64_t head = panel / panels_of_head, first = panel % panels_of_head * 16;
    if (head >= num_heads + cache.num_kv_heads) {
      const int64_t column = (panel - (num_heads + cache.num_kv_heads) * panels_of_head) * kPanel;
      store_value(column, slot, left);
      store_value(column + 16, slot, right);
      return;
    }
    const f32x16 cosine = load<f32x16>(rotation.cosines + position * rotation.stride + first);
    const f32x16 sine = load<f32x16>(rotation.sines + position * rotation.stride + first);
    const f32x16 turned_left = left * cosine - right * sine, turned_right = right * cosine + left * sine;
    auto put = [&](int64_t dim, f32x16 values, int64_t begin, int64_t end) {
      if (head < num_heads)
        store_query(queries + head * cache.head_dim + dim, values, begin, end);
      else
        store_key(head - num_heads, dim, slot, values, begin, end);
    };
    // Lanes of pairs that turn, and behind them lanes of pairs that do not; few panels hold both.
    const int64_t count = std::min<int64_t>(16, half - first);
    const int64_t num_turned = std::clamp<int64_t>(rotation.num_turned - first, 0, count);
    if (num_turned > 0) {
      put(first, turned_left, 0, num_turned);
      put(rotation.num_turned + first, turned_right, 0, num_turned);
    }
    if (num_turned < count) {
      put(rotation.num_turned + first + num_turned, turned_left, num_turned, count);
      put(half + first + num_turned, turned_right, num_turned, count);
    }
  }

 private:
  // Lanes [begin, end) of the values.
  void store_query(Value* to, f32x16 values, int64_t begin, int64_t end) const {
    if (end - begin == 16) return Element::narrow(to, values);
    Value narrowed[16];
    Element::narrow(narrowed, values);
    std::copy_n(narrowed + begin, end - begin, to);
  }

  // Lanes [begin, end) of the values, as dimensions from `dim` on of a key.
  void store_key(int64_t head, int64_t dim, int64_t slot, f32x16 values, int64_t begin, int64_t end) const {
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
  void store_value(int64_t column, int64_t slot, f32x16 values) const {
    const int64_t head = column / cache.head_dim, offset = slot % cache.block_size;
    if (head >= cache.num_kv_heads) return;
    Value narrowed[16];
    Element::narrow(narrowed, values);
    Value* to = cache.values(slot / cache.block_size, layer, head) +
                (offset / kPack * cache.head_dim + column % cache.head_dim) * kPack + offset % kPack;
    for (int64_t i = 0; i < 16; ++i) to[i * kPack] = narrowed[i];
  }
};

}  // namespace pdmesh
