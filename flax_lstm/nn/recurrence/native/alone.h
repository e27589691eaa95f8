// SPDX-License-Identifier: Apache-2.0
// One row of words by two threads: outputs alone. Sizes and cells are those of kernel.h.
//
// A step of one row reads all recurrent weights for a single product with each. The nearest cache is too small for them, and the
// one behind it gives so many bytes a cycle: that is a step's time. Two cores have two such caches, so each takes half the units,
// and they exchange h after every step.
//
// Nobody waits for long, whatever else the machine does. The row's own thread begins alone and shares once the helper is there;
// when the helper then is late by more than `patience`, it is left behind: what it has not finished is computed again, and all that
// is written from then on lies where the helper never writes. The helper leaves when it has waited as long. It touches nothing but
// what it owns a share of, so it may be late for the end, too. Where a helper did not help, the machine has other work, and waking it
// only took time from this thread: the next rows are alone, more of them each time. A unit's sums are the same whoever adds them up.

#pragma once

#include <chrono>

#include "kernel.h"

namespace flax_lstm {

using Duration = std::chrono::nanoseconds;

constexpr Duration PATIENCE{20'000};

inline void rest() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#endif
}

// Whether something is true within that time.
template <class Condition>
bool soon(Duration patience, const Condition& condition) {
  const auto end = std::chrono::steady_clock::now() + patience;
  for (long turn = 1; !condition(); ++turn) {
    if (turn % 16 == 0 && std::chrono::steady_clock::now() > end) return condition();
    rest();
  }
  return true;
}

struct State {  // after an even and an odd number of steps
  float *h[2], *carry[2];
  void want(Memory& memory, long stride) {
    for (float** array : {h, carry})
      for (long i = 0; i < 2; ++i) memory.want(array[i], stride + LINE);  // behind h a one, for the GRU's own bias
  }
  void copy(const State& from, long parity, long begin, long end) const {
    std::copy(from.h[parity] + begin, from.h[parity] + end, h[parity] + begin);
    std::copy(from.carry[parity] + begin, from.carry[parity] + end, carry[parity] + begin);
  }
};

// Whether to ask for help: all processors were there for the row before, or that was many rows ago.
class Trust {
 public:
  bool asks() { return alone_.load() <= 0 || alone_.fetch_sub(1) <= 1; }
  void learn(bool helped) {
    pause_ = helped ? 0 : std::min<long>(2 * pause_ + 8, 1024);
    alone_ = pause_.load();
  }

 private:
  std::atomic<long> alone_{0}, pause_{0};  // rows before the next that asks
};
inline Trust trust;

template <class Cell>
struct Alone {
  static constexpr long G = Cell::GATES, ADDED = G - Cell::HAS_Q;
  const Sizes size;
  const long blocks = size.blocks(), half = (blocks + 1) / 2, stride = blocks * COLS, depth = size.units + Cell::HAS_Q;
  const Duration patience;
  Memory memory;
  float *recurrent, *x;  // panels [block][gate][depth][COLS] and [block][gate][CHUNK_ROWS][COLS]
  State state;
  std::atomic<bool> helps{false}, over{false};
  alignas(ALIGNMENT) std::atomic<long> first{-1};    // step that is shared; before: none
  alignas(ALIGNMENT) std::atomic<long> ready{0};     // step that the helper may begin: the one before is finished
  alignas(ALIGNMENT) std::atomic<long> helped{0};    // steps that the helper has finished

  // Besides `least`, as long as a step takes where weights are read slowly.
  Alone(const Sizes& z, Duration least) : size(z), patience(least + Duration(G * z.units * z.units / 2)) {
    memory.want(recurrent, blocks * G * depth * COLS);
    memory.want(x, blocks * G * CHUNK_ROWS * COLS);
    state.want(memory, stride);
    memory.get();
  }

  // Step s for the units of some blocks.
  void advance(long s, long begin, long end, const float* x, const State& state) const {
    const float *h = state.h[s % 2], *carry = state.carry[s % 2];
    float *h_next = state.h[(s + 1) % 2], *carry_next = state.carry[(s + 1) % 2];
    for (long block = begin; block < end; ++block) {
      float arguments[G][COLS], q[COLS];
      for (long g = 0; g < G; ++g) {
        const float* from = x + ((block * G + g) * CHUNK_ROWS + s % CHUNK_ROWS) * COLS;
        std::copy(from, from + COLS, arguments[g]);
      }
      const float* weights = recurrent + block * G * depth * COLS;
      row_product<Single, ADDED>(h, weights, depth * COLS, depth, true, arguments[0], COLS);
      if (Cell::HAS_Q) row_product<Single, 1>(h, weights + ADDED * depth * COLS, 0, depth, false, q, 0);
      for (long i = 0; i < size.width(block); i += LANES) {
        const long unit = block * COLS + i;
        Vec gates[G], kept{}, now = load(carry + unit);
        for (long g = 0; g < G; ++g) gates[g] = load(arguments[g] + i);
        store(h_next + unit, Cell::forward(gates, Cell::HAS_Q ? load(q + i) : Vec{}, now, kept), size.units - unit);
        store(carry_next + unit, now);
      }
    }
  }

