// The entry points of scan.h for XLA. native.py compiles and calls them.

#include <algorithm>
#include <cstdint>

#include "kernels/cpp/threads.h"
#include "kernels/selective_scan/scan.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using namespace kernels;

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;

constexpr int64_t LINE = 16;  // floats in a cache line

Arrays MakeArrays(Buffer u, Buffer delta, Buffer A, Buffer B, Buffer C, Buffer D, Buffer z,
                  Buffer delta_bias, bool delta_softplus, bool gated, int64_t chunk,
                  int64_t channels) {
  return {u.typed_data(),    delta.typed_data(),  A.typed_data(),
          B.typed_data(),    C.typed_data(),      D.typed_data(),
          z.typed_data(),    delta_bias.typed_data(),
          u.dimensions()[0], u.dimensions()[1],   u.dimensions()[2], A.dimensions()[0],
          delta_softplus,    gated,               chunk,             channels};
}

template <typename Pass>
ffi::Error RunAll(ffi::ThreadPool& pool, const Pass& pass) {
  const int64_t groups = pass.Groups();
  InParallel(pool, pass.b * groups,
             [&](int64_t i) { pass.Run(i / groups, i % groups * pass.channels); });
  return ffi::Error::Success();
}

ffi::Error CallScan(ffi::ThreadPool pool, Buffer u, Buffer delta, Buffer A, Buffer B, Buffer C,
                    Buffer D, Buffer z, Buffer delta_bias, Buffer start, Result y, Result end,
                    Result borders, bool delta_softplus, bool gated, int64_t chunk) {
  // One to four cache lines of channels: as many as leave two tasks for each thread.
  const int64_t lines = D.dimensions()[0] * u.dimensions()[0] / (2 * pool.num_threads() * LINE);
  const int64_t channels = std::clamp<int64_t>(lines, 1, 4) * LINE;
  return RunAll(pool, Scan{MakeArrays(u, delta, A, B, C, D, z, delta_bias, delta_softplus, gated,
                                      chunk, channels),
                           start.typed_data(), y->typed_data(), end->typed_data(),
                           borders->element_count() ? borders->typed_data() : nullptr});
}

ffi::Error CallGradient(ffi::ThreadPool pool, Buffer u, Buffer delta, Buffer A, Buffer B, Buffer C,
                        Buffer D, Buffer z, Buffer delta_bias, Buffer borders, Buffer dout,
                        Buffer dend, Result du, Result ddelta, Result dA, Result dB, Result dC,
                        Result dD, Result dz, Result ddelta_bias, Result dstart,
                        bool delta_softplus, bool gated, int64_t chunk, int64_t channels) {
  return RunAll(pool, Gradient{MakeArrays(u, delta, A, B, C, D, z, delta_bias, delta_softplus,
                                          gated, chunk, channels),
                               borders.typed_data(), dout.typed_data(), dend.typed_data(),
                               du->typed_data(), ddelta->typed_data(), dz->typed_data(),
                               dstart->typed_data(), dA->typed_data(), dD->typed_data(),
                               ddelta_bias->typed_data(), dB->typed_data(), dC->typed_data()});
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
