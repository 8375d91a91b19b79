// A step of a decoder: a list of operations over the step's rows, run by one team of threads from the first to the last.
//
// Residuals and sums are float32; what a product reads (normed rows, attention's output, activations)
// and K and V are the weights' type. The C interface is mirrored in engine/cpu/library.py.

#include <limits>

#include "attention.h"
#include "group.h"
#include "matrix.h"

namespace pdmesh {

enum class Kind : int32_t { kEmbed, kNormalize, kProject, kAttend, kSelect, kReduce, kNormalizeHeads };

// What becomes of a product's sums; kRotate makes queries, and stores keys and values.
enum class Finish : int32_t { kStore, kAdd, kSiluMultiply, kRotate };

// Which rows an operation makes: one for each of the step's tokens, or for each whose hidden state is wanted.
enum class Rows : int32_t { kTokens, kOutputs };

struct Operation {
  Kind kind;
  Finish finish;
  Rows rows;
  int32_t layer;
  float epsilon;
  const char* input;
  int64_t input_bytes;  // from one row to the next
  char* output;
  int64_t output_bytes;
  const void* weight;  // a packed matrix, or a norm's scale in float32
  const float* bias;   // of a product: padded to whole panels
  int64_t n, k;
  int64_t window;      // of attention: how many keys a token sees, its own among them; 0: all up to its own
  int64_t first;       // of an embedding: the token of its first row; of a sum: which of the run's it is, from 0
  int64_t rank_bytes;  // of a sum: from one rank's rows to the next one's
};

struct Decoder {
  void* cache;  // of block 0, the first KV head and the first layer
  int64_t num_heads, num_kv_heads, head_dim, block_size;
  int64_t num_turned;  // pairs of a head's dimensions that turn
  int64_t block_stride, head_stride, layer_stride;  // of the cache, in values
  const float* cosines;  // [positions, head_dim / 2], and 16 values beyond
  const float* sines;
  float score_scale;
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

template <class Element>
class StepRun {
  using Value = typename Element::Value;

 public:
  StepRun(const Decoder& decoder, const Step& step)
      : decoder_(decoder),
        step_(step),
        cache_{static_cast<Value*>(decoder.cache), decoder.num_kv_heads, decoder.block_size, decoder.head_dim,
               decoder.block_stride, decoder.head_stride, decoder.layer_stride},
        group_(decoder.num_heads / std::max<int64_t>(1, decoder.num_kv_heads)) {
    int64_t end_row = 0;
    for (int64_t i = 0; i < step.num_sequences; ++i) {
      const int64_t query_len = step.query_lens[i], output_len = step.output_lens[i], seq_len = step.seq_lens[i];
      const int64_t* block_table = step.block_tables + i * step.max_blocks;
      end_row += query_len;
      sequences_.push_back({end_row - query_len, end_row - query_len, query_len, seq_len, block_table});
      wanted_.push_back({end_row - output_len, int64_t(output_rows_.size()), output_len, seq_len, block_table});
      for (int64_t row = end_row - output_len; row < end_row; ++row) output_rows_.push_back(row);
    }
    tiles_ = query_tiles(sequences_, group_);
    wanted_tiles_ = query_tiles(wanted_, group_);
  }

  // Runs the operations, on every thread of the team. A group that is given up ends this with its next sum.
  void run(Team& team, const Operation* operations, int64_t num_operations) {
    for (int64_t i = 0; i < num_operations; ++i) {
      run(team, operations[i], i);
      // The thread that noticed may be further on by now: all of them leave after the same operation.
      if (last_.load(std::memory_order_relaxed) <= i) return;
    }
  }

 private:
  void run(Team& team, const Operation& operation, int64_t index) {
    switch (operation.kind) {
      case Kind::kEmbed:
        return embed(team, operation);
      case Kind::kNormalize:
        return normalize(team, operation);
      case Kind::kProject:
        return project(team, operation);
      case Kind::kAttend:
        return attend(team, operation);
      case Kind::kSelect:
        return select(team, operation);
      case Kind::kReduce:
        return reduce(team, operation, index);
      case Kind::kNormalizeHeads:
        return normalize_heads(team, operation);
    }
  }

  static PackedMatrix<Element> matrix(const Operation& op) { return {static_cast<const Value*>(op.weight), op.n, op.k}; }

  int64_t num_rows(const Operation& op) const {
    return op.rows == Rows::kTokens ? step_.num_tokens : int64_t(output_rows_.size());
  }

  // Rows of the (packed) embedding, widened.
  void embed(Team& team, const Operation& op) const {
    const PackedMatrix<Element> table = matrix(op);
    team.for_each(step_.num_tokens, [&](int64_t row) {
      float* output = reinterpret_cast<float*>(op.output + row * op.output_bytes);
      const int64_t token = step_.token_ids[row] - op.first;
      // Of other ranks' tokens, nothing.
      const bool ours = token >= 0 && token < op.n;
      for (int64_t i = 0; i < op.k; ++i) output[i] = ours ? Element::widen_one(table.at(token, i)) : 0.0f;
    });
  }