  void help() {
    helps = true;
    if (!soon(patience, [&] { return over || first >= 0; })) return void(over = true);
    for (long s = first; soon(patience, [&] { return over || ready >= s; }) && !over; helped = ++s)
      advance(s, half, blocks, x, state);
    over = true;
  }
};

template <class Cell, class Pool>
void forward_alone(Pool& pool, const Forward& f, Duration patience) {
  constexpr long G = Cell::GATES;
  const Sizes& z = f.size;
  const long H = z.units;
  const auto shared = std::make_shared<Alone<Cell>>(z, patience);
  Alone<Cell>& a = *shared;
  for (long p = 0; p < a.blocks * G; ++p) {
    pack<Single>(f.recurrent, p, H, G, z, 0, a.depth, a.recurrent);
    if (Cell::HAS_Q) pack_bias<Single>(of_candidate(f.recurrent_bias, G, H), p, G, z, H, a.recurrent);
  }
  Memory memory;  // where the helper writes nothing
  State apart;
  float* x_apart;
  apart.want(memory, a.stride);
  memory.want(x_apart, a.blocks * G * CHUNK_ROWS * COLS);
  memory.get();
  for (const State& state : {a.state, apart})
    for (long i = 0; i < 2; ++i) {
      std::fill(state.carry[i], state.carry[i] + a.stride, 0.0f);
      std::fill(state.h[i], state.h[i] + a.stride + LINE, 0.0f);
      state.h[i][H] = Cell::HAS_Q;
    }
  std::copy(f.h0, f.h0 + H, a.state.h[0]);
  const float* begin = Cell::HAS_CELL ? f.c0 : f.h0;
  std::copy(begin, begin + H, a.state.carry[0]);
  pool.Schedule([shared] { shared->help(); });

  const Rows mine = deal(f.lengths, z, 1)[0];
  clear_padding(f.y, mine, z, H);
  const State* state = &a.state;
  float* x = a.x;
  bool sharing = false, left = false;
  const long steps = mine.steps(), units = a.half * COLS;
  for (long s = 0; s < steps; ++s) {
    if (s % CHUNK_ROWS == 0) {
      if (left) x = x_apart;
      look_up<Cell>(f, mine, chunk(mine, s, false), CHUNK_ROWS, x);
      a.ready = s;
    }
    if (!sharing && !left && a.helps) a.ready = s, a.first = s, sharing = true;
    a.advance(s, 0, sharing ? a.half : a.blocks, x, *state);
    if (sharing) {
      if ((s + 1) % CHUNK_ROWS) a.ready = s + 1;  // else once its words are looked up
      if (!soon(a.patience, [&] { return a.helped > s || a.over; }) || a.helped <= s) {
        a.over = left = true, sharing = false;
        apart.copy(*state, s % 2, 0, a.stride);
        apart.copy(*state, (s + 1) % 2, 0, std::min(units, a.stride));
        state = &apart;
        a.advance(s, a.half, a.blocks, x, *state);
      }
    }
    const float* h = state->h[(s + 1) % 2];
    std::copy(h, h + H, f.y + z.place(0, mine.time(0, s, f.reverse)) * H);
  }
  a.over = true;
  trust.learn(sharing);
  std::copy(state->h[steps % 2], state->h[steps % 2] + H, f.h);
  if (Cell::HAS_CELL) std::copy(state->carry[steps % 2], state->carry[steps % 2] + H, f.c);
}

// Outputs alone, of words: neither masks nor resets, and nothing is kept for a backward pass.
template <class Cell, class Number, class Pool>
void outputs(Pool& pool, long threads, const Forward& f, Duration patience = PATIENCE) {
  constexpr long FEW = 16, NARROW = 96;  // steps, and units whose weights the nearest cache nearly holds
  const Sizes& z = f.size;
  if (Number::PAIR == 1 && threads > 1 && z.batch == 1 && z.time >= FEW && z.units >= NARROW && trust.asks())
    forward_alone<Cell>(pool, f, patience);
  else
    forward<Cell, Number>(pool, threads, f);
}

}  // namespace flax_lstm
