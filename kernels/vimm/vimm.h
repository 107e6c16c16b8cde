// A whole ViMM on a CPU, for inference; README.md describes the design. Arrays are float32, and all
// is computed so except the factors of products.
//
// The tokens inside the image form the sequence. It is cut into pieces of TOKENS tokens, and each
// piece goes through three stages:
//
//   Project  LayerNorm, in_proj, causal convolution, silu, x_proj, dt_proj, softplus
//   Scan     the recurrence and the gate; one task for each block of channels
//   Finish   out_proj

#ifndef KERNELS_VIMM_VIMM_H_
#define KERNELS_VIMM_VIMM_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/cpp/layer_norm.h"
#include "kernels/cpp/matrix.h"
#include "kernels/cpp/vectors.h"
#include "kernels/selective_scan/scan.h"

namespace kernels {

// Puts a product's outputs into blocks that are `stride` lines apart.
inline auto Into(Line* lines, int64_t stride) {
  return [=](int64_t t, int64_t o, Floats x) {
    Store(lines[o / BLOCK * stride + t].at + o % BLOCK, x, WIDTH);
  };
}

struct ViMMSizes {
  int64_t c, d, n, rank;
  int64_t history;  // tokens before each one that the causal convolution reads
};

// The parameters, as in op.py.
struct ViMMWeights {
  const float *norm_scale, *norm_bias, *in_proj, *conv_kernel, *conv_bias, *x_proj, *dt_proj,
      *dt_bias, *A, *D, *out_proj;
};

// A ViMM's parameters, packed for products and vectors.
template <typename Factor>
struct ViMM {
  ViMM(const ViMMSizes& sizes, const ViMMWeights& weights, float epsilon)
      : s(sizes),
        norm(weights.norm_scale, weights.norm_bias, s.c, epsilon),
        in_u(s.c, s.d),
        in_gate(s.c, s.d),
        to_BC(s.d, 2 * BLOCK * Blocks(s.n)),
        to_low_rank(s.d, s.rank),
        to_delta(s.rank, s.d),
        out(s.d, s.c),
        taps(MakeLines(weights.conv_kernel, s.history + 1, s.d)),
        conv_bias(MakeLines(weights.conv_bias, 1, s.d)),
        dt_bias(MakeLines(weights.dt_bias, 1, s.d)),
        D(MakeLines(weights.D, 1, s.d)),
        A2((s.d + WIDTH - 1) / WIDTH * s.n) {
    const int64_t columns = s.rank + 2 * s.n;
    in_u.Set(0, weights.in_proj, s.d, 2 * s.d);
    in_gate.Set(0, weights.in_proj + s.d, s.d, 2 * s.d);
    to_low_rank.Set(0, weights.x_proj, s.rank, columns);
    to_BC.Set(0, weights.x_proj + s.rank, s.n, columns);
    to_BC.Set(BLOCK * Blocks(s.n), weights.x_proj + s.rank + s.n, s.n, columns);
    to_delta.Set(0, weights.dt_proj, s.d, s.d);
    out.Set(0, weights.out_proj, s.c, s.c);
    for (int64_t i = 0; i < s.d; ++i)
      for (int64_t j = 0; j < s.n; ++j)
        A2[i / WIDTH * s.n + j][i % WIDTH] = LOG2_E * weights.A[i * s.n + j];
  }

  const ViMMSizes s;
  LayerNorm norm;
  Matrix<Factor> in_u, in_gate, to_BC, to_low_rank, to_delta, out;
  Lines taps, conv_bias, dt_bias, D;
  std::vector<Floats> A2;  // A log2(e): of each vector of channels, n
};

// What passes through a ViMM: sequences of l tokens, (sequences, l, c), and for each of them the u
// of the tokens before, (history, d), and the state, (d, n). `last` and `end` receive those for the
// next tokens; they may be the same memory. `tails` and `borders` receive those before each piece,
// (sequences, pieces, blocks, history or n, BLOCK), unless they are null.
struct ViMMTokens {
  int64_t sequences, l;
  const float *tokens, *previous, *state;
  float *out, *last, *end, *tails, *borders;
};

// The part of the rows that lies inside the image.
struct Inside {
  int64_t first, rows, width, columns;

