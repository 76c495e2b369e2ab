// SPDX-License-Identifier: Apache-2.0
// A stack of GRU layers that is stepped: packed weights that any number of callers read, and the
// rows of state that one caller advances. The arithmetic of a step is that of forward.h, operation
// by operation, so float32 gives the same bits as the layer.
#pragma once
#include "dot_pairs.h"
#include "multiply.h"
#include "share.h"
#include "team.h"

namespace gru_fast {
namespace GRU_FAST_ISA {
namespace {

// Inputs that are projected together: of several rows, or of several steps of few rows.
constexpr int64_t kStepRows = 64;

// Where everything lies in the memory of a snapshot, of which it is the first piece.
struct Snapshot {
  static constexpr int W = kLanes<float>;

  // Without memory: only `bytes` is of use.
  Snapshot(const StackShape& shape, void* memory)
      : shape(shape),
        gates(gate_count(shape.cell)),
        tiles(tiles_of<float>(shape.H)),
        row(tiles * gates * W) {
    Layout layout(memory);
    layout.take<Snapshot>(1);
    layers = layout.take<Layer>(shape.layers);
    table = layout.take<float>(table_rows() * row);
    Layer counted{};
    for (int64_t l = 0; l < shape.layers; ++l) {
      Layer& to = memory == nullptr ? counted : layers[l];
      const bool two = has_second_product(shape.cell);
      const int first = first_gates(shape.cell);
      to.first = take_panels(shape.weights, shape.H, shape.H, first, layout);
      to.second = take_panels(shape.weights, two ? shape.H : 0, shape.H, 1, layout);
      const bool projects = l > 0 || shape.tokens == 0;
      to.input = take_panels(shape.weights, projects ? shape.H : 0, l > 0 ? shape.H : shape.I,
                             gates, layout);
      to.bias = layout.take<float>(row);
      to.bias_q = layout.take<float>(tiles * W);
    }
    head = take_panels(shape.weights, padded_outputs(), shape.H, 1, layout);
    head_bias = layout.take<float>(padded_outputs());
    bytes = layout.used();
  }

  struct Layer {
    Panels first, second, input;
    float* bias;    // [tile][gate][lane], input and recurrent where those only add
    float* bias_q;  // reset_after: the recurrent bias of the candidate
  };

  int64_t table_rows() const { return shape.tokens > 0 ? shape.tokens + 1 : 0; }
  int64_t padded_outputs() const { return round_up(shape.outputs, kUnitPad); }

  StackShape shape;
  int gates;
  int64_t tiles, row;  // floats of a row of projected gates: [tile][gate][lane]
  Layer* layers;
  float* table;  // the caller's, and the biases
  Panels head;
  float* head_bias;
  int64_t bytes;
};

template <Weights P>
void pack_stack(const Snapshot& s, const StackWeights& from) {
  constexpr int W = kLanes<float>;
  const StackShape& shape = s.shape;
  const int all[3] = {0, 1, 2}, candidate = 2;
  for (int64_t l = 0; l < shape.layers; ++l) {
    const LayerWeights& weights = from.layers[l];
    const Snapshot::Layer& to = s.layers[l];
    pack_panels<P>(weights.weight_hh, shape.H, shape.H, all, to.first);
    if (to.second.tiles > 0) {
      pack_panels<P>(weights.weight_hh, shape.H, shape.H, &candidate, to.second);
    }
    if (to.input.tiles > 0) {
      pack_panels<P>(weights.weight_ih, shape.H, l > 0 ? shape.H : shape.I, all, to.input);
    }
    for (int64_t tile = 0; tile < s.tiles; ++tile) {
      const int n = lanes_of<float>(tile, shape.H);
      for (int gate = 0; gate < s.gates; ++gate) {
        const int64_t at = gate * shape.H + tile * W;
        const bool separate = shape.cell == Cell::kResetAfter && gate == 2;
        store(to.bias + (tile * s.gates + gate) * W,
              load_or_zero(weights.bias_ih, at, n) +
                  load_or_zero(separate ? nullptr : weights.bias_hh, at, n));
        if (separate) store(to.bias_q + tile * W, load_or_zero(weights.bias_hh, at, n));
        for (int64_t token = 0; l == 0 && token < s.table_rows(); ++token) {
          const float* row = from.table + token * s.gates * shape.H;
          store(s.table + token * s.row + (tile * s.gates + gate) * W,
                load_n(row + at, n) + load(to.bias + (tile * s.gates + gate) * W));
        }
      }
    }
  }
  if (shape.outputs > 0) pack_panels<P>(from.head_weight, shape.outputs, shape.H, all, s.head);
  for (int64_t v = 0; v < s.padded_outputs(); ++v) {
    const bool real = v < shape.outputs;
    s.head_bias[v] = !real ? -__builtin_inff() : from.head_bias != nullptr ? from.head_bias[v] : 0;
  }
}

// The part of a step that falls to one member of a team that splits hidden units.
struct Crew {
  Team* team;  // null: alone
  int member;
  Range tiles;
  GRU_MEMBER void wait() const {
    if (team != nullptr) team->barrier(member);
  }
};

// Up to `capacity` rows that are stepped together. The members of a crew share what `shared` hands
// out and call the same methods in the same order.
template <Weights P>
class Stack {
 public:
  static constexpr int W = kLanes<float>;
  static constexpr int kPack = Dot<P>::kPack;
  using V = Vec<float>;

