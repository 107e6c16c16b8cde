// A 3x3 convolution on a CPU, in float32, for inference: a product with the nine neighbours of each
// pixel. op.py compiles and calls it.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpp/matrix.h"
#include "kernels/cpp/threads.h"
#include "kernels/cpp/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using namespace kernels;

// The largest part of an image that a thread takes at a time; its inputs should fit the cache.
constexpr int64_t ROWS = 4;
constexpr int64_t COLUMNS = 96;  // a multiple of SUMS

struct Convolution {
  const float *x, *bias;
  float* y;
  int64_t h, w, c_in, c_out;
  const Matrix* kernel;

  // Computes the results of image b from this row and column on.
  void Run(int64_t b, int64_t row, int64_t column) const {
    const int64_t rows = std::min(ROWS, h - row), columns = std::min(COLUMNS, w - column);
    const int64_t stride = COLUMNS + 2, blocks = Blocks(c_in);
    // (rows + 2, blocks of inputs, columns + 2); zeros beyond the image's sides
    Lines inputs(new Line[(rows + 2) * blocks * stride]());
    for (int64_t i = 0; i < rows + 2; ++i)
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t j = std::max<int64_t>(column - 1, 0); j < std::min(column + columns + 1, w); ++j)
          Copy(inputs[(i * blocks + block) * stride + j - column + 1].at,
               x + ((b * (h + 2) + row + i) * w + j) * c_in + block * BLOCK,
               std::min(BLOCK, c_in - block * BLOCK));
    const Lines biases = MakeLines(bias, 1, c_out);
    Lines outputs(new Line[Blocks(c_out) * COLUMNS]);
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<const Line*> neighbours;
      for (int64_t di = 0; di < 3; ++di)
        for (int64_t dj = 0; dj < 3; ++dj)
          for (int64_t block = 0; block < blocks; ++block)
            neighbours.push_back(&inputs[((i + di) * blocks + block) * stride + dj]);
      kernel->Multiply(neighbours, columns, [&](int64_t t, int64_t o, Floats sum) {
        Store(outputs[o / BLOCK * COLUMNS + t].at + o % BLOCK,
              sum + Load(biases[0].at + o, WIDTH), WIDTH);
      });
      for (int64_t block = 0; block < Blocks(c_out); ++block)
        for (int64_t t = 0; t < columns; ++t)
          Copy(y + ((b * h + row + i) * w + column + t) * c_out + block * BLOCK,
               outputs[block * COLUMNS + t].at, std::min(BLOCK, c_out - block * BLOCK));
    }
  }
};

using Buffer = ffi::Buffer<ffi::F32>;

ffi::Error CallConvolution(ffi::ThreadPool pool, Buffer x, Buffer kernel, Buffer bias,
                           ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = y->dimensions();
  const int64_t b = shape[0], h = shape[1], w = shape[2], c_out = shape[3];
  const int64_t c_in = x.dimensions()[3];
  Matrix matrix(c_in, c_out, 9);
  matrix.Set(0, kernel.typed_data(), c_out, c_out);
  const Convolution convolution{x.typed_data(), bias.typed_data(), y->typed_data(), h, w, c_in,
                                c_out,          &matrix};
  const int64_t down = (h + ROWS - 1) / ROWS, across = (w + COLUMNS - 1) / COLUMNS;
  InParallel(pool, b * down * across, [&](int64_t i) {
    convolution.Run(i / across / down, i / across % down * ROWS, i % across * COLUMNS);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Conv3x3, CallConvolution,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()   // x
                                  .Arg<Buffer>()   // kernel
                                  .Arg<Buffer>()   // bias
                                  .Ret<Buffer>());  // y
