// The selective scan and its gradient on a CPU, in float32: a few channels through all tokens.
//
// A vector holds WIDTH channels. The tokens are taken in chunks, and a chunk's work is split into
// loops without long chains of dependent instructions: what comes before the recurrence, the decays
// of a few states, the recurrence of these states, which stay in registers (and so on for the other
// states), and what comes after it. The gradient goes backwards through the chunks, and recomputes
// the states of each from the state before it, which the scan has stored. A and the states are
// (n, d) here, as in chunked.py; everything else is as in op.py.

#ifndef KERNELS_SELECTIVE_SCAN_SCAN_H_
#define KERNELS_SELECTIVE_SCAN_SCAN_H_

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "kernels/cpp/vectors.h"

namespace kernels {

// Calls function(S, i) for states i to i + S - 1, until all n have had their turn. S, a constant, is
// MOST as long as possible, and then half of it, and so on.
template <int MOST, typename Function>
inline void ForStates(int64_t n, Function function, int64_t i = 0) {
  for (; i + MOST <= n; i += MOST) function(std::integral_constant<int, MOST>(), i);
  if constexpr (MOST > 1) ForStates<MOST / 2>(n, function, i);
}

// Values of some states at each of a chunk's tokens, (tokens, S).
struct Decay {
  Floats decay;
};
struct DecayAndState : Decay {
  Floats h;  // before the token
};

// The decays exp(step A) of S states at each token; A2 is A log2(e), and `largest` the largest step.
// Meanwhile fetches two rows of a chunk to come: rows are `stride` apart, and their addresses need
// not exist.
template <int S, typename Token, typename State>
inline void Decays(int64_t tokens, const Token* token, Floats largest, const Floats* A2_,
                   State* state, const float* ahead, const float* ahead2, int64_t stride) {
  Floats A2[S];
  Ints beyond = {};
  for (int i = 0; i < S; ++i) {
    A2[i] = A2_[i];
    beyond |= largest * A2[i] < MIN_EXPONENT;
  }
  const auto fill = [&](auto clamped) {
    for (int64_t q = 0; q < tokens; ++q) {
      __builtin_prefetch(ahead + q * stride);
      __builtin_prefetch(ahead2 + q * stride);
      const Floats step = token[q].step;
#pragma GCC unroll 8
      for (int i = 0; i < S; ++i) {
        const Floats t = step * A2[i];
        state[q * S + i].decay = Exp2(clamped ? AtLeast(MIN_EXPONENT, t) : t);
      }
    }
  };
  if (Any(beyond))
    fill(std::true_type());
  else
    fill(std::false_type());
}

// Takes S states h through the tokens, and adds C h to y. B and C are those of the first token and
// state.
template <int S, typename Token, typename State>
inline void Recur(int64_t tokens, int64_t n, const float* B, const float* C, Floats* h_,
                  Token* token, State* state) {
  Floats h[S];
  std::copy_n(h_, S, h);
  for (int64_t q = 0; q < tokens; ++q, B += n, C += n) {
    const Floats x = token[q].x;
    Floats y = token[q].y;
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i) {
      if constexpr (std::is_same_v<State, DecayAndState>) state[q * S + i].h = h[i];
      h[i] = MultiplyAdd(state[q * S + i].decay, h[i], x * B[i]);
      y = MultiplyAdd(h[i], Fill(C[i]), y);
    }
    token[q].y = y;
  }
  std::copy_n(h, S, h_);
}

struct Arrays {
  const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias;
  int64_t b, l, d, n;
  bool delta_softplus, gated;
  int64_t chunk, channels;  // tokens per chunk, and channels per call of Run

  int64_t Chunks() const { return (l + chunk - 1) / chunk; }
  int64_t Tokens(int64_t k) const { return std::min(chunk, l - k * chunk); }
  int64_t Groups() const { return (d + channels - 1) / channels; }
  Floats StepSize(Floats biased) const { return delta_softplus ? Softplus(biased) : biased; }
};

struct Scan : Arrays {
  static constexpr int STATES = 8;  // taken through a chunk together

  const float* start;
  float *y, *end;
  float* borders;  // (b, chunks, n, d), the states before each chunk; null if not needed

  // Values that a vector of channels carries from chunk to chunk; A2 = A log2(e).
  struct Carry {
    std::vector<Floats> A2, h;
  };

  // Values of a vector of channels at a token; x = step u.
  struct Token {
    Floats step, x, y;
  };

