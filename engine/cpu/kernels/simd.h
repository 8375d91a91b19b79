// Sixteen floats at a time: one AVX-512 register, in GCC's and Clang's vector extensions.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace pdmesh {

typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));

template <class Vector, class Value>
inline Vector load(const Value* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <class Vector, class Value>
inline void store(Value* to, Vector vector) {
  std::memcpy(to, &vector, sizeof(Vector));
}

inline f32x16 splat(float value) { return value - f32x16{}; }

inline f32x16 as_float(u32x16 bits) { return load<f32x16>(&bits); }
inline f32x16 as_float(i32x16 bits) { return load<f32x16>(&bits); }
inline u32x16 as_bits(f32x16 values) { return load<u32x16>(&values); }

// a * b + c in one rounding. Elsewhere nothing is contracted (-ffp-contract=off): of a * b + c * d a compiler may fuse
// either product, and which one may differ from caller to caller.
inline f32x16 fused_multiply_add(f32x16 a, f32x16 b, f32x16 c) {
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
}

inline f32x16 maximum(f32x16 a, f32x16 b) { return a > b ? a : b; }

// In a fixed order, whatever the machine: halves added to halves.
inline float horizontal_sum(f32x16 v) {
  v = v + __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  v = v + __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  v = v + __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
  v = v + __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  return v[0];
}

inline float horizontal_max(f32x16 v) {
  v = maximum(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = maximum(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = maximum(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  v = maximum(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14));
  return v[0];
}

// The nearest integers, ties to even; of values below 2^22 in size.
inline f32x16 nearest(f32x16 x) {
  return (f32x16)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// x * 2^n for integers n of -200 to 127. What would be less than the smallest normal number may be 0.
inline f32x16 times_power_of_two(f32x16 x, f32x16 n) {
  return (f32x16)_mm512_scalef_ps((__m512)x, (__m512)n);
}

// Of a NaN in b, that NaN.
inline f32x16 at_least(float a, f32x16 b) {
  return (f32x16)_mm512_max_ps((__m512)splat(a), (__m512)b);
}

// e^x within 2 units in the last place, for x <= 88; 0 for -inf. NaN stays NaN.
inline f32x16 exponential(f32x16 x) {
  x = at_least(-138.0f, x);
  const f32x16 n = nearest(x * 1.44269504f);
  // x = n ln 2 + r, |r| <= ln 2 / 2.
  f32x16 r = fused_multiply_add(n, splat(-0.693359375f), x);
  r = fused_multiply_add(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fused_multiply_add(p, r, splat(1.3981999507e-3f));
  p = fused_multiply_add(p, r, splat(8.3334519073e-3f));
  p = fused_multiply_add(p, r, splat(4.1665795894e-2f));
  p = fused_multiply_add(p, r, splat(1.6666665459e-1f));
  p = fused_multiply_add(p, r, splat(5.0000001201e-1f));
  p = fused_multiply_add(p, r * r, r) + 1.0f;
  return times_power_of_two(p, n);
}

// 2^x within 2 units in the last place, for x <= 127; 0 for -inf. NaN stays NaN.
inline f32x16 power_of_two(f32x16 x) {
  x = at_least(-200.0f, x);
  const f32x16 n = nearest(x), r = x - n;
  // Of 2^r, |r| <= 1/2: coefficients of least relative error.
  f32x16 p = splat(1.3264726401e-3f);
  p = fused_multiply_add(p, r, splat(9.6715126970e-3f));
  p = fused_multiply_add(p, r, splat(5.5507337459e-2f));
  p = fused_multiply_add(p, r, splat(2.4022242084e-1f));
  p = fused_multiply_add(p, r, splat(6.9314697760e-1f));
  p = fused_multiply_add(p, r, splat(1.0f));
  return times_power_of_two(p, n);
}

// tanh x within 2 units in the last place or so. NaN stays NaN.
inline f32x16 hyperbolic_tangent(f32x16 x) {
  const f32x16 size = as_float(as_bits(x) & 0x7fffffffu);
  // Near 0 the difference below would leave few digits: coefficients of the Cephes library.
  const f32x16 z = x * x;
  f32x16 p = splat(-5.70498872745e-3f);
  p = fused_multiply_add(p, z, splat(2.06390887954e-2f));
  p = fused_multiply_add(p, z, splat(-5.37397155531e-2f));
  p = fused_multiply_add(p, z, splat(1.33314422036e-1f));
  p = fused_multiply_add(p, z, splat(-3.33332819422e-1f));
  const f32x16 near = fused_multiply_add(p * z, x, x);
  // From 10 on it is 1 in float32.
  const f32x16 capped = size > 10.0f ? splat(10.0f) : size;
  const f32x16 far = 1.0f - 2.0f / (exponential(capped + capped) + 1.0f);
  return size < 0.625f ? near : x != x ? x : x < 0.0f ? -far : far;
}

// The two types that weights, activations and KV come in. Of both, four bytes hold what one multiply-add takes of a
// row (one float, or a pair of bfloat16), and a vector of 64 bytes the same of 16 columns.
struct Float32 {
  using Value = float;
  static constexpr int kPack = 1;

  static inline f32x16 multiply_add(f32x16 sum, uint32_t row, f32x16 columns) {
    float value;
    std::memcpy(&value, &row, sizeof value);
    return fused_multiply_add(splat(value), columns, sum);
  }
  // sum + row * columns, lane by lane.
  static inline f32x16 dot(f32x16 sum, f32x16 row, f32x16 columns) { return fused_multiply_add(row, columns, sum); }
  // A vector's first `count` values, and zeros.
  static inline f32x16 load_first(const void* from, int64_t count) {
    return (f32x16)_mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), from);
  }
  static inline f32x16 widen(const Value* from) { return load<f32x16>(from); }
  static inline void narrow(Value* to, f32x16 values) { store(to, values); }
  static inline float widen_one(Value value) { return value; }
  static inline Value narrow_one(float value) { return value; }
};

struct BFloat16 {
  using Value = uint16_t;
  static constexpr int kPack = 2;

  // sum + even row value * even column values + odd * odd.
  static inline f32x16 multiply_add(f32x16 sum, uint32_t row, f32x16 columns) {
    return dot(sum, as_float(row - u32x16{}), columns);
  }
  // The same of 16 pairs, lane by lane.
  static inline f32x16 dot(f32x16 sum, f32x16 row, f32x16 columns) {
#if defined(__AVX512BF16__)
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)row, (__m512bh)columns);
#else
    const u32x16 bits = as_bits(columns), rows = as_bits(row);
    sum = fused_multiply_add(as_float(rows << 16), as_float(bits << 16), sum);
    return fused_multiply_add(as_float(rows & 0xffff0000u), as_float(bits & 0xffff0000u), sum);
#endif
  }
  static inline f32x16 load_first(const void* from, int64_t count) {
    return (f32x16)_mm512_maskz_loadu_epi16(__mmask32((1u << count) - 1), from);
  }
  static inline f32x16 widen(const Value* from) {
    return as_float(__builtin_convertvector(load<u16x16>(from), u32x16) << 16);
  }
  // Rounds to nearest, ties to even; NaN stays NaN.
  static inline void narrow(Value* to, f32x16 values) {
#if defined(__AVX512BF16__)
    store(to, _mm512_cvtneps_pbh((__m512)values));
#else
    const u32x16 bits = as_bits(values);
    const u32x16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const i32x16 is_nan = values != values;
    store(to, __builtin_convertvector(is_nan ? (bits >> 16) | 0x40u : rounded, u16x16));
#endif
  }
  static inline float widen_one(Value value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
  }
  static inline Value narrow_one(float value) {
    Value result[16];
    narrow(result, splat(value));
    return result[0];
  }
};

inline uint32_t row_unit(const void* row, int64_t step) {
  uint32_t unit;
  std::memcpy(&unit, static_cast<const char*>(row) + 4 * step, sizeof unit);
  return unit;
}

}  // namespace pdmesh
