// Weight matrices in few bits (engine/weights/quantized.py), packed for reading once, and their product with rows of
// activations.
//
// Like other packed matrices they lie in panels of 32 output columns. A panel is a run of groups of 32 of K:
//
//     scales float16[32]    minima float16[32], if the format has them    integers [kLines][kVectors][64 bytes]
//
// A line holds of 16 columns 32 bits each: the integers of kDepth consecutive k, those of even k in the lower half.
// So a vector of bfloat16 pairs comes of one shift, and the same lines serve float32.
//
// The integers are multiplied as they are, which float32 and bfloat16 hold exactly; a group's sum is scaled, and the
// minimum times the sum of the group's activations added. So the weights are the dequantised ones without any rounding,
// and a row's result does not depend on the rows beside it.
#pragma once

#include <vector>

#include "matrix.h"

namespace pdmesh {

// Of K: what shares a scale.
constexpr int kGroup = 32;
constexpr int64_t kLineBytes = 64;

inline f32x16 widen_halves(const char* from) {
  return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}

inline float widen_half(const char* from) {
  uint16_t bits;
  std::memcpy(&bits, from, sizeof bits);
  return _cvtsh_ss(bits);
}

// A line of a format, from which its `unit`th integers come: of each of 16 columns, Element's kPack ones.
template <class Element>
struct Int8Line;
template <class Element>
struct Int4Line;

struct Int8 {
  static constexpr bool kHasMinima = false;
  static constexpr int kDepth = 4;
  template <class Element>
  using Line = Int8Line<Element>;

  // The `k`th integer of a lane.
  static inline float integer(uint32_t lane, int k) { return float(int8_t(lane >> 8 * (k % 2 * 2 + k / 2))); }
};

struct Int4 {
  static constexpr bool kHasMinima = true;
  static constexpr int kDepth = 8;
  template <class Element>
  using Line = Int4Line<Element>;

  static inline float integer(uint32_t lane, int k) { return float(lane >> 4 * (k % 2 * 4 + k / 2) & 15); }
};

// The byte at `position` (0 to 3) of each lane, with its sign, as a float.
inline f32x16 signed_byte(u32x16 line, int position) {
  return __builtin_convertvector((i32x16)(line << (24 - 8 * position)) >> 24, f32x16);
}

template <>
struct Int8Line<Float32> {
  u32x16 line;
  f32x16 unit(int unit) const { return signed_byte(line, unit % 2 * 2 + unit / 2); }
};

#if defined(__AVX512VBMI__)

// The bytes of m in bfloat16, m = 0 to 127: `kHigh`, the upper one.
template <bool kHigh>
struct BFloat16Bytes {
  alignas(64) uint8_t of[128] = {};

  constexpr BFloat16Bytes() {
    for (int m = 1; m < 128; ++m) {
      int log = 0;
      while (m >> (log + 1)) ++log;
      const int bits = (127 + log) << 7 | ((m << (7 - log)) & 0x7f);
      of[m] = uint8_t(kHigh ? bits >> 8 : bits);
    }
  }
};
template <bool kHigh>
constexpr BFloat16Bytes<kHigh> kBFloat16Bytes;

template <bool kHigh>
inline u32x16 bfloat16_bytes(__m512i magnitudes) {
  const uint8_t* bytes = kBFloat16Bytes<kHigh>.of;
  return (u32x16)_mm512_permutex2var_epi8(_mm512_load_si512(bytes), magnitudes, _mm512_load_si512(bytes + 64));
}

template <>
struct Int8Line<BFloat16> {
  u32x16 low, high;

