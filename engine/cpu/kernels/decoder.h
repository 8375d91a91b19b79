// A step of a decoder: a list of operations over the step's rows, run by one team of threads from the first to the
// last.
//
// Residuals and sums are float32; what a product reads (normed rows, attention's output, activations)
// and K and V are the weights' type.

#pragma once

#include <limits>

#include "attention.h"
#include "matrix.h"
#include "mixture.h"
#include "norms.h"
#include "operation.h"
#include "quantized.h"
#include "rows.h"

namespace pdmesh {

template <class Element>
class StepRun {
  using Value = typename Element::Value;

 public:
  StepRun(const Decoder& decoder, const Step& step)
      : decoder_(decoder),
        step_(step),
        cache_{static_cast<Value*>(decoder.cache), decoder.num_kv_heads, decoder.block_size, decoder.head_dim,
               decoder.block_stride, decoder.head_stride, decoder.layer_stride},
        int8_cache_{static_cast<int8_t*>(decoder.cache), decoder.num_kv_heads, decoder.block_size, decoder.head_dim,
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
      case Kind::kRmsNorm:
      case Kind::kLayerNorm:
        return normalize(team, operation);
      case Kind::kProject:
        return project(team, operation);
      case Kind::kAttend:
        return attend(team, operation);
      case Kind::kSelect:
        return select(team, operation);
      case Kind::kReduce:
        return reduce(team, operation, index);
      case Kind::kFinishHeads:
        return finish_heads(team, operation);
      case Kind::kNarrow:
        return narrow(team, operation);
      case Kind::kAddPositions:
        return add_positions(team, operation);
      case Kind::kRoute:
        return route(team, operation);
      case Kind::kGather:
        return gather(team, operation);
      case Kind::kProjectExperts:
        return project_experts(team, operation);
      case Kind::kCombineExperts:
        return combine_experts(team, operation);
      case Kind::kCap:
        return cap(team, operation);
    }
  }

  // Calls work(matrix) with the operation's.
  template <class Work>
  static void with_matrix(const Operation& op, const Work& work) {
    switch (op.format) {
      case Format::kElement:
        return work(PackedMatrix<Element>{static_cast<const Value*>(op.weight), op.n, op.k});
      case Format::kInt8:
        return work(QuantizedMatrix<Int8>{static_cast<const char*>(op.weight), op.n, op.k});
      case Format::kInt4:
        return work(QuantizedMatrix<Int4>{static_cast<const char*>(op.weight), op.n, op.k});
      case Format::kRows:
        return work(RowMatrix<Element>{static_cast<const Value* const*>(op.weight), op.n, op.k});
    }
  }

  template <class T>
  static T* output_row(const Operation& op, int64_t row) {
    return reinterpret_cast<T*>(op.output + row * op.output_bytes);
  }
  static const float* input_row(const Operation& op, int64_t row) {
    return reinterpret_cast<const float*>(op.input + row * op.input_bytes);
  }

  int64_t num_rows(const Operation& op) const {
    return op.rows == Rows::kTokens ? step_.num_tokens : int64_t(output_rows_.size());
  }

  // Rows of the embedding, widened.
  void embed(Team& team, const Operation& op) const {
    with_matrix(op, [&](const auto& table) {
      team.for_each(step_.num_tokens, [&](int64_t row) {
        float* output = output_row<float>(op, row);
        const int64_t token = step_.token_ids[row] - op.first;
        // Of other ranks' tokens, nothing.
        const bool ours = token >= 0 && token < op.n;
        for (int64_t i = 0; i < op.k; ++i) output[i] = ours ? table.at(token, i) * op.scale : 0.0f;
      });
    });
  }

  // Of a table [positions, k], padded to whole vectors, each token's row on top of what is there.
  void add_positions(Team& team, const Operation& op) const {
    team.for_each(step_.num_tokens, [&](int64_t row) {
      const Value* position = static_cast<const Value*>(op.weight) + (step_.positions[row] + op.first) * op.k;
      float* output = output_row<float>(op, row);
      for (int64_t i = 0; i < op.k; i += 16) store(output + i, load<f32x16>(output + i) + Element::widen(position + i));
    });
  }

