// SPDX-License-Identifier: Apache-2.0
// LSTM, GRU and simple RNN over whole sequences on a CPU: forward, and backpropagation through time.
//
// Sizes: B rows of a batch, T time steps, D input features, G gates, H units (J: units of the previous step).
// x[B,T,D], input weights[D,G,H], recurrent weights[J,G,H], bias[G,H], y[B,T,H]; gates in the order of cells.py.
//
// How it is made fast:
// - A task owns some rows of the batch for the whole sequence, so that tasks never wait for each other within it. Rows are
//   dealt out by length, longest first: at every step the rows that have not ended are the first few of a task, and
//   padding costs nothing. A row read backwards just begins at its own last step.
// - Everything is a product with a panel: COLS columns of a matrix, stored together. A tile of rows x COLS stays in
//   registers while the depth is summed. The panel of a step's gates begins as the input projection of some steps at once
//   (a chunk: enough rows for a product that runs at full speed), gets the recurrent product added, and is activated while
//   it is in the nearest cache.
// - Backwards, a chunk's gate gradients stay in cache until their products with the inputs and the previous outputs are
//   added to the weights' gradients. No gradient of a gate is ever written to memory.
// - A column of ones behind the inputs makes the bias one more row of the input weights, its gradient included. (In bfloat16 there
//   are two: what the bias lost in rounding is the second row.)
//
// A step that begins from zeros (see rows.py: `reset` marks the steps that are the first of a sequence) finds the state before it
// zeroed, forwards, and cuts the gradient that would go on to it, backwards: one byte is read a row and step, nothing else changes.
// Arrays over time may have time or the batch as their first axis: `place` is the number of a row's step in either.
//
// What products multiply is float32, or bfloat16 (`Single`, `Half`): rounded where it enters a product, and nowhere else. What is
// added up, and all between products, is float32.
//
// The vectors are those of the compiler (GCC, Clang); LANES floats each, TILE rows in a tile, both set by the build.

#pragma once

#include <algorithm>
#include <atomic>
#include <bit>
#include <condition_variable>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <numeric>
#include <type_traits>
#include <vector>

#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace flax_lstm {

constexpr long COLS = 2 * LANES;     // columns of a panel
constexpr long CHUNK_ROWS = 96;      // rows of a product over several steps: enough to run at full speed
constexpr long ALIGNMENT = 64;       // bytes: a cache line
constexpr long LINE = ALIGNMENT / sizeof(float);

using Vec = float __attribute__((vector_size(4 * LANES)));
using HalfVec = float __attribute__((vector_size(2 * LANES)));
struct NoVec {};

// Before a loop over sums: they shall be registers, and unless told the compiler has them in memory before and after the product.
#define FLAX_LSTM_UNROLL _Pragma("GCC unroll 16")

