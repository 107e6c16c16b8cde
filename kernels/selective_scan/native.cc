// The selective scan and its gradient on a CPU, in float32. native.py compiles and calls them.
//
// A vector holds WIDTH channels. A thread takes a group of channels through all tokens of a
// sequence, with their states in its cache. The gradient goes backwards through chunks of tokens,
// and recomputes the states of each from the state before it, which the scan has stored. A and the
// states are (n, d) here, as in chunked.py; everything else is as in op.py.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/cpp/threads.h"
#include "kernels/cpp/vectors.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using namespace kernels;

constexpr int64_t GROUP = 16;  // channels per group in the forward pass: a cache line

struct Arrays {
  const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias;
  int64_t l, d, n;
  bool delta_softplus, gated;

  Floats StepSize(Floats biased) const { return delta_softplus ? Softplus(biased) : biased; }
  int64_t Chunks(int64_t chunk) const { return (l + chunk - 1) / chunk; }
};

struct Scan : Arrays {
  const float* start;
  float *y, *end;
  float* borders;  // (b, chunks, n, d), the states before each chunk; null if not needed
  int64_t chunk;   // tokens

  // Scans up to GROUP channels of sequence b, from c on.
  void Run(int64_t b, int64_t c) const {
    for (const int64_t last = std::min(c + GROUP, d); c < last; c += WIDTH)
      RunVector(b, c, std::min(WIDTH, last - c));
  }

  void RunVector(int64_t b, int64_t c, int64_t count) const {
    std::vector<Floats> A2(n), h(n);
    for (int64_t i = 0; i < n; ++i) {
      A2[i] = LOG2_E * Load(A + i * d + c, count);
      h[i] = Load(start + (b * n + i) * d + c, count);
    }
    const Floats D_c = Load(D + c, count), bias = Load(delta_bias + c, count);
    for (int64_t k = 0; k < Chunks(chunk); ++k) {
      if (borders)
        for (int64_t i = 0; i < n; ++i)
          Store(borders + ((b * Chunks(chunk) + k) * n + i) * d + c, h[i], count);
      const int64_t last = b * l + std::min((k + 1) * chunk, l);
      for (int64_t t = b * l + k * chunk; t < last; ++t) {
        const Floats u_t = Load(u + t * d + c, count);
        const Floats delta_t = StepSize(Load(delta + t * d + c, count) + bias);
        const Floats x_t = delta_t * u_t;
        Floats y_t = D_c * u_t;
        for (int64_t i = 0; i < n; ++i) {
          h[i] = Exp2(AtLeast(MIN_EXPONENT, delta_t * A2[i])) * h[i] + x_t * B[t * n + i];
          y_t += h[i] * C[t * n + i];
        }
        if (gated) {
          const Floats z_t = Load(z + t * d + c, count);
          y_t *= z_t * Sigmoid(z_t);
        }
        Store(y + t * d + c, y_t, count);
      }
    }
    for (int64_t i = 0; i < n; ++i) Store(end + (b * n + i) * d + c, h[i], count);
  }
};

// The gradients by each input (dX for X), from those by y and by the state after the last token.
struct Gradient : Arrays {
  const float *borders, *dout, *dend;
  float *du, *ddelta, *dz, *dstart;
  float *dA, *dD, *ddelta_bias;  // of each sequence: (b, n, d), (b, d), (b, d)
  float *dB, *dC;                // of each group of channels: (groups, b, l, n)
  int64_t sequences, chunk, channels;

  // Values that a vector of channels carries from chunk to chunk.
  struct Carry {
    std::vector<Floats> g, dA;  // g: the gradient by the state after the chunk
    Floats dD = {}, dbias = {};
  };

  // Values within a chunk, for each token or for each token's states.
  struct Scratch {
    std::vector<Floats> delta, y, decay;  // of one vector of channels
    std::vector<Floats> h;                // of one vector, before each token and after the last
    std::vector<Floats> dB, dC;           // sums over the group's vectors, element by element
  };

