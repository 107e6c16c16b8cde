// A vector of floats, as long as the machine's, and the mathematics that the kernels need of it.
//
// Written with the vector extensions of GCC and Clang, for AVX-512, AVX, NEON, SSE and WASM's
// SIMD128 alike. Comparisons are written so that NaN stays NaN.

#ifndef KERNELS_CPP_VECTORS_H_
#define KERNELS_CPP_VECTORS_H_

#include <cstdint>
#include <cstring>

namespace kernels {

#if defined(__AVX512F__)
constexpr int64_t WIDTH = 16;
#elif defined(__AVX__)
constexpr int64_t WIDTH = 8;
#else
constexpr int64_t WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

inline Floats Load(const float* from, int64_t count) {
  Floats x = {};
  if (count == WIDTH)
    std::memcpy(&x, from, sizeof x);
  else
    std::memcpy(&x, from, sizeof(float) * count);
  return x;
}

inline void Store(float* to, Floats x, int64_t count) {
  if (count == WIDTH)
    std::memcpy(to, &x, sizeof x);
  else
    std::memcpy(to, &x, sizeof(float) * count);
}

constexpr float LOG2_E = 1.44269504f;

// 2^t for t up to 127 (delta A is never positive), with a relative error of 2e-7; exact at 0, and
// 2^-126 below -126.
inline Floats Exp2(Floats t) {
  t = t < -126.0f ? Floats{} - 126.0f : t;
  const Floats shifted = t + 12582912.0f;  // 1.5 * 2^23: its last bits are now t, rounded
  const Floats f = t - (shifted - 12582912.0f);
  Floats p = Floats{} + 1.326472615e-3f;  // fitted to 2^f for f from -1/2 to 1/2
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));  // adds to the exponent
}

// log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 artanh(e / (2 + e)).
inline Floats Softplus(Floats x) {
  const Floats positive = x > 0.0f ? x : Floats{};
  const Floats minus_abs = x > 0.0f ? -x : x;
  const Floats e = minus_abs < -87.0f ? Floats{} : Exp2(LOG2_E * minus_abs);
  const Floats s = e / (2.0f + e);  // 1/3 at most
  const Floats s2 = s * s;
  Floats p = Floats{} + 1.0f / 15;
  for (int k = 13; k > 0; k -= 2) p = p * s2 + 1.0f / k;
  return positive + 2.0f * s * p;
}

inline Floats Sigmoid(Floats x) {
  const Floats t = -LOG2_E * x;
  return 1.0f / (1.0f + Exp2(t > 127.0f ? Floats{} + 127.0f : t));
}

inline float Sum(Floats x) {
  float sum = 0;
  for (int64_t i = 0; i < WIDTH; ++i) sum += x[i];
  return sum;
}

}  // namespace kernels

#endif  // KERNELS_CPP_VECTORS_H_
