// SPDX-License-Identifier: Apache-2.0
// Runs the recurrent kernel on its own, on several threads of the system: for the sanitizers, and for processors that are
// only emulated. Prints sums of what it computes, one line a cell and direction, which test_native.py compares.

#include <cmath>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>

#include <signal.h>

#include "alone.h"
#include "int8.h"
#include "kernel.h"
#include "table.h"

using namespace flax_lstm;

struct Threads {  // a pool that begins a thread for each task
  std::vector<std::thread> threads;
  template <class F>
  void Schedule(F&& f) {
    threads.emplace_back(std::forward<F>(f));
  }
  ~Threads() {
    for (auto& thread : threads) thread.join();
  }
};

double sum(const std::vector<float>& values) {  // of a kind that notices order
  double total = 0;
  for (size_t i = 0; i < values.size(); ++i) total += values[i] * std::cos(0.1 * (i % 101));
  return total;
}

// per_gate: with a mask for each gate, and inputs that were projected before.
template <class Cell, class Number>
void run_one(const char* name, bool reverse, bool masked, bool reset_and_time_major, bool per_gate = false) {
  constexpr long G = Cell::GATES;
  const Sizes z{7, 23, per_gate ? 0 : 5, 19, reset_and_time_major};
  const long B = z.batch, T = z.time, D = z.inputs, H = z.units, width = per_gate ? G * H : D, masks = per_gate ? G : 1;
  std::mt19937 random(1);
  const auto draw = [&](long count) {  // exactly the same numbers everywhere
    std::vector<float> values(count);
    for (float& v : values) v = static_cast<int>(random() % 2001) / 1000.0f - 1.0f;
    return values;
  };
  const auto x = draw(B * T * width), input = draw(D * G * H), recurrent = draw(H * G * H);
  const auto bias = draw(per_gate ? 0 : G * H);
  const auto recurrent_bias = draw(H), c0 = draw(B * H), h0 = draw(B * H), mask = draw(B * masks * H);
  const auto dy = draw(B * T * H), dc = draw(B * H), dh = draw(B * H);
  const std::vector<int> lengths{23, 0, 1, 22, 7, 7, 23};
  // Every array has just the size it should: a sanitizer sees the first step beyond it.
  std::vector<float> y(B * T * H), c(B * H), h(B * H), gates(B * T * G * H), kept(B * T * H), dx(B * T * width);
  std::vector<float> dinput(D * G * H), drecurrent(H * G * H), dbias(bias.size()), drecurrent_bias(H), dc0(B * H), dh0(B * H);
  std::vector<float> dmask(mask.size());
  const auto dkept = draw(reset_and_time_major ? B * T * H : 0);
  std::unique_ptr<bool[]> reset(reset_and_time_major ? new bool[B * T] : nullptr);
  for (long i = 0; reset && i < B * T; ++i) reset[i] = random() % 4 == 0;
  const Forward f{.size = z,
                  .reverse = reverse,
                  .x = x.data(),
                  .input = input.data(),
                  .recurrent = recurrent.data(),
                  .bias = bias.data(),
                  .recurrent_bias = recurrent_bias.data(),
                  .projected = per_gate,
                  .table = x.data(),
                  .c0 = c0.data(),
                  .h0 = h0.data(),
                  .mask = masked ? mask.data() : nullptr,
                  .mask_per_gate = per_gate,
                  .lengths = lengths.data(),
                  .reset = reset.get(),
                  .y = y.data(),
                  .c = c.data(),
                  .h = h.data(),
                  .gates = gates.data(),
                  .kept = kept.data()};
  const Backward b{.size = z,
                   .reverse = reverse,
                   .projected = per_gate,
                   .x = x.data(),
                   .input = input.data(),
                   .recurrent = recurrent.data(),
                   .c0 = c0.data(),
                   .h0 = h0.data(),
                   .mask = masked ? mask.data() : nullptr,
                   .mask_per_gate = per_gate,
                   .lengths = lengths.data(),
                   .reset = reset.get(),
                   .y = y.data(),
                   .gates = gates.data(),
                   .kept = kept.data(),
                   .dy = per_gate && reverse ? nullptr : dy.data(),
                   .dc = dc.data(),
                   .dh = dh.data(),
                   .dkept = dkept.empty() ? nullptr : dkept.data(),
                   .dx = dx.data(),
                   .dinput = dinput.data(),
                   .drecurrent = drecurrent.data(),
                   .dbias = dbias.data(),
                   .drecurrent_bias = drecurrent_bias.data(),
                   .dc0 = dc0.data(),
                   .dh0 = dh0.data(),
                   .dmask = dmask.data()};
  Threads pool;
  forward<Cell, Number>(pool, 3, f);
  backward<Cell, Number>(pool, 3, b);
  std::printf("%s%ld reverse=%d mask=%d,%d,%d", name, Number::PAIR, reverse, masked, reset_and_time_major, per_gate);
  for (const auto* values : {&y, &c, &h, &dx, &dinput, &drecurrent, &dbias, &drecurrent_bias, &dc0, &dh0, &dmask})
    std::printf(" %.6g", sum(*values));
  std::printf("\n");
}

