// SPDX-License-Identifier: Apache-2.0
// What one thread of this machine does at most: multiplications and additions in registers, and bytes read and written in
// arrays of a given size. Compiled by the build of the recurrent kernel, with the same flags: LANES floats in a vector.

#include <algorithm>
#include <chrono>
#include <cstring>

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

namespace {

using Vec = float __attribute__((vector_size(4 * LANES)));
using Clock = std::chrono::steady_clock;

constexpr long SUMS = 12;  // independent, so that none waits for the one before: twice as many as the longest pipeline is deep

// The best rate of turns of `run`, which does `work` in each, over so many seconds: whatever else the machine does in some
// of them does not count.
template <class Run>
double best_rate(double seconds, double work, const Run& run) {
  double best = 0;
  for (const auto begin = Clock::now(); std::chrono::duration<double>(Clock::now() - begin).count() < seconds;) {
    const auto from = Clock::now();
    run();
    best = std::max(best, work / std::chrono::duration<double>(Clock::now() - from).count());
  }
  return best;
}

// Keeps a value: the compiler must compute it, and knows nothing of it afterwards.
template <class T>
void keep(T& value) {
  asm volatile("" : "+m"(value) : : "memory");
}

template <class Value, class Step>
double arithmetic(double seconds, double flops_a_step, const Step& step) {
  constexpr long STEPS = 100'000;
  Value sum[SUMS] = {};
  return best_rate(seconds, flops_a_step * SUMS * STEPS, [&] {
    Value now[SUMS];
    std::memcpy(now, sum, sizeof now);
    for (long k = 0; k < STEPS; ++k)
      for (long i = 0; i < SUMS; ++i) now[i] = step(now[i]);
    std::memcpy(sum, now, sizeof now);
    keep(sum);
  });
}

}  // namespace

extern "C" double multiply_add_rate(double seconds) {  // float32, operations a second
  Vec factor = Vec{} + 0.5f, term = Vec{} + 1.0f;
  keep(factor), keep(term);
  return arithmetic<Vec>(seconds, 2.0 * LANES, [=](Vec sum) { return sum * factor + term; });
}

extern "C" double bfloat16_rate(double seconds) {  // operations a second; 0 where there is no instruction for it
#ifdef __AVX512BF16__
  __m512bh a, b;
  std::memset(&a, 0, sizeof a), std::memset(&b, 0, sizeof b);
  keep(a), keep(b);
  return arithmetic<__m512>(seconds, 4.0 * LANES, [=](__m512 sum) { return _mm512_dpbf16_ps(sum, a, b); });
#else
  return 0 * seconds;
#endif
}

extern "C" double update_rate(float* data, long floats, double seconds) {  // bytes read and written a second
  float factor = 1.0f;
  keep(factor);
  return best_rate(seconds, 8.0 * floats, [&] {
    for (long i = 0; i < floats; ++i) data[i] *= factor;
    keep(*data);
  });
}
