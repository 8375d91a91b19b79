// How ranks of one host meet, for Python.

#include "group.h"

extern "C" {

// Sums values[n] over the ranks of a group; 0 if it was given up.
int32_t pdmesh_all_reduce(pdmesh::Group* group, float* values, int64_t n) {
  return pdmesh::all_reduce(*group, values, n);
}

// Says that `word` has come to `value`.
void pdmesh_post(pdmesh::Word* word, uint32_t value) { word->store(value, std::memory_order_release); }

// Waits for that; 0 if the group was given up meanwhile.
int32_t pdmesh_wait(const pdmesh::Word* word, uint32_t value, const pdmesh::Word* given_up) {
  return pdmesh::wait_for(*word, value, *given_up);
}
}
