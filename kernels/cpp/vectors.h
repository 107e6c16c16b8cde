// A vector of floats, as long as the machine's, and the mathematics that the kernels need of it.
//
// Written with the vector extensions of GCC and Clang, for AVX-512, AVX, NEON, SSE and WASM's
// SIMD128 alike. Comparisons are written so that NaN stays NaN.

#ifndef KERNELS_CPP_VECTORS_H_
#define KERNELS_CPP_VECTORS_H_

#include <cstdint>
#include <cstring>
#include <type_traits>
#ifdef __AVX__
#include <immintrin.h>
#endif

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

// Calls function(count). For a whole vector, the count is a constant, so that loads and stores in
// the function's loops have no branches.
template <typename Function>
inline void ForCount(int64_t count, Function function) {
  if (count == WIDTH)
    function(std::integral_constant<int64_t, WIDTH>());
  else
    function(count);
}

// Compilers leave out the subtraction, but would keep an addition, since -0 + 0 is 0.
inline Floats Fill(float x) { return x - Floats{}; }

// `count` floats and zeros.
inline Floats Load(const float* from, int64_t count) {
  Floats x;
  if (count == WIDTH) {
    std::memcpy(&x, from, sizeof x);
    return x;
  }
#ifdef __AVX512F__
  return (Floats)_mm512_maskz_loadu_ps((1 << count) - 1, from);
#else
  float part[WIDTH] = {};
  std::memcpy(part, from, sizeof(float) * count);
  std::memcpy(&x, part, sizeof x);
  return x;
#endif
}

inline void Store(float* to, Floats x, int64_t count) {
  if (count == WIDTH)
    std::memcpy(to, &x, sizeof x);
  else
#ifdef __AVX512F__
    _mm512_mask_storeu_ps(to, (1 << count) - 1, (__m512)x);
#else
    std::memcpy(to, &x, sizeof(float) * count);
#endif
}

// max(x, bound) and min(x, bound), but NaN for NaN. GCC makes two instructions of the comparison.
inline Floats AtLeast(float bound, Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_max_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX__)
  return (Floats)_mm256_max_ps(_mm256_set1_ps(bound), (__m256)x);
#elif defined(__wasm_simd128__)
  return __builtin_wasm_pmax_f32x4(x, Fill(bound));
#else
  return x < bound ? Fill(bound) : x;
#endif
}

inline Floats AtMost(float bound, Floats x) {
#if defined(__AVX512F__)
  return (Floats)_mm512_min_ps(_mm512_set1_ps(bound), (__m512)x);
#elif defined(__AVX__)
  return (Floats)_mm256_min_ps(_mm256_set1_ps(bound), (__m256)x);
#elif defined(__wasm_simd128__)
  return __builtin_wasm_pmin_f32x4(x, Fill(bound));
#else
  return x > bound ? Fill(bound) : x;
#endif
}

// a b + c: one instruction where there is one. Compilers do this by themselves, but not for WASM.
inline Floats MultiplyAdd(Floats a, Floats b, Floats c) {
#ifdef __wasm_relaxed_simd__
  return __builtin_wasm_relaxed_madd_f32x4(a, b, c);
#else
  return a * b + c;
#endif
}

constexpr float LOG2_E = 1.44269504f;
constexpr float MIN_EXPONENT = -126.0f, MAX_EXPONENT = 127.0f;

// 2^t for t from MIN_EXPONENT to MAX_EXPONENT, with a relative error of 2e-7; exact at 0.
inline Floats Exp2(Floats t) {
  const Floats shifted = t + 12582912.0f;  // 1.5 * 2^23: its last bits are now t, rounded
  const Floats f = t - (shifted - 12582912.0f);
  Floats p = Fill(1.326472615e-3f);  // fitted to 2^f for f from -1/2 to 1/2
  p = MultiplyAdd(p, f, Fill(9.671512991e-3f));
  p = MultiplyAdd(p, f, Fill(5.550733581e-2f));
  p = MultiplyAdd(p, f, Fill(2.402224243e-1f));
  p = MultiplyAdd(p, f, Fill(6.931470037e-1f));
  p = MultiplyAdd(p, f, Fill(1.0f));
  return (Floats)((Ints)p + ((Ints)shifted << 23));  // adds to the exponent
}

// log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), and 0 for e < 2^-126.
inline Floats Softplus(Floats x) {
  const Floats t = LOG2_E * (Floats)((Ints)x | INT32_MIN);
  const Floats e = Exp2(AtLeast(MIN_EXPONENT, t));
  Floats p = Fill(5.232693703e-3f);  // fitted to log(1 + e) / e for e from 0 to 1
  p = MultiplyAdd(p, e, Fill(-2.950524012e-2f));
  p = MultiplyAdd(p, e, Fill(7.822596093e-2f));
  p = MultiplyAdd(p, e, Fill(-1.366324728e-1f));
  p = MultiplyAdd(p, e, Fill(1.910600791e-1f));
  p = MultiplyAdd(p, e, Fill(-2.484298267e-1f));
  p = MultiplyAdd(p, e, Fill(3.331909690e-1f));
  p = MultiplyAdd(p, e, Fill(-4.999949315e-1f));
  p = MultiplyAdd(p, e, Fill(9.999999699e-1f));
  return AtLeast(0.0f, x) + (t < MIN_EXPONENT ? Floats{} : e * p);
}

// exp(-x), at least 2^-126 and at most 2^127
inline Floats ExpMinus(Floats x) {
  return Exp2(AtMost(MAX_EXPONENT, AtLeast(MIN_EXPONENT, -LOG2_E * x)));
}

inline Floats Sigmoid(Floats x) { return 1.0f / (1.0f + ExpMinus(x)); }
inline Floats Silu(Floats x) { return x / (1.0f + ExpMinus(x)); }

// Whether any element is not zero.
inline bool Any(Ints x) {
  int32_t any = 0;
  for (int64_t i = 0; i < WIDTH; ++i) any |= x[i];
  return any;
}

inline float Sum(Floats x) {
  float sum = 0;
  for (int64_t i = 0; i < WIDTH; ++i) sum += x[i];
  return sum;
}

}  // namespace kernels

#endif  // KERNELS_CPP_VECTORS_H_