  Int8Line() = default;
  Int8Line(u32x16 line) {
    const __m512i magnitudes = _mm512_abs_epi8((__m512i)line);
    low = bfloat16_bytes<false>(magnitudes);
    high = bfloat16_bytes<true>(magnitudes) | (line & 0x80808080u);
  }
  // The lower bytes of each half, then the upper ones.
  f32x16 unit(int unit) const {
    return unit == 0 ? as_float((low & 0x00ff00ffu) | (u32x16)_mm512_slli_epi16((__m512i)high, 8))
                     : as_float((u32x16)_mm512_srli_epi16((__m512i)low, 8) | (high & 0xff00ff00u));
  }
};

#else

template <>
struct Int8Line<BFloat16> {
  u32x16 line;
  f32x16 unit(int unit) const {
    return as_float(as_bits(signed_byte(line, unit)) >> 16 | (as_bits(signed_byte(line, unit + 2)) & 0xffff0000u));
  }
};

#endif

template <>
struct Int4Line<Float32> {
  u32x16 line;
  f32x16 unit(int unit) const {
    const f32x16 integers = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    // Of each lane, the lowest four bits choose.
    return (f32x16)_mm512_permutexvar_ps((__m512i)(line >> 4 * (unit % 2 * 4 + unit / 2)), (__m512)integers);
  }
};

template <>
struct Int4Line<BFloat16> {
  u32x16 line;
  f32x16 unit(int unit) const {
    // 0 to 15 in bfloat16, twice: the lowest five bits choose, of which the fifth is the next integer's.
    const u32x16 integers = {0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0, 0x41104100, 0x41304120,
                             0x41504140, 0x41704160, 0x3f800000, 0x40404000, 0x40a04080, 0x40e040c0,
                             0x41104100, 0x41304120, 0x41504140, 0x41704160};
    return (f32x16)_mm512_permutexvar_epi16(_mm512_srli_epi16((__m512i)line, 4 * unit), (__m512i)integers);
  }
};

template <class Format>
struct QuantizedMatrix {
  static constexpr int kLines = kGroup / Format::kDepth;
  static constexpr int64_t kScaleBytes = kPanel * (Format::kHasMinima ? 4 : 2);
  static constexpr int64_t kGroupBytes = kScaleBytes + kLines * kVectors * kLineBytes;

  // What a thread keeps of a block of rows from panel to panel: the sums of their groups.
  struct Scratch {
    int64_t first = -1, end = -1;
    std::vector<float> row_sums;
  };

  const char* data;
  int64_t n, k;

