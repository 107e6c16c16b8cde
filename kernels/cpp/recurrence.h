// The recurrence of the selective scan, for a vector of channels.

#ifndef KERNELS_CPP_RECURRENCE_H_
#define KERNELS_CPP_RECURRENCE_H_

#include <algorithm>
#include <cstdint>

#include "kernels/cpp/vectors.h"

namespace kernels {

// States that pass through the tokens together. More would not fit AVX2's 16 registers.
constexpr int STATES = WIDTH == 16 ? 4 : 2;

// What the recurrence reads and writes at each of a few tokens.
struct Steps {
  int64_t tokens;
  // Vectors of channels, `stride` floats apart: the step size, its product with u, and a sum to
  // which the result is added.
  const float *step, *x;
  float* y;
  int64_t stride;
  // Of all states, `row` floats apart.
  const float *B, *C;
  int64_t row;
};

// Takes S states through the tokens; they stay in registers. IN_RANGE: no decay is below 2^-126.
template <int S, bool IN_RANGE>
inline void RecurStates(const Steps s, const float* B, const float* C, const float* A2, float* h,
                        int64_t stride) {
  Floats A2_[S], h_[S];
  for (int i = 0; i < S; ++i) {
    A2_[i] = Load(A2 + i * stride, WIDTH);
    h_[i] = Load(h + i * stride, WIDTH);
  }
  const float *step = s.step, *x = s.x;
  float* y = s.y;
  for (int64_t t = 0; t < s.tokens; ++t) {
    const Floats step_t = Load(step, WIDTH), x_t = Load(x, WIDTH);
    Floats y_t = Load(y, WIDTH);
#pragma GCC unroll 8
    for (int i = 0; i < S; ++i) {
      const Floats exponent = step_t * A2_[i];
      h_[i] = Exp2(IN_RANGE ? exponent : AtLeast(MIN_EXPONENT, exponent)) * h_[i] + x_t * B[i];
      y_t += h_[i] * C[i];
    }
    Store(y, y_t, WIDTH);
    step += s.stride, x += s.stride, y += s.stride, B += s.row, C += s.row;
  }
  for (int i = 0; i < S; ++i) Store(h + i * stride, h_[i], WIDTH);
}

// Takes n states h through the tokens. A2 is A log2(e); its vectors and those of h are `stride`
// floats apart.
inline void Recur(const Steps& s, int64_t n, const float* A2, float* h, int64_t stride) {
  Floats longest = {};
  for (int64_t t = 0; t < s.tokens; ++t) {
    const Floats step = Load(s.step + t * s.stride, WIDTH);
    longest = step > longest ? step : longest;
  }
  for (int64_t i = 0, count; i < n; i += count, A2 += count * stride, h += count * stride) {
    count = n - i < STATES ? 1 : STATES;
    bool in_range = true;
    for (int64_t j = 0; j < count; ++j) {
      const Floats exponent = longest * Load(A2 + j * stride, WIDTH);
      for (int64_t lane = 0; lane < WIDTH; ++lane) in_range &= exponent[lane] >= MIN_EXPONENT;
    }
    const auto recur =
        count == 1 ? (in_range ? RecurStates<1, true> : RecurStates<1, false>)
                   : (in_range ? RecurStates<STATES, true> : RecurStates<STATES, false>);
    recur(s, s.B + i, s.C + i, A2, h, stride);
  }
}

}  // namespace kernels

#endif  // KERNELS_CPP_RECURRENCE_H_