  Stack(const Snapshot& s, int64_t capacity, Layout& shared, Layout& mine)
      : s_(s),
        capacity_(capacity),
        ld_(round_up(s.tiles * W, kUnitPad) + kUnitPad),
        ldw_(round_up(s.tiles * W / kPack, kUnitPad) + kUnitPad),
        ldx_(s.shape.tokens == 0 ? round_up(tiles_of<float>(s.shape.I) * W / kPack, kUnitPad) : 0) {
    const int64_t L = s.shape.layers;
    h_ = shared.take<float>(2 * L * capacity * ld_);
    row_ = P == Weights::kFloat32 ? reinterpret_cast<uint32_t*>(h_)
                                  : shared.take<uint32_t>(2 * L * capacity * ldw_);
    gated_ = shared.take<uint32_t>(has_second_product(s.shape.cell) ? capacity * ldw_ : 0);
    update_ = shared.take<float>(has_second_product(s.shape.cell) ? capacity * ld_ : 0);
    const int64_t chunk = capacity > kStepRows ? capacity : kStepRows;
    gates_ = shared.take<float>(L > 1 || s.shape.tokens == 0 ? chunk * s.row : 0);
    between_ = shared.take<uint32_t>(chunk * ldw_);
    frames_ = shared.take<uint32_t>(kStepRows * ldx_);
    frame_scale_ = shared.take<float>(ldx_ > 0 ? kStepRows : 0);
    gates_of_ = mine.take<const float*>(chunk);
    if constexpr (kWidens<P>) {
      wide_ = take_widened(chunk, s.shape.I > s.shape.H ? s.shape.I : s.shape.H, mine);
    }
  }

  // Steps of R rows that fit into one advance().
  GRU_MEMBER int64_t most_steps(int64_t rows) const {
    return rows >= kStepRows ? 1 : kStepRows / rows;
  }

  // The state of one row of one layer.
  GRU_MEMBER float* state(int64_t layer, int64_t row) const { return h(layer, parity_, row); }
  // To be called once a state has been written from outside.
  GRU_MEMBER void state_written(int64_t layer, int64_t row, Range tiles) const {
    if (P == Weights::kFloat32) return;
    for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
      store_operand(operand(layer, parity_, row), tile, load(state(layer, row) + tile * W),
                    s_.shape.H);
    }
  }
  void swap_rows(int64_t a, int64_t b, Range tiles) const {
    for (int64_t l = 0; l < s_.shape.layers; ++l) {
      float *x = state(l, a), *y = state(l, b);
      for (int64_t tile = tiles.begin; tile < tiles.end; ++tile) {
        const V was = load(x + tile * W);
        store(x + tile * W, load(y + tile * W));
        store(y + tile * W, was);
      }
      state_written(l, a, tiles);
      state_written(l, b, tiles);
    }
  }

  // Which row of the token table `row` is fed at step `t` of the next advance() of `rows` rows.
  GRU_MEMBER void feed(int64_t t, int64_t rows, int64_t row, int64_t token) const {
    gates_of_[t * rows + row] = s_.table + token * s_.row;
  }

