// The gradient of vimm.h, of whole images in float32; README.md describes the design.
//
// A sequence is taken backwards, piece by piece. All that a piece needs is computed anew, from its
// tokens, the u before it and the state before it, which the forward pass has kept.

#ifndef KERNELS_VIMM_GRADIENT_H_
#define KERNELS_VIMM_GRADIENT_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpp/layer_norm.h"
#include "kernels/cpp/matrix.h"
#include "kernels/cpp/vectors.h"
#include "kernels/selective_scan/scan.h"
#include "kernels/vimm/vimm.h"

namespace kernels {

// An array of (rows, columns) as (columns, rows).
inline std::vector<float> Transposed(const float* x, int64_t rows, int64_t columns) {
  std::vector<float> transposed(rows * columns);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) transposed[j * rows + i] = x[i * columns + j];
  return transposed;
}

// The weights of the products that take gradients from outputs to inputs.
struct TransposedViMM {
  TransposedViMM(const ViMMSizes& s, const ViMMWeights& weights)
      : out(s.c, s.d), delta(s.d, s.rank), x(s.rank + 2 * s.n, s.d), in(s.d, s.c, 2) {
    const int64_t columns = s.rank + 2 * s.n;
    out.Set(0, Transposed(weights.out_proj, s.d, s.c).data(), s.d, s.d);
    delta.Set(0, Transposed(weights.dt_proj, s.rank, s.d).data(), s.rank, s.rank);
    x.Set(0, Transposed(weights.x_proj, s.d, columns).data(), s.d, s.d);
    in.Set(0, Transposed(weights.in_proj, s.c, 2 * s.d).data(), s.c, s.c);
  }

  Matrix<Float32> out, delta, x, in;  // `in` has two groups of inputs: u and the gate
};

// The gradient by a product's weights, (inputs, outputs): sums over tokens.
class WeightSums {
 public:
  WeightSums(int64_t inputs, int64_t outputs)
      : inputs_(inputs),
        outputs_(outputs),
        lines_(new Line[Blocks(inputs) * BLOCK * Blocks(outputs)]()) {}

  // Adds these tokens' products of the inputs and the gradients by the outputs.
  void Add(const std::vector<const Line*>& x, const std::vector<const Line*>& dy, int64_t tokens) {
    constexpr int ROWS = WIDTH == BLOCK ? 8 : 4;
    constexpr int VECTORS = WIDTH == BLOCK ? 1 : 2;
    for (int64_t i = 0; i < inputs_; i += ROWS)
      for (int64_t o = 0; o < outputs_; o += VECTORS * WIDTH) {
        const float* x_t = x[i / BLOCK]->at + i % BLOCK;
        const float* dy_t = dy[o / BLOCK]->at + o % BLOCK;
        Floats sums[ROWS][VECTORS] = {};
        for (int64_t t = 0; t < tokens; ++t, x_t += BLOCK, dy_t += BLOCK)
#pragma GCC unroll 8
          for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
            for (int v = 0; v < VECTORS; ++v)
              sums[r][v] = MultiplyAdd(Fill(x_t[r]), Load(dy_t + v * WIDTH, WIDTH), sums[r][v]);
        for (int r = 0; r < ROWS; ++r)
          for (int v = 0; v < VECTORS; ++v) {
            float* to = Row(i + r) + o + v * WIDTH;
            Store(to, Load(to, WIDTH) + sums[r][v], WIDTH);
          }
      }
  }

  // Copies the sums to rows that are `row` floats long.
  void CopyTo(float* to, int64_t row) const {
    for (int64_t i = 0; i < inputs_; ++i) std::copy_n(Row(i), outputs_, to + i * row);
  }

 private:
  float* Row(int64_t i) const { return lines_[i * Blocks(outputs_)].at; }

  int64_t inputs_, outputs_;
  Lines lines_;
};

// The tokens, what ViMMTokens has kept of them, the gradient by the result, and the gradients to be
// computed: those by weights are of each sequence.
struct ViMMGradientArrays {
  int64_t l;
  const float *tokens, *tails, *borders, *dout;
  float *dtokens, *norm_scale, *norm_bias, *in_proj, *conv_kernel, *conv_bias, *x_proj, *dt_proj,
      *dt_bias, *A, *D, *out_proj;
};

