// A whole ViMM on a CPU, in float32, for inference. op.py compiles and calls it; README.md describes
// the design.
//
// The tokens inside the image form the sequence. It is cut into pieces of TOKENS tokens, and each
// piece goes through three stages:
//
//   Project  LayerNorm, in_proj, causal convolution, silu, x_proj, dt_proj, softplus
//   Scan     the recurrence and the gate; one task for each block of channels
//   Finish   out_proj

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "kernels/cpp/matrix.h"
#include "kernels/cpp/threads.h"
#include "kernels/cpp/vectors.h"
#include "kernels/selective_scan/scan.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using namespace kernels;

constexpr int64_t TOKENS = 96;  // a multiple of SUMS

// The blocks of these channels, `stride` lines apart.
std::vector<const Line*> BlocksOf(const Line* lines, int64_t channels, int64_t stride) {
  std::vector<const Line*> blocks;
  for (int64_t i = 0; i < Blocks(channels); ++i) blocks.push_back(lines + i * stride);
  return blocks;
}

// Puts a product's outputs into blocks that are `stride` lines apart.
auto Into(Line* lines, int64_t stride) {
  return [=](int64_t t, int64_t o, Floats x) {
    Store(lines[o / BLOCK * stride + t].at + o % BLOCK, x, WIDTH);
  };
}

struct Sizes {
  int64_t l, c, d, n, rank;
  int64_t history;  // tokens before each one that the causal convolution reads
};

struct Buffers {
  const float *tokens, *norm_scale, *norm_bias, *in_proj, *conv_kernel, *conv_bias, *x_proj,
      *dt_proj, *dt_bias, *A, *D, *out_proj, *previous, *state;
  float *out, *last, *end;
};

// The part of the rows that lies inside the image.
struct Inside {
  int64_t first, rows, width, columns;

  int64_t Tokens() const { return rows * width; }};

// The activations of a piece. Its memory serves one piece after the other.
struct Piece {
  explicit Piece(const Sizes& s)
      : u(new Line[Blocks(s.d) * (s.history + TOKENS)]),
        gate(new Line[Blocks(s.d) * TOKENS]),
        delta(new Line[Blocks(s.d) * TOKENS]),
        BC(new Line[2 * Blocks(s.n) * TOKENS]),
        low_rank(new Line[Blocks(s.rank) * TOKENS]),
        tail(new Line[Blocks(s.d) * s.history]) {}

  Lines u;         // after the tokens before the piece; in the end y
  Lines gate;      // in the end the result
  Lines delta;     // at first the normalised tokens
  Lines BC;        // a token's B and C are next to each other
  Lines low_rank;
  Lines tail;      // the last tokens of u before the convolution
  int64_t positions[TOKENS];
  std::atomic<int64_t> progress{0};  // STAGES k + the stage that piece k has reached
};
enum Stage { TAIL = 1, PROJECTED = 2, FINISHED = 3, STAGES = 4 };

// The number of pieces that a block of channels has been scanned through.
struct alignas(sizeof(Line)) Scanned {
  std::atomic<int64_t> pieces{0};
};

// Waits for another thread that is at work.
void Wait(const std::atomic<int64_t>& progress, int64_t needed) {
  for (int64_t spins = 0; progress.load(std::memory_order_acquire) < needed; ++spins)
    if (spins > 1000) std::this_thread::yield();
}

