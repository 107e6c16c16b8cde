// The types of a product's factors. Sums are always float32.
//
// An element of a line is a float, or a pair of bfloat16 that belong to neighbouring channels. Any
// machine can compute with pairs; with AVX512-BF16, it is fast.

#ifndef KERNELS_CPP_FACTORS_H_
#define KERNELS_CPP_FACTORS_H_

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/cpp/vectors.h"

namespace kernels {

constexpr int64_t BLOCK = 16;  // elements in a line: a cache line

struct alignas(sizeof(float) * BLOCK) Line {
  float at[BLOCK];
};

// Copies up to BLOCK channels.
inline void Copy(float* to, const float* from, int64_t channels) {
  if (channels == BLOCK)
    std::memcpy(to, from, sizeof(Line));
  else
    std::memcpy(to, from, sizeof(float) * channels);
}

struct Float32 {
  static constexpr int64_t CHANNELS = 1;  // in an element

  // Sets one channel of up to BLOCK elements.
  static void Set(float* elements, int64_t, const float* from, int64_t count) {
    Copy(elements, from, count);
  }

  // Fills a line from its channels, or from as many as there are.
  static void Pack(float* line, const float* from, int64_t channels) {
    Copy(line, from, channels);
  }

  // Adds the products of an element with a vector of elements.
  static Floats MultiplyAdd(const float* element, const float* elements, Floats sum) {
    return kernels::MultiplyAdd(Fill(*element), Load(elements, WIDTH), sum);
  }
};

struct BFloat16 {
  static constexpr int64_t CHANNELS = 2;

  static void Set(float* elements, int64_t channel, const float* from, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t rounded = Round(from[i]);
      std::memcpy(reinterpret_cast<char*>(elements + i) + 2 * channel, &rounded, 2);
    }
  }

  static void Pack(float* line, const float* from, int64_t channels) {
    Line low = {}, high = {};
    Copy(low.at, from, std::min(BLOCK, channels));
    if (channels > BLOCK) Copy(high.at, from + BLOCK, channels - BLOCK);
    Pack(line, low, high);
  }

  // Fills a line from the two lines of its channels.
  static void Pack(float* line, const Line& low, const Line& high) {
#ifdef __AVX512BF16__
    const auto pairs =
        _mm512_cvtne2ps_pbh((__m512)Load(high.at, WIDTH), (__m512)Load(low.at, WIDTH));
    std::memcpy(line, &pairs, sizeof pairs);
#else
    for (int64_t i = 0; i < BLOCK; ++i) {
      const Line& from = i < BLOCK / 2 ? low : high;
      for (int64_t j = 0; j < 2; ++j) Set(line + i, j, from.at + 2 * i % BLOCK + j, 1);
    }
#endif
  }

  static Floats MultiplyAdd(const float* element, const float* elements, Floats sum) {
    int32_t pair;
    Ints pairs;
    std::memcpy(&pair, element, sizeof pair);
    std::memcpy(&pairs, elements, sizeof pairs);
#ifdef __AVX512BF16__
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(pair),
                                    (__m512bh)pairs);
#else
    const Ints filled = pair + Ints{};
    sum += (Floats)(filled << 16) * (Floats)(pairs << 16);
    return sum + (Floats)(filled >> 16 << 16) * (Floats)(pairs >> 16 << 16);
#endif
  }

 private:
  // To the nearest bfloat16, and to the even one of two. NaN stays NaN.
  static uint16_t Round(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (x != x) return bits >> 16 | 0x40;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
};

}  // namespace kernels

#endif  // KERNELS_CPP_FACTORS_H_