  // Computes the gradients of up to `channels` channels of sequence b, from c on.
  void Run(int64_t b, int64_t c) const {
    const int64_t first = c, last = std::min(c + channels, d), states = chunk * n;
    const std::vector<Floats> zeros(n);
    std::vector<Carry> carries;
    for (c = first; c < last; c += WIDTH) {
      carries.push_back({zeros, zeros});
      for (int64_t i = 0; i < n; ++i)
        carries.back().g[i] = Load(dend + (b * n + i) * d + c, std::min(WIDTH, last - c));
    }
    Scratch scratch{std::vector<Floats>(chunk),  std::vector<Floats>(chunk),
                    std::vector<Floats>(states), std::vector<Floats>(states + n),
                    std::vector<Floats>(states), std::vector<Floats>(states)};
    const int64_t part = (first / channels * sequences + b) * l * n;
    for (int64_t k = Chunks(chunk) - 1; k >= 0; --k) {
      std::fill(scratch.dB.begin(), scratch.dB.end(), Floats{});
      std::fill(scratch.dC.begin(), scratch.dC.end(), Floats{});
      for (c = first; c < last; c += WIDTH)
        RunChunk(b, k, c, std::min(WIDTH, last - c), carries[(c - first) / WIDTH], scratch);
      const int64_t begin = k * chunk * n, end = std::min((k + 1) * chunk, l) * n;
      for (int64_t i = begin; i < end; ++i) {
        dB[part + i] = Sum(scratch.dB[i - begin]);
        dC[part + i] = Sum(scratch.dC[i - begin]);
      }
    }
    for (c = first; c < last; c += WIDTH) {
      const Carry& carry = carries[(c - first) / WIDTH];
      const int64_t count = std::min(WIDTH, last - c);
      Store(dD + b * d + c, carry.dD, count);
      Store(ddelta_bias + b * d + c, carry.dbias, count);
      for (int64_t i = 0; i < n; ++i) {
        Store(dA + (b * n + i) * d + c, carry.dA[i], count);
        Store(dstart + (b * n + i) * d + c, carry.g[i], count);
      }
    }
  }

  void RunChunk(int64_t b, int64_t k, int64_t c, int64_t count, Carry& carry, Scratch& s) const {
    std::vector<Floats> A_c(n), h(n);
    for (int64_t i = 0; i < n; ++i) {
      A_c[i] = Load(A + i * d + c, count);
      s.h[i] = h[i] = Load(borders + ((b * Chunks(chunk) + k) * n + i) * d + c, count);
    }
    const Floats D_c = Load(D + c, count), bias = Load(delta_bias + c, count);
    const int64_t begin = b * l + k * chunk, tokens = std::min(chunk, l - k * chunk);

    // Recomputes the states, up to rounding.
    for (int64_t q = 0; q < tokens; ++q) {
      const int64_t t = begin + q;
      const Floats delta_t = StepSize(Load(delta + t * d + c, count) + bias);
      const Floats x_t = delta_t * Load(u + t * d + c, count), delta2 = LOG2_E * delta_t;
      Floats y_t = {};
      for (int64_t i = 0; i < n; ++i) {
        const Floats decay = Exp2(AtLeast(MIN_EXPONENT, delta2 * A_c[i]));
        h[i] = decay * h[i] + x_t * B[t * n + i];
        y_t += h[i] * C[t * n + i];
        s.decay[q * n + i] = decay;
        s.h[(q + 1) * n + i] = h[i];
      }
      s.delta[q] = delta_t;
      s.y[q] = y_t;
    }

    for (int64_t q = tokens - 1; q >= 0; --q) {
      const int64_t t = begin + q;
      const Floats u_t = Load(u + t * d + c, count), delta_t = s.delta[q], x_t = delta_t * u_t;
      Floats dy = Load(dout + t * d + c, count);
      if (gated) {
        const Floats z_t = Load(z + t * d + c, count), sigmoid = Sigmoid(z_t);
        const Floats dgate = dy * (s.y[q] + D_c * u_t);
        Store(dz + t * d + c, dgate * sigmoid * (1.0f + z_t * (1.0f - sigmoid)), count);
        dy *= z_t * sigmoid;
      }
      carry.dD += dy * u_t;
      Floats dx = {}, ddelta_t = {};
      for (int64_t i = 0; i < n; ++i) {
        const Floats h_before = s.h[q * n + i], h_t = s.h[(q + 1) * n + i];
        const Floats g = carry.g[i] + C[t * n + i] * dy;  // by h_t
        carry.g[i] = g * s.decay[q * n + i];              // by h_before
        const Floats dexponent = carry.g[i] * h_before;   // by delta A
        s.dB[q * n + i] += g * x_t;
        s.dC[q * n + i] += h_t * dy;
        dx += g * B[t * n + i];
        ddelta_t += dexponent * A_c[i];
        carry.dA[i] += dexponent * delta_t;
      }
      ddelta_t += dx * u_t;
      if (delta_softplus) ddelta_t *= Sigmoid(Load(delta + t * d + c, count) + bias);
      carry.dbias += ddelta_t;
      Store(ddelta + t * d + c, ddelta_t, count);
      Store(du + t * d + c, dx * delta_t + D_c * dy, count);
    }
  }
};

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

