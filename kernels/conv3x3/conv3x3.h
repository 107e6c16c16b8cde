// A 3x3 convolution on a CPU for inference: a product with the nine neighbours of each pixel. Its
// arrays are float32.

#ifndef KERNELS_CONV3X3_CONV3X3_H_
#define KERNELS_CONV3X3_CONV3X3_H_

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpp/matrix.h"
#include "kernels/cpp/vectors.h"

namespace kernels {

// A convolution's parameters, packed for products.
template <typename Factor>
class Convolution {
 public:
  Convolution(const float* kernel, const float* bias, int64_t c_in, int64_t c_out)
      : c_in_(c_in), c_out_(c_out), kernel_(c_in, c_out, 9), bias_(MakeLines(bias, 1, c_out)) {
    kernel_.Set(0, kernel, c_out, c_out);
  }

  int64_t inputs() const { return c_in_; }

  // The number of parts that an image of h rows is computed in, in any order.
  static int64_t Parts(int64_t h, int64_t w) { return Down(h) * Across(w); }

  // Computes one of the parts of y, (h, w, c_out), from x, (h + 2, w, c_in).
  void Run(const float* x, float* y, int64_t h, int64_t w, int64_t part) const {
    const int64_t row = part / Across(w) * ROWS, column = part % Across(w) * COLUMNS;
    const int64_t rows = std::min(ROWS, h - row), columns = std::min(COLUMNS, w - column);
    const int64_t begin = std::max<int64_t>(column - 1, 0), end = std::min(column + columns + 1, w);
    const int64_t stride = COLUMNS + 2, blocks = Blocks<Factor>(c_in_);
    // (rows + 2, blocks of inputs, columns + 2); zeros beyond the image's sides
    Lines inputs(new Line[(rows + 2) * blocks * stride]());
    for (int64_t i = 0; i < rows + 2; ++i)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t j = begin; j < end; ++j)
          Factor::Pack(inputs[(i * blocks + block) * stride + j - column + 1].at,
                       x + ((row + i) * w + j) * c_in_ + block * CHANNELS,
                       std::min(CHANNELS, c_in_ - block * CHANNELS));
    Lines outputs(new Line[Blocks(c_out_) * TOKENS]);
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<const Line*> neighbours;
      for (int64_t di = 0; di < 3; ++di)
        for (int64_t dj = 0; dj < 3; ++dj)
          for (int64_t block = 0; block < blocks; ++block)
            neighbours.push_back(&inputs[((i + di) * blocks + block) * stride + dj]);
      kernel_.Multiply(neighbours, columns, [&](int64_t t, int64_t o, Floats sum) {
        Store(outputs[o / BLOCK * TOKENS + t].at + o % BLOCK,
              sum + Load(bias_[0].at + o, WIDTH), WIDTH);
      });
      float* to = y + ((row + i) * w + column) * c_out_;
      Scatter(columns, c_out_, outputs.get(), [&](int64_t t) { return to + t * c_out_; });
    }
  }

 private:
  // The largest part; its inputs should fit the cache.
  static constexpr int64_t ROWS = 4, COLUMNS = TOKENS;
  static constexpr int64_t CHANNELS = Factor::CHANNELS * BLOCK;  // in a line of inputs

  static int64_t Down(int64_t h) { return (h + ROWS - 1) / ROWS; }
  static int64_t Across(int64_t w) { return (w + COLUMNS - 1) / COLUMNS; }

  const int64_t c_in_, c_out_;
  Matrix<Factor> kernel_;
  const Lines bias_;
};

}  // namespace kernels

#endif  // KERNELS_CONV3X3_CONV3X3_H_