template <class V = Vec>
V load(const float* p) {
  V v{};
  if constexpr (!std::is_empty_v<V>) std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
void store(float* p, V v) {
  if constexpr (!std::is_empty_v<V>) std::memcpy(p, &v, sizeof v);
}

// The first n alone; what is not loaded is zero. Numbers one by one would wait for each other between memory and vector.
#if defined __AVX512F__
inline Vec load(const float* p, long n) { return n >= LANES ? load(p) : (Vec)_mm512_maskz_loadu_ps((1u << n) - 1, p); }
inline void store(float* p, Vec v, long n) {
  n >= LANES ? store(p, v) : _mm512_mask_storeu_ps(p, (1u << n) - 1, (__m512)v);
}
#elif defined __AVX2__
inline __m256i first(long n) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
inline Vec load(const float* p, long n) { return n >= LANES ? load(p) : (Vec)_mm256_maskload_ps(p, first(n)); }
inline void store(float* p, Vec v, long n) { n >= LANES ? store(p, v) : _mm256_maskstore_ps(p, first(n), (__m256)v); }
#else
inline Vec load(const float* p, long n) {
  if (n >= LANES) return load(p);
  float part[LANES] = {};
  for (long i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
inline void store(float* p, Vec v, long n) {
  if (n >= LANES) return store(p, v);
  float part[LANES];
  store(part, v);
  for (long i = 0; i < n; ++i) p[i] = part[i];
}
#endif

// tanh by a quotient of polynomials; the coefficients are those of Eigen's generic_fast_tanh_float, which XLA uses too.
inline Vec tanh(Vec x) {
  const Vec most = Vec{} + 7.99881172180175781f;
  x = x > most ? most : x;  // NaN stays NaN: both comparisons are false
  x = x < -most ? -most : x;
  const Vec s = x * x;
  Vec p = s * -2.76076847742355e-16f + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  Vec q = s * 1.19825839466702e-06f + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x * p / q;
}
inline Vec sigmoid(Vec x) { return 0.5f + 0.5f * tanh(0.5f * x); }

// ---------------------------------------------------------------------------------------------- what products multiply
// `PAIR` elements of the depth lie side by side and are multiplied by one instruction: a panel is [depth / PAIR][COLS][PAIR].
struct Single {
  using Element = float;
  using One = float;  // of a row, PAIR elements
  static constexpr long PAIR = 1;
  static Element of(float v) { return v; }
  static float value(Element v) { return v; }
  static One one(const Element* p) { return *p; }
  template <class V>
  static void multiply_add(V& sum, One a, V b) {  // b: of a panel
    if constexpr (!std::is_empty_v<V>) sum += a * b;
  }
  static void store(Element* p, Vec v, long n) { flax_lstm::store(p, v, n); }
};

// Two bfloat16 numbers, the upper halves of float32 ones, each the nearest.
struct Half {
  using Element = uint16_t;
  using One = uint32_t;
  using Many = uint32_t __attribute__((vector_size(sizeof(Vec))));
  using HalfMany = uint32_t __attribute__((vector_size(sizeof(HalfVec))));
  using Narrow = uint16_t __attribute__((vector_size(2 * LANES)));
  static constexpr long PAIR = 2;
  static Element of(float v) {
    const auto bits = std::bit_cast<uint32_t>(v);
    return v != v ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  static float value(Element v) { return std::bit_cast<float>(uint32_t{v} << 16); }
  static One one(const Element* p) {
    One pair;
    std::memcpy(&pair, p, sizeof pair);
    return pair;
  }
  template <class V>
  static void multiply_add(V& sum, One a, V b) {  // b: the bits of pairs
    if constexpr (std::is_empty_v<V>) return;
#ifdef __AVX512BF16__
    else if constexpr (sizeof b == 64) sum = (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(a), (__m512bh)b);
    else sum = (V)_mm256_dpbf16_ps((__m256)sum, (__m256bh)_mm256_set1_epi32(a), (__m256bh)b);
#else
    else {
      using Bits = std::conditional_t<sizeof b == sizeof(Vec), Many, HalfMany>;
      sum += std::bit_cast<float>(a & 0xffff0000) * (V)((Bits)b & 0xffff0000);
      sum += std::bit_cast<float>(a << 16) * (V)((Bits)b << 16);
    }
#endif
  }
  static Many round(Vec v) {  // in the lower halves
    const Many bits = (Many)v, nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return v == v ? nearest : Many{} + 0x7fc0;
  }
  static void store(Element* p, Vec v, long n) {
    const Narrow all = __builtin_convertvector(round(v), Narrow);
    std::memcpy(p, &all, std::min<long>(n, LANES) * sizeof *p);
  }
};

template <class Number>
constexpr long even(long n) {  // whole pairs
  return (n + Number::PAIR - 1) / Number::PAIR * Number::PAIR;
}
template <class Number>
constexpr long slot(long k, long i, long columns) {  // of an element in a panel
  return (k / Number::PAIR * columns + i) * Number::PAIR + k % Number::PAIR;
}

// Rows [rows][columns] of floats as a panel, for a product whose depth they are; a row of zeros makes an odd number even. Both
// may be the same memory: what is written lies before what is still to be read. Gives the panel.
template <class Number>
typename Number::Element* interleave(float* from, long rows, long columns, float* to) {
  using Element = typename Number::Element;
  if constexpr (Number::PAIR == 1) {
    return from;
  } else {
    for (long k = 0; k < rows; k += 2)
      for (long i = 0; i < columns; i += LANES) {
        const long left = columns - i;
        const Vec first = load(from + k * columns + i, left);
        const Vec second = k + 1 < rows ? load(from + (k + 1) * columns + i, left) : Vec{};
        const auto pairs = Number::round(first) | Number::round(second) << 16;
        std::memcpy(to + k / 2 * columns + i, &pairs, std::min<long>(left, LANES) * sizeof(float));
      }
    return reinterpret_cast<Element*>(to);
  }
}

// ---------------------------------------------------------------------------------------------------- the three cells
// forward: gates hold their arguments and become their values; q is the recurrent part of the GRU's candidate; carry is
// what goes from step to step (c of the LSTM, h of the others); kept is saved beside the gates.
// backward: d is the gradient of what follows, from h and (LSTM) from c; gates become the gradients of their arguments,
// and dq that of q; the result is the gradient of the previous h but for its way through the recurrent weights.

struct Lstm {
  static constexpr long GATES = 4;
  static constexpr bool HAS_CELL = true, HAS_Q = false;
  static Vec forward(Vec* gates, Vec, Vec& carry, Vec& kept) {
    const Vec i = sigmoid(gates[0]), f = sigmoid(gates[1]), g = tanh(gates[2]), o = sigmoid(gates[3]);
    gates[0] = i, gates[1] = f, gates[2] = g, gates[3] = o;
    kept = carry = f * carry + i * g;
    return o * tanh(carry);
  }
  static Vec backward(Vec* gates, Vec kept, Vec before, Vec, Vec dh, Vec& dc, Vec&) {
    const Vec i = gates[0], f = gates[1], g = gates[2], o = gates[3], tanh_c = tanh(kept);
    dc += dh * o * (1.0f - tanh_c * tanh_c);
    gates[0] = dc * g * i * (1.0f - i);
    gates[1] = dc * before * f * (1.0f - f);
    gates[2] = dc * i * (1.0f - g * g);
    gates[3] = dh * tanh_c * o * (1.0f - o);
    dc *= f;
    return Vec{};
  }
};

struct Gru {
  static constexpr long GATES = 3;
  static constexpr bool HAS_CELL = false, HAS_Q = true;
  static Vec forward(Vec* gates, Vec q, Vec& carry, Vec& kept) {
    const Vec r = sigmoid(gates[0]), z = sigmoid(gates[1]), n = tanh(gates[2] + r * q);
    gates[0] = r, gates[1] = z, gates[2] = n;
    kept = q;
    return carry = n + z * (carry - n);
  }
  static Vec backward(Vec* gates, Vec q, Vec, Vec h, Vec dh, Vec&, Vec& dq) {
    const Vec r = gates[0], z = gates[1], n = gates[2];
    const Vec da = dh * (1.0f - z) * (1.0f - n * n);
    gates[0] = da * q * r * (1.0f - r);
    gates[1] = dh * (h - n) * z * (1.0f - z);
    gates[2] = da;
    dq = da * r;
    return dh * z;
  }
};

struct Rnn {
  static constexpr long GATES = 1;
  static constexpr bool HAS_CELL = false, HAS_Q = false;
  static Vec forward(Vec* gates, Vec, Vec& carry, Vec&) { return carry = gates[0] = tanh(gates[0]); }
  static Vec backward(Vec* gates, Vec, Vec, Vec, Vec dh, Vec&, Vec&) {
    gates[0] = dh * (1.0f - gates[0] * gates[0]);
    return Vec{};
  }
};

// --------------------------------------------------------------------------------------------------------- products
// Of a panel's columns those in use are a Vec and, of a narrower last panel, less than another: what is called Last is what they need.
template <class Run>
void by_last(long width, const Run& run) {
  if (width <= LANES) return run(NoVec{});
  if (width <= LANES + LANES / 2) return run(HalfVec{});
  run(Vec{});
}

template <class Number, class V>
V many(const typename Number::Element* p) {
  return load<V>(reinterpret_cast<const float*>(p));
}

// c[ROWS][COLS] = (add ? c : 0) + a b, with b a panel [depth][COLS]; a[row][depth], or a panel [depth][row] if TRANSPOSED. The
// depth is one of whole pairs.
template <class Number, int ROWS, class Last, bool TRANSPOSED>
void tile(const typename Number::Element* a, long lda, const typename Number::Element* b, long depth, bool add, float* c) {
  constexpr long PAIR = Number::PAIR;
  Vec sum[ROWS];
  Last last[ROWS];
  FLAX_LSTM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    sum[r] = add ? load(c + r * COLS) : Vec{};
    last[r] = add ? load<Last>(c + r * COLS + LANES) : Last{};
  }
  if (TRANSPOSED)  // gradients of weights, which may be far away: those of the next tile
    for (int r = ROWS; r < 2 * ROWS; ++r)
      for (int i = 0; i < COLS; i += LANES) __builtin_prefetch(c + r * COLS + i, 1);
  for (long k = 0; k < depth; k += PAIR) {
    const Vec w = many<Number, Vec>(b + k * COLS);
    const Last w_last = many<Number, Last>(b + k * COLS + LANES * PAIR);
    FLAX_LSTM_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      const auto s = Number::one(TRANSPOSED ? a + k * lda + r * PAIR : a + r * lda + k);
      Number::multiply_add(sum[r], s, w);
      Number::multiply_add(last[r], s, w_last);
    }
  }
  FLAX_LSTM_UNROLL
  for (int r = 0; r < ROWS; ++r) {
    store(c + r * COLS, sum[r]);
    store(c + r * COLS + LANES, last[r]);
  }
}

template <class Number, class Last, bool TRANSPOSED, int ROWS = TILE>
void tile_of(long rows, const typename Number::Element* a, long lda, const typename Number::Element* b, long depth, bool add,
             float* c) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return tile_of<Number, Last, TRANSPOSED, ROWS - 1>(rows, a, lda, b, depth, add, c);
  tile<Number, ROWS, Last, TRANSPOSED>(a, lda, b, depth, add, c);
}

// The same for any number of rows, in tiles of nearly equal size. `width` columns of the panel are in use.
template <class Number, bool TRANSPOSED>
void product(long rows, long width, const typename Number::Element* a, long lda, const typename Number::Element* b, long depth,
             bool add, float* c) {
  const long tiles = (rows + TILE - 1) / TILE;
  by_last(width, [&](auto last) {
    for (long i = 0; i < tiles; ++i) {
      const long begin = rows * i / tiles, n = rows * (i + 1) / tiles - begin;
      const auto* from = a + (TRANSPOSED ? begin * Number::PAIR : begin * lda);
      tile_of<Number, decltype(last), TRANSPOSED>(n, from, lda, b, depth, add, c + begin * COLS);
    }
  });
}

// The same for one row and several panels, `panel` elements apart, with results `next` floats apart. The sums of a single panel are
// too few: each addition would wait for the one before.
template <class Number, int PANELS>
void row_product(const typename Number::Element* a, const typename Number::Element* b, long panel, long depth, bool add, float* c,
                 long next) {
  Vec sum[PANELS][2];
  FLAX_LSTM_UNROLL
  for (int p = 0; p < PANELS; ++p)
    FLAX_LSTM_UNROLL
    for (int v = 0; v < 2; ++v) sum[p][v] = add ? load(c + p * next + v * LANES) : Vec{};
  for (long k = 0; k < depth; k += Number::PAIR) {
    const auto s = Number::one(a + k);
    FLAX_LSTM_UNROLL
    for (int p = 0; p < PANELS; ++p)
      FLAX_LSTM_UNROLL
      for (int v = 0; v < 2; ++v)
        Number::multiply_add(sum[p][v], s, many<Number, Vec>(b + p * panel + k * COLS + v * LANES * Number::PAIR));
  }
  FLAX_LSTM_UNROLL
  for (int p = 0; p < PANELS; ++p)
    FLAX_LSTM_UNROLL
    for (int v = 0; v < 2; ++v) store(c + p * next + v * LANES, sum[p][v]);
}

// The gradients of some gates' arguments as they are made: panels [columns / COLS][gate][row][COLS].
template <class Number>
struct Gates {
  long count;
  const typename Number::Element* gate[4];  // their first panels
  long next, columns;                       // from a gate's panel to its next one
};

// c[ROWS][COLS] = a b for BLOCKS results, `to` floats apart, of panels b [count][columns][COLS], `panel` elements apart; `row` is the
// first of a. One row alone takes several panels together: the sums of one are too few, each addition would wait for the one before.
template <class Number, int ROWS, class Last, int BLOCKS>
void gates_tile(const Gates<Number>& a, long row, const typename Number::Element* b, long panel, float* c, long to) {
  constexpr long PAIR = Number::PAIR;
  Vec sum[BLOCKS][ROWS] = {};
  Last last[BLOCKS][ROWS] = {};
  for (long g = 0; g < a.count; ++g)
    for (long begin = 0; begin < a.columns; begin += COLS) {
      const auto* from = a.gate[g] + begin / COLS * a.next + row * COLS;
      for (long k = 0, end = std::min(COLS, a.columns - begin); k < end; k += PAIR, b += PAIR * COLS)
        FLAX_LSTM_UNROLL
        for (int block = 0; block < BLOCKS; ++block) {
          const Vec w = many<Number, Vec>(b + block * panel);
          const Last w_last = many<Number, Last>(b + block * panel + LANES * PAIR);
          FLAX_LSTM_UNROLL
          for (int r = 0; r < ROWS; ++r) {
            const auto s = Number::one(from + r * COLS + k);
            Number::multiply_add(sum[block][r], s, w);
            Number::multiply_add(last[block][r], s, w_last);
          }
        }
    }
  FLAX_LSTM_UNROLL
  for (int block = 0; block < BLOCKS; ++block)
    FLAX_LSTM_UNROLL
    for (int r = 0; r < ROWS; ++r) {
      store(c + block * to + r * COLS, sum[block][r]);
      store(c + block * to + r * COLS + LANES, last[block][r]);
    }
}

template <class Number, class Last, int ROWS = TILE>
void gates_tile_of(long rows, const Gates<Number>& a, long row, const typename Number::Element* b, float* c) {
  if constexpr (ROWS > 1)
    if (rows < ROWS) return gates_tile_of<Number, Last, ROWS - 1>(rows, a, row, b, c);
  gates_tile<Number, ROWS, Last, 1>(a, row, b, 0, c, 0);
}

// The same for any number of rows, from the first on, and one panel, of which `width` columns are in use.
template <class Number>
void gates_product(long rows, long width, const Gates<Number>& a, long first, const typename Number::Element* b, float* c) {
  const long tiles = (rows + TILE - 1) / TILE;
  by_last(width, [&](auto last) {
    for (long i = 0; i < tiles; ++i) {
      const long begin = rows * i / tiles, n = rows * (i + 1) / tiles - begin;
      gates_tile_of<Number, decltype(last)>(n, a, first + begin, b, c + begin * COLS);
    }
  });
}

// ----------------------------------------------------------------------------------------------------------- memory
// The arrays of one task, in one piece of memory: `want` says for each how large it is, then `get` says where it is.
class Memory {
 public:
  template <class T>
  void want(T*& array, long floats) {
    places_.push_back([&array, at = total_](float* begin) { array = reinterpret_cast<T*>(begin + at); });
    total_ += (floats + 15) / 16 * 16;
  }
  void get() {
    data_.reset(static_cast<float*>(std::aligned_alloc(ALIGNMENT, total_ * sizeof(float))));
    for (const auto& place : places_) place(data_.get());
    places_.clear();
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::vector<std::function<void(float*)>> places_;
  std::unique_ptr<float, Free> data_;
  long total_ = 0;
};

struct Sizes {
  long batch, time, inputs, units;
  bool time_major = false;  // [T,B,...] in place of [B,T,...]
  long place(long b, long t) const { return time_major ? t * batch + b : b * time + t; }
  long step() const { return time_major ? batch : 1; }  // from the place of a step to that of the next
  long blocks() const { return (units + COLS - 1) / COLS; }  // panels over the units
  long input_blocks() const { return (inputs + COLS - 1) / COLS; }
  long width(long block) const { return std::min(COLS, units - block * COLS); }
};

// Rows [depth][G][H] as panels [block][gate][depth_all][COLS], zeros beyond H: the panel p. `at` is where the rows begin. The last
// row of an odd depth is followed by one of zeros.
template <class Number>
void pack(const float* rows, long p, long depth, long gates, const Sizes& z, long at, long depth_all,
          typename Number::Element* out) {
  auto* panel = out + p * even<Number>(depth_all) * COLS;
  const float* from = rows + p % gates * z.units + p / gates * COLS;
  const long width = z.width(p / gates);
  for (long k = at; k < at + depth; ++k, from += gates * z.units) {
    for (long i = 0; i < width; ++i) panel[slot<Number>(k, i, COLS)] = Number::of(from[i]);
    for (long i = width; i < COLS; ++i) panel[slot<Number>(k, i, COLS)] = Number::of(0);
  }
  if (at + depth == depth_all && even<Number>(depth_all) > depth_all)
    for (long i = 0; i < COLS; ++i) panel[slot<Number>(depth_all, i, COLS)] = Number::of(0);
}

// A bias [G][H] as the last rows of panels that begin at row `at`: what is lost in rounding one is in the next.
template <class Number>
void pack_bias(std::vector<float> bias, long p, long gates, const Sizes& z, long at, typename Number::Element* out) {
  for (long k = 0; k < Number::PAIR; ++k) {
    pack<Number>(bias.data(), p, 1, gates, z, at + k, at + Number::PAIR, out);
    for (float& v : bias) v -= Number::value(Number::of(v));
  }
}

// The recurrent bias of the GRU's candidate, as one of all gates: the others have none.
inline std::vector<float> of_candidate(const float* bias, long gates, long hidden) {
  std::vector<float> all(gates * hidden);
  std::copy(bias, bias + hidden, all.end() - hidden);
  return all;
}

// Rows [count][G][H] transposed, as panels [block][G * even(H)][COLS], zeros beyond `count` and behind a gate of an odd size: the
// panel p.
template <class Number>
void pack_transposed(const float* rows, long p, long count, long gates, long hidden, typename Number::Element* out) {
  const long each = even<Number>(hidden), all = gates * each, width = std::min(COLS, count - p * COLS);
  rows += p * COLS * gates * hidden, out += p * all * COLS;
  if (width < COLS || each > hidden) std::fill(out, out + all * COLS, Number::of(0));
  for (long i = 0; i < width; ++i)
    for (long g = 0; g < gates; ++g, rows += hidden)
      for (long k = 0; k < hidden; ++k) out[g * each * COLS + slot<Number>(k, i, COLS)] = Number::of(rows[k]);
}

// Weights as panels, which all tasks read.
template <class Number>
struct Packed {
  Memory memory;
  typename Number::Element *input, *recurrent;
  Packed(long inputs, long recurrents) {
    memory.want(input, inputs);
    memory.want(recurrent, recurrents);
    memory.get();
  }
};

// The sum over tasks of a panel as `pack` makes them, back in rows [depth][G][H].
inline void unpack_sum(const std::vector<const float*>& parts, long p, long depth, long gates, const Sizes& z, long at,
                       long depth_all, float* rows) {
  const long offset = (p * depth_all + at) * COLS, unit = p / gates * COLS, width = z.width(p / gates);
  for (long k = 0; k < depth; ++k)
    for (long i = 0; i < width; i += LANES) {
      Vec sum{};
      for (const float* part : parts) sum += load(part + offset + k * COLS + i);
      store(rows + (k * gates + p % gates) * z.units + unit + i, sum, width - i);
    }
}

// ------------------------------------------------------------------------------------------------------------ tasks
struct Rows {  // of one task, longest first
  std::vector<long> row, length;
  long steps() const { return row.empty() ? 0 : length[0]; }
  long active(long step) const {  // rows with more steps than that
    return std::partition_point(length.begin(), length.end(), [&](long l) { return l > step; }) - length.begin();
  }
  long time(long r, long step, bool reverse) const { return reverse ? length[r] - 1 - step : step; }
};

// Whether step s of a row, in the order of reading, begins from zeros. Read backwards that is the one after which (in time) a
// sequence begins.
inline bool fresh(const bool* reset, const Rows& mine, const Sizes& z, long r, long s, bool reverse) {
  const long t = mine.time(r, s, reverse);
  return reverse ? s > 0 && reset[z.place(mine.row[r], t + 1)] : reset[z.place(mine.row[r], t)];
}

// Zeros in the first `width` entries of the rows that begin from zeros in a step. Within the loops that call it, it made them 6 %
// slower where there are no resets.
template <class Value>
__attribute__((noinline)) void clear_fresh(const bool* reset, const Rows& mine, const Sizes& z, long s, bool reverse,
                                           Value* values, long stride, long width) {
  for (long r = 0, n = mine.active(s); r < n; ++r)
    if (fresh(reset, mine, z, r, s, reverse)) std::fill(values + r * stride, values + r * stride + width, Value{});
}

// Zeros where rows are padded, in an array [B,T,width] or [T,B,width].
inline void clear_padding(float* out, const Rows& mine, const Sizes& z, long width) {
  for (size_t r = 0; r < mine.row.size(); ++r)
    for (long t = mine.length[r]; t < z.time; ++t) {
      float* to = out + z.place(mine.row[r], t) * width;
      std::fill(to, to + width, 0.0f);
    }
}

inline std::vector<Rows> deal(const int* lengths, const Sizes& z, long tasks) {
  std::vector<long> order(z.batch);
  std::iota(order.begin(), order.end(), 0);
  const auto length = [&](long b) { return std::clamp<long>(lengths[b], 0, z.time); };
  std::stable_sort(order.begin(), order.end(), [&](long a, long b) { return length(a) > length(b); });
  std::vector<Rows> dealt(std::max<long>(1, std::min(tasks, z.batch)));
  const long n = dealt.size();
  for (long i = 0; i < z.batch; ++i) {
    const long turn = i % (2 * n), to = turn < n ? turn : 2 * n - 1 - turn;  // there and back, so that work is even
    dealt[to].row.push_back(order[i]);
    dealt[to].length.push_back(length(order[i]));
  }
  return dealt;
}

// Runs task(0) ... task(count - 1), on this thread and on the pool's. Whoever is free takes the next, and this thread waits
// only for tasks that some thread has begun: so a pool that is busy, or has no threads at all, cannot block it.
template <class Pool, class Task>
void parallel(Pool& pool, long count, const Task& task) {
  struct Shared {
    std::atomic<long> next{0}, done{0};
    std::mutex mutex;
    std::condition_variable changed;
  };
  auto shared = std::make_shared<Shared>();
  const auto work = [shared, count, &task] {  // `task` is not touched once all of them are taken
    for (long i; (i = shared->next.fetch_add(1)) < count;) {
      task(i);
      if (shared->done.fetch_add(1) + 1 == count) {
        std::lock_guard<std::mutex> lock(shared->mutex);
        shared->changed.notify_all();
      }
    }
  };
  for (long i = 1; i < count; ++i) pool.Schedule(std::decay_t<decltype(work)>(work));
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->changed.wait(lock, [&] { return shared->done.load() == count; });
}

// one(n) for all n below `count`, which handle so many numbers altogether: by several threads where these are many.
template <class Pool, class One>
void share_out(Pool& pool, long threads, long count, long numbers, const One& one) {
  constexpr long ENOUGH = 1 << 15;  // numbers: copied in the time that another thread takes to begin
  const long parts = std::clamp<long>(numbers / ENOUGH, 1, threads);
  parallel(pool, parts, [&](long part) {
    for (long n = count * part / parts; n < count * (part + 1) / parts; ++n) one(n);
  });
}

struct Chunk {  // steps [begin, end) of a task, their active rows put together: row r of step s is at offset[s - begin] + r
  long begin, end, rows = 0;
  std::vector<long> offset;
};

// Steps from `begin` on (or, backwards, those that end there) with about CHUNK_ROWS active rows altogether.
inline Chunk chunk(const Rows& mine, long edge, bool backwards) {
  Chunk c{edge, edge};
  const auto fits = [&](long step) { return c.rows == 0 || c.rows + mine.active(step) <= CHUNK_ROWS; };
  if (backwards)
    while (c.begin > 0 && fits(c.begin - 1)) c.rows += mine.active(--c.begin);
  else
    while (c.end < mine.steps() && fits(c.end)) c.rows += mine.active(c.end++);
  long at = 0;
  for (long s = c.begin; s < c.end; at += mine.active(s++)) c.offset.push_back(at);
  return c;
}

inline long chunk_rows(const Rows& mine) { return std::max<long>(CHUNK_ROWS, mine.row.size()); }

// The inputs of a chunk's rows with a one (or a pair of them) behind them: [rows][D + PAIR], or the next even number. Those of the
// next chunk, so many steps later or (negative) before, are fetched meanwhile.
template <class Number>
void gather(const float* x, const Rows& mine, const Chunk& c, const Sizes& z, bool reverse, long next,
            typename Number::Element* out) {
  for (long s = c.begin; s < c.end; ++s)
    for (long r = 0, n = mine.active(s); r < n; ++r, out += even<Number>(z.inputs + Number::PAIR)) {
      const float* from = x + z.place(mine.row[r], mine.time(r, s, reverse)) * z.inputs;
      for (long i = 0; i < z.inputs; i += LINE) __builtin_prefetch(from + next * z.step() * z.inputs + i);
      std::transform(from, from + z.inputs, out, Number::of);
      std::fill(out + z.inputs, out + z.inputs + Number::PAIR, Number::of(1));
      std::fill(out + z.inputs + Number::PAIR, out + even<Number>(z.inputs + Number::PAIR), Number::of(0));
    }
}

// ---------------------------------------------------------------------------------------------------------- forward
struct Forward {
  Sizes size;
  bool reverse;
  const float *x, *input, *recurrent, *bias, *recurrent_bias;  // recurrent_bias: GRU only
  bool projected;        // there are no x, input weights and bias, but the inputs' part of the gates' arguments:
  const float* table;    // [count][G,H] for every word, or [B,T,G,H] where there are no words
  const int* words;      // [B,T] or null
  long count;
  const float *c0, *h0;                                        // c0: LSTM only
  const float* mask;     // [B,J], or [B,G,J] with one for each gate, or null
  bool mask_per_gate;
  const int* lengths;
  const bool* reset;     // [B,T] or null
  float *y, *c, *h;      // outputs and final state
  float *gates, *kept;   // [B,T,G,H] and [B,T,H] for the backward pass, or null
};

// Rows of the table for a chunk's words (or steps), as panels [block][gate][m][COLS].
template <class Cell>
void look_up(const Forward& f, const Rows& mine, const Chunk& c, long m, float* panels) {
  constexpr long G = Cell::GATES;
  const Sizes& z = f.size;
  long row = 0;
  for (long s = c.begin; s < c.end; ++s)
    for (long r = 0, n = mine.active(s); r < n; ++r, ++row) {
      const long place = z.place(mine.row[r], mine.time(r, s, f.reverse));
      const long word = f.words ? std::clamp<long>(f.words[place], 0, f.count - 1) : place;
      for (long g = 0; g < G; ++g)
        for (long unit = 0; unit < z.units; unit += LANES) {
          const long panel = unit / COLS * G + g;
          const Vec looked = load(f.table + (word * G + g) * z.units + unit, z.units - unit);
          store(panels + (panel * m + row) * COLS + unit % COLS, looked);
        }
    }
}

// h as it enters the product of each gate: under a mask of its own. Apart from the loop that makes h, which it would make slower.
template <class Number>
__attribute__((noinline)) void mask_gates(const float* mask, long masks, const Rows& mine, long rows, long H, const float* h,
                                          long stride, typename Number::Element* out, long ldh, long masked) {
  for (long r = 0; r < rows; ++r)
    for (long k = 0; k < masks; ++k)
      for (long unit = 0; unit < H; unit += LANES) {
        const Vec m = load(mask + (mine.row[r] * masks + k) * H + unit, H - unit);
        Number::store(out + k * masked + r * ldh + unit, load(h + r * stride + unit) * m, H - unit);
      }
}

template <class Cell, class Number>
void forward_task(const Forward& f, const Rows& mine, const Packed<Number>& weights) {
  constexpr long G = Cell::GATES;
  using Element = typename Number::Element;
  const Sizes& z = f.size;
  const long H = z.units, blocks = z.blocks(), rows = mine.row.size(), m = chunk_rows(mine), stride = blocks * COLS;
  const long inputs = z.inputs + Number::PAIR, hidden = H + Cell::HAS_Q * Number::PAIR;  // ones behind h: the GRU's own bias
  const long input_depth = even<Number>(inputs), depth = even<Number>(hidden), ldh = stride + 3;
  const long masks = f.mask_per_gate ? G : 1, masked = rows * ldh;  // h under each mask, and from one to the next
  const float* tied = masks > 1 ? nullptr : f.mask;
  const Element *input = weights.input, *recurrent = weights.recurrent;
  Element *x, *h_in, *h_next;
  float *panels, *carry, *h_last, *q;
  Memory memory;
  memory.want(panels, blocks * G * m * COLS);
  memory.want(x, m * input_depth);
  memory.want(h_in, masks * masked);
  memory.want(h_next, masks * masked);
  memory.want(carry, rows * stride);
  memory.want(h_last, rows * stride);
  memory.want(q, rows * COLS);
  memory.get();

  if (H % COLS) {  // of the last panels not all columns are written, but read
    std::fill(panels, panels + blocks * G * m * COLS, 0.0f);
    std::fill(q, q + rows * COLS, 0.0f);
  }
  std::fill(carry, carry + rows * stride, 0.0f);
  std::fill(h_last, h_last + rows * stride, 0.0f);
  for (long r = 0; r < rows; ++r) {
    const long b = mine.row[r];
    std::copy(f.h0 + b * H, f.h0 + (b + 1) * H, h_last + r * stride);
    const float* begin = Cell::HAS_CELL ? f.c0 : f.h0;
    std::copy(begin + b * H, begin + (b + 1) * H, carry + r * stride);
    for (long k = 0; k < masks; ++k) {
      const float* mask = f.mask ? f.mask + (b * masks + k) * H : nullptr;
      const long at = k * masked + r * ldh;
      for (long i = 0; i < H; ++i) h_in[at + i] = Number::of(f.h0[b * H + i] * (mask ? mask[i] : 1.0f));
      for (Element* h : {h_in + at + H, h_next + at + H}) {
        std::fill(h, h + Number::PAIR, Number::of(Cell::HAS_Q));
        h[Number::PAIR] = Number::of(0);
      }
    }
  }
  clear_padding(f.y, mine, z, H);

  std::vector<long> place(rows);  // of the rows' present step
  // From what a step writes to what the next one will. Each row and gate is a stream of its own, too many to be foreseen by the
  // processor: unless told, it waits for memory.
  const long ahead = (f.reverse ? -z.step() : z.step()) * H;
  for (long edge = 0; edge < mine.steps();) {
    const Chunk c = chunk(mine, edge, false);
    edge = c.end;
    if (f.projected) {
      look_up<Cell>(f, mine, c, m, panels);
    } else {
      gather<Number>(f.x, mine, c, z, f.reverse, f.reverse ? c.begin - c.end : c.end - c.begin, x);
      for (long p = 0; p < blocks * G; ++p)
        product<Number, false>(c.rows, z.width(p / G), x, input_depth, input + p * input_depth * COLS, input_depth, false,
                               panels + p * m * COLS);
    }
    for (long s = c.begin; s < c.end; ++s) {
      const long n = mine.active(s), at = c.offset[s - c.begin];
      for (long r = 0; r < n; ++r) place[r] = z.place(mine.row[r], mine.time(r, s, f.reverse));
      if (f.reset) {
        for (long k = 0; k < masks; ++k) clear_fresh(f.reset, mine, z, s, f.reverse, h_in + k * masked, ldh, H);
        clear_fresh(f.reset, mine, z, s, f.reverse, carry, stride, H);
      }
      for (long block = 0; block < blocks; ++block) {
        const long width = z.width(block);
        float* gate_panel[G];
        for (long g = 0; g < G; ++g) gate_panel[g] = panels + ((block * G + g) * m + at) * COLS;
        const Element* of_block = recurrent + block * G * depth * COLS;
        constexpr long ADDED = G - Cell::HAS_Q;  // the recurrent part of the GRU's candidate is apart
        const auto of_gate = [&](long g) { return h_in + std::min(g, masks - 1) * masked; };
        if (n == 1 && masks == 1)
          row_product<Number, ADDED>(h_in, of_block, depth * COLS, depth, true, gate_panel[0], m * COLS);
        else
          for (long g = 0; g < ADDED; ++g)
            product<Number, false>(n, width, of_gate(g), ldh, of_block + g * depth * COLS, depth, true, gate_panel[g]);
        if (Cell::HAS_Q)
          product<Number, false>(n, width, of_gate(ADDED), ldh, of_block + ADDED * depth * COLS, depth, false, q);
        for (long r = 0; r < n; ++r) {
          const long b = mine.row[r], at_y = place[r] * H;
          for (long i = 0; i < width; i += LANES) {
            const long unit = block * COLS + i, left = H - unit;
            Vec gates[G], kept{};
            for (long g = 0; g < G; ++g) gates[g] = load(gate_panel[g] + r * COLS + i);
            Vec state = load(carry + r * stride + unit);
            const Vec h = Cell::forward(gates, Cell::HAS_Q ? load(q + r * COLS + i) : Vec{}, state, kept);
            store(carry + r * stride + unit, state);
            store(h_last + r * stride + unit, h);
            Number::store(h_next + r * ldh + unit, tied ? h * load(tied + b * H + unit, left) : h, left);
            store(f.y + at_y + unit, h, left);
            __builtin_prefetch(f.y + at_y + ahead + unit, 1);
            if (f.gates) {
              for (long g = 0; g < G; ++g) {
                store(f.gates + at_y * G + g * H + unit, gates[g], left);
                __builtin_prefetch(f.gates + (at_y + ahead) * G + g * H + unit, 1);
              }
              if (Cell::HAS_CELL || Cell::HAS_Q) {
                store(f.kept + at_y + unit, kept, left);
                __builtin_prefetch(f.kept + at_y + ahead + unit, 1);
              }
            }
          }
        }
      }
      if (masks > 1) mask_gates<Number>(f.mask, masks, mine, n, H, h_last, stride, h_next, ldh, masked);
      std::swap(h_in, h_next);
    }
  }
  for (long r = 0; r < rows; ++r) {
    const long b = mine.row[r];
    std::copy(h_last + r * stride, h_last + r * stride + H, f.h + b * H);
    if (Cell::HAS_CELL) std::copy(carry + r * stride, carry + r * stride + H, f.c + b * H);
  }
}

template <class Cell, class Number, class Pool>
void forward(Pool& pool, long threads, const Forward& f) {
  constexpr long G = Cell::GATES;
  const Sizes& z = f.size;
  const auto dealt = deal(f.lengths, z, threads);
  const long inputs = z.inputs + Number::PAIR, hidden = z.units + Cell::HAS_Q * Number::PAIR, panels = z.blocks() * G;
  const long input_size = f.projected ? 0 : panels * even<Number>(inputs) * COLS, size = panels * even<Number>(hidden) * COLS;
  Packed<Number> weights(input_size, size);
  share_out(pool, dealt.size(), panels, input_size + size, [&](long p) {
    if (!f.projected) {
      pack<Number>(f.input, p, z.inputs, G, z, 0, inputs, weights.input);
      pack_bias<Number>({f.bias, f.bias + G * z.units}, p, G, z, z.inputs, weights.input);
    }
    pack<Number>(f.recurrent, p, z.units, G, z, 0, hidden, weights.recurrent);
    if (Cell::HAS_Q)
      pack_bias<Number>(of_candidate(f.recurrent_bias, G, z.units), p, G, z, z.units, weights.recurrent);
  });
  parallel(pool, dealt.size(), [&](long i) { forward_task<Cell, Number>(f, dealt[i], weights); });
}

// --------------------------------------------------------------------------------------------------------- backward
struct Backward {
  Sizes size;
  bool reverse;
  bool projected;                         // see Forward: no x, input weights and bias; dx is [B,T,G,H]
  const float *x, *input, *recurrent;
  const float *c0, *h0, *mask;
  bool mask_per_gate;
  const int* lengths;
  const bool* reset;
  const float *y, *gates, *kept;          // of the forward pass
  const float *dy, *dc, *dh, *dkept;      // gradients of its outputs; dy: or null; dc: LSTM only; dkept (of all its c): or null
  float *dx, *dinput, *drecurrent, *dbias, *drecurrent_bias, *dc0, *dh0, *dmask;
};

// One task's part of the weights' gradients: panels [block][gate][D + 1 or J][COLS].
template <class Cell>
struct Gradients {
  static constexpr long G = Cell::GATES;
  long input_depth, depth;
  Memory memory;
  float *input, *recurrent;
  explicit Gradients(const Sizes& z)
      : input_depth(z.inputs + 1),
        depth(z.units + Cell::HAS_Q) {
    memory.want(input, z.blocks() * G * input_depth * COLS);
    memory.want(recurrent, z.blocks() * G * depth * COLS);
    memory.get();
    std::fill(input, input + z.blocks() * G * input_depth * COLS, 0.0f);
    std::fill(recurrent, recurrent + z.blocks() * G * depth * COLS, 0.0f);
  }
};

// With a mask for each gate: what comes back through the gates, each under its own, added up in the place of the first; the
// gradients of the masks; and h as it entered the products.
__attribute__((noinline)) inline void fold_gates(const float* mask, long masks, const Rows& mine, long active, long rows, long H,
                                                 const float* const* olds, float* h_before, long depth, long masked,
                                                 float* through, long returned, float* dmask) {
  for (long r = 0; r < active; ++r)
    for (long unit = 0; unit < H; unit += LANES) {
      const long left = H - unit, place = (unit / COLS * rows + r) * COLS + unit % COLS;
      const Vec h = load(olds[r] + unit, left);
      Vec sum{};
      for (long k = 0; k < masks; ++k) {
        const long at = (mine.row[r] * masks + k) * H + unit;
        const Vec m = load(mask + at, left), t = load(through + k * returned + place);
        store(dmask + at, load(dmask + at, left) + t * h, left);
        store(h_before + k * masked + r * depth + unit, h * m, left);
        sum += t * m;
      }
      store(through + place, sum);
    }
}

template <class Cell, class Number>
void backward_task(const Backward& f, const Rows& mine, const Packed<Number>& weights, Gradients<Cell>& sums) {
  constexpr long G = Cell::GATES, P = G + Cell::HAS_Q;  // the GRU has one more panel: the gradients of q
  using Element = typename Number::Element;
  const Sizes& z = f.size;
  const long H = z.units, D = z.inputs, blocks = z.blocks(), rows = mine.row.size(), m = chunk_rows(mine);
  const long gate_depth = even<Number>(H), gates_depth = G * gate_depth;
  const long stride = blocks * COLS, input_depth = sums.input_depth, depth = sums.depth;
  const long ldh = depth + (depth % LINE ? 0 : LINE);  // of a power of two, a cache has too few places for a column
  const long masks = f.mask_per_gate ? G : 1, masked = m * ldh, returned = blocks * rows * COLS;  // from one mask to the next
  const float* tied = masks > 1 ? nullptr : f.mask;
  const Element *input = weights.input, *recurrent = weights.recurrent;
  Element* da;
  float *x, *h_before, *panels, *dx, *direct, *dcell, *through, *zeros;
  Memory memory;
  memory.want(x, m * input_depth);
  memory.want(h_before, masks * masked);
  memory.want(panels, blocks * P * m * COLS);
  memory.want(da, Number::PAIR > 1 ? blocks * P * m * COLS : 0);
  memory.want(dx, m * COLS);
  memory.want(direct, rows * stride);
  memory.want(dcell, rows * stride);
  memory.want(through, masks * returned);
  memory.want(zeros, stride);
  memory.get();

  if constexpr (Number::PAIR == 1) da = panels;
  // What the inputs' gradients are made of, and what comes back through the recurrent weights: in place of the candidate of the GRU
  // its q, the last panel.
  Gates<Number> for_inputs{G, {}, P * m * COLS, gate_depth}, for_h = for_inputs;
  for (long g = 0; g < G; ++g) {
    for_inputs.gate[g] = da + g * m * COLS;
    for_h.gate[g] = da + (Cell::HAS_Q && g == 2 ? G : g) * m * COLS;
  }
  std::fill(direct, direct + rows * stride, 0.0f);
  std::fill(dcell, dcell + rows * stride, 0.0f);
  std::fill(through, through + masks * returned, 0.0f);
  std::fill(zeros, zeros + stride, 0.0f);
  for (long r = 0; r < rows; ++r) {
    const long b = mine.row[r];
    std::copy(f.dh + b * H, f.dh + (b + 1) * H, direct + r * stride);
    if (f.mask) std::fill(f.dmask + b * masks * H, f.dmask + (b + 1) * masks * H, 0.0f);
    if (Cell::HAS_CELL) std::copy(f.dc + b * H, f.dc + (b + 1) * H, dcell + r * stride);
  }
  clear_padding(f.dx, mine, z, f.projected ? G * H : D);
  // The gradient of the state h before the step that was handled last: directly, and through the recurrent weights.
  const auto incoming = [&](long r, const float* h, long unit) {
    const long b = mine.row[r], left = H - unit;
    Vec t = load(through + (unit / COLS * rows + r) * COLS + unit % COLS);
    if (tied) {
      float* dmask = f.dmask + b * H + unit;
      store(dmask, load(dmask, left) + t * load(h + unit, left), left);
      t *= load(tied + b * H + unit, left);
    }
    return load(direct + r * stride + unit) + t;
  };
  std::vector<const float*> olds(rows);  // the h before a step

  for (long edge = mine.steps(); edge > 0;) {
    const Chunk c = chunk(mine, edge, true);
    edge = c.begin;
    if (!f.projected) gather<Single>(f.x, mine, c, z, f.reverse, f.reverse ? c.end - c.begin : c.begin - c.end, x);
    for (long s = c.end - 1; s >= c.begin; --s) {
      const long n = mine.active(s), at = c.offset[s - c.begin];
      for (long r = 0; r < n; ++r) {
        const long b = mine.row[r], place = z.place(b, mine.time(r, s, f.reverse));
        const long place_before = place + (f.reverse ? z.step() : -z.step());
        const bool begins = f.reset && fresh(f.reset, mine, z, r, s, f.reverse);
        const float* h_old = begins ? zeros : s ? f.y + place_before * H : f.h0 + b * H;
        const float* c_old = begins ? zeros : !Cell::HAS_CELL ? nullptr : s ? f.kept + place_before * H : f.c0 + b * H;
        float* before = h_before + (at + r) * ldh;
        olds[r] = h_old;
        if (Cell::HAS_Q)
          for (long k = 0; k < masks; ++k) before[k * masked + H] = 1;
        for (long unit = 0; unit < H; unit += LANES) {
          const long left = H - unit, block = unit / COLS, column = unit % COLS;
          Vec gates[G], dq{}, dc = load(dcell + r * stride + unit);
          for (long g = 0; g < G; ++g) gates[g] = load(f.gates + (place * G + g) * H + unit, left);
          const Vec h = load(h_old + unit, left);
          const Vec kept = Cell::HAS_CELL || Cell::HAS_Q ? load(f.kept + place * H + unit, left) : Vec{};
          const Vec cell = Cell::HAS_CELL ? load(c_old + unit, left) : Vec{};
          if (Cell::HAS_CELL && f.dkept) dc += load(f.dkept + place * H + unit, left);
          const Vec dh = incoming(r, f.y + place * H, unit) + (f.dy ? load(f.dy + place * H + unit, left) : Vec{});
          store(direct + r * stride + unit, Cell::backward(gates, kept, cell, h, dh, dc, dq));
          store(dcell + r * stride + unit, dc);
          store(before + unit, tied ? h * load(tied + b * H + unit, left) : h, left);
          const auto keep = [&](long panel, Vec gradient) {
            const long to = ((block * P + panel) * m + at + r) * COLS + column;
            store(panels + to, gradient);
            if (Number::PAIR > 1) Number::store(da + to, gradient, LANES);
          };
          for (long g = 0; g < G; ++g) keep(g, gates[g]);
          if (Cell::HAS_Q) keep(G, dq);
          // What the step that is handled next, and the one before it, will read.
          const long next = place_before * H + unit, after = next + (place_before - place) * H;
          for (long g = 0; g < G; ++g) __builtin_prefetch(f.gates + (place_before * G + g) * H + unit);
          if (f.dy) __builtin_prefetch(f.dy + next);
          __builtin_prefetch(f.y + after);
          if (Cell::HAS_CELL || Cell::HAS_Q) __builtin_prefetch(f.kept + (Cell::HAS_CELL ? after : next));
          if (f.projected)
            for (long g = 0; g < G; ++g) store(f.dx + (place * G + g) * H + unit, gates[g], left);
        }
      }
      constexpr long TOGETHER = 4;
      for (long block = 0; block < blocks;) {
        const Element* of_block = recurrent + block * gates_depth * COLS;
        float* to = through + block * rows * COLS;
        if (n == 1 && masks == 1 && block + TOGETHER <= blocks) {
          gates_tile<Number, 1, Vec, TOGETHER>(for_h, at, of_block, gates_depth * COLS, to, rows * COLS);
          block += TOGETHER;
          continue;
        }
        if (masks == 1) gates_product<Number>(n, z.width(block), for_h, at, of_block, to);
        for (long k = 0; masks > 1 && k < masks; ++k)
          gates_product<Number>(n, z.width(block), {1, {for_h.gate[k]}, for_h.next, gate_depth}, at,
                                of_block + k * gate_depth * COLS, to + k * returned);
        block += 1;
      }
      if (masks > 1)
        fold_gates(f.mask, masks, mine, n, rows, H, olds.data(), h_before + at * ldh, ldh, masked, through, returned, f.dmask);
      if (f.reset) {
        clear_fresh(f.reset, mine, z, s, f.reverse, direct, stride, H);
        clear_fresh(f.reset, mine, z, s, f.reverse, dcell, stride, H);
        for (long block = 0; block < blocks; ++block)
          clear_fresh(f.reset, mine, z, s, f.reverse, through + block * rows * COLS, COLS, COLS);
      }
    }
    const long steps = even<Number>(c.rows);
    const Element* x_panel = f.projected ? nullptr : interleave<Number>(x, c.rows, input_depth, x);
    const Element* h_panel[G];
    for (long k = 0; k < masks; ++k)
      h_panel[k] = interleave<Number>(h_before + k * masked, c.rows, ldh, h_before + k * masked);
    for (long p = 0; p < blocks * P; ++p) {
      const long block = p / P, g = p % P, width = z.width(block);
      float* gradients = panels + p * m * COLS;
      const Element* panel = interleave<Number>(gradients, c.rows, COLS, gradients);
      if (g < G && !f.projected)
        product<Number, true>(input_depth, width, x_panel, input_depth, panel, steps, true,
                              sums.input + (block * G + g) * input_depth * COLS);
      if (!(Cell::HAS_Q && g == 2))  // in place of the candidate's own gradients those of q, the last panel
        product<Number, true>(depth, width, h_panel[std::min(g, masks - 1)], ldh, panel, steps, true,
                              sums.recurrent + (block * G + std::min(g, G - 1)) * depth * COLS);
    }
    for (long begin = 0; begin < D; begin += COLS) {
      const long width = std::min(COLS, D - begin);
      gates_product<Number>(c.rows, width, for_inputs, 0, input + begin * gates_depth, dx);
      for (long s = c.begin; s < c.end; ++s)
        for (long r = 0, n = mine.active(s); r < n; ++r) {
          const float* from = dx + (c.offset[s - c.begin] + r) * COLS;
          std::copy(from, from + width, f.dx + z.place(mine.row[r], mine.time(r, s, f.reverse)) * D + begin);
        }
    }
  }
  for (long r = 0; r < rows; ++r)
    for (long unit = 0; unit < H; unit += LANES) {
      const long b = mine.row[r], left = H - unit;
      store(f.dh0 + b * H + unit, incoming(r, f.h0 + b * H, unit), left);
      if (Cell::HAS_CELL) store(f.dc0 + b * H + unit, load(dcell + r * stride + unit), left);
    }
}

template <class Cell, class Number, class Pool>
void backward(Pool& pool, long threads, const Backward& f) {
  constexpr long G = Cell::GATES;
  const Sizes& z = f.size;
  const auto dealt = deal(f.lengths, z, threads);
  const long depth_all = G * even<Number>(z.units), input_panels = f.projected ? 0 : z.input_blocks();
  const long input_size = input_panels * depth_all * COLS, size = z.blocks() * depth_all * COLS;
  Packed<Number> weights(input_size, size);
  share_out(pool, dealt.size(), input_panels + z.blocks(), input_size + size, [&](long p) {
    if (p < input_panels) pack_transposed<Number>(f.input, p, z.inputs, G, z.units, weights.input);
    else pack_transposed<Number>(f.recurrent, p - input_panels, z.units, G, z.units, weights.recurrent);
  });
  std::vector<std::unique_ptr<Gradients<Cell>>> sums(dealt.size());
  parallel(pool, dealt.size(), [&](long i) {
    sums[i] = std::make_unique<Gradients<Cell>>(z);
    backward_task<Cell, Number>(f, dealt[i], weights, *sums[i]);
  });
  std::vector<const float*> inputs, recurrents;
  for (const auto& part : sums) inputs.push_back(part->input), recurrents.push_back(part->recurrent);
  const long input_depth = sums[0]->input_depth, depth = sums[0]->depth;
  std::vector<float> own_bias(G * z.units);  // of the recurrent weights: the GRU's candidate has one
  share_out(pool, dealt.size(), z.blocks() * G, input_size + size, [&](long p) {
    if (!f.projected) {
      unpack_sum(inputs, p, z.inputs, G, z, 0, input_depth, f.dinput);
      unpack_sum(inputs, p, 1, G, z, z.inputs, input_depth, f.dbias);
    }
    unpack_sum(recurrents, p, z.units, G, z, 0, depth, f.drecurrent);
    if (Cell::HAS_Q) unpack_sum(recurrents, p, 1, G, z, z.units, depth, own_bias.data());
  });
  if (Cell::HAS_Q) std::copy(own_bias.end() - z.units, own_bias.end(), f.drecurrent_bias);
}

}  // namespace flax_lstm
