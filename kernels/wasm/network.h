// DVMSR for pictures that come in bands of rows, from top to bottom: dvmsr_jax/model.py, with the
// bands of dvmsr_jax/bands.py. A row of the result is finished when its last neighbour is there, one
// row later for each 3x3 convolution on the way. How a picture is cut into bands does not matter.

#ifndef KERNELS_WASM_NETWORK_H_
#define KERNELS_WASM_NETWORK_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels/conv3x3/conv3x3.h"
#include "kernels/cpp/layer_norm.h"
#include "kernels/cpp/matrix.h"
#include "kernels/vimm/vimm.h"

namespace kernels {

constexpr float RGB_MEAN[3] = {0.4488f, 0.4371f, 0.4040f};
constexpr float LAYER_NORM_EPSILON = 1e-5f;

struct Config {
  int64_t scale, rssbs, vimms_per_rssb;
  ViMMSizes vimm;
};

// The parameters in the order in which the network's constructor takes them.
class Parameters {
 public:
  explicit Parameters(const float* next) : next_(next) {}

  const float* Take(int64_t count) {
    next_ += count;
    return next_ - count;
  }

 private:
  const float* next_;
};

// Braces evaluate their items from left to right.
inline Convolution<Float32>* MakeConvolution(Parameters& from, int64_t c_in, int64_t c_out) {
  const float *kernel = from.Take(9 * c_in * c_out), *bias = from.Take(c_out);
  return new Convolution<Float32>(kernel, bias, c_in, c_out);
}

inline LayerNorm* MakeLayerNorm(Parameters& from, int64_t channels) {
  const float *scale = from.Take(channels), *bias = from.Take(channels);
  return new LayerNorm(scale, bias, channels, LAYER_NORM_EPSILON);
}

inline ViMM<Float32>* MakeViMM(Parameters& from, const ViMMSizes& s) {
  const ViMMWeights weights{from.Take(s.c),
                            from.Take(s.c),
                            from.Take(s.c * 2 * s.d),
                            from.Take((s.history + 1) * s.d),
                            from.Take(s.d),
                            from.Take(s.d * (s.rank + 2 * s.n)),
                            from.Take(s.rank * s.d),
                            from.Take(s.d),
                            from.Take(s.d * s.n),
                            from.Take(s.d),
                            from.Take(s.d * s.c)};
  return new ViMM<Float32>(s, weights, LAYER_NORM_EPSILON);
}

struct RSSB {
  RSSB(Parameters& from, const Config& config) {
    for (int64_t i = 0; i < config.vimms_per_rssb; ++i)
      vimms.emplace_back(MakeViMM(from, config.vimm));
    conv.reset(MakeConvolution(from, config.vimm.c, config.vimm.c));
  }

  std::vector<std::unique_ptr<ViMM<Float32>>> vimms;
  std::unique_ptr<Convolution<Float32>> conv;
};

struct Network {
  Network(Parameters& from, const Config& config)
      : config(config),
        conv_first(MakeConvolution(from, 3, config.vimm.c)),
        norm_first(MakeLayerNorm(from, config.vimm.c)) {
    for (int64_t i = 0; i < config.rssbs; ++i) rssbs.emplace_back(new RSSB(from, config));
    norm_last.reset(MakeLayerNorm(from, config.vimm.c));
    conv_last.reset(MakeConvolution(from, config.vimm.c, config.vimm.c));
    reconstruct.reset(
        MakeConvolution(from, config.vimm.c, 3 * config.scale * config.scale));
  }

  const Config config;
  std::unique_ptr<Convolution<Float32>> conv_first;
  std::unique_ptr<LayerNorm> norm_first;
  std::vector<std::unique_ptr<RSSB>> rssbs;
  std::unique_ptr<LayerNorm> norm_last;
  std::unique_ptr<Convolution<Float32>> conv_last, reconstruct;
};

// Rows that wait for others, the oldest first.
class Rows {
 public:
  // At most `capacity` rows of `length` floats.
  Rows(int64_t capacity, int64_t length) : length_(length), rows_(capacity * length) {}

  int64_t count() const { return count_; }
  float* data() { return rows_.data(); }

  // The place of more rows, which the caller fills.
  float* Append(int64_t count) {
    count_ += count;
    return rows_.data() + (count_ - count) * length_;
  }

  void DropOldest(int64_t count) {
    count_ -= count;
    std::memmove(rows_.data(), rows_.data() + count * length_, sizeof(float) * count_ * length_);
  }