class ViMM {
 public:
  ViMM(const Sizes& sizes, const Buffers& arrays, const Inside& inside, int64_t sequences,
       float epsilon, int64_t threads)
      : s_(sizes),
        arrays_(arrays),
        inside_(inside),
        epsilon_(epsilon),
        ahead_(threads),
        pieces_per_sequence_((inside.Tokens() + TOKENS - 1) / TOKENS),
        count_(sequences * pieces_per_sequence_),
        in_u_(s_.c, s_.d),
        in_gate_(s_.c, s_.d),
        to_BC_(s_.d, 2 * BLOCK * Blocks(s_.n)),
        to_low_rank_(s_.d, s_.rank),
        to_delta_(s_.rank, s_.d),
        out_(s_.d, s_.c),
        norm_scale_(MakeLines(arrays.norm_scale, 1, s_.c)),
        norm_bias_(MakeLines(arrays.norm_bias, 1, s_.c)),
        taps_(MakeLines(arrays.conv_kernel, s_.history + 1, s_.d)),
        conv_bias_(MakeLines(arrays.conv_bias, 1, s_.d)),
        dt_bias_(MakeLines(arrays.dt_bias, 1, s_.d)),
        D_(MakeLines(arrays.D, 1, s_.d)),
        A2_((s_.d + WIDTH - 1) / WIDTH * s_.n),
        states_(A2_.size()),
        scanned_(Blocks(s_.d)) {
    const int64_t columns = s_.rank + 2 * s_.n;
    in_u_.Set(0, arrays.in_proj, s_.d, 2 * s_.d);
    in_gate_.Set(0, arrays.in_proj + s_.d, s_.d, 2 * s_.d);
    to_low_rank_.Set(0, arrays.x_proj, s_.rank, columns);
    to_BC_.Set(0, arrays.x_proj + s_.rank, s_.n, columns);
    to_BC_.Set(BLOCK * Blocks(s_.n), arrays.x_proj + s_.rank + s_.n, s_.n, columns);
    to_delta_.Set(0, arrays.dt_proj, s_.d, s_.d);
    out_.Set(0, arrays.out_proj, s_.c, s_.c);
    for (int64_t i = 0; i < s_.d; ++i)
      for (int64_t j = 0; j < s_.n; ++j)
        A2_[i / WIDTH * s_.n + j][i % WIDTH] = LOG2_E * arrays.A[i * s_.n + j];
    for (int64_t i = 0; i < 2 * ahead_ + 1; ++i) pieces_.emplace_back(new Piece(s_));
  }

  // Runs tasks until all have begun. Several threads do this at the same time.
  void Help() {
    const int64_t tasks = Blocks(s_.d) + 2, steps = count_ + 2 * ahead_;
    for (int64_t i; (i = next_++) < steps * tasks;) {
      // Each task waits only for tasks before it, which have begun.
      const int64_t k = i / tasks, task = i % tasks;
      if (task == 0) {
        if (k < count_) Project(k);
      } else if (task < tasks - 1) {
        if (k >= ahead_ && k - ahead_ < count_) Scan(k - ahead_, task - 1);
      } else if (k >= 2 * ahead_) {
        Finish(k - 2 * ahead_);
      }
    }
  }

 private:
  Piece& At(int64_t k) { return *pieces_[k % pieces_.size()]; }
  int64_t Sequence(int64_t k) const { return k / pieces_per_sequence_; }
  int64_t FirstToken(int64_t k) const { return k % pieces_per_sequence_ * TOKENS; }
  int64_t Tokens(int64_t k) const { return std::min(TOKENS, inside_.Tokens() - FirstToken(k)); }
  bool IsFirst(int64_t k) const { return FirstToken(k) == 0; }
  bool IsLast(int64_t k) const { return FirstToken(k) + TOKENS >= inside_.Tokens(); }

  void Project(int64_t k) {
    Piece& piece = At(k);
    const int64_t before = k - static_cast<int64_t>(pieces_.size());  // the piece whose memory this is
    Wait(piece.progress, STAGES * before + FINISHED);
    Wait(At(k + 1).progress, STAGES * (before + 1) + PROJECTED);  // it has read the tail

    const int64_t tokens = Tokens(k), u_stride = s_.history + TOKENS;
    Line *u = piece.u.get(), *x = piece.delta.get();
    int64_t row = FirstToken(k) / inside_.width, column = FirstToken(k) % inside_.width;
    for (int64_t t = 0; t < tokens; ++t, ++column) {
      if (column == inside_.width) column = 0, ++row;
      piece.positions[t] = Sequence(k) * s_.l + (inside_.first + row) * inside_.columns + column;
    }
    Normalise(k);
    const auto normalised = BlocksOf(x, s_.c, TOKENS);
    in_u_.Multiply(normalised, tokens, Into(u + s_.history, u_stride));
    in_gate_.Multiply(normalised, tokens, Into(piece.gate.get(), TOKENS));
    for (int64_t i = 0; i < s_.d; i += WIDTH) {
      float* gate = piece.gate[i / BLOCK * TOKENS].at + i % BLOCK;
      for (int64_t t = 0; t < tokens; ++t, gate += BLOCK)
        Store(gate, Silu(Load(gate, WIDTH)), WIDTH);
    }

    MoveTails(k);
    for (int64_t i = 0; i < s_.d; i += WIDTH) Convolve(piece, tokens, i);

    const auto convolved = BlocksOf(u + s_.history, s_.d, u_stride);
    to_BC_.Multiply(convolved, tokens, [&](int64_t t, int64_t o, Floats y) {
      Store(piece.BC[t * 2 * Blocks(s_.n)].at + o, y, WIDTH);
    });
    to_low_rank_.Multiply(convolved, tokens, Into(piece.low_rank.get(), TOKENS));
    to_delta_.Multiply(BlocksOf(piece.low_rank.get(), s_.rank, TOKENS), tokens,
                       Into(piece.delta.get(), TOKENS));
    for (int64_t i = 0; i < s_.d; i += WIDTH) {
      const Floats bias = Load(dt_bias_[0].at + i, WIDTH);
      float* delta = piece.delta[i / BLOCK * TOKENS].at + i % BLOCK;
      for (int64_t t = 0; t < tokens; ++t, delta += BLOCK)
        Store(delta, Softplus(Load(delta, WIDTH) + bias), WIDTH);
    }
    piece.progress.store(STAGES * k + PROJECTED, std::memory_order_release);
  }

