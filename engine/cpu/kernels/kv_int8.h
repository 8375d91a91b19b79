// Keys and values in 8 bits: symmetric, one float32 scale for each token's head of dimensions; what engine/kv_int8.py
// computes in torch, to the bit.
//
//     K  [head_dim][block_size]    V  [block_size][head_dim]    scales of K [block_size]    of V [block_size]
//
// They are widened to float32 as they are read, and met by float32 rows. A key's scale multiplies its score, a value's
// its softmax weight: the loops over dimensions know of no scales.
#pragma once

#include <cmath>

#include "simd.h"

namespace pdmesh {

constexpr float kLargestInt8 = 127.0f;
constexpr float kSmallestInt8Head = 1e-30f;

// As PagedCache; strides in bytes.
struct Int8Cache {
  using Value = int8_t;
  using Row = Float32;
  static constexpr bool kScaled = true;

  int8_t* data;
  int64_t num_kv_heads, block_size, head_dim;
  int64_t block_stride, head_stride, layer_stride;

  int8_t* keys(int64_t block, int64_t layer, int64_t head) const {
    return data + block * block_stride + head * head_stride + layer * layer_stride;
  }
  int8_t* values(int64_t block, int64_t layer, int64_t head) const {
    return keys(block, layer, head) + block_size * head_dim;
  }
  float* key_scales(int64_t block, int64_t layer, int64_t head) const {
    return reinterpret_cast<float*>(keys(block, layer, head) + 2 * block_size * head_dim);
  }
  float* value_scales(int64_t block, int64_t layer, int64_t head) const {
    return key_scales(block, layer, head) + block_size;
  }

  static f32x16 columns(const int8_t* from) {
    return (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load<__m128i>(from)));
  }

  // A token's K and V of one head, [head_dim] each.
  void store_head(int64_t slot, int64_t layer, int64_t head, const float* key, const float* value) const {
    const int64_t block = slot / block_size, offset = slot % block_size;
    int8_t quantized[16];
    int8_t* to = keys(block, layer, head) + offset;
    const float key_inverse = scale_head(key, key_scales(block, layer, head) + offset);
    for (int64_t first = 0; first < head_dim; first += 16) {
      narrow(quantized, load<f32x16>(key + first) * key_inverse);
      for (int64_t i = 0; i < 16; ++i) to[(first + i) * block_size] = quantized[i];
    }
    to = values(block, layer, head) + offset * head_dim;
    const float value_inverse = scale_head(value, value_scales(block, layer, head) + offset);
    for (int64_t first = 0; first < head_dim; first += 16)
      narrow(to + first, load<f32x16>(value + first) * value_inverse);
  }

 private:
  // Stores a head's scale. Returns what its values are multiplied with.
  float scale_head(const float* values, float* scale) const {
    // Without their signs, floats are ordered as their bits are, and NaN lies above all others.
    u32x16 bits = {};
    for (int64_t first = 0; first < head_dim; first += 16) {
      const u32x16 sizes = as_bits(load<f32x16>(values + first)) & 0x7fffffffu;
      bits = sizes > bits ? sizes : bits;
    }
    const uint32_t most = _mm512_reduce_max_epu32((__m512i)bits);
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7f800000u;
    *scale = finite ? largest / kLargestInt8 : NAN;
    return finite && largest > kSmallestInt8Head ? kLargestInt8 / largest : 0.0f;
  }

  // To nearest, ties to even; NaN is 0.
  static void narrow(int8_t* to, f32x16 values) {
    values = values == values ? values : f32x16{};
    store(to, _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)values)));
  }
};

}  // namespace pdmesh