  void normalize(Team& team, const Operation& op) const {
    const Norm norm{static_cast<const float*>(op.weight), op.bias, op.epsilon, op.n};
    auto each_row = [&](const auto& of_row) {
      team.for_each(num_rows(op), [&](int64_t row) {
        auto store_results = of_row(row);
        if (op.kind == Kind::kRmsNorm)
          rms_norm(norm, input_row(op, row), store_results);
        else
          layer_norm(norm, input_row(op, row), store_results);
      });
    };
    if (op.finish == Finish::kNarrow)
      return each_row([&](int64_t row) {
        return [output = output_row<Value>(op, row)](int64_t i, f32x16 values) { Element::narrow(output + i, values); };
      });
    each_row([&](int64_t row) {
      return [output = output_row<float>(op, row), adds = op.finish == Finish::kAdd](int64_t i, f32x16 values) {
        store(output + i, adds ? load<f32x16>(output + i) + values : values);
      };
    });
  }

  // Rows of n float32 values, as products read them.
  void narrow(Team& team, const Operation& op) const {
    team.for_each(num_rows(op), [&](int64_t row) {
      for (int64_t i = 0; i < op.n; i += 16)
        Element::narrow(output_row<Value>(op, row) + i, load<f32x16>(input_row(op, row) + i));
    });
  }

  // Calls body(finish) with what `multiply` is to do with the operation's sums.
  template <class Body>
  void with_finish(const Operation& op, const Body& body) const {
    auto biased = [&op](int64_t panel, int vector, f32x16 sum) {
      return sum + load<f32x16>(op.bias + panel * kPanel + 16 * vector);
    };
    switch (op.finish) {
      case Finish::kStore:
        return body([&](int64_t row, int64_t panel, const f32x16* sums) {
          float* output = output_row<float>(op, row) + panel * kPanel;
          for (int j = 0; j < kVectors; ++j) store(output + 16 * j, biased(panel, j, sums[j]));
        });
      case Finish::kAdd:
        return body([&](int64_t row, int64_t panel, const f32x16* sums) {
          float* output = output_row<float>(op, row) + panel * kPanel;
          for (int j = 0; j < kVectors; ++j)
            store(output + 16 * j, load<f32x16>(output + 16 * j) + biased(panel, j, sums[j]));
        });
      case Finish::kNarrow:
      case Finish::kActivate:
        return body([&](int64_t row, int64_t panel, const f32x16* sums) {
          Value* output = output_row<Value>(op, row) + panel * kPanel;
          for (int j = 0; j < kVectors; ++j)
            Element::narrow(output + 16 * j, activate(op.activation, biased(panel, j, sums[j])));
        });
      case Finish::kActivateMultiply:
        // A panel holds 16 columns of the gate beside the same 16 of the other factor.
        return body([&](int64_t row, int64_t panel, const f32x16* sums) {
          Element::narrow(output_row<Value>(op, row) + panel * 16,
                          activate(op.activation, biased(panel, 0, sums[0])) * biased(panel, 1, sums[1]));
        });
      case Finish::kProjectHeads: {
        const Projection<Element> projection = this->projection(op);
        return body([&](int64_t row, int64_t panel, const f32x16* sums) {
          projection.store_sums(panel, step_.positions[row], biased(panel, 0, sums[0]), biased(panel, 1, sums[1]),
                                output_row<Value>(op, row), CacheSink<Element>{cache_, op.layer, step_.slots[row]});
        });
      }
    }
  }

  void project(Team& team, const Operation& op) const {
    with_finish(op, [&](const auto& finish) {
      with_matrix(op, [&](const auto& matrix) {
        multiply<Element>(team, matrix, op.input, op.input_bytes, num_rows(op), finish);
      });
    });
  }

  Projection<Element> projection(const Operation& op) const {
    return {decoder_.num_heads, decoder_.num_kv_heads, decoder_.head_dim, *op.rotation};
  }

