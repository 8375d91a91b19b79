// Weights to few bits, as engine/weights/quantized.py has them, bit for bit; and into panels.
#include <cmath>
#include <limits>

#include "quantized.h"

namespace pdmesh {
namespace {

// How often the range of 4 bits is fitted.
constexpr int kFits = 3;

// One group of a row of floats.
struct Group {
  f32x16 low, high;

  bool finite() const {
    const i32x16 not_zero = (low - low) + (high - high) != 0.0f;
    return _mm512_test_epi32_mask((__m512i)not_zero, (__m512i)not_zero) == 0;
  }
};

inline uint16_t narrow_half(float value) { return _cvtss_sh(value, _MM_FROUND_TO_NEAREST_INT); }
inline float rounded_to_half(float value) { return _cvtsh_ss(narrow_half(value)); }

inline f32x16 clamped(f32x16 values, float low, float high) {
  return (f32x16)_mm512_min_ps(_mm512_max_ps((__m512)values, (__m512)splat(low)), (__m512)splat(high));
}

// What integers mean: scale * integer + minimum.
struct Range {
  float scale, minimum;

  f32x16 integers(f32x16 values, float low, float high) const {
    return clamped(nearest((values - minimum) / (scale == 0.0f ? 1.0f : scale)), low, high);
  }
  f32x16 squared_errors(f32x16 values) const {
    const f32x16 error = values - (integers(values, 0.0f, 15.0f) * scale + minimum);
    return error * error;
  }
  float error(const Group& group) const {
    return horizontal_sum(squared_errors(group.low) + squared_errors(group.high));
  }

  // The range by which these integers come nearest to the group's values, by least squares; NaN if all are the same.
  Range fitted(const Group& group) const {
    const f32x16 low = integers(group.low, 0.0f, 15.0f), high = integers(group.high, 0.0f, 15.0f);
    const float of_integers = horizontal_sum(low + high), of_values = horizontal_sum(group.low + group.high);
    const float products = kGroup * horizontal_sum(low * group.low + high * group.high);
    const float squares = kGroup * horizontal_sum(low * low + high * high);
    const float fit =
        rounded_to_half((products - of_integers * of_values) / (squares - of_integers * of_integers));
    return {fit, rounded_to_half((of_values - fit * of_integers) / kGroup)};
  }
};

inline Range choose_range(Int8, const Group& group) {
  const f32x16 low = maximum(group.low, -group.low), high = maximum(group.high, -group.high);
  return {rounded_to_half(horizontal_max(maximum(low, high)) / 127.0f), 0.0f};
}

// From the least value to the largest, or symmetric around 0; then, while that helps, the line through the nearest
// integers: the smallest squared error of these.
inline Range choose_range(Int4, const Group& group) {
  const float high = horizontal_max(maximum(group.low, group.high));
  const float low = -horizontal_max(maximum(-group.low, -group.high));
  Range range = {rounded_to_half((high - low) / 15.0f), rounded_to_half(low)};
  float error = range.error(group);
  const auto try_range = [&](const Range& other) {
    const float of_other = other.error(group);
    const bool better = of_other < error;
    if (better) range = other, error = of_other;
    return better;
  };
  const float scale = rounded_to_half((std::fabs(high) > std::fabs(low) ? high : low) / -8.0f);
  try_range({scale, rounded_to_half(scale * -8.0f)});
  for (int fit = 0; fit < kFits && try_range(range.fitted(group)); ++fit) {
  }
  return range;
}

inline void store_integers(Int8, const Range& range, const Group& group, uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    const f32x16 integers = range.integers(half ? group.high : group.low, -127.0f, 127.0f);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16 * half),
                     _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)integers)));
  }
}

inline void store_integers(Int4, const Range& range, const Group& group, uint8_t* to) {
  for (int half = 0; half < 2; ++half) {
    const f32x16 integers = range.integers(half ? group.high : group.low, 0.0f, 15.0f);
    const __m128i bytes = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32((__m512)integers));
    // Pairs of bytes to one: the second one times 16 beside the first.
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(to + 8 * half), _mm_packus_epi16(pairs, pairs));
  }
}

