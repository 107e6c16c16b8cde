// Products of activations with packed weights, for activations that stay in the cache.

#ifndef KERNELS_CPP_MATRIX_H_
#define KERNELS_CPP_MATRIX_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/cpp/factors.h"
#include "kernels/cpp/vectors.h"

namespace kernels {

// Vectors of sums that a product holds in registers. Engines for WASM load all factors of a step
// before they multiply, and have 15 of x86's registers to do it.
#ifdef __wasm__
constexpr int64_t SUMS = 8;
#else
constexpr int64_t SUMS = 12;
#endif
constexpr int64_t TOKENS = 96;  // in a piece that is processed at a time; a multiple of SUMS

// Activations are blocks of BLOCK channels. A block is an array of lines, one for each token.
typedef std::unique_ptr<Line[]> Lines;

// The number of blocks that hold these channels as elements of this type.
template <typename Factor = Float32>
inline int64_t Blocks(int64_t channels) {
  return (channels + Factor::CHANNELS * BLOCK - 1) / (Factor::CHANNELS * BLOCK);
}

// The blocks of a product's inputs, from activations in blocks that are `stride` lines apart: these
// blocks, or those made of them at `packed`, TOKENS lines apart. `packed` may be `lines`.
template <typename Factor>
inline std::vector<const Line*> InputsOf(const Line* lines, int64_t channels, int64_t stride,
                                         int64_t tokens, Line* packed) {
  std::vector<const Line*> blocks;
  for (int64_t i = 0; i < Blocks<Factor>(channels); ++i)
    if constexpr (Factor::CHANNELS == 1) {
      blocks.push_back(lines + i * stride);
    } else {
      const Line *low = lines + 2 * i * stride, *high = low + stride;
      const bool both = 2 * i + 1 < Blocks(channels);
      blocks.push_back(packed + i * TOKENS);
      for (int64_t t = 0; t < tokens; ++t)
        Factor::Pack(packed[i * TOKENS + t].at, low[t], both ? high[t] : Line{});
    }
  return blocks;
}

// Rows of (count, channels) as (count, blocks) lines, padded with zeros.
inline Lines MakeLines(const float* rows, int64_t count, int64_t channels) {
  Lines lines(new Line[count * Blocks(channels)]());
  for (int64_t i = 0; i < count; ++i)
    std::memcpy(lines[i * Blocks(channels)].at, rows + i * channels, sizeof(float) * channels);
  return lines;
}

// Copies `tokens` rows of `channels` floats, row(t) for token t, into blocks that are TOKENS lines
// apart. Channels and tokens that fill up blocks and pieces become zeros.
template <typename Row>
inline void Gather(int64_t tokens, int64_t channels, Row row, Line* lines) {
  for (int64_t first = 0; first < channels; first += BLOCK, lines += TOKENS) {
    const int64_t count = std::min(BLOCK, channels - first);
    if (count < BLOCK || tokens < TOKENS) std::fill_n(lines, TOKENS, Line{});
    for (int64_t t = 0; t < tokens; ++t) Copy(lines[t].at, row(t) + first, count);
  }
}

// The inverse: copies blocks into rows.
template <typename Row>
inline void Scatter(int64_t tokens, int64_t channels, const Line* lines, Row row) {
  for (int64_t first = 0; first < channels; first += BLOCK, lines += TOKENS)
    for (int64_t t = 0; t < tokens; ++t)
      Copy(row(t) + first, lines[t].at, std::min(BLOCK, channels - first));
}

// The weights of a product, (groups, inputs, outputs).
template <typename Factor>
class Matrix {
 public:
  Matrix(int64_t inputs, int64_t outputs, int64_t groups = 1)
      : inputs_(inputs),
        outputs_(outputs),
        groups_(groups),
        lines_(new Line[groups * Elements() * Blocks(outputs)]()) {}

  // Copies `count` columns of an array whose rows are `row` floats long, from output `first`
  // on, which is the first of a block.
  void Set(int64_t first, const float* columns, int64_t count, int64_t row) {
    for (int64_t o = 0; o < count; o += PANEL)
      for (int64_t i = 0; i < groups_ * inputs_; ++i) {
        const int64_t element = i / inputs_ * Elements() + i % inputs_ / Factor::CHANNELS;
        Factor::Set(Panel(first + o) + element * PANEL, i % inputs_ % Factor::CHANNELS,
                    columns + i * row + o, std::min(PANEL, count - o));
      }
  }

  // Multiplies with the inputs of these tokens, and calls put(token, output, vector of outputs).
  // `x` holds the blocks of inputs of each group. The number of tokens is rounded up to SUMS.
  template <typename Put>
  void Multiply(const std::vector<const Line*>& x, int64_t tokens, Put put) const {
    for (int64_t o = 0; o < outputs_;) {
      if (2 * WIDTH <= PANEL && o + WIDTH < outputs_) {
        Columns<2>(x, tokens, o, put);
        o += 2 * WIDTH;
      } else {
        Columns<1>(x, tokens, o, put);
        o += WIDTH;
      }
    }
  }

 private:
  // Outputs whose weights are side by side: those that are computed together.
  static constexpr int64_t PANEL = std::min(2 * WIDTH, BLOCK);

  // The number of elements that a group's inputs are.
  int64_t Elements() const { return (inputs_ + Factor::CHANNELS - 1) / Factor::CHANNELS; }

  // The weights of the panel that this output belongs to.
  float* Panel(int64_t o) const {
    return lines_[0].at + o / PANEL * groups_ * Elements() * PANEL;
  }

  template <int VECTORS, typename Put>
  void Columns(const std::vector<const Line*>& x, int64_t tokens, int64_t o, Put put) const {
    constexpr int ROWS = SUMS / VECTORS;
    for (int64_t t = 0; t < tokens; t += ROWS) {
      Floats sums[ROWS][VECTORS] = {};
      const Line* const* from = x.data();
      const float* weights = Panel(o) + o % PANEL;
      for (int64_t group = 0; group < groups_; ++group)
        for (int64_t i = 0; i < Elements(); i += BLOCK) {
          const float* x_k = (*from++)[t].at;
          for (int64_t k = std::min(BLOCK, Elements() - i); k > 0; --k, ++x_k, weights += PANEL)
#pragma GCC unroll 12
            for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
              for (int v = 0; v < VECTORS; ++v)
                sums[r][v] =
                    Factor::MultiplyAdd(x_k + r * BLOCK, weights + v * WIDTH, sums[r][v]);
        }
#pragma GCC unroll 12
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
        for (int v = 0; v < VECTORS; ++v) put(t + r, o + v * WIDTH, sums[r][v]);
    }
  }

  int64_t inputs_, outputs_, groups_;
  Lines lines_;  // (panels of outputs, groups, elements of inputs)
};

}  // namespace kernels

#endif  // KERNELS_CPP_MATRIX_H_