// Words that are looked up, some of them not in the table: the final state alone is printed.
template <class Cell, class Number>
void run_words(const char* name, bool reverse) {
  constexpr long G = Cell::GATES;
  const Sizes z{7, 23, 0, 19, false};
  std::mt19937 random(2);
  std::vector<float> table(5 * G * z.units), recurrent(z.units * G * z.units), zeros(z.batch * z.units);
  for (auto* values : {&table, &recurrent})
    for (float& v : *values) v = static_cast<int>(random() % 2001) / 1000.0f - 1.0f;
  std::vector<int> words(z.batch * z.time);
  for (int& word : words) word = static_cast<int>(random() % 9) - 2;
  const std::vector<int> lengths{23, 0, 1, 22, 7, 7, 23};
  std::vector<float> y(z.batch * z.time * z.units), c(z.batch * z.units), h(z.batch * z.units), bias(z.units, 0.5f);
  const Forward f{.size = z,
                  .reverse = reverse,
                  .recurrent = recurrent.data(),
                  .recurrent_bias = bias.data(),
                  .projected = true,
                  .table = table.data(),
                  .words = words.data(),
                  .count = 5,
                  .c0 = zeros.data(),
                  .h0 = zeros.data(),
                  .lengths = lengths.data(),
                  .y = y.data(),
                  .c = c.data(),
                  .h = h.data()};
  Threads pool;
  forward<Cell, Number>(pool, 3, f);
  std::printf("%s%ld words reverse=%d %.6g %.6g %.6g\n", name, Number::PAIR, reverse, sum(y), sum(c), sum(h));
}

struct Nobody {  // a pool that is too busy
  template <class F>
  void Schedule(F&&) {}
};

struct Stopped {  // a pool whose thread is stopped for long while it works
  Threads all;
  template <class F>
  void Schedule(F&& f) {
    signal(SIGUSR1, [](int) { std::this_thread::sleep_for(std::chrono::milliseconds(100)); });
    all.threads.reserve(2);
    all.Schedule(std::forward<F>(f));
    all.Schedule([helper = all.threads[0].native_handle()] {
      std::this_thread::sleep_for(std::chrono::microseconds(300));
      pthread_kill(helper, SIGUSR1);
    });
  }
};