 private:
  const int64_t length_;
  int64_t count_ = 0;
  std::vector<float> rows_;
};

// A convolution whose rows come one band after the other.
class BandConvolution {
 public:
  BandConvolution(const Convolution<Float32>& convolution, int64_t band_rows, int64_t width)
      : convolution_(convolution),
        width_(width),
        x_(band_rows + 2, width * convolution.inputs()) {
    AppendZeros();  // above the picture
  }

  float* Append(int64_t rows) { return x_.Append(rows); }
  // A row below the picture or above it.
  void AppendZeros() { std::fill_n(x_.Append(1), width_ * convolution_.inputs(), 0.0f); }

  // The number of rows of the result whose neighbours are there.
  int64_t Ready() const { return std::max<int64_t>(x_.count() - 2, 0); }

  // Computes these.
  void Run(float* y) {
    const int64_t rows = Ready();
    for (int64_t i = 0; i < Convolution<Float32>::Parts(rows, width_); ++i)
      convolution_.Run(x_.data(), y, rows, width_, i);
    x_.DropOldest(rows);
  }

 private:
  const Convolution<Float32>& convolution_;
  const int64_t width_;
  Rows x_;
};

// A ViMM whose tokens come one band after the other.
class BandViMM {
 public:
  explicit BandViMM(const ViMM<Float32>& vimm)
      : vimm_(vimm), previous_(vimm.s.history * vimm.s.d), state_(vimm.s.d * vimm.s.n) {}

  // `out` may be `tokens`.
  void Run(const float* tokens, float* out, int64_t rows, int64_t width) {
    const ViMMTokens arrays{1,   rows * width,     tokens,       previous_.data(), state_.data(),
                            out, previous_.data(), state_.data(), nullptr,          nullptr};
    ViMMPass<Float32>(vimm_, arrays, Inside{0, rows, width, width}, 1).Help();
  }

 private:
  const ViMM<Float32>& vimm_;
  std::vector<float> previous_, state_;
};

// A picture on its way through a stage of the network: RSSBs that follow each other, with what lies
// before the first of all, and behind the last.
//
// Stages hand on rows of features, each followed by the same row of the first convolution's result,
// which the long skip connection adds behind the last RSSB.
class Picture {
 public:
  // RSSBs from `first` to before `last`.
  Picture(const Network& network, int64_t width, int64_t first, int64_t last)
      : network_(network),
        width_(width),
        head_(first == 0),
        tail_(last == network.config.rssbs),
        band_rows_(std::max<int64_t>(BAND_PIXELS / width, 1)),
        received_(band_rows_ * (head_ ? width * 3 : 2 * Row())),
        shallow_(last - first + 1 + band_rows_, Row()),
        computed_(band_rows_ *
                  (tail_ ? width * 3 * network.config.scale * network.config.scale : Row())),
        finished_(tail_ ? computed_.size() : band_rows_ * 2 * Row()) {
    if (head_) AddConvolution(*network.conv_first);
    for (int64_t i = first; i < last; ++i) {
      const RSSB& rssb = *network.rssbs[i];
      AddConvolution(*rssb.conv);
      features_.emplace_back(new Rows(1 + band_rows_, Row()));
      for (const auto& vimm : rssb.vimms) vimms_.emplace_back(new BandViMM(*vimm));
    }
    if (tail_) {
      AddConvolution(*network.conv_last);
      AddConvolution(*network.reconstruct);
    }
  }

  int64_t band_rows() const { return band_rows_; }  // at most, in a band
  float* received() { return received_.data(); }    // a band's: RGB, or from the stage before
  float* finished() { return finished_.data(); }    // upscaled RGB, or for the next stage

  // Takes a band in. Returns the number of the picture's rows that are now finished.
  int64_t Push(int64_t rows) {
    if (head_) {
      float* x = convs_[0]->Append(rows);
      for (int64_t i = 0; i < rows * width_ * 3; ++i) x[i] = received_[i] - RGB_MEAN[i % 3];
    } else {
      float *features = features_[0]->Append(rows), *shallow = shallow_.Append(rows);
      for (int64_t row = 0; row < rows; ++row) {
        const float* from = received_.data() + row * 2 * Row();
        std::memcpy(features + row * Row(), from, sizeof(float) * Row());
        std::memcpy(shallow + row * Row(), from + Row(), sizeof(float) * Row());
      }
    }
    return Advance(rows);
  }

  // The same after the last band, once for each convolution: it gets the row of zeros below its
  // last one.
  int64_t Flush() {
    convs_[flushed_++]->AppendZeros();
    return Advance(0);
  }

