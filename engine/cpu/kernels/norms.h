// Norms of rows of float32. Rows are padded to whole vectors with zeros, and so are scales and biases.
#pragma once

#include <cmath>

#include "simd.h"

namespace pdmesh {

struct Norm {
  const float* scale;
  const float* bias;  // of a layer norm; null: none
  float epsilon;
  int64_t n;
};

// store(i, values) takes the results from i on, 16 at a time.
// Root mean square norm (arXiv:1910.07467).
template <class Store>
inline void rms_norm(const Norm& norm, const float* input, const Store& store) {
  f32x16 squares = {};
  for (int64_t i = 0; i < norm.n; i += 16) {
    const f32x16 values = load<f32x16>(input + i);
    squares = fused_multiply_add(values, values, squares);
  }
  const float factor = 1.0f / std::sqrt(horizontal_sum(squares) / float(norm.n) + norm.epsilon);
  for (int64_t i = 0; i < norm.n; i += 16) store(i, load<f32x16>(input + i) * factor * load<f32x16>(norm.scale + i));
}

// Layer norm (arXiv:1607.06450). The mean is taken off before anything is squared: where it is large, the difference of
// two squares would keep few digits.
template <class Store>
inline void layer_norm(const Norm& norm, const float* input, const Store& store) {
  f32x16 sum = {};
  for (int64_t i = 0; i < norm.n; i += 16) sum = sum + load<f32x16>(input + i);
  const float mean = horizontal_sum(sum) / float(norm.n);
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  f32x16 squares = {};
  for (int64_t i = 0; i < norm.n; i += 16) {
    const f32x16 values = load<f32x16>(input + i) - mean;
    const f32x16 square = fused_multiply_add(values, values, squares);
    squares = lanes < int32_t(norm.n - i) ? square : squares;
  }
  const float factor = 1.0f / std::sqrt(horizontal_sum(squares) / float(norm.n) + norm.epsilon);
  for (int64_t i = 0; i < norm.n; i += 16) {
    const f32x16 scaled = (load<f32x16>(input + i) - mean) * factor * load<f32x16>(norm.scale + i);
    store(i, norm.bias ? scaled + load<f32x16>(norm.bias + i) : scaled);
  }
}

}  // namespace pdmesh