  int64_t Tokens() const { return rows * width; }
  int64_t Pieces() const { return (Tokens() + kernels::TOKENS - 1) / kernels::TOKENS; }
};

// The activations of a piece. Its memory serves one piece after the other.
struct Piece {
  explicit Piece(const ViMMSizes& s)
      : u(new Line[Blocks(s.d) * (s.history + TOKENS)]),
        gate(new Line[Blocks(s.d) * TOKENS]),
        delta(new Line[Blocks(s.d) * TOKENS]),
        BC(new Line[2 * Blocks(s.n) * TOKENS]),
        low_rank(new Line[Blocks(s.rank) * TOKENS]),
        tail(new Line[Blocks(s.d) * s.history]) {}

  Lines u;         // after the tokens before the piece; in the end y
  Lines gate;      // in the end the result
  Lines delta;     // at other times the inputs of products with u, and at first normalised tokens
  Lines BC;        // a token's B and C are next to each other
  Lines low_rank;
  Lines tail;      // the last tokens of u before the convolution
  int64_t positions[TOKENS];
  std::atomic<int64_t> progress{0};  // STAGES k + the stage that piece k has reached
};
enum Stage { TAIL = 1, PROJECTED = 2, FINISHED = 3, STAGES = 4 };

// The number of pieces that a block of channels has been scanned through.
struct alignas(sizeof(Line)) Scanned {
  std::atomic<int64_t> pieces{0};
};

// Waits for another thread that is at work.
inline void Wait(const std::atomic<int64_t>& progress, int64_t needed) {
  for (int64_t spins = 0; progress.load(std::memory_order_acquire) < needed; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

// One pass of tokens through a ViMM.
template <typename Factor>
class ViMMPass {
 public:
  ViMMPass(const ViMM<Factor>& vimm, const ViMMTokens& arrays, const Inside& inside,
           int64_t threads)
      : vimm_(vimm),
        s_(vimm.s),
        arrays_(arrays),
        inside_(inside),
        ahead_(threads),
        pieces_per_sequence_(inside.Pieces()),
        count_(arrays.sequences * pieces_per_sequence_),
        states_(vimm.A2.size()),
        scanned_(Blocks(s_.d)) {
    for (int64_t i = 0; i < 2 * ahead_ + 1; ++i) pieces_.emplace_back(new Piece(s_));
  }

  // Runs tasks until all have begun. Several threads do this at the same time.
  void Help() {
    const int64_t tasks = Blocks(s_.d) + 2, steps = count_ + 2 * ahead_;
    for (int64_t i; (i = next_++) < steps * tasks;) {
      // Each task waits only for tasks before it, which have begun.
      const int64_t k = i / tasks, task = i % tasks;
      if (task == 0) {
        if (k < count_) Project(k);
      } else if (task < tasks - 1) {
        if (k >= ahead_ && k - ahead_ < count_) Scan(k - ahead_, task - 1);
      } else if (k >= 2 * ahead_) {
        Finish(k - 2 * ahead_);
      }
    }
  }

 private:
  Piece& At(int64_t k) { return *pieces_[k % pieces_.size()]; }
  int64_t Sequence(int64_t k) const { return k / pieces_per_sequence_; }
  int64_t FirstToken(int64_t k) const { return k % pieces_per_sequence_ * TOKENS; }
  int64_t Tokens(int64_t k) const { return std::min(TOKENS, inside_.Tokens() - FirstToken(k)); }
  bool IsFirst(int64_t k) const { return FirstToken(k) == 0; }
  bool IsLast(int64_t k) const { return FirstToken(k) + TOKENS >= inside_.Tokens(); }

  void Project(int64_t k) {
    Piece& piece = At(k);
    // The piece whose memory this is.
    const int64_t before = k - static_cast<int64_t>(pieces_.size());
    Wait(piece.progress, STAGES * before + FINISHED);
    Wait(At(k + 1).progress, STAGES * (before + 1) + PROJECTED);  // it has read the tail

    const int64_t tokens = Tokens(k), u_stride = s_.history + TOKENS;
    Line *u = piece.u.get(), *x = piece.delta.get();
    int64_t row = FirstToken(k) / inside_.width, column = FirstToken(k) % inside_.width;
    for (int64_t t = 0; t < tokens; ++t, ++column) {
      if (column == inside_.width) column = 0, ++row;
      piece.positions[t] =
          Sequence(k) * arrays_.l + (inside_.first + row) * inside_.columns + column;
    }
    Gather(tokens, s_.c, [&](int64_t t) { return arrays_.tokens + piece.positions[t] * s_.c; }, x);
    vimm_.norm.Normalise(tokens, x);
    const auto normalised = InputsOf<Factor>(x, s_.c, TOKENS, tokens, x);
    vimm_.in_u.Multiply(normalised, tokens, Into(u + s_.history, u_stride));
    vimm_.in_gate.Multiply(normalised, tokens, Into(piece.gate.get(), TOKENS));
    for (int64_t i = 0; i < s_.d; i += WIDTH) {
      float* gate = piece.gate[i / BLOCK * TOKENS].at + i % BLOCK;
      for (int64_t t = 0; t < tokens; ++t, gate += BLOCK)
        Store(gate, Silu(Load(gate, WIDTH)), WIDTH);
    }

    MoveTails(k);
    for (int64_t i = 0; i < s_.d; i += WIDTH) Convolve(piece, tokens, i);

    const auto convolved = InputsOf<Factor>(u + s_.history, s_.d, u_stride, tokens, x);
    vimm_.to_BC.Multiply(convolved, tokens, [&](int64_t t, int64_t o, Floats y) {
      Store(piece.BC[t * 2 * Blocks(s_.n)].at + o, y, WIDTH);
    });
    Line* low_rank = piece.low_rank.get();
    vimm_.to_low_rank.Multiply(convolved, tokens, Into(low_rank, TOKENS));
    vimm_.to_delta.Multiply(InputsOf<Factor>(low_rank, s_.rank, TOKENS, tokens, low_rank), tokens,
                            Into(piece.delta.get(), TOKENS));
    for (int64_t i = 0; i < s_.d; i += WIDTH) {
      const Floats bias = Load(vimm_.dt_bias[0].at + i, WIDTH);
      float* delta = piece.delta[i / BLOCK * TOKENS].at + i % BLOCK;
      for (int64_t t = 0; t < tokens; ++t, delta += BLOCK)
        Store(delta, Softplus(Load(delta, WIDTH) + bias), WIDTH);
    }
    piece.progress.store(STAGES * k + PROJECTED, std::memory_order_release);
  }

  // Puts the tokens before the piece in front of u, and keeps its last ones for the next.
  void MoveTails(int64_t k) {
    Piece& piece = At(k);
    const int64_t tokens = Tokens(k), history = s_.history, b = Sequence(k);
    if (!IsFirst(k)) Wait(At(k - 1).progress, STAGES * (k - 1) + TAIL);
    for (int64_t block = 0; block < Blocks(s_.d); ++block) {
      Line* u = &piece.u[block * (history + TOKENS)];
      const int64_t channels = std::min(BLOCK, s_.d - block * BLOCK);
      for (int64_t i = 0; i < history; ++i) {
        const int64_t at = (b * history + i) * s_.d + block * BLOCK;
        if (IsFirst(k)) {
          u[i] = {};
          std::memcpy(u[i].at, arrays_.previous + at, sizeof(float) * channels);
        } else {
          u[i] = At(k - 1).tail[block * history + i];
        }
      }
      for (int64_t i = 0; i < history; ++i) {
        const int64_t at = (b * history + i) * s_.d + block * BLOCK;
        piece.tail[block * history + i] = u[tokens + i];
        if (IsLast(k)) std::memcpy(arrays_.last + at, u[tokens + i].at, sizeof(float) * channels);
      }
      if (arrays_.tails)
        std::memcpy(arrays_.tails + (k * Blocks(s_.d) + block) * history * BLOCK, u,
                    sizeof(Line) * history);
    }
    piece.progress.store(STAGES * k + TAIL, std::memory_order_release);
  }

  // The causal convolution and silu of a vector of channels, in place.
  void Convolve(Piece& piece, int64_t tokens, int64_t channel) {
    const Floats bias = Load(vimm_.conv_bias[0].at + channel, WIDTH);
    float* u = piece.u[channel / BLOCK * (s_.history + TOKENS)].at + channel % BLOCK;
    for (int64_t t = tokens - 1; t >= 0; --t) {  // backwards, as u_t is replaced
      Floats sum = bias;
      for (int64_t i = 0; i <= s_.history; ++i)
        sum = MultiplyAdd(Load(vimm_.taps[i * Blocks(s_.d)].at + channel, WIDTH),
                          Load(u + (t + i) * BLOCK, WIDTH), sum);
      Store(u + (t + s_.history) * BLOCK, Silu(sum), WIDTH);
    }
  }

  void Scan(int64_t k, int64_t block) {
    Piece& piece = At(k);
    std::atomic<int64_t>& scanned = scanned_[block].pieces;
    Wait(piece.progress, STAGES * k + PROJECTED);
    Wait(scanned, k);
    const int64_t first = block * BLOCK, last = std::min(first + BLOCK, s_.d);
    const int64_t sequence = Sequence(k) * s_.d * s_.n;
    if (IsFirst(k))
      for (int64_t c = first; c < last; ++c)
        for (int64_t i = 0; i < s_.n; ++i)
          states_[c / WIDTH * s_.n + i][c % WIDTH] = arrays_.state[sequence + c * s_.n + i];
    if (arrays_.borders)
      for (int64_t c = first; c < last; c += WIDTH)
        for (int64_t i = 0; i < s_.n; ++i)
          Store(arrays_.borders + ((k * Blocks(s_.d) + block) * s_.n + i) * BLOCK + c % BLOCK,
                states_[c / WIDTH * s_.n + i], WIDTH);
    for (int64_t c = first; c < last; c += WIDTH) ScanVector(piece, Tokens(k), c);
    if (IsLast(k))
      for (int64_t c = first; c < last; ++c)
        for (int64_t i = 0; i < s_.n; ++i)
          arrays_.end[sequence + c * s_.n + i] = states_[c / WIDTH * s_.n + i][c % WIDTH];
    scanned.store(k + 1, std::memory_order_release);
  }

  void ScanVector(Piece& piece, int64_t tokens, int64_t channel) {
    constexpr int STATES = kernels::Scan::STATES;
    const int64_t block = channel / BLOCK, lane = channel % BLOCK;
    const Floats D = Load(vimm_.D[block].at + lane, WIDTH);
    Line* u = &piece.u[block * (s_.history + TOKENS) + s_.history];
    const Line *step = &piece.delta[block * TOKENS], *gate = &piece.gate[block * TOKENS];
    kernels::Scan::Token token[TOKENS];
    Decay decay[TOKENS * STATES];
    Floats largest = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const Floats u_t = Load(u[t].at + lane, WIDTH), step_t = Load(step[t].at + lane, WIDTH);
      token[t] = {step_t, step_t * u_t, D * u_t};
      largest = step_t > largest ? step_t : largest;
    }
    const int64_t padded = BLOCK * Blocks(s_.n), first = channel / WIDTH * s_.n;
    const float *B = piece.BC[0].at, *C = B + padded;
    ForStates<STATES>(s_.n, [&](auto S, int64_t i) {
      Decays<S>(tokens, token, largest, &vimm_.A2[first + i], decay, B, C, 0);
      Recur<S>(tokens, 2 * padded, B + i, C + i, &states_[first + i], token, decay);
    });
    for (int64_t t = 0; t < tokens; ++t)
      Store(u[t].at + lane, token[t].y * Load(gate[t].at + lane, WIDTH), WIDTH);
  }

  void Finish(int64_t k) {
    Piece& piece = At(k);
    for (Scanned& scanned : scanned_) Wait(scanned.pieces, k + 1);
    const int64_t tokens = Tokens(k);
    Line* out = piece.gate.get();
    const auto y = InputsOf<Factor>(&piece.u[s_.history], s_.d, s_.history + TOKENS, tokens,
                                    piece.delta.get());
    vimm_.out.Multiply(y, tokens, Into(out, TOKENS));
    Scatter(tokens, s_.c, out, [&](int64_t t) { return arrays_.out + piece.positions[t] * s_.c; });
    piece.progress.store(STAGES * k + FINISHED, std::memory_order_release);
  }

  const ViMM<Factor>& vimm_;
  const ViMMSizes s_;
  const ViMMTokens arrays_;
  const Inside inside_;
  const int64_t ahead_;  // pieces that are projected before one is scanned, and so on
  const int64_t pieces_per_sequence_, count_;
  std::vector<Floats> states_;  // of each vector of channels, n
  std::vector<Scanned> scanned_;
  std::vector<std::unique_ptr<Piece>> pieces_;
  std::atomic<int64_t> next_{0};
};

}  // namespace kernels

#endif  // KERNELS_VIMM_VIMM_H_
