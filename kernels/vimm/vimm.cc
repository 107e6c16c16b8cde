// The entry points of vimm.h and gradient.h for XLA. op.py compiles and calls them.

#include <algorithm>
#include <cstdint>

#include "kernels/cpp/threads.h"
#include "kernels/vimm/gradient.h"
#include "kernels/vimm/vimm.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using namespace kernels;

using Buffer = ffi::Buffer<ffi::F32>;
using Result = ffi::ResultBuffer<ffi::F32>;
using Integer = ffi::BufferR0<ffi::S32>;

ViMMSizes SizesOf(Buffer tokens, Buffer conv_kernel, Buffer dt_proj, Buffer A) {
  return {tokens.dimensions()[2], A.dimensions()[0], A.dimensions()[1], dt_proj.dimensions()[0],
          conv_kernel.dimensions()[0] - 1};
}

template <typename... Weights>
ViMMWeights WeightsOf(const Weights&... weights) {
  return {weights.typed_data()...};
}

template <typename Factor>
ffi::Error CallViMM(ffi::ThreadPool pool, Buffer tokens, Buffer norm_scale, Buffer norm_bias,
                    Buffer in_proj, Buffer conv_kernel, Buffer conv_bias, Buffer x_proj,
                    Buffer dt_proj, Buffer dt_bias, Buffer A, Buffer D, Buffer out_proj,
                    Buffer previous, Buffer state, Integer first, Integer height, Integer width,
                    Result out, Result last, Result end, Result tails, Result borders,
                    int64_t columns, float epsilon) {
  const int64_t b = tokens.dimensions()[0], l = tokens.dimensions()[1];
  const ViMMSizes s = SizesOf(tokens, conv_kernel, dt_proj, A);
  const ViMMWeights weights = WeightsOf(norm_scale, norm_bias, in_proj, conv_kernel, conv_bias,
                                        x_proj, dt_proj, dt_bias, A, D, out_proj);
  const bool keep = borders->element_count() > 0;
  const ViMMTokens arrays{b,
                          l,
                          tokens.typed_data(),
                          previous.typed_data(),
                          state.typed_data(),
                          out->typed_data(),
                          last->typed_data(),
                          end->typed_data(),
                          keep ? tails->typed_data() : nullptr,
                          keep ? borders->typed_data() : nullptr};
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

ffi::Error CallGradient(ffi::ThreadPool pool, Buffer tokens, Buffer norm_scale, Buffer norm_bias,
                        Buffer in_proj, Buffer conv_kernel, Buffer conv_bias, Buffer x_proj,
                        Buffer dt_proj, Buffer dt_bias, Buffer A, Buffer D, Buffer out_proj,
                        Buffer tails, Buffer borders, Buffer dout, Result dtokens,
                        Result dnorm_scale, Result dnorm_bias, Result din_proj,
                        Result dconv_kernel, Result dconv_bias, Result dx_proj, Result ddt_proj,
                        Result ddt_bias, Result dA, Result dD, Result dout_proj, float epsilon) {
  const ViMMSizes s = SizesOf(tokens, conv_kernel, dt_proj, A);
  const ViMMWeights weights = WeightsOf(norm_scale, norm_bias, in_proj, conv_kernel, conv_bias,
                                        x_proj, dt_proj, dt_bias, A, D, out_proj);
  const ViMMGradientArrays arrays{
      tokens.dimensions()[1],     tokens.typed_data(),      tails.typed_data(),
      borders.typed_data(),           dout.typed_data(),        dtokens->typed_data(),
      dnorm_scale->typed_data(),  dnorm_bias->typed_data(), din_proj->typed_data(),
      dconv_kernel->typed_data(), dconv_bias->typed_data(), dx_proj->typed_data(),
      ddt_proj->typed_data(),     ddt_bias->typed_data(),   dA->typed_data(),
      dD->typed_data(),           dout_proj->typed_data()};
  const ViMM<Float32> vimm(s, weights, epsilon);
  const TransposedViMM transposed(s, weights);
  InParallel(pool, tokens.dimensions()[0],
             [&](int64_t i) { ViMMGradient(vimm, transposed, arrays, i).Run(); });
  return ffi::Error::Success();
}

// The first arguments of all functions.
auto BindWeights() {
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
      .Arg<Buffer>();  // out_proj
}

auto BindViMM() {
  return BindWeights()
      .Arg<Buffer>()   // u of the tokens before, unconvolved
      .Arg<Buffer>()   // the state before the first token
      .Arg<Integer>()  // the place: the first row
      .Arg<Integer>()  // the image's height
      .Arg<Integer>()  // its width
      .Ret<Buffer>()   // the result
      .Ret<Buffer>()   // u of the last tokens, unconvolved
      .Ret<Buffer>()   // the state after the last token
      .Ret<Buffer>()   // for the gradient: u of the tokens before each piece, or nothing
      .Ret<Buffer>()   // the states before each piece, or nothing
      .Attr<int64_t>("columns")
      .Attr<float>("epsilon");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedViMMFloat32, CallViMM<kernels::Float32>, BindViMM());
XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedViMMBFloat16, CallViMM<kernels::BFloat16>, BindViMM());

XLA_FFI_DEFINE_HANDLER_SYMBOL(FusedViMMGradient, CallGradient,
                              BindWeights()
                                  .Arg<Buffer>()  // u of the tokens before each piece
                                  .Arg<Buffer>()  // the states before each piece
                                  .Arg<Buffer>()  // the gradient by the result
                                  .Ret<Buffer>()  // the gradients, by tokens
                                  .Ret<Buffer>()  // by each weight, of each sequence: norm_scale
                                  .Ret<Buffer>()  // norm_bias
                                  .Ret<Buffer>()  // in_proj
                                  .Ret<Buffer>()  // conv_kernel
                                  .Ret<Buffer>()  // conv_bias
                                  .Ret<Buffer>()  // x_proj
                                  .Ret<Buffer>()  // dt_proj
                                  .Ret<Buffer>()  // dt_bias
                                  .Ret<Buffer>()  // A
                                  .Ret<Buffer>()  // D
                                  .Ret<Buffer>()  // out_proj
                                  .Attr<float>("epsilon"));