  // Of the n sums that make q, k and v: what kProjectHeads does, of whole heads.
  void finish_heads(Team& team, const Operation& op) const {
    const Projection<Element> projection = this->projection(op);
    auto store_row = [&](int64_t row, const auto& sink) {
      projection.store_row(input_row(op, row), op.n, static_cast<const float*>(op.weight), op.epsilon,
                           step_.positions[row], output_row<Value>(op, row), sink);
    };
    if (!decoder_.int8_cache)
      return team.for_each(step_.num_tokens, [&](int64_t row) {
        store_row(row, CacheSink<Element>{cache_, op.layer, step_.slots[row]});
      });
    const int64_t head_dim = decoder_.head_dim, width = decoder_.num_kv_heads * head_dim + kPanel;
    std::vector<float> heads(2 * width);
    const HeadsSink sink{heads.data(), heads.data() + width, head_dim};
    team.for_each(step_.num_tokens, [&](int64_t row) {
      store_row(row, sink);
      for (int64_t head = 0; head < decoder_.num_kv_heads; ++head)
        int8_cache_.store_head(step_.slots[row], op.layer, head, sink.keys + head * head_dim,
                               sink.values + head * head_dim);
    });
  }

  void attend(Team& team, const Operation& op) const {
    decoder_.int8_cache ? attend_over(team, op, int8_cache_) : attend_over(team, op, cache_);
  }

  template <class Cache>
  void attend_over(Team& team, const Operation& op, const Cache& cache) const {
    AttentionTile<Element, Cache> scratch;
    const std::vector<QueryTile>& tiles = op.rows == Rows::kTokens ? tiles_ : wanted_tiles_;
    const int64_t num_tiles = int64_t(tiles.size());
    team.for_each(num_tiles * decoder_.num_kv_heads, [&](int64_t item) {
      scratch.attend(cache, op.layer, item % decoder_.num_kv_heads, group_, op.window, op.scores,
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

  // Chooses k of n experts for each row, by its n logits.
  void route(Team& team, const Operation& op) {
    team.for_each(1, [&](int64_t) { routing_.begin(num_rows(op), op.n, op.k); });
    team.for_each(num_rows(op),
                  [&](int64_t row) { routing_.choose(row, input_row(op, row), op.whole_shares); });
    team.for_each(1, [&](int64_t) { routing_.group(); });
  }

  // Copies rows of n values to where the routing has them.
  void gather(Team& team, const Operation& op) const {
    team.for_each(routing_.num_places(), [&](int64_t place) {
      std::memcpy(op.output + place * op.output_bytes, op.input + routing_.source(place) * op.input_bytes,
                  op.n * sizeof(Value));
    });
  }

  // As project, of gathered rows, each with its expert's matrix.
  void project_experts(Team& team, const Operation& op) const {
    with_finish(op, [&](const auto& finish) {
      with_matrix(op, [&](const auto& matrix) {
        multiply_experts<Element>(team, matrix, op.num_experts, routing_, op.input, op.input_bytes, finish);
      });
    });
  }

  // Of each row, the weighted sum of its experts' n float32 values, in place of the output or on top of it.
  void combine_experts(Team& team, const Operation& op) {
    team.for_each(num_rows(op), [&](int64_t row) {
      float* output = output_row<float>(op, row);
      const Routing::Choice* choices = routing_.choices_of(row);
      for (int64_t i = 0; i < op.n; i += 16) {
        f32x16 sum = {};
        for (int64_t choice = 0; choice < routing_.num_chosen(); ++choice)
          sum = sum + load<f32x16>(input_row(op, choices[choice].place) + i) * choices[choice].weight;
        store(output + i, op.finish == Finish::kAdd ? load<f32x16>(output + i) + sum : sum);
      }
    });
  }

  // In place: cap * tanh(value / cap) of n float32 values.
  void cap(Team& team, const Operation& op) const {
    team.for_each(num_rows(op), [&](int64_t row) {
      float* values = output_row<float>(op, row);
      for (int64_t i = 0; i < op.n; i += 16)
        store(values + i, hyperbolic_tangent(load<f32x16>(values + i) * (1.0f / op.scale)) * op.scale);
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
  // Of the same memory: the decoder says which of them it is.
  const PagedCache<Element> cache_;
  const Int8Cache int8_cache_;
  const int64_t group_;
  // With all of the step's tokens, and with those that are wanted.
  std::vector<Sequence> sequences_, wanted_;
  std::vector<QueryTile> tiles_, wanted_tiles_;
  std::vector<int64_t> output_rows_;
  Routing routing_;
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
