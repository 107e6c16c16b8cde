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

constexpr int STATES = 4;  // taken through a chunk together

// Calls function(S, i) for states i to i + S - 1, with S a constant, for all n states.
template <typename Function>
inline void ForStates(int64_t n, Function function) {
  int64_t i = 0;
  for (; i + STATES <= n; i += STATES) function(std::integral_constant<int, STATES>(), i);
  for (; i < n; ++i) function(std::integral_constant<int, 1>(), i);
}

// The decays exp(step A) of S states at each token, (tokens, S); A2 is A log2(e). Meanwhile fetches
// two rows of a chunk to come: rows are `stride` apart, and their addresses need not exist.
template <int S>
inline void Decays(int64_t tokens, const Floats* step, const Floats* A2_, Floats* decay,
                   const float* ahead, const float* ahead2, int64_t stride) {
  Floats A2[S];
  std::copy_n(A2_, S, A2);
  for (int64_t q = 0; q < tokens; ++q) {
    __builtin_prefetch(ahead + q * stride);
    __builtin_prefetch(ahead2 + q * stride);
    const Floats step_q = step[q];
#pragma GCC unroll 4
    for (int i = 0; i < S; ++i)
      decay[q * S + i] = Exp2(AtLeast(MIN_EXPONENT, step_q * A2[i]));
  }
}

// Takes S states h through the tokens, and adds C h to y. B and C are those of the first token and
// state. Keeps the states before each token, (tokens, S), if there is room for them.
template <int S, bool KEEP>
inline void Recur(int64_t tokens, int64_t n, const Floats* decay, const Floats* x, const float* B,
                  const float* C, Floats* h_, Floats* y, Floats* kept = nullptr) {
  Floats h[S];
  std::copy_n(h_, S, h);
  for (int64_t q = 0; q < tokens; ++q, B += n, C += n) {
    const Floats x_q = x[q];
    Floats y_q = y[q];
#pragma GCC unroll 4
    for (int i = 0; i < S; ++i) {
      if (KEEP) kept[q * S + i] = h[i];
      h[i] = decay[q * S + i] * h[i] + x_q * B[i];
      y_q += h[i] * C[i];
    }
    y[q] = y_q;
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
  const float* start;
  float *y, *end;
  float* borders;  // (b, chunks, n, d), the states before each chunk; null if not needed

  // Values that a vector of channels carries from chunk to chunk; A2 = A log2(e).
  struct Carry {
    std::vector<Floats> A2, h;
  };

  // Values of one vector of channels within a chunk, and its decays.
  struct Scratch {
    std::vector<Floats> step, x, y, decay;
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
    const std::vector<Floats> per_token(chunk);
    Scratch scratch{per_token, per_token, per_token, std::vector<Floats>(chunk * STATES)};
    for (int64_t k = 0; k < Chunks(); ++k)
      for (c = first; c < last; c += WIDTH)
        ForCount(std::min(WIDTH, last - c), [&](auto count) {
          RunChunk(s, k, c, count, carries[(c - first) / WIDTH], scratch);
        });
    for (c = first; c < last; c += WIDTH)
      for (int64_t i = 0; i < n; ++i)
        Store(end + (s * n + i) * d + c, carries[(c - first) / WIDTH].h[i],
              std::min(WIDTH, last - c));
  }

  template <typename Count>
  void RunChunk(int64_t s, int64_t k, int64_t c, Count count, Carry& carry,
                Scratch& scratch) const {
    auto& [step, x, sum, decay] = scratch;
    if (borders)
      for (int64_t i = 0; i < n; ++i)
        Store(borders + ((s * Chunks() + k) * n + i) * d + c, carry.h[i], count);
    const Floats D_c = Load(D + c, count), bias = Load(delta_bias + c, count);
    const int64_t first = s * l + k * chunk, tokens = Tokens(k);
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      const Floats u_q = Load(u + at, count);
      step[q] = StepSize(Load(delta + at, count) + bias);
      x[q] = step[q] * u_q;
      sum[q] = D_c * u_q;
    }
    const int64_t next = (first + chunk) * d + c;
    ForStates(n, [&](auto S, int64_t i) {
      const bool even = i / STATES % 2 == 0;
      Decays<S>(tokens, &step[0], &carry.A2[i], &decay[0], (even ? u : z) + next,
                (even ? delta : y) + next, d);
      Recur<S, false>(tokens, n, &decay[0], &x[0], B + first * n + i, C + first * n + i,
                      &carry.h[i], &sum[0]);
    });
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      Store(y + at, gated ? sum[q] * Silu(Load(z + at, count)) : sum[q], count);
    }
  }
};

// The gradients by each input (dX for X), from those by y and by the state after the last token.
struct Gradient : Arrays {
  const float *borders, *dout, *dend;
  float *du, *ddelta, *dz, *dstart;
  float *dA, *dD, *ddelta_bias;  // of each sequence: (b, n, d), (b, d), (b, d)
  float *dB, *dC;                // of each group of channels: (groups, b, l, n)

  // Values that a vector of channels carries from chunk to chunk; A2 = A log2(e).
  struct Carry {
    std::vector<Floats> A, A2, g, dA;  // g: the gradient by the state after the chunk
    Floats dD = {}, dbias = {};
  };

