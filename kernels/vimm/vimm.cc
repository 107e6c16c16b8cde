// The entry point of vimm.h for XLA. op.py compiles and calls it.

#include <algorithm>
#include <cstdint>

#include "kernels/cpp/threads.h"
#include "kernels/vimm/vimm.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using namespace kernels;

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
using Integer = ffi::BufferR0<ffi::S32>;

template <typename Factor>
ffi::Error CallViMM(ffi::ThreadPool pool, Buffer tokens, Buffer norm_scale, Buffer norm_bias,
                    Buffer in_proj, Buffer conv_kernel, Buffer conv_bias, Buffer x_proj,
                    Buffer dt_proj, Buffer dt_bias, Buffer A, Buffer D, Buffer out_proj,
                    Buffer previous, Buffer state, Integer first, Integer height, Integer width,
                    Result out, Result last, Result end, int64_t columns, float epsilon) {
  const int64_t b = tokens.dimensions()[0], l = tokens.dimensions()[1];
  const ViMMSizes s{tokens.dimensions()[2], A.dimensions()[0], A.dimensions()[1],
                    dt_proj.dimensions()[0], previous.dimensions()[1]};
  const ViMMWeights weights{norm_scale.typed_data(), norm_bias.typed_data(), in_proj.typed_data(),
                            conv_kernel.typed_data(), conv_bias.typed_data(), x_proj.typed_data(),
                            dt_proj.typed_data(),    dt_bias.typed_data(),   A.typed_data(),
                            D.typed_data(),          out_proj.typed_data()};
  const ViMMTokens arrays{b, l, tokens.typed_data(), previous.typed_data(), state.typed_data(),
                          out->typed_data(), last->typed_data(), end->typed_data()};
  const int64_t rows = l / columns, place = *first.typed_data();
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
  const int64_t threads = std::clamp<int64_t>(pool.num_threads(), 1, 2 * b * inside.Pieces());
  const ViMM<Factor> vimm(s, weights, epsilon);
  ViMMPass<Factor> pass(vimm, arrays, inside, threads);
  InParallel(pool, threads, [&](int64_t) { pass.Help(); });
  return ffi::Error::Success();
}

auto Binding() {
  return ffi::Ffi::Bind()
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
      .Attr<float>("epsilon");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedViMMFloat32, CallViMM<kernels::Float32>, Binding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedViMMBFloat16, CallViMM<kernels::BFloat16>, Binding());