  // Root mean square norm (arXiv:1910.07467).
  void normalize(Team& team, const Operation& op) const {
    const float* scale = static_cast<const float*>(op.weight);
    team.for_each(num_rows(op), [&](int64_t row) {
      const float* input = reinterpret_cast<const float*>(op.input + row * op.input_bytes);
      Value* output = reinterpret_cast<Value*>(op.output + row * op.output_bytes);
      f32x16 squares = {};
      for (int64_t i = 0; i < op.n; i += 16) {
        const f32x16 values = load<f32x16>(input + i);
        squares = fused_multiply_add(values, values, squares);
      }
      const float factor = 1.0f / std::sqrt(horizontal_sum(squares) / float(op.n) + op.epsilon);
      for (int64_t i = 0; i < op.n; i += 16)
        Element::narrow(output + i, load<f32x16>(input + i) * factor * load<f32x16>(scale + i));
    });
  }

  void project(Team& team, const Operation& op) const {
    auto biased = [&op](int64_t panel, int vector, f32x16 sum) {
      return sum + load<f32x16>(op.bias + panel * kPanel + 16 * vector);
    };
    auto multiplied = [&](const auto& finish) {
      multiply<Element>(team, matrix(op), op.input, op.input_bytes, num_rows(op), finish);
    };
    switch (op.finish) {
      case Finish::kStore:
        return multiplied([&](int64_t row, int64_t panel, const f32x16* sums) {
          float* output = reinterpret_cast<float*>(op.output + row * op.output_bytes) + panel * kPanel;
          for (int j = 0; j < kVectors; ++j) store(output + 16 * j, biased(panel, j, sums[j]));
        });
      case Finish::kAdd:
        return multiplied([&](int64_t row, int64_t panel, const f32x16* sums) {
          float* output = reinterpret_cast<float*>(op.output + row * op.output_bytes) + panel * kPanel;
          for (int j = 0; j < kVectors; ++j)
            store(output + 16 * j, load<f32x16>(output + 16 * j) + biased(panel, j, sums[j]));
        });
      case Finish::kSiluMultiply:
        // A panel holds 16 columns of the gate beside the same 16 of the other factor.
        return multiplied([&](int64_t row, int64_t panel, const f32x16* sums) {
          const f32x16 gate = biased(panel, 0, sums[0]);
          // Above 80 the exponential is only larger than float32 needs here, and further up would overflow.
          const f32x16 negative = gate < splat(-80.0f) ? splat(80.0f) : -gate;
          const f32x16 silu = gate / (exponential(negative) + 1.0f);
          Element::narrow(reinterpret_cast<Value*>(op.output + row * op.output_bytes) + panel * 16,
                          silu * biased(panel, 1, sums[1]));
        });
      case Finish::kRotate: {
        const Projection<Element> projection = this->projection(op);
        return multiplied([&](int64_t row, int64_t panel, const f32x16* sums) {
          projection.store_sums(panel, step_.positions[row], step_.slots[row], biased(panel, 0, sums[0]),
                                biased(panel, 1, sums[1]),
                                reinterpret_cast<Value*>(op.output + row * op.output_bytes));
        });
      }
    }
  }

  Projection<Element> projection(const Operation& op) const {
    return {cache_, op.layer, decoder_.num_heads, decoder_.num_turned, decoder_.cosines, decoder_.sines};
  }

  // Of the n sums that make q, k and v: each head of q and k to unit root mean square, scaled, and then what kRotate
  // does. The scales of q's heads and behind them those of k's lie as a head's panels do.
  void normalize_heads(Team& team, const Operation& op) const {
    const Projection<Element> projection = this->projection(op);
    const int64_t num_turned_heads = decoder_.num_heads + decoder_.num_kv_heads;
    const int64_t panels_of_head = (decoder_.head_dim / 2 + 15) / 16, num_panels = (op.n + kPanel - 1) / kPanel;
    team.for_each(step_.num_tokens, [&](int64_t row) {
      const float* sums = reinterpret_cast<const float*>(op.input + row * op.input_bytes);
      Value* queries = reinterpret_cast<Value*>(op.output + row * op.output_bytes);
      auto store_panel = [&](int64_t panel, f32x16 left, f32x16 right) {
        projection.store_sums(panel, step_.positions[row], step_.slots[row], left, right, queries);
      };
      for (int64_t head = 0; head < num_turned_heads; ++head) {
        const int64_t first = head * panels_of_head, size = panels_of_head * kPanel;
        const float* of_head = sums + first * kPanel;
        const float* scale = static_cast<const float*>(op.weight) + (head < decoder_.num_heads ? 0 : size);
        f32x16 squares = {};
        for (int64_t i = 0; i < size; i += 16) {
          const f32x16 values = load<f32x16>(of_head + i);
          squares = fused_multiply_add(values, values, squares);
        }
        const float factor = 1.0f / std::sqrt(horizontal_sum(squares) / float(decoder_.head_dim) + op.epsilon);
        for (int64_t i = 0; i < size; i += kPanel)
          store_panel(first + i / kPanel, load<f32x16>(of_head + i) * factor * load<f32x16>(scale + i),
                      load<f32x16>(of_head + i + 16) * factor * load<f32x16>(scale + i + 16));
      }
      for (int64_t panel = num_turned_heads * panels_of_head; panel < num_panels; ++panel)
        store_panel(panel, load<f32x16>(sums + panel * kPanel), load<f32x16>(sums + panel * kPanel + 16));
    });
  }

