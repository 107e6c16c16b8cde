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
    float mean[TOKENS], factor[TOKENS];
    Statistics(tokens, x, mean, factor);
    for (int64_t v = 0; v < Vectors(); ++v) {
      const Floats scale = Load(scale_[0].at + v * WIDTH, WIDTH);
      const Floats bias = Load(bias_[0].at + v * WIDTH, WIDTH);
      for (int64_t t = 0; t < tokens; ++t)
        Store(At(x, t, v), (Load(At(x, t, v), WIDTH) - mean[t]) * (factor[t] * scale) + bias,
              WIDTH);
    }
  }

  // Turns the gradient by the normalised tokens into that by x, in place, and adds those by scale
  // and bias to rows of blocks.
  void Differentiate(int64_t tokens, const Line* x, Line* gradient, Line* dscale,
                     Line* dbias) const {
    float mean[TOKENS], factor[TOKENS], mean_g[TOKENS], mean_gx[TOKENS];
    Statistics(tokens, x, mean, factor);
    for (int64_t t = 0; t < tokens; ++t) {
      Floats sum_g = {}, sum_gx = {};
      for (int64_t v = 0; v < Vectors(); ++v) {
        const Floats normal = (Load(At(x, t, v), WIDTH) - mean[t]) * factor[t];
        const Floats g = Load(At(gradient, t, v), WIDTH) * Load(scale_[0].at + v * WIDTH, WIDTH);
        sum_g += g;
        sum_gx += g * normal;
      }
      mean_g[t] = Sum(sum_g) / channels_;
      mean_gx[t] = Sum(sum_gx) / channels_;
    }
    for (int64_t v = 0; v < Vectors(); ++v) {
      const Floats scale = Load(scale_[0].at + v * WIDTH, WIDTH);
      float *to_scale = dscale[0].at + v * WIDTH, *to_bias = dbias[0].at + v * WIDTH;
      Floats sum_scale = Load(to_scale, WIDTH), sum_bias = Load(to_bias, WIDTH);
      for (int64_t t = 0; t < tokens; ++t) {
        const Floats normal = (Load(At(x, t, v), WIDTH) - mean[t]) * factor[t];
        const Floats dy = Load(At(gradient, t, v), WIDTH);
        sum_scale += dy * normal;
        sum_bias += dy;
        Store(At(gradient, t, v), (dy * scale - mean_g[t] - normal * mean_gx[t]) * factor[t],
              WIDTH);
      }
      Store(to_scale, sum_scale, WIDTH);
      Store(to_bias, sum_bias, WIDTH);
    }
  }

 private:
  int64_t Vectors() const { return (channels_ + WIDTH - 1) / WIDTH; }

  // Where a token's vector v is in blocks.
  template <typename L>
  static auto At(L* x, int64_t t, int64_t v) -> decltype(x->at + v) {
    return x[v * WIDTH / BLOCK * TOKENS + t].at + v * WIDTH % BLOCK;
  }

  // Each token's mean, and the inverse of its deviation.
  void Statistics(int64_t tokens, const Line* x, float* mean, float* factor) const {
    const int64_t last = Vectors() - 1;
    Floats inside = {};  // the lanes of the last vector that hold channels
    for (int64_t i = 0; i < channels_ - last * WIDTH; ++i) inside[i] = 1.0f;
    for (int64_t t = 0; t < tokens; ++t) {
      Floats sum = {};
      for (int64_t v = 0; v <= last; ++v) sum += Load(At(x, t, v), WIDTH);
      mean[t] = Sum(sum) / channels_;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      Floats difference = (Load(At(x, t, last), WIDTH) - mean[t]) * inside;
      Floats squares = difference * difference;
      for (int64_t v = 0; v < last; ++v) {
        difference = Load(At(x, t, v), WIDTH) - mean[t];
        squares += difference * difference;
      }
      factor[t] = Sum(squares) / channels_;
    }
    for (int64_t t = 0; t < tokens; ++t) factor[t] = 1.0f / std::sqrt(factor[t] + epsilon_);
  }

  const int64_t channels_;
  const float epsilon_;
  const Lines scale_, bias_;
};

}  // namespace kernels

#endif  // KERNELS_CPP_LAYER_NORM_H_
