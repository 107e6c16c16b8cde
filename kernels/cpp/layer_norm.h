// LayerNorm of tokens that are in blocks.

#ifndef KERNELS_CPP_LAYER_NORM_H_
#define KERNELS_CPP_LAYER_NORM_H_

#include <cmath>
#include <cstdint>

#include "kernels/cpp/matrix.h"
#include "kernels/cpp/vectors.h"

namespace kernels {

class LayerNorm {
 public:
  LayerNorm(const float* scale, const float* bias, int64_t channels, float epsilon)
      : channels_(channels),
        epsilon_(epsilon),
        scale_(MakeLines(scale, 1, channels)),
        bias_(MakeLines(bias, 1, channels)) {}

  // Normalises a piece in place. Its blocks are TOKENS lines apart and filled up with zeros.
  void Normalise(int64_t tokens, Line* x) const {
    const int64_t vectors = (channels_ + WIDTH - 1) / WIDTH;
    const auto at = [x](int64_t t, int64_t v) {
      return x[v * WIDTH / BLOCK * TOKENS + t].at + v * WIDTH % BLOCK;
    };
    Floats inside = {};  // the lanes of the last vector that hold channels
    for (int64_t i = 0; i < channels_ - (vectors - 1) * WIDTH; ++i) inside[i] = 1.0f;
    float mean[TOKENS], factor[TOKENS];
    for (int64_t t = 0; t < tokens; ++t) {
      Floats sum = {};
      for (int64_t v = 0; v < vectors; ++v) sum += Load(at(t, v), WIDTH);
      mean[t] = Sum(sum) / channels_;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      Floats difference = (Load(at(t, vectors - 1), WIDTH) - mean[t]) * inside;
      Floats squares = difference * difference;
      for (int64_t v = 0; v < vectors - 1; ++v) {
        difference = Load(at(t, v), WIDTH) - mean[t];
        squares += difference * difference;
      }
      factor[t] = Sum(squares) / channels_;
    }
    for (int64_t t = 0; t < tokens; ++t) factor[t] = 1.0f / std::sqrt(factor[t] + epsilon_);
    for (int64_t v = 0; v < vectors; ++v) {
      const Floats scale = Load(scale_[0].at + v * WIDTH, WIDTH);
      const Floats bias = Load(bias_[0].at + v * WIDTH, WIDTH);
      for (int64_t t = 0; t < tokens; ++t)
        Store(at(t, v), (Load(at(t, v), WIDTH) - mean[t]) * (factor[t] * scale) + bias, WIDTH);
    }
  }

 private:
  const int64_t channels_;
  const float epsilon_;
  const Lines scale_, bias_;
};

}  // namespace kernels

#endif  // KERNELS_CPP_LAYER_NORM_H_