 private:
  static constexpr int64_t BAND_PIXELS = 1024;

  int64_t Row() const { return width_ * network_.config.vimm.c; }

  void AddConvolution(const Convolution<Float32>& convolution) {
    convs_.emplace_back(new BandConvolution(convolution, band_rows_, width_));
  }

  // Takes the rows that have come as far as possible.
  int64_t Advance(int64_t rows) {
    const int64_t rssbs = features_.size(), per_rssb = network_.config.vimms_per_rssb;
    auto conv = convs_.begin();
    float* features;
    if (head_) {
      rows = (*conv)->Ready();
      features = shallow_.Append(rows);
      (*conv++)->Run(features);
      Normalise(*network_.norm_first, features, features_[0]->Append(rows), rows);
    }
    for (int64_t i = 0; i < rssbs; ++i) {
      float* refined = (*conv)->Append(rows);
      const float* tokens = features_[i]->data() + (features_[i]->count() - rows) * Row();
      for (int64_t j = 0; j < per_rssb; ++j, tokens = refined)
        vimms_[i * per_rssb + j]->Run(tokens, refined, rows, width_);
      rows = (*conv)->Ready();
      features = i + 1 < rssbs ? features_[i + 1]->Append(rows)
                 : tail_       ? conv[1]->Append(rows)
                               : computed_.data();
      (*conv++)->Run(features);
      AddOldest(*features_[i], features, rows);
    }
    if (tail_) {
      Normalise(*network_.norm_last, features, features, rows);
      rows = (*conv)->Ready();
      float* deep = conv[1]->Append(rows);
      (*conv++)->Run(deep);
      AddOldest(shallow_, deep, rows);
      rows = (*conv)->Ready();
      (*conv)->Run(computed_.data());
      Shuffle(rows);
    } else {
      HandOn(rows);
    }
    return rows;
  }

  // Adds a skip connection's oldest rows, and drops them.
  void AddOldest(Rows& skip, float* x, int64_t rows) {
    const float* from = skip.data();
    for (int64_t i = 0; i < rows * Row(); ++i) x[i] += from[i];
    skip.DropOldest(rows);
  }

  void Normalise(const LayerNorm& norm, const float* x, float* y, int64_t rows) {
    const int64_t c = network_.config.vimm.c;
    const Lines lines(new Line[Blocks(c) * TOKENS]);
    for (int64_t first = 0; first < rows * width_; first += TOKENS) {
      const int64_t tokens = std::min(TOKENS, rows * width_ - first);
      Gather(tokens, c, [&](int64_t t) { return x + (first + t) * c; }, lines.get());
      norm.Normalise(tokens, lines.get());
      Scatter(tokens, c, lines.get(), [&](int64_t t) { return y + (first + t) * c; });
    }
  }

  // Puts features and the oldest rows for the long skip connection together, and drops these.
  void HandOn(int64_t rows) {
    for (int64_t row = 0; row < rows; ++row) {
      float* to = finished_.data() + row * 2 * Row();
      std::memcpy(to, computed_.data() + row * Row(), sizeof(float) * Row());
      std::memcpy(to + Row(), shallow_.data() + row * Row(), sizeof(float) * Row());
    }
    shallow_.DropOldest(rows);
  }

  // Moves channels, ordered by colour, row and column, to their places in the upscaled rows.
  void Shuffle(int64_t rows) {
    const int64_t s = network_.config.scale;
    const float* from = computed_.data();
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t column = 0; column < width_; ++column)
        for (int64_t colour = 0; colour < 3; ++colour)
          for (int64_t i = 0; i < s; ++i)
            for (int64_t j = 0; j < s; ++j)
              finished_[(((row * s + i) * width_ + column) * s + j) * 3 + colour] =
                  *from++ + RGB_MEAN[colour];
  }

  const Network& network_;
  const int64_t width_;
  const bool head_, tail_;
  const int64_t band_rows_;
  std::vector<float> received_;
  Rows shallow_;
  std::vector<std::unique_ptr<BandConvolution>> convs_;  // from the first to the last
  std::vector<std::unique_ptr<Rows>> features_;          // before each RSSB, for its skip
  std::vector<std::unique_ptr<BandViMM>> vimms_;
  std::vector<float> computed_, finished_;
  int64_t flushed_ = 0;  // convolutions that have got their last row
};

}  // namespace kernels

#endif  // KERNELS_WASM_NETWORK_H_
