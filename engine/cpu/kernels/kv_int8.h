// Keys and values in 8 bits: symmetric, one float32 scale for each token's head of dimensions; what engine/kv_int8.py
// computes in torch, to the bit.
//
//     K  [head_dim / 2][block_size][2]    V  [block_size / 2][head_dim][2]    scales of K [block_size]    of V [block_size]
//
// Queries and softmax weights meet them as integers of 16 bits, which round less than the weights' own types do: products
// are exact, two to a multiply-add, and 8 bits are widened to 16 by one instruction. Scales are multiplied in afterwards:
// a key's to its score, a value's to its softmax weight before that is rounded.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace pdmesh {

constexpr float kLargestInt8 = 127.0f;
// Sums of products with 8 bits fit 32 for up to 512 of them.
constexpr float kLargestInt16 = 32767.0f;

// Of values in size: the bits of the largest. Without their signs floats are ordered as their bits are, NaN above all.
inline u32x16 largest_bits(u32x16 bits, f32x16 values) {
  const u32x16 sizes = as_bits(values) & 0x7fffffffu;
  return sizes > bits ? sizes : bits;
}

// How values are made integers of -limit to limit: times `inverse`; and `scale` brings them back. Values that are next
// to nothing become 0, as do all beside one that is not finite, with a scale of NaN: what reads them shows it.
struct Quantization {
  float scale, inverse;

  Quantization(u32x16 bits, float limit) {
    const uint32_t most = _mm512_reduce_max_epu32((__m512i)bits);
    float largest;
    std::memcpy(&largest, &most, sizeof largest);
    const bool finite = most < 0x7f800000u;
    scale = finite ? largest / limit : NAN;
    inverse = finite && largest > 1e-30f ? limit / largest : 0.0f;
  }

  // To nearest, ties to even.
  __m512i integers(f32x16 values) const {
    values = values * inverse;
    return _mm512_cvtps_epi32((__m512)(values == values ? values : f32x16{}));
  }
};

// As PagedCache; strides in bytes.
struct Int8Cache {
  using Value = int8_t;
  using RowValue = int16_t;
  using Sums = i32x16;
  static constexpr int kPack = 2;
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

  static i32x16 columns(const int8_t* from) { return (i32x16)_mm512_cvtepi8_epi16(load<__m256i>(from)); }

  static i32x16 multiply_add(i32x16 sums, uint32_t row, i32x16 columns) {
    const __m512i pairs = _mm512_set1_epi32(int32_t(row));
#if defined(__AVX512VNNI__)
    return (i32x16)_mm512_dpwssd_epi32((__m512i)sums, pairs, (__m512i)columns);
#else
    return sums + (i32x16)_mm512_madd_epi16(pairs, (__m512i)columns);
#endif
  }

  // A token's K and V of one head, [head_dim] each.
  void store_head(int64_t slot, int64_t layer, int64_t head, const float* key, const float* value) const {
    const int64_t block = slot / block_size, offset = slot % block_size;
    quantize(key, key_scales(block, layer, head) + offset, [&](int64_t dim, const int8_t* quantized) {
      int8_t* to = keys(block, layer, head) + (dim / 2 * block_size + offset) * 2;
      for (int64_t i = 0; i < 16; i += 2, to += 2 * block_size) std::copy_n(quantized + i, 2, to);
    });
    quantize(value, value_scales(block, layer, head) + offset, [&](int64_t dim, const int8_t* quantized) {
      int8_t* to = values(block, layer, head) + (offset / 2 * head_dim + dim) * 2 + offset % 2;
      for (int64_t i = 0; i < 16; ++i) to[2 * i] = quantized[i];
    });
  }

 private:
  // Calls put(dim, 16 quantised values) for all dimensions of a head.
  template <class Put>
  void quantize(const float* head, float* scale, const Put& put) const {
    u32x16 bits = {};
    for (int64_t dim = 0; dim < head_dim; dim += 16) bits = largest_bits(bits, load<f32x16>(head + dim));
    const Quantization quantization(bits, kLargestInt8);
    *scale = quantization.scale;
    for (int64_t dim = 0; dim < head_dim; dim += 16) {
      int8_t quantized[16];
      store(quantized, _mm512_cvtepi32_epi8(quantization.integers(load<f32x16>(head + dim))));
      put(dim, quantized);
    }
  }
};

}  // namespace pdmesh
