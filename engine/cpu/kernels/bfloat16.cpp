// The decoder in bfloat16. Each type is compiled by itself, side by side with the others.

#include "decoder.h"

extern "C" void pdmesh_run_bfloat16(const pdmesh::Decoder* decoder, const pdmesh::Step* step,
                                    const pdmesh::Operation* operations, int64_t num_operations,
                                    int32_t num_threads) {
  pdmesh::run<pdmesh::BFloat16>(*decoder, *step, operations, num_operations, num_threads);
}
