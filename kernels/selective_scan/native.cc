// The forward pass of the selective scan on a CPU, in float32. native.py compiles and calls it.
//
// Channels are taken WIDTH at a time, as a vector, and GROUP at a time by a thread, which runs
// through all the tokens with the states in its cache. A and the states are (n, d) here, as in
// chunked.py; everything else is as in op.py.

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

#ifdef __AVX512F__
constexpr int64_t WIDTH = 16;
#else
constexpr int64_t WIDTH = 8;
#endif
constexpr int64_t GROUP = 16;  // a cache line of floats

typedef float Floats __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));

inline Floats Load(const float* from, int64_t count) {
  Floats x = {};
  if (count == WIDTH)
    std::memcpy(&x, from, sizeof x);
  else
    std::memcpy(&x, from, sizeof(float) * count);
  return x;
}

inline void Store(float* to, Floats x, int64_t count) {
  if (count == WIDTH)
    std::memcpy(to, &x, sizeof x);
  else
    std::memcpy(to, &x, sizeof(float) * count);
}

constexpr float LOG2_E = 1.44269504f;

// 2^t for t up to 127, with a relative error of 2e-7, exact at 0; 2^-126 below -126.
inline Floats Exp2(Floats t) {
  t = t > -126.0f ? t : Floats{} - 126.0f;
  const Floats shifted = t + 12582912.0f;  // 1.5 * 2^23: the last bits are now t rounded
  const Floats f = t - (shifted - 12582912.0f);
  Floats p = Floats{} + 1.326472615e-3f;  // fitted to 2^f for f from -1/2 to 1/2
  p = p * f + 9.671512991e-3f;
  p = p * f + 5.550733581e-2f;
  p = p * f + 2.402224243e-1f;
  p = p * f + 6.931470037e-1f;
  p = p * f + 1.0f;
  return (Floats)((Ints)p + ((Ints)shifted << 23));  // adds to the exponent
}

// log(1 + exp(x)) = max(x, 0) + log(1 + e) with e = exp(-|x|), and log(1 + e) = 2 artanh(e / (2 + e)).
inline Floats Softplus(Floats x) {
  const Floats positive = x > 0.0f ? x : Floats{};
  const Floats minus_abs = x > 0.0f ? -x : x;
  const Floats e = minus_abs > -87.0f ? Exp2(LOG2_E * minus_abs) : Floats{};
  const Floats s = e / (2.0f + e);  // 1/3 at most
  const Floats s2 = s * s;
  Floats p = Floats{} + 1.0f / 15;
  for (int k = 13; k > 0; k -= 2) p = p * s2 + 1.0f / k;
  return positive + 2.0f * s * p;
}

struct Scan {
  const float *u, *delta, *A, *B, *C, *D, *z, *delta_bias, *start;
  float *y, *end;
  int64_t l, d, n;
  bool delta_softplus, gated;

  // The channels from c, GROUP of them or those that are left, of sequence b.
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
    for (int64_t t = b * l; t < (b + 1) * l; ++t) {
      const Floats u_t = Load(u + t * d + c, count);
      Floats delta_t = Load(delta + t * d + c, count) + bias;
      if (delta_softplus) delta_t = Softplus(delta_t);
      const Floats x_t = delta_t * u_t;
      Floats y_t = D_c * u_t;
      for (int64_t i = 0; i < n; ++i) {
        h[i] = Exp2(delta_t * A2[i]) * h[i] + x_t * B[t * n + i];
        y_t += h[i] * C[t * n + i];
      }
      if (gated) {
        const Floats z_t = Load(z + t * d + c, count);
        const Floats t = -LOG2_E * z_t;
        y_t *= z_t / (1.0f + Exp2(t < 127.0f ? t : Floats{} + 127.0f));
      }
      Store(y + t * d + c, y_t, count);
    }
    for (int64_t i = 0; i < n; ++i) Store(end + (b * n + i) * d + c, h[i], count);
  }
};

// work(0) .. work(count - 1), by this thread and those of the pool that are free. It waits only for
// what others have begun, so that it may run on one of the pool's threads itself.
void InParallel(ffi::ThreadPool& pool, int64_t count, std::function<void(int64_t)> work) {
  struct Progress {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  auto progress = std::make_shared<Progress>();
  const std::function<void()> help = [progress, count, work] {
    for (int64_t i; (i = progress->next++) < count;) {
      work(i);
      std::lock_guard<std::mutex> lock(progress->mutex);
      if (++progress->done == count) progress->all_done.notify_all();
    }
  };
  for (int64_t i = 1; i < std::min(count, pool.num_threads()); ++i) pool.Schedule(std::function<void()>(help));
  help();
  std::unique_lock<std::mutex> lock(progress->mutex);
  progress->all_done.wait(lock, [&] { return progress->done == count; });
}

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

ffi::Error Call(ffi::ThreadPool pool, Buffer u, Buffer delta, Buffer A, Buffer B, Buffer C, Buffer D,
                Buffer z, Buffer delta_bias, Buffer start, Result y, Result end,
                bool delta_softplus, bool gated) {
  const auto shape = u.dimensions();
  const int64_t b = shape[0], l = shape[1], d = shape[2], groups = (d + GROUP - 1) / GROUP;
  const Scan scan{u.typed_data(), delta.typed_data(), A.typed_data(), B.typed_data(),
                  C.typed_data(), D.typed_data(), z.typed_data(), delta_bias.typed_data(),
                  start.typed_data(), y->typed_data(), end->typed_data(), l, d,
                  A.dimensions()[0], delta_softplus, gated};
  InParallel(pool, b * groups, [&](int64_t i) { scan.Run(i / groups, i % groups * GROUP); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(SelectiveScan, Call,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Buffer>()  // u
                                  .Arg<Buffer>()  // delta
                                  .Arg<Buffer>()  // A
                                  .Arg<Buffer>()  // B
                                  .Arg<Buffer>()  // C
                                  .Arg<Buffer>()  // D
                                  .Arg<Buffer>()  // z
                                  .Arg<Buffer>()  // delta_bias
                                  .Arg<Buffer>()  // the state before the first token
                                  .Ret<Buffer>()  // y
                                  .Ret<Buffer>()  // the state after the last
                                  .Attr<bool>("delta_softplus")
                                  .Attr<bool>("gated"));