  // Scans up to `channels` channels of sequence s, from c on.
  void Run(int64_t s, int64_t c) const {
    const int64_t first = c, last = std::min(c + channels, d);
    std::vector<Carry> carries;
    for (c = first; c < last; c += WIDTH) {
      carries.push_back({std::vector<Floats>(n), std::vector<Floats>(n)});
      for (int64_t i = 0; i < n; ++i) {
        carries.back().A2[i] = LOG2_E * Load(A + i * d + c, std::min(WIDTH, last - c));
        carries.back().h[i] = Load(start + (s * n + i) * d + c, std::min(WIDTH, last - c));
      }
    }
    std::vector<Token> token(chunk);
    std::vector<Decay> decay(chunk * STATES);
    for (int64_t k = 0; k < Chunks(); ++k)
      for (c = first; c < last; c += WIDTH)
        ForCount(std::min(WIDTH, last - c), [&](auto count) {
          RunChunk(s, k, c, count, carries[(c - first) / WIDTH], token.data(), decay.data());
        });
    for (c = first; c < last; c += WIDTH)
      for (int64_t i = 0; i < n; ++i)
        Store(end + (s * n + i) * d + c, carries[(c - first) / WIDTH].h[i],
              std::min(WIDTH, last - c));
  }

  template <typename Count>
  void RunChunk(int64_t s, int64_t k, int64_t c, Count count, Carry& carry, Token* token,
                Decay* decay) const {
    if (borders)
      for (int64_t i = 0; i < n; ++i)
        Store(borders + ((s * Chunks() + k) * n + i) * d + c, carry.h[i], count);
    const Floats D_c = Load(D + c, count), bias = Load(delta_bias + c, count);
    const int64_t first = s * l + k * chunk, tokens = Tokens(k);
    Floats largest = {};
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      const Floats u_q = Load(u + at, count);
      const Floats step = StepSize(Load(delta + at, count) + bias);
      token[q] = {step, step * u_q, D_c * u_q};
      largest = step > largest ? step : largest;
    }
    const int64_t next = (first + chunk) * d + c;
    ForStates<STATES>(n, [&](auto S, int64_t i) {
      const bool even = i / S % 2 == 0;
      Decays<S>(tokens, token, largest, &carry.A2[i], decay, (even ? u : z) + next,
                (even ? delta : y) + next, d);
      Recur<S>(tokens, n, B + first * n + i, C + first * n + i, &carry.h[i], token, decay);
    });
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      Store(y + at, gated ? token[q].y * Silu(Load(z + at, count)) : token[q].y, count);
    }
  }
};

// The gradients by each input (dX for X), from those by y and by the state after the last token.
struct Gradient : Arrays {
  static constexpr int STATES = 4;

  const float *borders, *dout, *dend;
  float *du, *ddelta, *dz, *dstart;
  float *dA, *dD, *ddelta_bias;  // of each sequence: (b, n, d), (b, d), (b, d)
  float *dB, *dC;                // of each group of channels: (groups, b, l, n)
  float* y;                      // the scan's result once more; null if not needed

  // Values that a vector of channels carries from chunk to chunk; A2 = A log2(e).
  struct Carry {
    std::vector<Floats> A, A2, g, dA;  // g: the gradient by the state after the chunk
    Floats dD = {}, dbias = {};
  };

  // Values of a vector of channels at a token; x = step u, and `slope` is that of softplus.
  struct Token {
    Floats u, step, slope, x, y, dy, dgate, dx, dstep;
  };

  // Sums over a group's vectors, element by element, for a state at a token.
  struct Sums {
    Floats dB, dC;
  };

  // Values within a chunk: one vector's at each token, its STATES', and the sums for all states.
  struct Scratch {
    std::vector<Token> token;
    std::vector<DecayAndState> state;
    std::vector<Sums> sums;
  };

  // Computes the gradients of up to `channels` channels of sequence s, from c on.
  void Run(int64_t s, int64_t c) const {
    const int64_t first = c, last = std::min(c + channels, d), group = first / channels;
    const std::vector<Floats> zeros(n);
    std::vector<Carry> carries;
    for (c = first; c < last; c += WIDTH) {
      carries.push_back({zeros, zeros, zeros, zeros});
      for (int64_t i = 0; i < n; ++i) {
        Carry& carry = carries.back();
        carry.A[i] = Load(A + i * d + c, std::min(WIDTH, last - c));
        carry.A2[i] = LOG2_E * carry.A[i];
        carry.g[i] = Load(dend + (s * n + i) * d + c, std::min(WIDTH, last - c));
      }
    }
    Scratch scratch{std::vector<Token>(chunk), std::vector<DecayAndState>(chunk * STATES),
                    std::vector<Sums>(chunk * n)};
    for (int64_t k = Chunks() - 1; k >= 0; --k) {
      std::fill(scratch.sums.begin(), scratch.sums.end(), Sums{});
      for (c = first; c < last; c += WIDTH)
        ForCount(std::min(WIDTH, last - c), [&](auto count) {
          RunChunk(s, k, c, count, carries[(c - first) / WIDTH], scratch);
        });
      const int64_t begin = ((group * b + s) * l + k * chunk) * n;
      for (int64_t i = 0; i < Tokens(k) * n; ++i) {
        dB[begin + i] = Sum(scratch.sums[i].dB);
        dC[begin + i] = Sum(scratch.sums[i].dC);
      }
    }
    for (c = first; c < last; c += WIDTH) {
      const Carry& carry = carries[(c - first) / WIDTH];
      const int64_t count = std::min(WIDTH, last - c);
      Store(dD + s * d + c, carry.dD, count);
      Store(ddelta_bias + s * d + c, carry.dbias, count);
      for (int64_t i = 0; i < n; ++i) {
        Store(dA + (s * n + i) * d + c, carry.dA[i], count);
        Store(dstart + (s * n + i) * d + c, carry.g[i], count);
      }
    }
  }