  int64_t num_panels() const { return (n + kPanel - 1) / kPanel; }
  int64_t num_groups() const { return (k + kGroup - 1) / kGroup; }
  const char* panel(int64_t index) const { return data + index * num_groups() * kGroupBytes; }
  // Element (row, column) of the matrix as the checkpoint has it, dequantised.
  float at(int64_t row, int64_t column) const {
    const char* group = panel(row / kPanel) + column / kGroup * kGroupBytes;
    const int64_t in_panel = row % kPanel, in_group = column % kGroup;
    const char* line = group + kScaleBytes + in_group / Format::kDepth * kVectors * kLineBytes;
    uint32_t lane;
    std::memcpy(&lane, line + in_panel * sizeof lane, sizeof lane);
    const float scaled = Format::integer(lane, int(in_group % Format::kDepth)) * widen_half(group + 2 * in_panel);
    return Format::kHasMinima ? scaled + widen_half(group + 2 * (kPanel + in_panel)) : scaled;
  }
};

// sums += rows' values of one group * its integers.
template <class Element, class Format, int kRows>
__attribute__((always_inline)) inline void multiply_group(const char* rows, int64_t row_bytes, const char* lines, f32x16 (&sums)[kRows][kVectors]) {
  constexpr int kUnits = Format::kDepth / Element::kPack;
  // Streaming through memory, a core waits less the earlier it asks.
  constexpr int64_t kAhead = 2048;
  for (int line = 0; line < kGroup / Format::kDepth; ++line) {
    typename Format::template Line<Element> integers[kVectors];
    for (int j = 0; j < kVectors; ++j) {
      const char* from = lines + (line * kVectors + j) * kLineBytes;
      integers[j] = {load<u32x16>(from)};
      __builtin_prefetch(from + kAhead);
    }
#pragma GCC unroll 8
    for (int unit = 0; unit < kUnits; ++unit) {
      f32x16 columns[kVectors];
      for (int j = 0; j < kVectors; ++j) columns[j] = integers[j].unit(unit);
      for (int i = 0; i < kRows; ++i) {
        const uint32_t of_row = row_unit(rows + i * row_bytes, line * kUnits + unit);
        for (int j = 0; j < kVectors; ++j) sums[i][j] = Element::multiply_add(sums[i][j], of_row, columns[j]);
      }
    }
  }
}

// totals[i][j] = rows[i] * panel column vector j. `row_sums`: of each row, the sums of its groups, num_groups apart.
template <class Element, class Format, int kRows>
__attribute__((noinline)) void multiply_quantized_tile(const QuantizedMatrix<Format>& matrix, int64_t panel,
                                                       const char* rows, int64_t row_bytes, const float* row_sums,
                                                       f32x16 (*totals)[kVectors]) {
  constexpr int64_t kGroupRowBytes = kGroup * sizeof(typename Element::Value);
  const int64_t num_groups = matrix.num_groups();
  const char* group = matrix.panel(panel);
  char padded[kRows][kGroupRowBytes];
  for (int i = 0; i < kRows; ++i)
    for (int j = 0; j < kVectors; ++j) totals[i][j] = f32x16{};
  for (int64_t g = 0; g < num_groups; ++g) {
    if (matrix.k - g * kGroup < kGroup) {
      // What lies behind the end of a row is another one's.
      std::memset(padded, 0, sizeof padded);
      for (int i = 0; i < kRows; ++i)
        std::memcpy(padded[i], rows + i * row_bytes, (matrix.k - g * kGroup) * sizeof(typename Element::Value));
      rows = padded[0];
      row_bytes = kGroupRowBytes;
    }
    f32x16 sums[kRows][kVectors] = {};
    multiply_group<Element, Format, kRows>(rows, row_bytes, group + matrix.kScaleBytes, sums);
    for (int j = 0; j < kVectors; ++j) {
      const f32x16 scales = widen_halves(group + 32 * j);
      for (int i = 0; i < kRows; ++i) totals[i][j] = fused_multiply_add(scales, sums[i][j], totals[i][j]);
    }
    if constexpr (Format::kHasMinima)
      for (int j = 0; j < kVectors; ++j) {
        const f32x16 minima = widen_halves(group + 2 * kPanel + 32 * j);
        for (int i = 0; i < kRows; ++i)
          totals[i][j] = fused_multiply_add(minima, splat(row_sums[i * num_groups + g]), totals[i][j]);
      }
    rows += kGroupRowBytes;
    group += matrix.kGroupBytes;
  }
}

template <class Element, class Format, int kRows = kMaxRows>
inline void multiply_quantized_rows(int count, const QuantizedMatrix<Format>& matrix, int64_t index, const char* rows,
                                    int64_t row_bytes, const float* row_sums, f32x16 (*totals)[kVectors]) {
  if constexpr (kRows > 1) {
    if (count < kRows)
      return multiply_quantized_rows<Element, Format, kRows - 1>(count, matrix, index, rows, row_bytes, row_sums,
                                                                 totals);
  }
  multiply_quantized_tile<Element, Format, kRows>(matrix, index, rows, row_bytes, row_sums, totals);
}

// Of one row of k values, the sum of each group.
template <class Element>
inline void sum_groups(const void* row, int64_t k, float* sums) {
  const auto* values = static_cast<const typename Element::Value*>(row);
  for (int64_t first = 0; first < k; first += kGroup) {
    if (k - first >= kGroup) {
      *sums++ = horizontal_sum(Element::widen(values + first) + Element::widen(values + first + 16));
      continue;
    }
    float sum = 0.0f;
    for (int64_t i = first; i < k; ++i) sum += Element::widen_one(values[i]);
    *sums++ = sum;
  }
}

// As of a matrix that is not quantised.
template <class Element, class Format, class Finish>
inline void multiply_panel(const QuantizedMatrix<Format>& matrix, int64_t panel, const void* rows, int64_t row_bytes,
                           int64_t first, int64_t end, int64_t index, const Finish& finish,
                           typename QuantizedMatrix<Format>::Scratch& scratch) {
  const char* all_rows = static_cast<const char*>(rows);
  const int64_t num_groups = matrix.num_groups();
  if (Format::kHasMinima && (scratch.first != first || scratch.end != end)) {
    scratch.row_sums.resize((end - first) * num_groups);
    for (int64_t row = first; row < end; ++row)
      sum_groups<Element>(all_rows + row * row_bytes, matrix.k, &scratch.row_sums[(row - first) * num_groups]);
    scratch.first = first;
    scratch.end = end;
  }
  const int64_t num_tiles = (end - first + kMaxRows - 1) / kMaxRows;
  for (int64_t tile = 0; tile < num_tiles; ++tile) {
    const int64_t begin = first + (end - first) * tile / num_tiles;
    const int64_t count = first + (end - first) * (tile + 1) / num_tiles - begin;
    const float* row_sums = Format::kHasMinima ? &scratch.row_sums[(begin - first) * num_groups] : nullptr;
    f32x16 totals[kMaxRows][kVectors];
    multiply_quantized_rows<Element, Format>(int(count), matrix, panel, all_rows + begin * row_bytes, row_bytes,
                                             row_sums, totals);
    for (int64_t i = 0; i < count; ++i) finish(begin + i, index, totals[i]);
  }
}

}  // namespace pdmesh
