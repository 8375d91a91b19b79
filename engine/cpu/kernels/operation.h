// What a step is told: the C interface's structures, mirrored in engine/cpu/library.py.
#pragma once

#include "activations.h"
#include "group.h"
#include "projection.h"
#include "scores.h"

namespace pdmesh {

enum class Kind : int32_t {
  kEmbed,
  kRmsNorm,
  kProject,
  kAttend,
  kSelect,
  kReduce,
  kFinishHeads,
  kLayerNorm,
  kNarrow,
  kAddPositions,
  kRoute,
  kGather,
  kProjectExperts,
  kCombineExperts,
  kCap,
};

// What becomes of results. kStore and kAdd make float32; kNarrow, what a product reads; kActivate and kActivateMultiply
// that too, of a product's sums; kProjectHeads makes queries, and stores keys and values.
enum class Finish : int32_t { kStore, kAdd, kNarrow, kActivate, kActivateMultiply, kProjectHeads };

// Which rows an operation makes: one for each of the step's tokens, or for each whose hidden state is wanted.
enum class Rows : int32_t { kTokens, kOutputs };

// Of a matrix: packed values of the activations' type, fewer bits, or the addresses of its rows.
enum class Format : int32_t { kElement, kInt8, kInt4, kRows };

struct Operation {
  Kind kind;
  Finish finish;
  Rows rows;
  int32_t layer;
  Activation activation;
  int32_t whole_shares;  // of a routing: shares of the experts chosen are scaled to add up to 1
  float epsilon;
  float scale;  // of an embedding's rows; what kCap caps at
  const char* input;
  int64_t input_bytes;  // from one row to the next
  char* output;
  int64_t output_bytes;
  const void* weight;  // a matrix, a norm's scale in float32, or learned positions
  const float* bias;   // of a product: padded to whole panels; of a layer norm: null for none
  int64_t n, k;
  int64_t window;      // of attention: how many keys a token sees, its own among them; 0: all up to its own
  int64_t first;       // of an embedding: the token of its first row; of positions: the row of position 0; of a sum:
                       // which of the run's it is, from 0
  int64_t rank_bytes;  // of a sum: from one rank's rows to the next one's
  Format format;  // of a matrix
  int64_t num_experts;  // whose matrices lie in `weight`, one after the other
  const Rotation* rotation;
  Scores scores;
};

struct Decoder {
  void* cache;  // of block 0, the first KV head and the first layer
  int32_t int8_cache;  // whether K and V lie in 8 bits, else in the weights' type
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t block_stride, head_stride, layer_stride;  // of the cache, in its values
  Group* group;  // whose sums a kReduce takes; null: this rank's own rows are whole already
};

struct Step {
  int64_t num_tokens, num_sequences, max_blocks;
  const int64_t* token_ids;  // [T]
  const int64_t* positions;  // [T]
  const int64_t* slots;      // [T]
  const int64_t* query_lens;    // [B]
  const int64_t* seq_lens;      // [B]
  const int64_t* output_lens;   // [B]: how many of each sequence's last tokens are wanted
  const int64_t* block_tables;  // [B, max_blocks]
};

}  // namespace pdmesh