// Quantises rows [n, k]; of values, scales and minima each row lies as in QuantizedWeight.
template <class Format>
void quantize(const float* rows, int64_t n, int64_t k, uint8_t* values, uint16_t* scales, uint16_t* minima) {
  constexpr int kGroupBytes = kGroup / Format::kDepth * 4;
  const int64_t num_groups = (k + kGroup - 1) / kGroup;
#pragma omp parallel for if (n * k >= 1 << 16)
  for (int64_t row = 0; row < n; ++row)
    for (int64_t g = 0; g < num_groups; ++g) {
      const int64_t place = row * num_groups + g, num_left = std::min<int64_t>(kGroup, k - g * kGroup);
      const float* from = rows + row * k + g * kGroup;
      float padded[kGroup];
      // The last value again: a group's range is that of its own values.
      for (int64_t i = 0; num_left < kGroup && i < kGroup; ++i) padded[i] = from[std::min(i, num_left - 1)];
      if (num_left < kGroup) from = padded;
      const Group group = {load<f32x16>(from), load<f32x16>(from + 16)};
      const Range range = choose_range(Format{}, group);
      // Of what cannot be quantised the scale says so.
      scales[place] = narrow_half(group.finite() ? range.scale : std::numeric_limits<float>::infinity());
      if (Format::kHasMinima) minima[place] = narrow_half(range.minimum);
      uint8_t* to = values + place * kGroupBytes;
      store_integers(Format{}, range, group, to);
      for (int64_t i = num_left; i < kGroup; ++i) {
        if (Format::kDepth == 4)
          to[i] = 0;
        else
          to[i / 2] &= i % 2 ? 0x0f : 0xf0;
      }
    }
}

// A lane of a line from integers in the order of k: those of even k come to the lower half.
inline uint32_t lane_of(Int8, uint32_t bytes) {
  return (bytes & 0xff0000ffu) | (bytes & 0x0000ff00u) << 8 | (bytes & 0x00ff0000u) >> 8;
}
inline uint32_t lane_of(Int4, uint32_t nibbles) {
  return _pext_u32(nibbles, 0x0f0f0f0fu) | _pext_u32(nibbles, 0xf0f0f0f0u) << 16;
}

// Stores rows of a quantised matrix of k columns into a packed one: as its output i row rows[i], or none if negative.
template <class Format>
void pack_quantized(char* packed, int64_t k, const int64_t* rows, int64_t num_rows, const uint8_t* values,
                    const uint16_t* scales, const uint16_t* minima) {
  using Matrix = QuantizedMatrix<Format>;
  const int64_t num_groups = (k + kGroup - 1) / kGroup;
#pragma omp parallel for if (num_rows * k >= 1 << 16)
  for (int64_t panel = 0; panel < (num_rows + kPanel - 1) / kPanel; ++panel)
    for (int64_t output = panel * kPanel; output < std::min((panel + 1) * kPanel, num_rows); ++output) {
      if (rows[output] < 0) continue;
      const int64_t in_panel = output % kPanel;
      char* to = packed + panel * num_groups * Matrix::kGroupBytes;
      for (int64_t place = rows[output] * num_groups; place < (rows[output] + 1) * num_groups; ++place) {
        std::memcpy(to + 2 * in_panel, scales + place, 2);
        if (Format::kHasMinima) std::memcpy(to + 2 * (kPanel + in_panel), minima + place, 2);
        const uint8_t* from = values + place * Matrix::kLines * 4;
        for (int line = 0; line < Matrix::kLines; ++line) {
          uint32_t integers;
          std::memcpy(&integers, from + 4 * line, 4);
          integers = lane_of(Format{}, integers);
          std::memcpy(to + Matrix::kScaleBytes + line * kVectors * kLineBytes + 4 * in_panel, &integers, 4);
        }
        to += Matrix::kGroupBytes;
      }
    }
}

}  // namespace
}  // namespace pdmesh

extern "C" {

void pdmesh_quantize_int8(const float* rows, int64_t n, int64_t k, uint8_t* values, uint16_t* scales,
                          uint16_t* minima) {
  pdmesh::quantize<pdmesh::Int8>(rows, n, k, values, scales, minima);
}

void pdmesh_quantize_int4(const float* rows, int64_t n, int64_t k, uint8_t* values, uint16_t* scales,
                          uint16_t* minima) {
  pdmesh::quantize<pdmesh::Int4>(rows, n, k, values, scales, minima);
}

void pdmesh_pack_int8(char* packed, int64_t k, const int64_t* rows, int64_t num_rows, const uint8_t* values,
                      const uint16_t* scales, const uint16_t* minima) {
  pdmesh::pack_quantized<pdmesh::Int8>(packed, k, rows, num_rows, values, scales, minima);
}

void pdmesh_pack_int4(char* packed, int64_t k, const int64_t* rows, int64_t num_rows, const uint8_t* values,
                      const uint16_t* scales, const uint16_t* minima) {
  pdmesh::pack_quantized<pdmesh::Int4>(packed, k, rows, num_rows, values, scales, minima);
}
}