// The gradient of one sequence.
class ViMMGradient {
 public:
  ViMMGradient(const ViMM<Float32>& vimm, const TransposedViMM& transposed,
               const ViMMGradientArrays& arrays, int64_t sequence)
      : vimm_(vimm),
        transposed_(transposed),
        s_(vimm.s),
        arrays_(arrays),
        sequence_(sequence),
        columns_(s_.rank + 2 * s_.n),
        x_(new Line[Blocks(s_.c) * TOKENS]),
        normal_(new Line[Blocks(s_.c) * TOKENS]),
        before_conv_(new Line[Blocks(s_.d) * (s_.history + TOKENS)]),
        u_(new Line[Blocks(s_.d) * TOKENS]),
        slope_(new Line[Blocks(s_.d) * TOKENS]),
        gate_(new Line[Blocks(s_.d) * TOKENS]),
        low_rank_(new Line[Blocks(s_.rank) * TOKENS]),
        delta_(new Line[Blocks(s_.d) * TOKENS]),
        y_(new Line[Blocks(s_.d) * TOKENS]),
        dout_(new Line[Blocks(s_.c) * TOKENS]),
        du_(new Line[Blocks(s_.d) * DuStride()]()),
        dcolumns_(new Line[Blocks(columns_) * TOKENS]),
        dbefore_conv_(new Line[Blocks(s_.d) * (s_.history + TOKENS)]()),
        dnormal_(new Line[Blocks(s_.c) * TOKENS]),
        B_(TOKENS * s_.n),
        C_(TOKENS * s_.n),
        rows_(TOKENS * columns_),
        scratch_{std::vector<Gradient::Token>(TOKENS),
                 std::vector<DecayAndState>(TOKENS * Gradient::STATES),
                 std::vector<Gradient::Sums>(TOKENS * s_.n)},
        in_u_(s_.c, s_.d),
        in_gate_(s_.c, s_.d),
        x_proj_(s_.d, columns_),
        dt_proj_(s_.rank, s_.d),
        out_proj_(s_.d, s_.c),
        norm_scale_(new Line[Blocks(s_.c)]()),
        norm_bias_(new Line[Blocks(s_.c)]()),
        taps_(new Line[(s_.history + 1) * Blocks(s_.d)]()),
        conv_bias_(new Line[Blocks(s_.d)]()) {
    const std::vector<Floats> zeros(s_.n);
    for (int64_t c = 0; c < s_.d; c += WIDTH) {
      carries_.push_back({zeros, zeros, zeros, zeros});
      for (int64_t i = 0; i < s_.n; ++i) {
        carries_.back().A2[i] = vimm.A2[c / WIDTH * s_.n + i];
        carries_.back().A[i] = carries_.back().A2[i] / LOG2_E;
      }
    }
  }

  void Run() {
    const int64_t pieces = (arrays_.l + TOKENS - 1) / TOKENS;
    for (int64_t k = pieces - 1; k >= 0; --k) {
      const int64_t first = sequence_ * arrays_.l + k * TOKENS;
      const int64_t tokens = std::min(TOKENS, arrays_.l - k * TOKENS);
      const int64_t channel = (sequence_ * pieces + k) * Blocks(s_.d) * BLOCK;
      Recompute(tokens, arrays_.tokens + first * s_.c, arrays_.tails + channel * s_.history);
      GoBackToScan(tokens, arrays_.dout + first * s_.c);
      GoBackThroughScan(tokens, arrays_.borders + channel * s_.n);
      GoBackToConvolution(tokens);
      GoBackToTokens(tokens, arrays_.dtokens + first * s_.c);
    }
    CopyWeightGradients();
  }

 private:
  typedef std::vector<const Line*> Blocked;

  // Blocks of du, with `history` zeros before and after the tokens.
  int64_t DuStride() const { return TOKENS + 2 * s_.history; }

