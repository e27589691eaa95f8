// SPDX-License-Identifier: Apache-2.0
// The update of a table of embeddings by AdamW (Loshchilov & Hutter 2019), whose gradient is given as rows of it: what was looked
// up. Sizes: V rows of F numbers, N looked up.
//
// A table's gradient is zeros but for the few rows of a batch. Written out, it is filled, added to, measured and read in passes of
// their own; so is each moment. Here the rows are added up, and then one pass goes over the table and both moments. Rows that
// nobody looked up move, too, for their moments live on: this is Adam, not an approximation of it.

#pragma once

#include <cmath>
#include <limits>

#include "kernel.h"

namespace flax_lstm {

// found: the different ids in increasing order, then V where there were fewer than N. sums[n]: the sum of the values that belong
// to found[n], in their order, then zeros. An id that is none counts for nothing.
template <class Pool>
void add_up(Pool& pool, long threads, const int* ids, const float* values, long N, long V, long F, int* found, float* sums) {
  std::vector<int> first(V + 1, 0), order(N);  // of every id its first place in the order, which is that of ids
  const auto known = [&](long n) { return ids[n] >= 0 && ids[n] < V; };
  for (long n = 0; n < N; ++n)
    if (known(n)) ++first[ids[n] + 1];
  std::partial_sum(first.begin(), first.end(), first.begin());
  std::vector<int> next(first.begin(), first.end() - 1);
  for (long n = 0; n < N; ++n)
    if (known(n)) order[next[ids[n]]++] = n;
  long count = 0;
  for (long id = 0; id < V; ++id)
    if (first[id + 1] > first[id]) found[count++] = id;
  std::fill(found + count, found + N, V);
  // Each thread adds up as many values as the others. Where the next ones lie, the processor cannot foresee.
  constexpr int AHEAD = 2;
  const auto until = [&](long part) {  // rows found whose values begin before that part of all
    const auto begins = [&](int id, long at) { return first[id] < at; };
    return std::lower_bound(found, found + count, first[V] * part / threads, begins) - found;
  };
  parallel(pool, threads, [&](long part) {
    for (long n = until(part), end = until(part + 1); n < end; ++n) {
      float* sum = sums + n * F;
      std::fill(sum, sum + F, 0.0f);
      for (int at = first[found[n]]; at < first[found[n] + 1]; ++at) {
        const float *value = values + order[at] * F, *next = values + order[std::min<long>(at + AHEAD, N - 1)] * F;
        for (long i = 0; i < F; i += LINE) __builtin_prefetch(next + i);
        for (long i = 0; i < F; ++i) sum[i] += value[i];
      }
    }
    std::fill(sums + (count + (N - count) * part / threads) * F, sums + (count + (N - count) * (part + 1) / threads) * F, 0.0f);
  });
}

// The rows of a table that ids name, counted from its end if negative; not a number where they name none, as `jax.numpy.take` has it.
template <class Pool>
void take(Pool& pool, long threads, const float* table, const int* ids, long N, long V, long F, float* out) {
  constexpr long AHEAD = 4;
  const auto row = [&](long n) { return ids[n] < 0 ? ids[n] + V : ids[n]; };
  share_out(pool, threads, N, N * F, [&](long n) {
    const long next = std::clamp<long>(row(std::min(n + AHEAD, N - 1)), 0, V - 1);
    for (long i = 0; i < F; i += LINE) __builtin_prefetch(table + next * F + i);
    const bool known = row(n) >= 0 && row(n) < V;
    if (known) std::copy(table + row(n) * F, table + (row(n) + 1) * F, out + n * F);
    else std::fill(out + n * F, out + (n + 1) * F, std::numeric_limits<float>::quiet_NaN());
  });
}

struct Adam {
  float scale;              // of the gradient, after clipping
  float rate, decay;        // learning rate, weight decay
  float first, second;      // how much of the moments is kept
  float unbias_first, unbias_second;  // 1 / (1 - first ** updates), and so on
  float epsilon;
};

// g: null for zeros. By value, and nothing overlaps: only so do compilers see that entries are independent.
template <bool ZEROS>
void update(const Adam a, long F, const float* __restrict g, float* __restrict p, float* __restrict m, float* __restrict v) {
  const float fresh = 1 - a.first, fresh_square = 1 - a.second;
  for (long i = 0; i < F; ++i) {
    const float gradient = ZEROS ? 0.0f : a.scale * g[i];
    const float first = a.first * m[i] + fresh * gradient;
    const float second = a.second * v[i] + fresh_square * gradient * gradient;
    const float step = first * a.unbias_first / (std::sqrt(second * a.unbias_second) + a.epsilon);
    m[i] = first;
    v[i] = second;
    p[i] -= a.rate * (step + a.decay * p[i]);
  }
}

// One update of the table p and its moments, all [V,F]. found, sums: of `add_up`, N of them.
template <class Pool>
void update_table(Pool& pool, long threads, const Adam& a, const int* found, const float* sums, long N, long V, long F, float* p,
                  float* m, float* v) {
  parallel(pool, threads, [&](long part) {
    const long begin = V * part / threads, end = V * (part + 1) / threads;
    long n = std::lower_bound(found, found + N, begin) - found;
    for (long row = begin; row < end; ++row) {
      const long at = row * F;
      if (n < N && found[n] == row)
        update<false>(a, F, sums + n++ * F, p + at, m + at, v + at);
      else
        update<true>(a, F, nullptr, p + at, m + at, v + at);
    }
  });
}

}  // namespace flax_lstm
