// SPDX-License-Identifier: Apache-2.0
// The kernel as XLA custom calls. What a cell does not have, and a mask, resets or gradients that are not there, are arrays
// without elements.
//
// The kernel trusts the sizes that it is given, so every dimension of every array is checked here: whatever is called with
// whatever, nothing is read or written beyond an array.

#include <string>

#include "alone.h"
#include "int8.h"
#include "kernel.h"
#include "table.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using namespace flax_lstm;

using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;
using Marks = ffi::Buffer<ffi::PRED>;
using Result = ffi::Result<Floats>;
using Dims = ffi::Span<const int64_t>;

namespace {

template <class Buffer>
auto some(Buffer& b) {
  return b.element_count() ? b.typed_data() : nullptr;
}
float* some(Result& b) { return b->element_count() ? b->typed_data() : nullptr; }

std::string text(const std::vector<int64_t>& dims) {
  std::string all = "[";
  for (size_t i = 0; i < dims.size(); ++i) all += (i ? "," : "") + std::to_string(dims[i]);
  return all + "]";
}

// Collects what is wrong with the shapes of a call: the first problem is the one that is told.
class Shapes {
 public:
  void expect(const char* name, Dims dims, const std::vector<int64_t>& wanted, bool optional = false) {
    const std::vector<int64_t> found(dims.begin(), dims.end());
    if (problem_.empty() && found != wanted && !(optional && found == std::vector<int64_t>{0}))
      problem_ = std::string("flax_lstm: ") + name + " has shape " + text(found) + ", expected " + text(wanted);
  }
  void rank(const char* name, Dims dims, size_t wanted) {
    if (problem_.empty() && dims.size() != wanted)
      problem_ = std::string("flax_lstm: ") + name + " has rank " + std::to_string(dims.size()) + ", expected " +
                 std::to_string(wanted);
  }
  bool fine() const { return problem_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(problem_); }