Arrays MakeArrays(Buffer u, Buffer delta, Buffer A, Buffer B, Buffer C, Buffer D, Buffer z,
                  Buffer delta_bias, bool delta_softplus, bool gated) {
  return {u.typed_data(),          delta.typed_data(),  A.typed_data(),
          B.typed_data(),          C.typed_data(),      D.typed_data(),
          z.typed_data(),          delta_bias.typed_data(),
          u.dimensions()[1],       u.dimensions()[2],   A.dimensions()[0],
          delta_softplus,          gated};
}

ffi::Error CallScan(ffi::ThreadPool pool, Buffer u, Buffer delta, Buffer A, Buffer B, Buffer C,
                    Buffer D, Buffer z, Buffer delta_bias, Buffer start, Result y, Result end,
                    Result borders, bool delta_softplus, bool gated, int64_t chunk) {
  const Scan scan{MakeArrays(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gated),
                  start.typed_data(), y->typed_data(), end->typed_data(),
                  borders->element_count() ? borders->typed_data() : nullptr, chunk};
  const int64_t b = u.dimensions()[0], groups = (scan.d + GROUP - 1) / GROUP;
  InParallel(pool, b * groups, [&](int64_t i) { scan.Run(i / groups, i % groups * GROUP); });
  return ffi::Error::Success();
}

ffi::Error CallGradient(ffi::ThreadPool pool, Buffer u, Buffer delta, Buffer A, Buffer B, Buffer C,
                        Buffer D, Buffer z, Buffer delta_bias, Buffer borders, Buffer dout,
                        Buffer dend, Result du, Result ddelta, Result dA, Result dB, Result dC,
                        Result dD, Result dz, Result ddelta_bias, Result dstart,
                        bool delta_softplus, bool gated, int64_t chunk, int64_t channels) {
  const int64_t b = u.dimensions()[0], groups = dB->dimensions()[0];
  const Gradient gradient{MakeArrays(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gated),
                          borders.typed_data(), dout.typed_data(), dend.typed_data(),
                          du->typed_data(), ddelta->typed_data(), dz->typed_data(),
                          dstart->typed_data(), dA->typed_data(), dD->typed_data(),
                          ddelta_bias->typed_data(), dB->typed_data(), dC->typed_data(), b, chunk,
                          channels};
  InParallel(pool, b * groups, [&](int64_t i) { gradient.Run(i / groups, i % groups * channels); });
  return ffi::Error::Success();
}

// The first arguments of both functions.
auto BindArrays() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Buffer>()   // u
      .Arg<Buffer>()   // delta
      .Arg<Buffer>()   // A
      .Arg<Buffer>()   // B
      .Arg<Buffer>()   // C
      .Arg<Buffer>()   // D
      .Arg<Buffer>()   // z
      .Arg<Buffer>();  // delta_bias
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SelectiveScan, CallScan,
                              BindArrays()
                                  .Arg<Buffer>()  // the state before the first token
                                  .Ret<Buffer>()  // y
                                  .Ret<Buffer>()  // the state after the last
                                  .Ret<Buffer>()  // the states before each chunk, or nothing
                                  .Attr<bool>("delta_softplus")
                                  .Attr<bool>("gated")
                                  .Attr<int64_t>("chunk"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(SelectiveScanGradient, CallGradient,
                              BindArrays()
                                  .Arg<Buffer>()  // the states before each chunk
                                  .Arg<Buffer>()  // the gradient by y
                                  .Arg<Buffer>()  // the gradient by the state after the last token
                                  .Ret<Buffer>()  // the gradients, by u
                                  .Ret<Buffer>()  // by delta
                                  .Ret<Buffer>()  // by A
                                  .Ret<Buffer>()  // by B
                                  .Ret<Buffer>()  // by C
                                  .Ret<Buffer>()  // by D
                                  .Ret<Buffer>()  // by z
                                  .Ret<Buffer>()  // by delta_bias
                                  .Ret<Buffer>()  // by the state before the first token
                                  .Attr<bool>("delta_softplus")
                                  .Attr<bool>("gated")
                                  .Attr<int64_t>("chunk")
                                  .Attr<int64_t>("channels"));