  // Values within a chunk.
  struct Scratch {
    std::vector<Floats> u, step, slope, x, y, dy, dgate, dx, dstep;  // one vector's, at each token
    std::vector<Floats> decay, h;  // of one vector's STATES; h is the state before the token
    std::vector<Floats> dB, dC;    // sums over the group's vectors, element by element
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
    const std::vector<Floats> per_token(chunk), few(chunk * STATES), all(chunk * n);
    Scratch scratch{per_token, per_token, per_token, per_token, per_token, per_token, per_token,
                    per_token, per_token, few,       few,       all,       all};
    for (int64_t k = Chunks() - 1; k >= 0; --k) {
      std::fill(scratch.dB.begin(), scratch.dB.end(), Floats{});
      std::fill(scratch.dC.begin(), scratch.dC.end(), Floats{});
      for (c = first; c < last; c += WIDTH)
        ForCount(std::min(WIDTH, last - c), [&](auto count) {
          RunChunk(s, k, c, count, carries[(c - first) / WIDTH], scratch);
        });
      const int64_t begin = ((group * b + s) * l + k * chunk) * n;
      for (int64_t i = 0; i < Tokens(k) * n; ++i) {
        dB[begin + i] = Sum(scratch.dB[i]);
        dC[begin + i] = Sum(scratch.dC[i]);
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
    auto& [u_, step, slope, x, y, dy, dgate, dx, dstep, decay, h, dB_sums, dC_sums] = scratch;
    const Floats D_c = Load(D + c, count), bias = Load(delta_bias + c, count);
    const int64_t first = s * l + k * chunk, tokens = Tokens(k);
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      u_[q] = Load(u + at, count);
      step[q] = StepSize(Load(delta + at, count) + bias);
      x[q] = step[q] * u_[q];
      y[q] = D_c * u_[q];
      dx[q] = dstep[q] = Floats{};
    }
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      slope[q] = delta_softplus ? Sigmoid(Load(delta + at, count) + bias) : Floats{} + 1.0f;
      dy[q] = Load(dout + at, count);
      if (gated) {
        const Floats z_q = Load(z + at, count), sigmoid = Sigmoid(z_q), silu = z_q * sigmoid;
        dgate[q] = dy[q] * (sigmoid + silu * (1.0f - sigmoid));
        dy[q] *= silu;
      }
    }
    const int64_t at_state = first * n, next = (first - chunk) * d + c;
    ForStates(n, [&](auto S, int64_t i) {
      const float* ahead[][2] = {{u, delta}, {z, dout}, {du, ddelta}, {dz, dz}};
      const auto& [one, other] = ahead[i / STATES % 4];
      Decays<S>(tokens, &step[0], &carry.A2[i], &decay[0], one + next, other + next, d);
      Floats h_i[S];
      for (int j = 0; j < S; ++j)
        h_i[j] = Load(borders + ((s * Chunks() + k) * n + i + j) * d + c, count);
      Recur<S, true>(tokens, n, &decay[0], &x[0], B + at_state + i, C + at_state + i, h_i, &y[0],
                     &h[0]);
      GoBack<S>(tokens, B + at_state + i, C + at_state + i, i, h_i, carry, scratch);
    });
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t at = (first + q) * d + c;
      const Floats ddelta_q = (dstep[q] + dx[q] * u_[q]) * slope[q];
      carry.dD += dy[q] * u_[q];
      carry.dbias += ddelta_q;
      if (gated) Store(dz + at, dgate[q] * y[q], count);
      Store(ddelta + at, ddelta_q, count);
      Store(du + at, dx[q] * step[q] + D_c * dy[q], count);
    }
  }

  // Takes the gradient by S states, from i on, back through the tokens. h is the state after them.
  template <int S>
  void GoBack(int64_t tokens, const float* B, const float* C, int64_t i, const Floats* h_,
              Carry& carry, Scratch& scratch) const {
    Floats A_i[S], g[S], dA_i[S], h[S];
    std::copy_n(&carry.A[i], S, A_i);
    std::copy_n(&carry.g[i], S, g);
    std::copy_n(&carry.dA[i], S, dA_i);
    std::copy_n(h_, S, h);
    for (int64_t q = tokens - 1; q >= 0; --q) {
      const Floats dy = scratch.dy[q], x_q = scratch.x[q], step_q = scratch.step[q];
      Floats dx = scratch.dx[q], dstep = scratch.dstep[q];
      Floats *dB_q = &scratch.dB[q * n + i], *dC_q = &scratch.dC[q * n + i];
#pragma GCC unroll 4
      for (int j = 0; j < S; ++j) {
        g[j] += C[q * n + j] * dy;
        dC_q[j] += h[j] * dy;
        dB_q[j] += g[j] * x_q;
        dx += g[j] * B[q * n + j];
        h[j] = scratch.h[q * S + j];
        g[j] *= scratch.decay[q * S + j];
        const Floats dexponent = g[j] * h[j];
        dstep += dexponent * A_i[j];
        dA_i[j] += dexponent * step_q;
      }
      scratch.dx[q] = dx;
      scratch.dstep[q] = dstep;
    }
    std::copy_n(g, S, &carry.g[i]);
    std::copy_n(dA_i, S, &carry.dA[i]);
  }
};

}  // namespace kernels

#endif  // KERNELS_SELECTIVE_SCAN_SCAN_H_
