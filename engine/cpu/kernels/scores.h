// What becomes of the dot products of queries and keys before their softmax.
#pragma once

#include "simd.h"

namespace pdmesh {

// dot product * scale; then, where there is a cap, cap * tanh(that / cap); then, with slopes (ALiBi, arXiv:2108.12409),
// minus the head's slope for each position that the key lies before the query.
struct Scores {
  float scale;
  float cap;            // 0: none
  const float* slopes;  // [num_heads]; null: none

  bool scale_only() const { return cap == 0.0f && !slopes; }

  // Of 16 keys, the first of them `distance` positions behind the query.
  f32x16 of(f32x16 products, int64_t head, int64_t distance) const {
    f32x16 scores = products * scale;
    if (cap != 0.0f) scores = hyperbolic_tangent(scores * (1.0f / cap)) * cap;
    if (!slopes) return scores;
    const f32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return fused_multiply_add(splat(slopes[head]), lanes + float(distance), scores);
  }
};

}  // namespace pdmesh