  void attend(Team& team, const Operation& op) const {
    AttentionTile<Element> scratch;
    const std::vector<QueryTile>& tiles = op.rows == Rows::kTokens ? tiles_ : wanted_tiles_;
    const int64_t num_tiles = int64_t(tiles.size());
    team.for_each(num_tiles * decoder_.num_kv_heads, [&](int64_t item) {
      scratch.attend(cache_, op.layer, item % decoder_.num_kv_heads, group_, op.window, decoder_.score_scale,
                     tiles[item / decoder_.num_kv_heads], op.input, op.input_bytes, op.output, op.output_bytes);
    });
  }

  // Of rows of k float32 values, those that are wanted.
  void select(Team& team, const Operation& op) const {
    team.for_each(num_rows(op), [&](int64_t row) {
      std::memcpy(op.output + row * op.output_bytes, op.input + output_rows_[row] * op.input_bytes,
                  op.k * sizeof(float));
    });
  }

  // Adds up all ranks' rows of n float32 values, in place of the output or on top of it.
  void reduce(Team& team, const Operation& op, int64_t index) {
    const int num_ranks = decoder_.group ? decoder_.group->size : 1;
    if (num_ranks > 1) {
      // This rank's rows are whole: the team has met after what wrote them.
      const uint32_t number = decoder_.group->num_meetings + uint32_t(op.first) + 1;
      if (team.is_first()) decoder_.group->come(number);
      decoder_.group->wait(number);
      if (team.is_first() && decoder_.group->given_up->load(std::memory_order_relaxed))
        last_.store(index, std::memory_order_relaxed);
    }
    team.for_each(num_rows(op), [&](int64_t row) {
      float* output = reinterpret_cast<float*>(op.output + row * op.output_bytes);
      for (int64_t i = 0; i < op.n; i += 16) {
        f32x16 sum = op.finish == Finish::kAdd ? load<f32x16>(output + i) : f32x16{};
        for (int rank = 0; rank < num_ranks; ++rank)
          sum += load<f32x16>(reinterpret_cast<const float*>(op.input + rank * op.rank_bytes + row * op.input_bytes) + i);
        store(output + i, sum);
      }
    });
  }

  const Decoder& decoder_;
  const Step& step_;
  const PagedCache<Element> cache_;
  const int64_t group_;
  // With all of the step's tokens, and with those that are wanted.
  std::vector<Sequence> sequences_, wanted_;
  std::vector<QueryTile> tiles_, wanted_tiles_;
  std::vector<int64_t> output_rows_;
  // The operation after which the rest is left out; written by the first thread before it meets the others there.
  std::atomic<int64_t> last_{std::numeric_limits<int64_t>::max()};
};

template <class Element>
void run(const Decoder& decoder, const Step& step, const Operation* operations, int64_t num_operations,
         int num_threads) {
  StepRun<Element> step_run(decoder, step);
  run_team(num_threads, [&](Team& team) { step_run.run(team, operations, num_operations); });
  if (decoder.group)
    for (int64_t i = 0; i < num_operations; ++i) decoder.group->num_meetings += operations[i].kind == Kind::kReduce;
}

}  // namespace pdmesh

extern "C" {

void pdmesh_run_float32(const pdmesh::Decoder* decoder, const pdmesh::Step* step, const pdmesh::Operation* operations,
                        int64_t num_operations, int32_t num_threads) {
  pdmesh::run<pdmesh::Float32>(*decoder, *step, operations, num_operations, num_threads);
}

void pdmesh_run_bfloat16(const pdmesh::Decoder* decoder, const pdmesh::Step* step, const pdmesh::Operation* operations,
                         int64_t num_operations, int32_t num_threads) {
  pdmesh::run<pdmesh::BFloat16>(*decoder, *step, operations, num_operations, num_threads);
}

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