  template <typename Count>
  void RunChunk(int64_t s, int64_t k, int64_t c, Count count, Carry& carry,
                Scratch& scratch) const {
    Token* const token = scratch.token.data();
    DecayAndState* const state = scratch.state.data();
    const Floats D_c = Load(D + c, count), bias = Load(delta_bias + c, count);
    const int64_t first = s * l + k * chunk, tokens = Tokens(k);
    Floats largest = {};
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      Token& t = token[q];
      const Floats biased = Load(delta + at, count) + bias;
      t.u = Load(u + at, count);
      t.step = StepSize(biased);
      t.slope = delta_softplus ? Sigmoid(biased) : Fill(1.0f);
      largest = t.step > largest ? t.step : largest;
      t.x = t.step * t.u;
      t.y = D_c * t.u;
      t.dx = t.dstep = Floats{};
    }
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      Token& t = token[q];
      t.dy = Load(dout + at, count);
      if (gated) {
        const Floats z_q = Load(z + at, count), sigmoid = Sigmoid(z_q), silu = z_q * sigmoid;
        t.dgate = t.dy * (sigmoid + silu * (1.0f - sigmoid));
        t.dy *= silu;
      }
    }
    const int64_t next = (first - chunk) * d + c;
    ForStates<STATES>(n, [&](auto S, int64_t i) {
      const float* ahead[][2] = {{u, delta}, {z, dout}, {du, ddelta}, {dz, dz}};
      const auto& [one, other] = ahead[i / S % 4];
      Decays<S>(tokens, token, largest, &carry.A2[i], state, one + next, other + next, d);
      Floats h[S];
      for (int j = 0; j < S; ++j)
        h[j] = Load(borders + ((s * Chunks() + k) * n + i + j) * d + c, count);
      const float *B_i = B + first * n + i, *C_i = C + first * n + i;
      Recur<S>(tokens, n, B_i, C_i, h, token, state);
      GoBack<S>(tokens, B_i, C_i, h, &carry.A[i], &carry.g[i], &carry.dA[i], token, state,
                &scratch.sums[i]);
    });
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      const Token& t = token[q];
      const Floats ddelta_q = (t.dstep + t.dx * t.u) * t.slope;
      carry.dD += t.dy * t.u;
      carry.dbias += ddelta_q;
      if (y) Store(y + at, gated ? t.y * Silu(Load(z + at, count)) : t.y, count);
      if (gated) Store(dz + at, t.dgate * t.y, count);
      Store(ddelta + at, ddelta_q, count);
      Store(du + at, t.dx * t.step + D_c * t.dy, count);
    }
  }

  // Takes g, the gradient by S states, back through the tokens. h are the states after them.
  template <int S>
  void GoBack(int64_t tokens, const float* B, const float* C, const Floats* h_, const Floats* A_,
              Floats* g_, Floats* dA_, Token* token, const DecayAndState* state,
              Sums* sums) const {
    Floats A_i[S], g[S], dA_i[S], h[S];
    std::copy_n(A_, S, A_i);
    std::copy_n(g_, S, g);
    std::copy_n(dA_, S, dA_i);
    std::copy_n(h_, S, h);
    for (int64_t q = tokens - 1; q >= 0; --q) {
      Token& t = token[q];
      const Floats dy = t.dy, x = t.x, step = t.step;
      Floats dx = t.dx, dstep = t.dstep;
#pragma GCC unroll 8
      for (int i = 0; i < S; ++i) {
        g[i] += C[q * n + i] * dy;
        sums[q * n + i].dC += h[i] * dy;
        sums[q * n + i].dB += g[i] * x;
        dx += g[i] * B[q * n + i];
        h[i] = state[q * S + i].h;
        g[i] *= state[q * S + i].decay;
        const Floats dexponent = g[i] * h[i];
        dstep += dexponent * A_i[i];
        dA_i[i] += dexponent * step;
      }
      t.dx = dx;
      t.dstep = dstep;
    }
    std::copy_n(g, S, g_);
    std::copy_n(dA_i, S, dA_);
  }
};

}  // namespace kernels

#endif  // KERNELS_SELECTIVE_SCAN_SCAN_H_