  // The blocks of an array whose blocks are `stride` lines apart.
  static Blocked BlocksOf(const Line* lines, int64_t channels, int64_t stride = TOKENS) {
    return InputsOf<Float32>(lines, channels, stride, TOKENS, nullptr);
  }

  // All that comes before the scan.
  void Recompute(int64_t tokens, const float* rows, const float* tail) {
    const int64_t history = s_.history, stride = history + TOKENS, n = s_.n;
    Gather(tokens, s_.c, [&](int64_t t) { return rows + t * s_.c; }, x_.get());
    std::copy_n(x_.get(), Blocks(s_.c) * TOKENS, normal_.get());
    vimm_.norm.Normalise(tokens, normal_.get());
    const Blocked normal = BlocksOf(normal_.get(), s_.c);
    vimm_.in_u.Multiply(normal, tokens, Into(&before_conv_[history], stride));
    vimm_.in_gate.Multiply(normal, tokens, Into(gate_.get(), TOKENS));
    for (int64_t block = 0; block < Blocks(s_.d); ++block)
      std::copy_n(tail + block * history * BLOCK, history * BLOCK,
                  &before_conv_[block * stride].at[0]);
    for (int64_t c = 0; c < s_.d; c += WIDTH) Convolve(tokens, c / BLOCK, c % BLOCK);
    const Blocked u = BlocksOf(u_.get(), s_.d);
    vimm_.to_BC.Multiply(u, tokens, [&](int64_t t, int64_t o, Floats x) {
      const int64_t padded = BLOCK * Blocks(n), i = o % padded;
      if (i < n) Store(&(o < padded ? B_ : C_)[t * n + i], x, std::min(WIDTH, n - i));
    });
    vimm_.to_low_rank.Multiply(u, tokens, Into(low_rank_.get(), TOKENS));
    vimm_.to_delta.Multiply(BlocksOf(low_rank_.get(), s_.rank), tokens, Into(delta_.get(), TOKENS));
  }

  // u after the convolution and silu, and the slope of silu.
  void Convolve(int64_t tokens, int64_t block, int64_t lane) {
    const Floats bias = Load(vimm_.conv_bias[block].at + lane, WIDTH);
    const Line* before = &before_conv_[block * (s_.history + TOKENS)];
    for (int64_t t = 0; t < tokens; ++t) {
      Floats sum = bias;
      for (int64_t i = 0; i <= s_.history; ++i)
        sum = MultiplyAdd(Load(vimm_.taps[i * Blocks(s_.d) + block].at + lane, WIDTH),
                          Load(before[t + i].at + lane, WIDTH), sum);
      const Floats sigmoid = Sigmoid(sum), silu = sum * sigmoid;
      Store(u_[block * TOKENS + t].at + lane, silu, WIDTH);
      Store(slope_[block * TOKENS + t].at + lane, sigmoid + silu * (1.0f - sigmoid), WIDTH);
    }
  }

  // From the gradient by the result to that by the gated y, which is put into du_.
  void GoBackToScan(int64_t tokens, const float* rows) {
    Gather(tokens, s_.c, [&](int64_t t) { return rows + t * s_.c; }, dout_.get());
    transposed_.out.Multiply(BlocksOf(dout_.get(), s_.c), tokens,
                             Into(&du_[s_.history], DuStride()));
  }

  // Replaces the gate, delta, and the gradient in du_, by the gradients by gate, delta and u.
  void GoBackThroughScan(int64_t tokens, const float* borders) {
    std::fill(scratch_.sums.begin(), scratch_.sums.end(), Gradient::Sums{});
    for (int64_t c = 0; c < s_.d; c += WIDTH) {
      const int64_t block = c / BLOCK;
      float *delta = delta_[block * TOKENS].at, *gate = gate_[block * TOKENS].at,
            *du = du_[block * DuStride() + s_.history].at;
      Gradient scan{};
      scan.b = 1;
      scan.l = scan.chunk = tokens;
      scan.d = scan.channels = BLOCK;
      scan.n = s_.n;
      scan.delta_softplus = scan.gated = true;
      scan.u = u_[block * TOKENS].at;
      scan.delta = delta;
      scan.B = B_.data();
      scan.C = C_.data();
      scan.D = vimm_.D[block].at;
      scan.z = gate;
      scan.delta_bias = vimm_.dt_bias[block].at;
      scan.borders = borders + block * s_.n * BLOCK;
      scan.dout = scan.du = du;
      scan.ddelta = delta;
      scan.dz = gate;
      scan.y = y_[block * TOKENS].at;
      scan.RunChunk(0, 0, c % BLOCK, std::integral_constant<int64_t, WIDTH>(), carries_[c / WIDTH],
                    scratch_);
    }
    out_proj_.Add(BlocksOf(y_.get(), s_.d), BlocksOf(dout_.get(), s_.c), tokens);
  }