// One row of words: what two threads make of it together is what one does, to the bit, whether the second helps, never comes or is
// stopped. How often it helped is up to the machine: once at least.
template <class Cell>
void run_alone(const char* name, bool reverse) {
  constexpr long G = Cell::GATES;
  const Sizes z{1, 500, 0, 109, false};
  std::mt19937 random(5);
  std::vector<float> table(5 * G * z.units), recurrent(z.units * G * z.units), c0(z.units), h0(z.units), bias(z.units, 0.5f);
  for (auto* values : {&table, &recurrent, &c0, &h0})
    for (float& v : *values) v = static_cast<int>(random() % 2001) / 10000.0f - 0.1f;
  std::vector<int> words(z.time);
  for (int& word : words) word = static_cast<int>(random() % 9) - 2;
  const std::vector<int> lengths{487};
  struct Found {
    std::vector<float> y, c, h;
    bool operator==(const Found&) const = default;
  };
  const auto call = [&](auto&& run) {
    Found found{std::vector<float>(z.time * z.units, 7), std::vector<float>(z.units), std::vector<float>(z.units)};
    run(Forward{.size = z,
                .reverse = reverse,
                .recurrent = recurrent.data(),
                .recurrent_bias = bias.data(),
                .projected = true,
                .table = table.data(),
                .words = words.data(),
                .count = 5,
                .c0 = c0.data(),
                .h0 = h0.data(),
                .lengths = lengths.data(),
                .y = found.y.data(),
                .c = found.c.data(),
                .h = found.h.data()});
    return found;
  };
  const auto with = [&](auto pool, Duration patience = PATIENCE) {
    return call([&](const Forward& f) {
      trust.learn(true);
      outputs<Cell, Single>(pool, 2, f, patience);
    });
  };
  const Found expected = call([&](const Forward& f) {
    Threads pool;
    forward<Cell, Single>(pool, 1, f);
  });
  long helped = 0, tries = 0;
  bool same = with(Nobody{}) == expected && with(Stopped{}) == expected;
  for (; tries < 4 || (!helped && tries < 2000); ++tries) {
    same = same && with(Threads{}, Duration(tries % 2 ? 30'000'000 : 30'000)) == expected;
    helped += trust.asks();
  }
  std::printf("%s alone reverse=%d %d %d\n", name, reverse, same, helped > 0);
  if (!same || !helped) std::exit(1);
}

// The same with weights of 8 bits.
template <class Cell>
void run_bytes(const char* name, bool reverse) {
  constexpr long G = Cell::GATES;
  const Sizes z{7, 23, 0, 19, false};
  const long blocks = (z.units + COLUMNS - 1) / COLUMNS, depth = (z.units + DEPTH - 1) / DEPTH * DEPTH;
  std::mt19937 random(3);
  std::vector<float> table(5 * G * z.units), scales(G * z.units, 1e-4f), zeros(z.batch * z.units), bias(z.units, 0.5f);
  for (float& v : table) v = static_cast<int>(random() % 2001) / 1000.0f - 1.0f;
  std::vector<int8_t> panels(blocks * G * depth * COLUMNS);
  for (int8_t& v : panels) v = static_cast<int8_t>(static_cast<int>(random() % 255) - 127);
  std::vector<int> words(z.batch * z.time);
  for (int& word : words) word = static_cast<int>(random() % 9) - 2;
  const std::vector<int> lengths{23, 0, 1, 22, 7, 7, 23};
  std::vector<float> y(z.batch * z.time * z.units), c(z.batch * z.units), h(z.batch * z.units);
  const Bytes f{.size = z,
                .reverse = reverse,
                .words = words.data(),
                .table = table.data(),
                .count = 5,
                .depth = depth,
                .panels = panels.data(),
                .scales = scales.data(),
                .recurrent_bias = bias.data(),
                .c0 = zeros.data(),
                .h0 = zeros.data(),
                .lengths = lengths.data(),
                .y = y.data(),
                .c = c.data(),
                .h = h.data()};
  Threads pool;
  forward_bytes<Cell>(pool, 3, f);
  std::printf("%s bytes reverse=%d %.6g %.6g %.6g\n", name, reverse, sum(y), sum(c), sum(h));
}

// An update of a table of embeddings: words that come twice, some that are none.
void run_table() {
  const long V = 11, F = 19, N = 40;
  std::mt19937 random(4);
  std::vector<float> values(N * F), sums(N * F), p(V * F), m(V * F), v(V * F, 0.5f);
  for (auto* all : {&values, &p, &m})
    for (float& x : *all) x = static_cast<int>(random() % 2001) / 1000.0f - 1.0f;
  std::vector<int> ids(N), found(N);
  for (int& id : ids) id = static_cast<int>(random() % 16) - 2;
  {
    Threads pool;
    add_up(pool, 3, ids.data(), values.data(), N, V, F, found.data(), sums.data());
  }
  Threads pool;
  const Adam adam{0.5f, 0.1f, 0.01f, 0.9f, 0.999f, 10.0f, 1000.0f, 1e-6f};
  update_table(pool, 3, adam, found.data(), sums.data(), N, V, F, p.data(), m.data(), v.data());
  std::vector<float> taken(N * F);
  take(pool, 3, p.data(), ids.data(), N, V, F, taken.data());
  for (float& x : taken) x = x == x ? x : 3;  // of words that are none
  std::printf("table reverse=0 %.6g %.6g %.6g %.6g %.6g\n", sum(sums), sum(p), sum(m), sum(v), sum(taken));
}

template <class Cell>
void run(const char* name, bool reverse, bool masked, bool reset_and_time_major) {
  run_one<Cell, Single>(name, reverse, masked, reset_and_time_major);
  run_one<Cell, Half>(name, reverse, masked, reset_and_time_major);
  if (masked) {
    run_one<Cell, Single>(name, reverse, masked, reset_and_time_major, true);
    run_one<Cell, Half>(name, reverse, masked, reset_and_time_major, true);
  }
  if (masked && reset_and_time_major) {
    run_words<Cell, Single>(name, reverse);
    run_words<Cell, Half>(name, reverse);
    run_bytes<Cell>(name, reverse);
    run_alone<Cell>(name, reverse);
  }
}

int main() {
  for (bool reverse : {false, true})
    for (bool masked : {false, true})
      for (bool reset_and_time_major : {false, true}) {
        run<Lstm>("lstm", reverse, masked, reset_and_time_major);
        run<Gru>("gru", reverse, masked, reset_and_time_major);
        run<Rnn>("rnn", reverse, masked, reset_and_time_major);
      }
  run_table();
}
