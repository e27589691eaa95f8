// SPDX-License-Identifier: Apache-2.0
// The recurrence over words with recurrent weights of 8 bits: outputs alone. Sizes and cells are those of kernel.h.
//
// A weight is a whole number of -127 ... 127 times the scale of its column, an h one of 127ths, as between -1 and 1. Their
// product is a sum of whole numbers, exact, and then times the scale; all between products is float32. The processor's
// instruction multiplies numbers without a sign by those with one: so 128 is added to h, and what that adds to a sum, which
// depends on the column alone, is taken off the table (and off the GRU's own bias) before.
//
// Weights are given as panels, `pack` of int8.py: [blocks][G][depth / 4][COLUMNS][4], one block for COLUMNS units, the depth
// filled with zeros.

#pragma once

#include "kernel.h"

#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace flax_lstm {

constexpr long COLUMNS = 16;  // columns of a panel
constexpr long FOUR = 4;      // of the depth, multiplied by one instruction
constexpr long DEPTH = 8;     // the depth is whole multiples of it: one row sums in two halves
constexpr long ROWS = 4;      // that are multiplied together

using Sums = int32_t __attribute__((vector_size(4 * COLUMNS)));

inline void multiply_add(Sums& sum, const uint8_t* a, const int8_t* w) {
#ifdef __AVX512VNNI__
  int32_t four;
  std::memcpy(&four, a, sizeof four);
  sum = (Sums)_mm512_dpbusd_epi32((__m512i)sum, _mm512_set1_epi32(four), _mm512_loadu_si512(w));
#else
  for (long i = 0; i < COLUMNS; ++i)
    for (long k = 0; k < FOUR; ++k) sum[i] += a[k] * w[i * FOUR + k];
#endif
}

// sums[row][gate] of N rows a[row][depth] with a block's panels.
template <long G, long N>
void sums_of(const uint8_t* a, long depth, const int8_t* panels, Sums (*sums)[G]) {
  constexpr long HALVES = N == 1 ? 2 : 1;  // the sums of one row are too few: each would wait for the one before
  Sums part[HALVES][N][G] = {};
  for (long k = 0; k < depth; k += HALVES * FOUR)
    for (long half = 0; half < HALVES; ++half)
      for (long g = 0; g < G; ++g) {
        const long at = k + half * FOUR;
        const int8_t* w = panels + (g * depth + at) * COLUMNS;
        for (long r = 0; r < N; ++r) multiply_add(part[half][r][g], a + r * depth + at, w);
      }
  for (long r = 0; r < N; ++r)
    for (long g = 0; g < G; ++g) sums[r][g] = HALVES == 2 ? part[0][r][g] + part[HALVES - 1][r][g] : part[0][r][g];
}

template <long G, long N = ROWS>
void sums_of(long rows, const uint8_t* a, long depth, const int8_t* panels, Sums (*sums)[G]) {
  if constexpr (N > 1)
    if (rows < N) return sums_of<G, N - 1>(rows, a, depth, panels, sums);
  sums_of<G, N>(a, depth, panels, sums);
}

// The first n of some h as bytes. NaN becomes some number.
inline void store_bytes(uint8_t* p, Vec h, long n) {
  using Whole = int32_t __attribute__((vector_size(4 * LANES)));
  using Narrow = uint8_t __attribute__((vector_size(LANES)));
  h = h > -1.0f ? h : Vec{} - 1.0f;
  h = h < 1.0f ? h : Vec{} + 1.0f;
  const Narrow all = __builtin_convertvector(__builtin_convertvector(h * 127.0f + 128.5f, Whole), Narrow);
  std::memcpy(p, &all, std::min<long>(n, LANES));
}

struct Bytes {
  Sizes size;
  bool reverse;
  const int* words;       // [B,T]
  const float* table;     // [count][G,H]
  long count, depth;
  const int8_t* panels;
  const float* scales;    // [G,H], of a product of two whole numbers
  const float *recurrent_bias, *c0, *h0;  // [H], GRU only; [B,H], LSTM only; [B,H]
  const int* lengths;
  float *y, *c, *h;
};

template <class Cell>
void bytes_task(const Bytes& f, const Rows& mine) {
  constexpr long G = Cell::GATES, ADDED = G - Cell::HAS_Q;
  const Sizes& z = f.size;
  const long H = z.units, blocks = (H + COLUMNS - 1) / COLUMNS, stride = blocks * COLUMNS, rows = mine.row.size();
  std::vector<uint8_t> h_in(rows * f.depth, 0), h_next(rows * f.depth, 0);
  std::vector<float> carry(rows * stride, 0.0f), h_last(rows * stride, 0.0f);
  for (long r = 0; r < rows; ++r) {
    const float *h = f.h0 + mine.row[r] * H, *begin = Cell::HAS_CELL ? f.c0 + mine.row[r] * H : h;
    std::copy(h, h + H, h_last.begin() + r * stride);
    std::copy(begin, begin + H, carry.begin() + r * stride);
    for (long unit = 0; unit < H; unit += LANES)
      store_bytes(&h_in[r * f.depth + unit], load(h + unit, H - unit), H - unit);
  }
  clear_padding(f.y, mine, z, H);

  for (long s = 0; s < mine.steps(); ++s) {
    const long n = mine.active(s);
    for (long block = 0; block < blocks; ++block) {
      const int8_t* panels = f.panels + block * G * f.depth * COLUMNS;
      for (long first = 0; first < n; first += ROWS) {
        const long several = std::min(ROWS, n - first);
        Sums sums[ROWS][G];
        sums_of<G>(several, h_in.data() + first * f.depth, f.depth, panels, sums);
        for (long r = first; r < first + several; ++r) {
          const long place = z.place(mine.row[r], mine.time(r, s, f.reverse));
          const float* looked = f.table + std::clamp<long>(f.words[place], 0, f.count - 1) * G * H;
          float products[G][COLUMNS];
          for (long g = 0; g < G; ++g)
            for (long i = 0; i < COLUMNS; ++i) products[g][i] = static_cast<float>(sums[r - first][g][i]);
          for (long i = 0; i < COLUMNS && block * COLUMNS + i < H; i += LANES) {
            const long unit = block * COLUMNS + i, left = H - unit;
            Vec gates[G], q{}, kept{}, state = load(&carry[r * stride + unit]);
            for (long g = 0; g < G; ++g) {
              const Vec product = load(products[g] + i) * load(f.scales + g * H + unit, left);
              gates[g] = load(looked + g * H + unit, left);
              if (g < ADDED)
                gates[g] += product;
              else
                q = product + load(f.recurrent_bias + unit, left);
            }
            const Vec h = Cell::forward(gates, q, state, kept);
            store(&carry[r * stride + unit], state);
            store(&h_last[r * stride + unit], h);
            store(f.y + place * H + unit, h, left);
            store_bytes(&h_next[r * f.depth + unit], h, left);
          }
        }
      }
    }
    std::swap(h_in, h_next);
  }
  for (long r = 0; r < rows; ++r) {
    const long b = mine.row[r];
    std::copy(&h_last[r * stride], &h_last[r * stride] + H, f.h + b * H);
    if (Cell::HAS_CELL) std::copy(&carry[r * stride], &carry[r * stride] + H, f.c + b * H);
  }
}

template <class Cell, class Pool>
void forward_bytes(Pool& pool, long threads, const Bytes& f) {
  const auto dealt = deal(f.lengths, f.size, threads);
  parallel(pool, dealt.size(), [&](long i) { bytes_task<Cell>(f, dealt[i]); });
}

}  // namespace flax_lstm