  // From the gradients by delta, B, C and u to that by u before the convolution.
  void GoBackToConvolution(int64_t tokens) {
    const int64_t history = s_.history, stride = history + TOKENS;
    const Blocked ddelta = BlocksOf(delta_.get(), s_.d);
    dt_proj_.Add(BlocksOf(low_rank_.get(), s_.rank), ddelta, tokens);
    for (int64_t t = 0; t < tokens; ++t)
      for (int64_t i = 0; i < s_.n; ++i) {
        float* to = &rows_[t * columns_ + s_.rank + i];
        to[0] = Sum(scratch_.sums[t * s_.n + i].dB);
        to[s_.n] = Sum(scratch_.sums[t * s_.n + i].dC);
      }
    transposed_.delta.Multiply(ddelta, tokens, [&](int64_t t, int64_t o, Floats x) {
      Store(&rows_[t * columns_ + o], x, std::min(WIDTH, s_.rank - o));
    });
    Gather(tokens, columns_, [&](int64_t t) { return &rows_[t * columns_]; }, dcolumns_.get());
    const Blocked dcolumns = BlocksOf(dcolumns_.get(), columns_);
    x_proj_.Add(BlocksOf(u_.get(), s_.d), dcolumns, tokens);
    transposed_.x.Multiply(dcolumns, tokens, [&](int64_t t, int64_t o, Floats x) {
      float* du = du_[o / BLOCK * DuStride() + history + t].at + o % BLOCK;
      const Floats slope = Load(slope_[o / BLOCK * TOKENS + t].at + o % BLOCK, WIDTH);
      Store(du, (Load(du, WIDTH) + x) * slope, WIDTH);
    });
    for (int64_t block = 0; block < Blocks(s_.d); ++block) {
      Line *du = &du_[block * DuStride()], *dbefore = &dbefore_conv_[block * stride];
      std::fill_n(du + history + tokens, history, Line{});
      // The piece after this one has found gradients by tokens before it, some of which are here.
      std::copy_backward(dbefore, dbefore + history, dbefore + tokens + history);
      std::fill_n(dbefore, tokens, Line{});
    }
    for (int64_t c = 0; c < s_.d; c += WIDTH)
      GoBackThroughConvolution(tokens, c / BLOCK, c % BLOCK);
  }

  void GoBackThroughConvolution(int64_t tokens, int64_t block, int64_t lane) {
    const int64_t history = s_.history, stride = history + TOKENS;
    const Line *before = &before_conv_[block * stride], *du = &du_[block * DuStride() + history];
    Line* dbefore = &dbefore_conv_[block * stride];
    const auto tap = [&](const Lines& taps, int64_t i) {
      return taps[i * Blocks(s_.d) + block].at + lane;
    };
    for (int64_t t = 0; t < history + tokens; ++t) {
      Floats sum = Load(dbefore[t].at + lane, WIDTH);
      for (int64_t i = 0; i <= history; ++i)
        sum = MultiplyAdd(Load(tap(vimm_.taps, i), WIDTH), Load(du[t - i].at + lane, WIDTH), sum);
      Store(dbefore[t].at + lane, sum, WIDTH);
    }
    for (int64_t i = 0; i <= history; ++i) {
      Floats sum = Load(tap(taps_, i), WIDTH);
      for (int64_t t = 0; t < tokens; ++t)
        sum = MultiplyAdd(Load(before[t + i].at + lane, WIDTH), Load(du[t].at + lane, WIDTH), sum);
      Store(tap(taps_, i), sum, WIDTH);
    }
    Floats sum = Load(conv_bias_[block].at + lane, WIDTH);
    for (int64_t t = 0; t < tokens; ++t) sum += Load(du[t].at + lane, WIDTH);
    Store(conv_bias_[block].at + lane, sum, WIDTH);
  }