  // LayerNorm; the tokens that round their number up to SUMS are zero.
  void Normalise(int64_t k) {
    Piece& piece = At(k);
    const int64_t tokens = Tokens(k), blocks = Blocks(s_.c), vectors = (s_.c + WIDTH - 1) / WIDTH;
    Line* x = piece.delta.get();
    const auto at = [x](int64_t t, int64_t v) {
      return x[v * WIDTH / BLOCK * TOKENS + t].at + v * WIDTH % BLOCK;
    };
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t channels = std::min(BLOCK, s_.c - block * BLOCK);
      if (channels < BLOCK || tokens < TOKENS)
        std::fill_n(x + block * TOKENS, TOKENS, Line{});
      for (int64_t t = 0; t < tokens; ++t) {
        const float* from = arrays_.tokens + piece.positions[t] * s_.c + block * BLOCK;
        Copy(x[block * TOKENS + t].at, from, channels);
      }
    }
    Floats inside = {};  // the lanes of the last vector that hold channels
    for (int64_t i = 0; i < s_.c - (vectors - 1) * WIDTH; ++i) inside[i] = 1.0f;
    float mean[TOKENS], factor[TOKENS];
    for (int64_t t = 0; t < tokens; ++t) {
      Floats sum = {};
      for (int64_t v = 0; v < vectors; ++v) sum += Load(at(t, v), WIDTH);
      mean[t] = Sum(sum) / s_.c;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      Floats difference = (Load(at(t, vectors - 1), WIDTH) - mean[t]) * inside;
      Floats squares = difference * difference;
      for (int64_t v = 0; v < vectors - 1; ++v) {
        difference = Load(at(t, v), WIDTH) - mean[t];
        squares += difference * difference;
      }
      factor[t] = Sum(squares) / s_.c;
    }
    for (int64_t t = 0; t < tokens; ++t) factor[t] = 1.0f / std::sqrt(factor[t] + epsilon_);
    for (int64_t v = 0; v < vectors; ++v) {
      const Floats scale = Load(norm_scale_[0].at + v * WIDTH, WIDTH);
      const Floats bias = Load(norm_bias_[0].at + v * WIDTH, WIDTH);
      for (int64_t t = 0; t < tokens; ++t)
        Store(at(t, v), (Load(at(t, v), WIDTH) - mean[t]) * (factor[t] * scale) + bias, WIDTH);
    }
  }

  // Puts the tokens before the piece in front of u, and keeps its last ones for the next.
  void MoveTails(int64_t k) {
    Piece& piece = At(k);
    const int64_t tokens = Tokens(k), history = s_.history, b = Sequence(k);
    if (!IsFirst(k)) Wait(At(k - 1).progress, STAGES * (k - 1) + TAIL);
    for (int64_t block = 0; block < Blocks(s_.d); ++block) {
      Line* u = &piece.u[block * (history + TOKENS)];
      const int64_t channels = std::min(BLOCK, s_.d - block * BLOCK);
      for (int64_t i = 0; i < history; ++i) {
        const int64_t at = (b * history + i) * s_.d + block * BLOCK;
        if (IsFirst(k))
          std::memcpy(u[i].at, arrays_.previous + at, sizeof(float) * channels);
        else
          u[i] = At(k - 1).tail[block * history + i];
      }
      for (int64_t i = 0; i < history; ++i) {
        const int64_t at = (b * history + i) * s_.d + block * BLOCK;
        piece.tail[block * history + i] = u[tokens + i];
        if (IsLast(k)) std::memcpy(arrays_.last + at, u[tokens + i].at, sizeof(float) * channels);
      }
    }
    piece.progress.store(STAGES * k + TAIL, std::memory_order_release);
  }

  // The causal convolution and silu of a vector of channels, in place.
  void Convolve(Piece& piece, int64_t tokens, int64_t channel) {
    const Floats bias = Load(conv_bias_[0].at + channel, WIDTH);
    float* u = piece.u[channel / BLOCK * (s_.history + TOKENS)].at + channel % BLOCK;
    for (int64_t t = tokens - 1; t >= 0; --t) {  // backwards, as u_t is replaced
      Floats sum = bias;
      for (int64_t i = 0; i <= s_.history; ++i)
        sum += Load(taps_[i * Blocks(s_.d)].at + channel, WIDTH) * Load(u + (t + i) * BLOCK, WIDTH);
      Store(u + (t + s_.history) * BLOCK, Silu(sum), WIDTH);
    }
  }

  void Scan(int64_t k, int64_t block) {
    Piece& piece = At(k);
    std::atomic<int64_t>& scanned = scanned_[block].pieces;
    Wait(piece.progress, STAGES * k + PROJECTED);
    Wait(scanned, k);
    const int64_t first = block * BLOCK, last = std::min(first + BLOCK, s_.d);
    const int64_t sequence = Sequence(k) * s_.d * s_.n;
    if (IsFirst(k))
      for (int64_t c = first; c < last; ++c)
        for (int64_t i = 0; i < s_.n; ++i)
          states_[c / WIDTH * s_.n + i][c % WIDTH] = arrays_.state[sequence + c * s_.n + i];
    for (int64_t c = first; c < last; c += WIDTH) ScanVector(piece, Tokens(k), c);
    if (IsLast(k))
      for (int64_t c = first; c < last; ++c)
        for (int64_t i = 0; i < s_.n; ++i)
          arrays_.end[sequence + c * s_.n + i] = states_[c / WIDTH * s_.n + i][c % WIDTH];
    scanned.store(k + 1, std::memory_order_release);
  }

  void ScanVector(Piece& piece, int64_t tokens, int64_t channel) {
    constexpr int STATES = kernels::Scan::STATES;
    const int64_t block = channel / BLOCK, lane = channel % BLOCK;
    const Floats D = Load(D_[block].at + lane, WIDTH);
    Line* u = &piece.u[block * (s_.history + TOKENS) + s_.history];
    const Line *step = &piece.delta[block * TOKENS], *gate = &piece.gate[block * TOKENS];
    kernels::Scan::Token token[TOKENS];
    Decay decay[TOKENS * STATES];
    Floats largest = {};
    for (int64_t t = 0; t < tokens; ++t) {
      const Floats u_t = Load(u[t].at + lane, WIDTH), step_t = Load(step[t].at + lane, WIDTH);
      token[t] = {step_t, step_t * u_t, D * u_t};
      largest = step_t > largest ? step_t : largest;
    }
    const int64_t padded = BLOCK * Blocks(s_.n), first = channel / WIDTH * s_.n;
    const float *B = piece.BC[0].at, *C = B + padded;
    ForStates<STATES>(s_.n, [&](auto S, int64_t i) {
      Decays<S>(tokens, token, largest, &A2_[first + i], decay, B, C, 0);
      Recur<S>(tokens, 2 * padded, B + i, C + i, &states_[first + i], token, decay);
    });
    for (int64_t t = 0; t < tokens; ++t)
      Store(u[t].at + lane, token[t].y * Load(gate[t].at + lane, WIDTH), WIDTH);
  }

  void Finish(int64_t k) {
    Piece& piece = At(k);
    for (Scanned& scanned : scanned_) Wait(scanned.pieces, k + 1);
    const int64_t tokens = Tokens(k);
    Line* out = piece.gate.get();
    out_.Multiply(BlocksOf(&piece.u[s_.history], s_.d, s_.history + TOKENS), tokens,
                  Into(out, TOKENS));
    for (int64_t block = 0; block < Blocks(s_.c); ++block)
      for (int64_t t = 0; t < tokens; ++t)
        Copy(arrays_.out + piece.positions[t] * s_.c + block * BLOCK, out[block * TOKENS + t].at,
             std::min(BLOCK, s_.c - block * BLOCK));
    piece.progress.store(STAGES * k + FINISHED, std::memory_order_release);
  }

  const Sizes s_;
  const Buffers arrays_;
  const Inside inside_;
  const float epsilon_;
  const int64_t ahead_;  // pieces that are projected before one is scanned, and so on
  const int64_t pieces_per_sequence_, count_;
  Matrix in_u_, in_gate_, to_BC_, to_low_rank_, to_delta_, out_;
  Lines norm_scale_, norm_bias_, taps_, conv_bias_, dt_bias_, D_;
  std::vector<Floats> A2_, states_;  // of each vector of channels, n; A2 = A log2(e)
  std::vector<Scanned> scanned_;
  std::vector<std::unique_ptr<Piece>> pieces_;
  std::atomic<int64_t> next_{0};
};

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
using Integer = ffi::BufferR0<ffi::S32>;