  // Projects T frames (T, I) that one row is fed at the next advance().
  void feed_frames(const float* frames, int64_t T, const Crew& crew) const {
    const int64_t I = s_.shape.I;
    for (int64_t t = 0; t < T; ++t) {
      const float* x = frames + t * I;
      float most = 0;
      if (P == Weights::kInt8) {
        for (int64_t i = 0; i < I; ++i) {
          const float size = x[i] < 0 ? -x[i] : x[i];
          most = size > most ? size : most;
        }
        frame_scale_[t] = most;
      }
      for (int64_t tile = 0; tile < tiles_of<float>(I); ++tile) {
        store_row<P>(frames_ + t * ldx_, tile, load_n(x + tile * W, lanes_of<float>(tile, I)),
                     most > 0 ? kInt8Most / most : 0);
      }
    }
    project(0, frames_, ldx_, T, frame_scale_, crew);
    for (int64_t t = 0; t < T; ++t) gates_of_[t] = gates_ + t * s_.row;
  }

  // Feeds T inputs to each of the first `rows` rows, T <= most_steps(rows). `states`, unless null,
  // gets the top layer's state after every step: (T, rows, H).
  void advance(int64_t T, int64_t rows, const Crew& crew, float* states = nullptr) {
    const int64_t L = s_.shape.layers;
    const int parity = parity_;
    for (int64_t l = 0; l < L; ++l) {
      if (l > 0) {
        const bool chunk = T > 1;
        project(l, chunk ? between_ : operand(l - 1, parity ^ 1, 0), ldw_, T * rows, nullptr, crew);
        // Every member has to be done with the rows below before they are written again.
        if (chunk) crew.wait();
        for (int64_t i = 0; i < T * rows; ++i) gates_of_[i] = gates_ + i * s_.row;
      }
      for (int64_t t = 0; t < T; ++t) {
        step({l, static_cast<int>((parity + t) & 1), rows, gates_of_ + t * rows,
              T > 1 ? between_ + t * rows * ldw_ : nullptr},
             crew);
        if (states != nullptr && l + 1 == L) {
          for (int64_t row = 0; row < rows; ++row) {
            std::memcpy(states + (t * rows + row) * s_.shape.H,
                        h(l, static_cast<int>((parity + t + 1) & 1), row),
                        static_cast<size_t>(s_.shape.H) * sizeof(float));
          }
        }
      }
    }
    parity_ = static_cast<int>((parity + T) & 1);
  }

  // The top layer's operands, for logits(): of a row, where the last advance() made one step, or of
  // step * rows + row, where it made several.
  GRU_MEMBER const uint32_t* top(int64_t row) const {
    return operand(s_.shape.layers - 1, parity_, row);
  }
  GRU_MEMBER const uint32_t* top_of_steps(int64_t index) const { return between_ + index * ldw_; }

  // Logits of `rows` rows from top(), each padded_outputs() long; -inf behind the last.
  void logits(const uint32_t* top, int64_t rows, float* to, Range tiles) const {
    const int64_t ld = s_.padded_outputs();
    multiply<P, 1>(s_.head, top, ldw_, rows, tiles, parity_ != 0, wide_,
                   [&]<int N>(Items at, const V(&sums)[1][N]) GRU_MEMBER_LAMBDA {
                     GRU_EACH(j) {
                       store(to + at.row_of(j) * ld + at.tile_of(j) * W,
                             sums[0][j] + load(s_.head_bias + at.tile_of(j) * W));
                     }
                   });
  }
  // Which of the two states is the current one: kept by who keeps the memory of a stack.
  GRU_MEMBER int parity() const { return parity_; }
  GRU_MEMBER void set_parity(int parity) { parity_ = parity; }

 private:
  GRU_MEMBER float* h(int64_t layer, int parity, int64_t row) const {
    return h_ + ((layer * 2 + parity) * capacity_ + row) * ld_;
  }
  GRU_MEMBER uint32_t* operand(int64_t layer, int parity, int64_t row) const {
    return row_ + ((layer * 2 + parity) * capacity_ + row) * ldw_;
  }

  // A register of a state, as a product reads it. The last word may reach beyond H, where its
  // weight is zero: no use against NaN, which lanes of padding become where an input is infinite.
  GRU_MEMBER static void store_operand(uint32_t* row, int64_t tile, V value, int64_t H) {
    if constexpr (P == Weights::kBFloat16) {
      value = first_lanes<float>(value, lanes_of<float>(tile, H));
    }
    store_row<P>(row, tile, value, kInt8Most);
  }