  // From the gradients by u before the convolution and by the gate to that by the tokens.
  void GoBackToTokens(int64_t tokens, float* rows) {
    const Blocked normal = BlocksOf(normal_.get(), s_.c);
    const Blocked dgate = BlocksOf(gate_.get(), s_.d);
    Blocked both = BlocksOf(&dbefore_conv_[s_.history], s_.d, s_.history + TOKENS);
    in_u_.Add(normal, both, tokens);
    in_gate_.Add(normal, dgate, tokens);
    both.insert(both.end(), dgate.begin(), dgate.end());
    transposed_.in.Multiply(both, tokens, Into(dnormal_.get(), TOKENS));
    vimm_.norm.Differentiate(tokens, x_.get(), dnormal_.get(), norm_scale_.get(), norm_bias_.get());
    Scatter(tokens, s_.c, dnormal_.get(), [&](int64_t t) { return rows + t * s_.c; });
  }

  void CopyWeightGradients() const {
    const auto copy = [&](const Lines& lines, int64_t count, int64_t channels, float* to) {
      to += sequence_ * count * channels;
      for (int64_t i = 0; i < count; ++i)
        std::copy_n(lines[i * Blocks(channels)].at, channels, to + i * channels);
    };
    copy(norm_scale_, 1, s_.c, arrays_.norm_scale);
    copy(norm_bias_, 1, s_.c, arrays_.norm_bias);
    copy(taps_, s_.history + 1, s_.d, arrays_.conv_kernel);
    copy(conv_bias_, 1, s_.d, arrays_.conv_bias);
    in_u_.CopyTo(arrays_.in_proj + sequence_ * s_.c * 2 * s_.d, 2 * s_.d);
    in_gate_.CopyTo(arrays_.in_proj + sequence_ * s_.c * 2 * s_.d + s_.d, 2 * s_.d);
    x_proj_.CopyTo(arrays_.x_proj + sequence_ * s_.d * columns_, columns_);
    dt_proj_.CopyTo(arrays_.dt_proj + sequence_ * s_.rank * s_.d, s_.d);
    out_proj_.CopyTo(arrays_.out_proj + sequence_ * s_.d * s_.c, s_.c);
    for (int64_t c = 0; c < s_.d; ++c) {
      const Gradient::Carry& carry = carries_[c / WIDTH];
      arrays_.dt_bias[sequence_ * s_.d + c] = carry.dbias[c % WIDTH];
      arrays_.D[sequence_ * s_.d + c] = carry.dD[c % WIDTH];
      for (int64_t i = 0; i < s_.n; ++i)
        arrays_.A[(sequence_ * s_.d + c) * s_.n + i] = carry.dA[i][c % WIDTH];
    }
  }

  const ViMM<Float32>& vimm_;
  const TransposedViMM& transposed_;
  const ViMMSizes s_;
  const ViMMGradientArrays arrays_;
  const int64_t sequence_, columns_;
  // A piece's activations, some of which are replaced by the gradients by them.
  Lines x_, normal_, before_conv_, u_, slope_, gate_, low_rank_, delta_, y_;
  Lines dout_, du_, dcolumns_, dbefore_conv_, dnormal_;
  std::vector<float> B_, C_, rows_;  // rows_: of dcolumns_
  std::vector<Gradient::Carry> carries_;
  Gradient::Scratch scratch_;
  // Gradients by weights.
  WeightSums in_u_, in_gate_, x_proj_, dt_proj_, out_proj_;
  Lines norm_scale_, norm_bias_, taps_, conv_bias_;
};

}  // namespace kernels

#endif  // KERNELS_VIMM_GRADIENT_H_