ffi::Error CallViMM(ffi::ThreadPool pool, Buffer tokens, Buffer norm_scale, Buffer norm_bias,
                    Buffer in_proj, Buffer conv_kernel, Buffer conv_bias, Buffer x_proj,
                    Buffer dt_proj, Buffer dt_bias, Buffer A, Buffer D, Buffer out_proj,
                    Buffer previous, Buffer state, Integer first, Integer height, Integer width,
                    Result out, Result last, Result end, int64_t columns, float epsilon) {
  const int64_t b = tokens.dimensions()[0];
  const Sizes s{tokens.dimensions()[1], tokens.dimensions()[2], A.dimensions()[0],
                A.dimensions()[1],      dt_proj.dimensions()[0], previous.dimensions()[1]};
  const Buffers arrays{
      tokens.typed_data(),      norm_scale.typed_data(), norm_bias.typed_data(),
      in_proj.typed_data(),     conv_kernel.typed_data(), conv_bias.typed_data(),
      x_proj.typed_data(),      dt_proj.typed_data(),    dt_bias.typed_data(),
      A.typed_data(),           D.typed_data(),          out_proj.typed_data(),
      previous.typed_data(),    state.typed_data(),      out->typed_data(),
      last->typed_data(),       end->typed_data()};
  const int64_t rows = s.l / columns, place = *first.typed_data();
  const int64_t begin = std::clamp<int64_t>(-place, 0, rows);
  const int64_t stop = std::clamp<int64_t>(*height.typed_data() - place, begin, rows);
  const Inside inside{begin, stop - begin, std::min<int64_t>(*width.typed_data(), columns), columns};

  // Outside the image, u and the gate are zero, so the result is too.
  for (int64_t row = 0; row < b * rows; ++row) {
    const bool is_inside = begin <= row % rows && row % rows < stop;
    const int64_t kept = is_inside ? inside.width : 0;
    std::fill_n(arrays.out + (row * columns + kept) * s.c, (columns - kept) * s.c, 0.0f);
  }
  if (inside.Tokens() == 0) {
    std::copy_n(arrays.previous, previous.element_count(), arrays.last);
    std::copy_n(arrays.state, state.element_count(), arrays.end);
    return ffi::Error::Success();
  }
  const int64_t pieces = b * ((inside.Tokens() + TOKENS - 1) / TOKENS);
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, 2 * pieces);
  ViMM vimm(s, arrays, inside, b, epsilon, threads);
  InParallel(pool, threads, [&](int64_t) { vimm.Help(); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedViMM, CallViMM,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()   // tokens
                                  .Arg<Buffer>()   // the weights: norm_scale
                                  .Arg<Buffer>()   // norm_bias
                                  .Arg<Buffer>()   // in_proj
                                  .Arg<Buffer>()   // conv_kernel
                                  .Arg<Buffer>()   // conv_bias
                                  .Arg<Buffer>()   // x_proj
                                  .Arg<Buffer>()   // dt_proj
                                  .Arg<Buffer>()   // dt_bias
                                  .Arg<Buffer>()   // A
                                  .Arg<Buffer>()   // D
                                  .Arg<Buffer>()   // out_proj
                                  .Arg<Buffer>()   // u of the tokens before, unconvolved
                                  .Arg<Buffer>()   // the state before the first token
                                  .Arg<Integer>()  // the place: the first row
                                  .Arg<Integer>()  // the image's height
                                  .Arg<Integer>()  // its width
                                  .Ret<Buffer>()   // the result
                                  .Ret<Buffer>()   // u of the last tokens, unconvolved
                                  .Ret<Buffer>()   // the state after the last token
                                  .Attr<int64_t>("columns")
                                  .Attr<float>("epsilon"));
