// What an MLP applies to its sums, or to its gate.
#pragma once

#include "simd.h"

namespace pdmesh {

enum class Activation : int32_t { kNone, kSilu, kRelu, kGelu, kGeluTanh };

inline f32x16 silu(f32x16 x) {
  // Above 80 the exponential is only larger than float32 needs here, and further up would overflow.
  const f32x16 negative = x < splat(-80.0f) ? splat(80.0f) : -x;
  return x / (exponential(negative) + 1.0f);
}

// The error function within 3e-7: Abramowitz and Stegun, 7.1.26. NaN stays NaN.
inline f32x16 error_function(f32x16 x) {
  const f32x16 size = as_float(as_bits(x) & 0x7fffffffu);
  const f32x16 t = 1.0f / fused_multiply_add(splat(0.3275911f), size, splat(1.0f));
  f32x16 p = splat(1.061405429f);
  p = fused_multiply_add(p, t, splat(-1.453152027f));
  p = fused_multiply_add(p, t, splat(1.421413741f));
  p = fused_multiply_add(p, t, splat(-0.284496736f));
  p = fused_multiply_add(p, t, splat(0.254829592f));
  const f32x16 value = 1.0f - p * t * exponential(-size * size);
  return x < 0.0f ? -value : value;
}

// arXiv:1606.08415.
inline f32x16 gelu(f32x16 x) { return 0.5f * x * (1.0f + error_function(x * 0.70710678f)); }

inline f32x16 gelu_tanh(f32x16 x) {
  const f32x16 inner = 0.79788456f * fused_multiply_add(0.044715f * x * x, x, x);
  return 0.5f * x * (1.0f + hyperbolic_tangent(inner));
}

// Beside a product's sums the choice costs nothing, and one product serves all of them.
inline f32x16 activate(Activation activation, f32x16 x) {
  switch (activation) {
    case Activation::kNone:
      return x;
    case Activation::kSilu:
      return silu(x);
    case Activation::kRelu:
      return x < 0.0f ? f32x16{} : x;
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
  }
  __builtin_unreachable();
}

}  // namespace pdmesh