  // gates_ = W_ih x + b of `count` rows.
  void project(int64_t layer, const uint32_t* x, int64_t stride, int64_t count, const float* scale,
               const Crew& crew) const {
    const bool scaled = P == Weights::kInt8 && scale != nullptr;
    if (s_.gates == 3) {
      if (scaled) return project_gates<3, true>(layer, x, stride, count, scale, crew);
      return project_gates<3, false>(layer, x, stride, count, scale, crew);
    }
    if (scaled) return project_gates<2, true>(layer, x, stride, count, scale, crew);
    return project_gates<2, false>(layer, x, stride, count, scale, crew);
  }
  // Which additions and products the compiler joins must not depend on the number of items.
  template <int GATES, bool SCALED>
  void project_gates(int64_t layer, const uint32_t* x, int64_t stride, int64_t count,
                     [[maybe_unused]] const float* scale, const Crew& crew) const {
    const Snapshot::Layer& weights = s_.layers[layer];
    multiply<P, GATES>(weights.input, x, stride, count, crew.tiles, false, wide_,
                       [&]<int N>(Items at, const V(&sums)[GATES][N]) GRU_MEMBER_LAMBDA {
                         GRU_EACH(j) {
                           const int64_t row = at.row_of(j), first = at.tile_of(j) * GATES * W;
                           for (int gate = 0; gate < GATES; ++gate) {
                             V sum = sums[gate][j];
                             if constexpr (SCALED) sum *= scale[row];
                             store(gates_ + row * s_.row + first + gate * W,
                                   sum + load(weights.bias + first + gate * W));
                           }
                         }
                       });
  }

  // One step of a layer: from which of its states, what the inputs of its rows add to the gates,
  // and where the new operands go beside the state, or null.
  struct Step {
    int64_t layer;
    int parity;
    int64_t rows;
    const float* const* gates;
    uint32_t* copy;
  };

  void step(const Step& now, const Crew& crew) const {
    if (s_.shape.cell == Cell::kResetAfter) {
      step_reset_after(now, crew);
    } else if (s_.shape.cell == Cell::kNoReset) {
      step_no_reset(now, crew);
    } else {
      step_reset_before(now, crew);
    }
    crew.wait();
  }

  // Where the rows of a step find their numbers: worked out once, for the gates of a row and tile
  // take little longer than its addresses.
  template <int GATES>
  class Rows {
   public:
    GRU_MEMBER Rows(const Stack& stack, const Step& now)
        : gates_(now.gates),
          state_(stack.h(now.layer, now.parity, 0)),
          next_(stack.h(now.layer, now.parity ^ 1, 0)),
          operand_(stack.operand(now.layer, now.parity ^ 1, 0)),
          copy_(now.copy),
          H_(stack.s_.shape.H),
          ld_(stack.ld_),
          ldw_(stack.ldw_) {}

    // Gate `gate` of what the input adds to an item.
    GRU_MEMBER V gx(const Items& at, int j, int gate) const {
      return load(gates_[at.row_of(j)] + (at.tile_of(j) * GATES + gate) * W);
    }
    GRU_MEMBER V state(int64_t row, int64_t tile) const {
      return load(state_ + row * ld_ + tile * W);
    }
    // Equation (6): the new state of a row and tile.
    GRU_MEMBER void finish(int64_t row, int64_t tile, V z, V n) const {
      const V next = n + z * (state(row, tile) - n);
      store(next_ + row * ld_ + tile * W, next);
      if (P != Weights::kFloat32) store_operand(operand_ + row * ldw_, tile, next, H_);
      if (copy_ != nullptr) store_operand(copy_ + row * ldw_, tile, next, H_);
    }

   private:
    const float* const* gates_;
    const float* state_;
    float* next_;
    uint32_t *operand_, *copy_;
    int64_t H_, ld_, ldw_;
  };

