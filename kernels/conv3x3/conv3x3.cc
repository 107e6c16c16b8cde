// The entry point of conv3x3.h for XLA. op.py compiles and calls it.

#include <cstdint>

#include "kernels/conv3x3/conv3x3.h"
#include "kernels/cpp/threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using namespace kernels;

using Buffer = ffi::Buffer<ffi::F32>;

template <typename Factor>
ffi::Error CallConvolution(ffi::ThreadPool pool, Buffer x, Buffer kernel, Buffer bias,
                           ffi::ResultBuffer<ffi::F32> y) {
  const auto shape = y->dimensions();
  const int64_t b = shape[0], h = shape[1], w = shape[2], c_out = shape[3];
  const int64_t c_in = x.dimensions()[3];
  const Convolution<Factor> convolution(kernel.typed_data(), bias.typed_data(), c_in, c_out);
  const int64_t parts = Convolution<Factor>::Parts(h, w);
  InParallel(pool, b * parts, [&](int64_t i) {
    const int64_t image = i / parts;
    convolution.Run(x.typed_data() + image * (h + 2) * w * c_in,
                    y->typed_data() + image * h * w * c_out, h, w, i % parts);
  });
  return ffi::Error::Success();
}

auto Binding() {
  return ffi::Ffi::Bind()
      .Ctx<ffi::ThreadPool>()
      .Arg<Buffer>()   // x
      .Arg<Buffer>()   // kernel
      .Arg<Buffer>()   // bias
      .Ret<Buffer>();  // y
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(Conv3x3Float32, CallConvolution<kernels::Float32>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Conv3x3BFloat16, CallConvolution<kernels::BFloat16>, Binding());
