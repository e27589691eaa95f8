// SPDX-License-Identifier: Apache-2.0
// The kernel as XLA custom calls. What a cell does not have, and a mask that is not there, is an array without elements.

#include "kernel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace flax_lstm;

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Result = ffi::Result<Floats>;

namespace {

const float* some(const Floats& b) { return b.element_count() ? b.typed_data() : nullptr; }
float* some(Result& b) { return b->element_count() ? b->typed_data() : nullptr; }

Sizes sizes(const Floats& x, const Floats& recurrent) {
  const auto d = x.dimensions();
  return {d[0], d[1], d[2], recurrent.dimensions()[0]};
}

// By the number of gates: 4 of the LSTM, 3 of the GRU, 1 of the simple RNN.
template <class Run>
ffi::Error by_cell(const Floats& recurrent, const Run& run) {
  switch (recurrent.dimensions()[1]) {
    case 4: run(Lstm{}); break;
    case 3: run(Gru{}); break;
    case 1: run(Rnn{}); break;
    default: return ffi::Error::InvalidArgument("flax_lstm: no cell has this number of gates");
  }
  return ffi::Error::Success();
}

ffi::Error run_forward(ffi::ThreadPool pool, Floats x, Floats input, Floats recurrent, Floats bias,
                       Floats recurrent_bias, Floats c0, Floats h0, Floats mask, Ints lengths, Result y, Result c,
                       Result h, Result gates, Result kept, bool reverse) {
  const Forward f{sizes(x, recurrent), reverse,   x.typed_data(),    input.typed_data(),   recurrent.typed_data(),
                  bias.typed_data(),   some(recurrent_bias), some(c0), h0.typed_data(), some(mask),
                  lengths.typed_data(), y->typed_data(), some(c),    h->typed_data(), some(gates), some(kept)};
  return by_cell(recurrent, [&](auto cell) { forward<decltype(cell)>(pool, pool.num_threads(), f); });
}

ffi::Error run_backward(ffi::ThreadPool pool, Floats x, Floats input, Floats recurrent, Floats c0, Floats h0,
                        Floats mask, Ints lengths, Floats y, Floats gates, Floats kept, Floats dy, Floats dc, Floats dh,
                        Result dx, Result dinput, Result drecurrent, Result dbias, Result drecurrent_bias, Result dc0,
                        Result dh0, Result dmask, bool reverse) {
  const Backward f{sizes(x, recurrent),      reverse,              x.typed_data(),      input.typed_data(),
                   recurrent.typed_data(),   some(c0),             h0.typed_data(),     some(mask),
                   lengths.typed_data(),     y.typed_data(),       gates.typed_data(),  some(kept),
                   dy.typed_data(),          some(dc),             dh.typed_data(),     dx->typed_data(),
                   dinput->typed_data(),     drecurrent->typed_data(), dbias->typed_data(), some(drecurrent_bias),
                   some(dc0),                dh0->typed_data(),    some(dmask)};
  return by_cell(recurrent, [&](auto cell) { backward<decltype(cell)>(pool, pool.num_threads(), f); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(flax_lstm_forward, run_forward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // input weights
                                  .Arg<Floats>()  // recurrent weights
                                  .Arg<Floats>()  // bias
                                  .Arg<Floats>()  // recurrent bias
                                  .Arg<Floats>()  // c0
                                  .Arg<Floats>()  // h0
                                  .Arg<Floats>()  // mask
                                  .Arg<Ints>()    // lengths
                                  .Ret<Floats>()  // y
                                  .Ret<Floats>()  // c
                                  .Ret<Floats>()  // h
                                  .Ret<Floats>()  // gates
                                  .Ret<Floats>()  // kept
                                  .Attr<bool>("reverse"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(flax_lstm_backward, run_backward,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // x
                                  .Arg<Floats>()  // input weights
                                  .Arg<Floats>()  // recurrent weights
                                  .Arg<Floats>()  // c0
                                  .Arg<Floats>()  // h0
                                  .Arg<Floats>()  // mask
                                  .Arg<Ints>()    // lengths
                                  .Arg<Floats>()  // y
                                  .Arg<Floats>()  // gates
                                  .Arg<Floats>()  // kept
                                  .Arg<Floats>()  // dy
                                  .Arg<Floats>()  // dc
                                  .Arg<Floats>()  // dh
                                  .Ret<Floats>()  // dx
                                  .Ret<Floats>()  // dinput
                                  .Ret<Floats>()  // drecurrent
                                  .Ret<Floats>()  // dbias
                                  .Ret<Floats>()  // drecurrent bias
                                  .Ret<Floats>()  // dc0
                                  .Ret<Floats>()  // dh0
                                  .Ret<Floats>()  // dmask
                                  .Attr<bool>("reverse"));