  void step_reset_after(const Step& now, const Crew& crew) const {
    const Snapshot::Layer& weights = s_.layers[now.layer];
    const uint32_t* previous = operand(now.layer, now.parity, 0);
    const Rows<3> rows(*this, now);
    const float* const bias_q = weights.bias_q;
    auto close = [&]<int N, class Between>(Items at, const V(&sums)[3][N],
                                           Between between) GRU_MEMBER_LAMBDA {
      V rz[2 * N], q[N], n[N];
      reset_after_gates<float, N>(
          sums, [&](int j, int gate) GRU_MEMBER_LAMBDA { return rows.gx(at, j, gate); },
          [&](int j) GRU_MEMBER_LAMBDA { return load(bias_q + at.tile_of(j) * W); }, rz, q, n,
          between);
      GRU_EACH(j) { rows.finish(at.row_of(j), at.tile_of(j), rz[N + j], n[j]); }
    };
    Range tiles = crew.tiles;
    if constexpr (kPairs) {
      if (now.rows == 1 && one_chain<P>(weights.first)) {
        Pairs<P, 3>(weights.first, tiles, now.parity != 0).multiply(previous, close);
        tiles.begin = tiles.end - tiles.size() % 2;
      }
    }
    multiply<P, 3>(weights.first, previous, ldw_, now.rows, tiles, now.parity != 0, wide_,
                   [&]<int N>(Items at, const V(&sums)[3][N])
                       GRU_MEMBER_LAMBDA { close(at, sums, Nothing{}); });
  }

  void step_no_reset(const Step& now, const Crew& crew) const {
    const Rows<2> rows(*this, now);
    multiply<P, 2>(s_.layers[now.layer].first, operand(now.layer, now.parity, 0), ldw_, now.rows,
                   crew.tiles, now.parity != 0, wide_,
                   [&]<int N>(Items at, const V(&sums)[2][N]) GRU_MEMBER_LAMBDA {
                     V z[N], n[N];
                     GRU_EACH(j) z[j] = sums[0][j] + rows.gx(at, j, 0);
                     GRU_EACH(j) n[j] = sums[1][j] + rows.gx(at, j, 1);
                     sigmoid<float, N>(z);
                     tanh<float, N>(n);
                     GRU_EACH(j) { rows.finish(at.row_of(j), at.tile_of(j), z[j], n[j]); }
                   });
  }

  void step_reset_before(const Step& now, const Crew& crew) const {
    const Snapshot::Layer& weights = s_.layers[now.layer];
    const Rows<3> rows(*this, now);
    const int64_t H = s_.shape.H;
    multiply<P, 2>(weights.first, operand(now.layer, now.parity, 0), ldw_, now.rows, crew.tiles,
                   now.parity != 0, wide_,
                   [&]<int N>(Items at, const V(&sums)[2][N]) GRU_MEMBER_LAMBDA {
                     V rz[2 * N];
                     GRU_EACH(j) rz[j] = sums[0][j] + rows.gx(at, j, 0);
                     GRU_EACH(j) rz[N + j] = sums[1][j] + rows.gx(at, j, 1);
                     sigmoid<float, 2 * N>(rz);
                     GRU_EACH(j) {
                       const int64_t row = at.row_of(j), tile = at.tile_of(j);
                       store_operand(gated_ + row * ldw_, tile, rz[j] * rows.state(row, tile), H);
                       store(update_ + row * ld_ + tile * W, rz[N + j]);
                     }
                   });
    crew.wait();
    multiply<P, 1>(weights.second, gated_, ldw_, now.rows, crew.tiles, now.parity != 0, wide_,
                   [&]<int N>(Items at, const V(&sums)[1][N]) GRU_MEMBER_LAMBDA {
                     V n[N];
                     GRU_EACH(j) n[j] = sums[0][j] + rows.gx(at, j, 2);
                     tanh<float, N>(n);
                     GRU_EACH(j) {
                       const int64_t row = at.row_of(j), tile = at.tile_of(j);
                       rows.finish(row, tile, load(update_ + row * ld_ + tile * W), n[j]);
                     }
                   });
  }

  const Snapshot& s_;
  const int64_t capacity_, ld_, ldw_, ldx_;
  float *h_, *update_, *gates_, *frame_scale_;
  uint32_t *row_, *gated_, *between_, *frames_;
  const float** gates_of_;
  int parity_ = 0;
  [[no_unique_address]] WideRoom<P> wide_;
};

}  // namespace
}  // namespace GRU_FAST_ISA
}  // namespace gru_fast