 private:
  std::string problem_;
};

// The shapes that a cell's arrays must have. [B,T,...] or, with time first, [T,B,...]. Inputs are [.., D], or, without input
// weights, what these would make of them: [.., G * H], D being 0.
struct Expected {
  int64_t B, T, D, G, H;
  bool time_major, has_cell, has_q, projected;
  using Shape = std::vector<int64_t>;
  Shape x() const { return over_time({projected ? G * H : D}); }
  Shape input() const { return projected ? Shape{0} : Shape{D, G, H}; }
  Shape bias() const { return projected ? Shape{0} : Shape{G, H}; }
  Shape over_time(std::initializer_list<int64_t> rest) const {
    Shape shape = time_major ? Shape{T, B} : Shape{B, T};
    shape.insert(shape.end(), rest);
    return shape;
  }
  Shape state() const { return {B, H}; }
  Shape cell() const { return has_cell ? Shape{B, H} : Shape{0}; }
  Shape recurrent_bias() const { return has_q ? Shape{H} : Shape{0}; }
  Sizes sizes() const { return {B, T, D, H, time_major}; }
};

bool per_gate(const Floats& mask) { return mask.dimensions().size() == 3; }

// What forward and backward calls have in common; `expected` is filled in unless something is wrong.
ffi::Error check_common(Shapes& shapes, Expected& expected, const Floats& x, const Floats& input, const Floats& recurrent,
                        const Floats& c0, const Floats& h0, const Floats& mask, const Ints& lengths, const Marks& reset,
                        bool time_major) {
  shapes.rank("x", x.dimensions(), 3);
  shapes.rank("recurrent weights", recurrent.dimensions(), 3);
  if (!shapes.fine()) return shapes.error();
  const Dims d = x.dimensions(), r = recurrent.dimensions();
  const bool projected = input.dimensions().size() == 1;
  const int64_t batch = d[time_major ? 1 : 0], time = d[time_major ? 0 : 1];
  Expected& e = expected = {batch, time, projected ? 0 : d[2], r[1], r[2], time_major, r[1] == 4, r[1] == 3, projected};
  if (e.G != 4 && e.G != 3 && e.G != 1)
    return ffi::Error::InvalidArgument("flax_lstm: no cell has " + std::to_string(e.G) + " gates");
  shapes.expect("recurrent weights", r, {e.H, e.G, e.H});
  shapes.expect("x", d, e.x());
  shapes.expect("input weights", input.dimensions(), e.input());
  shapes.expect("state c", c0.dimensions(), e.cell());
  shapes.expect("state h", h0.dimensions(), e.state());
  if (per_gate(mask)) shapes.expect("mask", mask.dimensions(), {e.B, e.G, e.H});
  else shapes.expect("mask", mask.dimensions(), e.state(), true);
  shapes.expect("lengths", lengths.dimensions(), {e.B});
  shapes.expect("resets", reset.dimensions(), e.over_time({}), true);
  return shapes.fine() ? ffi::Error::Success() : shapes.error();
}

// By the number of gates: 4 of the LSTM, 3 of the GRU, 1 of the simple RNN; and by what products multiply.
template <class Run>
void by_cell(int64_t gates, bool half, const Run& run) {
  const auto of = [&](auto cell) { half ? run(cell, Half{}) : run(cell, Single{}); };
  if (gates == 4) return of(Lstm{});
  if (gates == 3) return of(Gru{});
  of(Rnn{});
}

ffi::Error run_forward(ffi::ThreadPool pool, Floats x, Floats input, Floats recurrent, Floats bias,
                       Floats recurrent_bias, Floats c0, Floats h0, Floats mask, Ints lengths, Marks reset, Result y,
                       Result c, Result h, Result gates, Result kept, bool reverse, bool time_major, bool half) {
  Shapes shapes;
  Expected e;
  if (auto error = check_common(shapes, e, x, input, recurrent, c0, h0, mask, lengths, reset, time_major); error.failure())
    return error;
  shapes.expect("bias", bias.dimensions(), e.bias());
  shapes.expect("recurrent bias", recurrent_bias.dimensions(), e.recurrent_bias());
  shapes.expect("outputs", y->dimensions(), e.over_time({e.H}));
  shapes.expect("final c", c->dimensions(), e.cell());
  shapes.expect("final h", h->dimensions(), e.state());
  shapes.expect("gates", gates->dimensions(), e.over_time({e.G, e.H}), true);
  const bool save = gates->dimensions().size() == 4, keeps = save && e.G > 1;
  shapes.expect("kept", kept->dimensions(), keeps ? e.over_time({e.H}) : Expected::Shape{0});
  if (!shapes.fine()) return shapes.error();
  const Forward f{
      .size = e.sizes(),
      .reverse = reverse,
      .x = x.typed_data(),
      .input = input.typed_data(),
      .recurrent = recurrent.typed_data(),
      .bias = some(bias),
      .recurrent_bias = some(recurrent_bias),
      .projected = e.projected,
      .table = x.typed_data(),
      .c0 = some(c0),
      .h0 = h0.typed_data(),
      .mask = some(mask),
      .mask_per_gate = per_gate(mask),
      .lengths = lengths.typed_data(),
      .reset = some(reset),
      .y = y->typed_data(),
      .c = some(c),
      .h = h->typed_data(),
      .gates = some(gates),
      .kept = some(kept),
  };
  by_cell(e.G, half, [&](auto cell, auto number) { forward<decltype(cell), decltype(number)>(pool, pool.num_threads(), f); });
  return ffi::Error::Success();
}

// What calls with words have in common; `expected` is filled in unless something is wrong. The inputs' part of the gates' arguments
// is looked up in a table [count,G,H].
ffi::Error check_words(Shapes& shapes, Expected& expected, const Ints& words, const Floats& table, const Floats& recurrent_bias,
                       const Floats& c0, const Floats& h0, const Ints& lengths, Result& y, Result& c, Result& h) {
  shapes.rank("words", words.dimensions(), 2);
  shapes.rank("table", table.dimensions(), 3);
  if (!shapes.fine()) return shapes.error();
  const Dims d = words.dimensions(), t = table.dimensions();
  const Expected& e = expected = {d[0], d[1], 0, t[1], t[2], false, t[1] == 4, t[1] == 3, true};
  if (e.G != 4 && e.G != 3 && e.G != 1)
    return ffi::Error::InvalidArgument("flax_lstm: no cell has " + std::to_string(e.G) + " gates");
  if (t[0] == 0) return ffi::Error::InvalidArgument("flax_lstm: the table has no words");
  shapes.expect("recurrent bias", recurrent_bias.dimensions(), e.recurrent_bias());
  shapes.expect("state c", c0.dimensions(), e.cell());
  shapes.expect("state h", h0.dimensions(), e.state());
  shapes.expect("lengths", lengths.dimensions(), {e.B});
  shapes.expect("outputs", y->dimensions(), e.over_time({e.H}));
  shapes.expect("final c", c->dimensions(), e.cell());
  shapes.expect("final h", h->dimensions(), e.state());
  return shapes.fine() ? ffi::Error::Success() : shapes.error();
}

// Outputs alone, of words.
ffi::Error run_words(ffi::ThreadPool pool, Ints words, Floats table, Floats recurrent, Floats recurrent_bias, Floats c0,
                     Floats h0, Ints lengths, Result y, Result c, Result h, bool reverse, bool half) {
  Shapes shapes;
  Expected e;
  if (auto error = check_words(shapes, e, words, table, recurrent_bias, c0, h0, lengths, y, c, h); error.failure()) return error;
  shapes.expect("recurrent weights", recurrent.dimensions(), {e.H, e.G, e.H});
  if (!shapes.fine()) return shapes.error();
  const Forward f{
      .size = e.sizes(),
      .reverse = reverse,
      .recurrent = recurrent.typed_data(),
      .recurrent_bias = some(recurrent_bias),
      .projected = true,
      .table = table.typed_data(),
      .words = words.typed_data(),
      .count = table.dimensions()[0],
      .c0 = some(c0),
      .h0 = h0.typed_data(),
      .lengths = lengths.typed_data(),
      .y = y->typed_data(),
      .c = some(c),
      .h = h->typed_data(),
  };
  by_cell(e.G, half, [&](auto cell, auto number) { outputs<decltype(cell), decltype(number)>(pool, pool.num_threads(), f); });
  return ffi::Error::Success();
}

// The same with recurrent weights of 8 bits.
ffi::Error run_bytes(ffi::ThreadPool pool, Ints words, Floats table, ffi::Buffer<ffi::S8> panels, Floats scales,
                     Floats recurrent_bias, Floats c0, Floats h0, Ints lengths, Result y, Result c, Result h, bool reverse) {
  Shapes shapes;
  Expected e;
  if (auto error = check_words(shapes, e, words, table, recurrent_bias, c0, h0, lengths, y, c, h); error.failure()) return error;
  const int64_t blocks = (e.H + COLUMNS - 1) / COLUMNS, depth = (e.H + DEPTH - 1) / DEPTH * DEPTH;
  shapes.expect("panels", panels.dimensions(), {blocks, e.G, depth / FOUR, COLUMNS, FOUR});
  shapes.expect("scales", scales.dimensions(), {e.G, e.H});
  if (!shapes.fine()) return shapes.error();
  const Bytes f{
      .size = e.sizes(),
      .reverse = reverse,
      .words = words.typed_data(),
      .table = table.typed_data(),
      .count = table.dimensions()[0],
      .depth = depth,
      .panels = panels.typed_data(),
      .scales = scales.typed_data(),
      .recurrent_bias = some(recurrent_bias),
      .c0 = some(c0),
      .h0 = h0.typed_data(),
      .lengths = lengths.typed_data(),
      .y = y->typed_data(),
      .c = some(c),
      .h = h->typed_data(),
  };
  by_cell(e.G, false, [&](auto cell, auto) { forward_bytes<decltype(cell)>(pool, pool.num_threads(), f); });
  return ffi::Error::Success();
}

ffi::Error run_backward(ffi::ThreadPool pool, Floats x, Floats input, Floats recurrent, Floats c0, Floats h0,
                        Floats mask, Ints lengths, Marks reset, Floats y, Floats gates, Floats kept, Floats dy, Floats dc,
                        Floats dh, Floats dkept, Result dx, Result dinput, Result drecurrent, Result dbias,
                        Result drecurrent_bias, Result dc0, Result dh0, Result dmask, bool reverse, bool time_major,
                        bool half) {
  Shapes shapes;
  Expected e;
  if (auto error = check_common(shapes, e, x, input, recurrent, c0, h0, mask, lengths, reset, time_major); error.failure())
    return error;
  const auto over_time = e.over_time({e.H});
  shapes.expect("outputs", y.dimensions(), over_time);
  shapes.expect("gates", gates.dimensions(), e.over_time({e.G, e.H}));
  shapes.expect("kept", kept.dimensions(), e.G > 1 ? over_time : Expected::Shape{0});
  shapes.expect("gradient of outputs", dy.dimensions(), over_time, true);
  shapes.expect("gradient of final c", dc.dimensions(), e.cell());
  shapes.expect("gradient of final h", dh.dimensions(), e.state());
  shapes.expect("gradient of every c", dkept.dimensions(), over_time, true);
  shapes.expect("gradient of x", dx->dimensions(), e.x());
  shapes.expect("gradient of input weights", dinput->dimensions(), e.input());
  shapes.expect("gradient of recurrent weights", drecurrent->dimensions(), {e.H, e.G, e.H});
  shapes.expect("gradient of bias", dbias->dimensions(), e.bias());
  shapes.expect("gradient of recurrent bias", drecurrent_bias->dimensions(), e.recurrent_bias());
  shapes.expect("gradient of state c", dc0->dimensions(), e.cell());
  shapes.expect("gradient of state h", dh0->dimensions(), e.state());
  const Dims m = mask.dimensions();
  shapes.expect("gradient of mask", dmask->dimensions(), Expected::Shape(m.begin(), m.end()));
  if (!shapes.fine()) return shapes.error();
  const Backward b{
      .size = e.sizes(),
      .reverse = reverse,
      .projected = e.projected,
      .x = x.typed_data(),
      .input = input.typed_data(),
      .recurrent = recurrent.typed_data(),
      .c0 = some(c0),
      .h0 = h0.typed_data(),
      .mask = some(mask),
      .mask_per_gate = per_gate(mask),
      .lengths = lengths.typed_data(),
      .reset = some(reset),
      .y = y.typed_data(),
      .gates = gates.typed_data(),
      .kept = some(kept),
      .dy = some(dy),
      .dc = some(dc),
      .dh = dh.typed_data(),
      .dkept = some(dkept),
      .dx = dx->typed_data(),
      .dinput = some(dinput),
      .drecurrent = drecurrent->typed_data(),
      .dbias = some(dbias),
      .drecurrent_bias = some(drecurrent_bias),
      .dc0 = some(dc0),
      .dh0 = dh0->typed_data(),
      .dmask = some(dmask),
  };
  by_cell(e.G, half, [&](auto cell, auto number) { backward<decltype(cell), decltype(number)>(pool, pool.num_threads(), b); });
  return ffi::Error::Success();
}

ffi::Error run_add_up(ffi::ThreadPool pool, Ints ids, Floats values, ffi::Result<Ints> found, Result sums, int64_t rows) {
  Shapes shapes;
  shapes.rank("ids", ids.dimensions(), 1);
  shapes.rank("values", values.dimensions(), 2);
  if (!shapes.fine()) return shapes.error();
  const int64_t N = ids.dimensions()[0], F = values.dimensions()[1];
  if (rows < 0 || rows > INT32_MAX - 1)
    return ffi::Error::InvalidArgument("flax_lstm: no table has " + std::to_string(rows) + " rows");
  shapes.expect("values", values.dimensions(), {N, F});
  shapes.expect("rows found", found->dimensions(), {N});
  shapes.expect("sums", sums->dimensions(), {N, F});
  if (!shapes.fine()) return shapes.error();
  add_up(pool, pool.num_threads(), ids.typed_data(), values.typed_data(), N, rows, F, found->typed_data(), sums->typed_data());
  return ffi::Error::Success();
}

ffi::Error run_take(ffi::ThreadPool pool, Floats table, Ints ids, Result rows) {
  Shapes shapes;
  shapes.rank("table", table.dimensions(), 2);
  shapes.rank("ids", ids.dimensions(), 2);
  if (!shapes.fine()) return shapes.error();
  const int64_t V = table.dimensions()[0], F = table.dimensions()[1];
  if (V == 0) return ffi::Error::InvalidArgument("flax_lstm: the table has no rows");
  shapes.expect("rows", rows->dimensions(), {ids.dimensions()[0], ids.dimensions()[1], F});
  if (!shapes.fine()) return shapes.error();
  take(pool, pool.num_threads(), table.typed_data(), ids.typed_data(), ids.element_count(), V, F, rows->typed_data());
  return ffi::Error::Success();
}

// `found` must be in increasing order, which is not checked: whatever it is, nothing beyond an array is touched.
ffi::Error run_update_table(ffi::ThreadPool pool, Floats table, Floats first, Floats second, Ints found, Floats sums,
                            Floats settings, Result table_out, Result first_out, Result second_out) {
  Shapes shapes;
  shapes.rank("table", table.dimensions(), 2);
  shapes.rank("rows found", found.dimensions(), 1);
  if (!shapes.fine()) return shapes.error();
  const int64_t V = table.dimensions()[0], F = table.dimensions()[1], N = found.dimensions()[0];
  const Expected::Shape whole{V, F};
  shapes.expect("first moment", first.dimensions(), whole);
  shapes.expect("second moment", second.dimensions(), whole);
  shapes.expect("sums", sums.dimensions(), {N, F});
  shapes.expect("settings", settings.dimensions(), {sizeof(Adam) / sizeof(float)});
  for (Result* out : {&table_out, &first_out, &second_out}) shapes.expect("results", (*out)->dimensions(), whole);
  if (!shapes.fine()) return shapes.error();
  Adam adam;
  std::memcpy(&adam, settings.typed_data(), sizeof adam);
  const auto in_place = [](const Floats& from, Result& to) {  // XLA gives the same memory, where it can
    if (from.typed_data() != to->typed_data()) std::copy_n(from.typed_data(), from.element_count(), to->typed_data());
    return to->typed_data();
  };
  update_table(pool, pool.num_threads(), adam, found.typed_data(), sums.typed_data(), N, V, F, in_place(table, table_out),
               in_place(first, first_out), in_place(second, second_out));
  return ffi::Error::Success();
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
                                  .Arg<Marks>()   // resets
                                  .Ret<Floats>()  // y
                                  .Ret<Floats>()  // c
                                  .Ret<Floats>()  // h
                                  .Ret<Floats>()  // gates
                                  .Ret<Floats>()  // kept
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("time_major")
                                  .Attr<bool>("half"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(flax_lstm_words, run_words,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()    // words
                                  .Arg<Floats>()  // table
                                  .Arg<Floats>()  // recurrent weights
                                  .Arg<Floats>()  // recurrent bias
                                  .Arg<Floats>()  // c0
                                  .Arg<Floats>()  // h0
                                  .Arg<Ints>()    // lengths
                                  .Ret<Floats>()  // y
                                  .Ret<Floats>()  // c
                                  .Ret<Floats>()  // h
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("half"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(flax_lstm_bytes, run_bytes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()                  // words
                                  .Arg<Floats>()                // table
                                  .Arg<ffi::Buffer<ffi::S8>>()  // recurrent weights
                                  .Arg<Floats>()                // scales
                                  .Arg<Floats>()                // recurrent bias
                                  .Arg<Floats>()                // c0
                                  .Arg<Floats>()                // h0
                                  .Arg<Ints>()                  // lengths
                                  .Ret<Floats>()                // y
                                  .Ret<Floats>()                // c
                                  .Ret<Floats>()                // h
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
                                  .Arg<Marks>()   // resets
                                  .Arg<Floats>()  // y
                                  .Arg<Floats>()  // gates
                                  .Arg<Floats>()  // kept
                                  .Arg<Floats>()  // dy
                                  .Arg<Floats>()  // dc
                                  .Arg<Floats>()  // dh
                                  .Arg<Floats>()  // dkept
                                  .Ret<Floats>()  // dx
                                  .Ret<Floats>()  // dinput
                                  .Ret<Floats>()  // drecurrent
                                  .Ret<Floats>()  // dbias
                                  .Ret<Floats>()  // drecurrent bias
                                  .Ret<Floats>()  // dc0
                                  .Ret<Floats>()  // dh0
                                  .Ret<Floats>()  // dmask
                                  .Attr<bool>("reverse")
                                  .Attr<bool>("time_major")
                                  .Attr<bool>("half"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(flax_lstm_add_up, run_add_up,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Ints>()         // ids
                                  .Arg<Floats>()       // values
                                  .Ret<Ints>()         // rows found
                                  .Ret<Floats>()       // sums
                                  .Attr<int64_t>("rows"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(flax_lstm_take, run_take,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()   // table
                                  .Arg<Ints>()     // ids
                                  .Ret<Floats>()); // rows

XLA_FFI_DEFINE_HANDLER_SYMBOL(flax_lstm_update_table, run_update_table,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()  // table
                                  .Arg<Floats>()  // first moment
                                  .Arg<Floats>()  // second moment
                                  .Arg<Ints>()    // rows found
                                  .Arg<Floats>()  // sums
                                  .Arg<Floats>()  // settings
                                  .Ret<Floats>()  // table
                                  .Ret<Floats>()  // first moment
                                  .Ret<Floats>()); // second moment
