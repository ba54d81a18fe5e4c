// Which thread of a block takes which columns of a row, and how the block's partial results are joined. The columns of
// a thread depend on the column number alone, never on the row's address: a row's bits do not depend on its alignment,
// its stride, its index or its neighbours.
//
// A block algorithm is written in phases: block.each(f) runs f(thread) in every thread, then a barrier. On the device
// the threads run f together; the host build runs them one after another, which is the same program.
#pragma once
#include "oreal_core.h"
#include "oreal_loss.h"

namespace oreal {

template <class E, bool ALIGNED>
struct Row {
  E* data;

  OR_FN E get(int64_t column) const { return data[column]; }
  OR_FN void put(int64_t column, E e) const { data[column] = e; }

  OR_FN Group<E> load(int64_t group) const {
    Group<E> g;
    if constexpr (ALIGNED) {
      load_vectors(g, data + group * kGroup);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) g.set_element(i, data[group * kGroup + i]);
    }
    return g;
  }

  // The first `count` < 8 columns of a group, the others masked.
  OR_FN Group<E> load_part(int64_t group, int count) const {
    Group<E> g;
#pragma unroll
    for (int i = 0; i < kGroup; ++i)
      g.set_element(i, i < count ? data[group * kGroup + i] : Group<E>::floor_element());
    return g;
  }

  OR_FN void store(int64_t group, const Group<E>& g) const {
    if constexpr (ALIGNED) {
      store_vectors(data + group * kGroup, g);
    } else {
#pragma unroll
      for (int i = 0; i < kGroup; ++i) data[group * kGroup + i] = g.element(i);
    }
  }
};

// ---- statistics -----------------------------------------------------------------------------------------------------

// What one thread sees of a row of `columns` valid columns.
template <int THREADS, int UNROLL, class E, bool ALIGNED>
OR_FN Statistics thread_statistics(int thread, const Row<E, ALIGNED>& row, int64_t columns, float s2) {
  Statistics s = no_columns();
  const int groups = static_cast<int>(columns / kGroup), rest = static_cast<int>(columns % kGroup);
  int g = thread;
  for (; g < groups - (UNROLL - 1) * THREADS; g += UNROLL * THREADS) {
    Group<E> v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) v[u] = row.load(g + u * THREADS);
    fold(s, v, s2);
  }
  if (g < groups) {  // fewer than UNROLL groups: all their loads first, too
    Group<E> v[UNROLL][1];
#pragma unroll
    for (int u = 0; u < UNROLL - 1; ++u)
      if (g + u * THREADS < groups) v[u][0] = row.load(g + u * THREADS);
#pragma unroll
    for (int u = 0; u < UNROLL - 1; ++u)
      if (g + u * THREADS < groups) fold(s, v[u], s2);
  }
  if (rest != 0 && thread == groups % THREADS) {
    Group<E> v[1] = {row.load_part(groups, rest)};
    fold(s, v, s2);
  }
  return s;
}

struct StatisticsArguments {
  OrealLogits logits;
  int64_t columns;  // valid ones of this shard
  float s2;
  const int64_t* labels;
  const uint8_t* active;
  Statistics* out;
  int32_t* status;
};

// The label's logit: NaN for a label that is nobody's, -inf for another shard's.
template <class Block, class E, bool ALIGNED>
OR_FN float label_logit(Block& block, const StatisticsArguments& a, const Row<E, ALIGNED>& row, int64_t index) {
  const int64_t label = a.labels[index], column = label - a.logits.vocab_start;
  if (label < 0 || label >= a.logits.vocab_size) {
    if (a.status != nullptr) block.set_bit(a.status, OREAL_LABEL_OUTSIDE);
    return quiet_nan();
  }
  return column >= 0 && column < a.columns ? Group<E>::load(row.get(column)) : -INFINITY;
}

template <int THREADS, int UNROLL, class E, bool ALIGNED, class Block>
OR_FN void block_statistics(Block& block, Statistics* shared, const StatisticsArguments& a, int64_t index) {
  if (a.active != nullptr && a.active[index] == 0) {
    block.one([&] { a.out[index] = Statistics{0.f, 1.f, 0.f, 0.f}; });
    return;
  }
  const Row<E, ALIGNED> row{static_cast<E*>(a.logits.data) + index * a.logits.stride};
  block.each([&](int thread) {
    // the last thread has the least to do, and its two dependent loads overlap the others' work
    const float xy = thread == THREADS - 1 ? label_logit(block, a, row, index) : -INFINITY;
    Statistics s = thread_statistics<THREADS, UNROLL>(thread, row, a.columns, a.s2);
    s.xy = xy;
    shared[thread] = s;
  });
  block.warp([&](int lane) {
    Statistics s = shared[lane];
#pragma unroll
    for (int other = 32; other < THREADS; other += 32) s = merge(s, shared[lane + other], a.s2);
    shared[lane] = s;
  });
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    block.warp([&](int lane) {
      if (lane < half) shared[lane] = merge(shared[lane], shared[lane + half], a.s2);
    });
  }
  block.one([&] {
    Statistics s = shared[0];
    if (s.m <= kFloor) s = Statistics{-INFINITY, 0.f, 0.f, s.xy};
    a.out[index] = s;
  });
}

// ---- gradient -------------------------------------------------------------------------------------------------------

struct GradientArguments {
  OrealLogits logits;
  int64_t columns;
  float s2, inverse_temperature;
  const int64_t* labels;
  const Statistics* state;  // (m, d, g, logp)
  const double* grad_out;
};

OR_FN RowGradient row_gradient(const GradientArguments& a, int64_t index) {
  const Statistics state = a.state[index];
  RowGradient r;
  r.m = state.m;
  r.s2 = a.s2;
  r.logp = state.xy;
  r.factor = state.t * (a.grad_out != nullptr ? static_cast<float>(a.grad_out[0]) : 1.f) * a.inverse_temperature;
  r.k = -r.factor / state.d;
  const int64_t column = a.labels[index] - a.logits.vocab_start;
  r.label = column >= 0 && column < a.columns ? column : -1;
  return r;
}

// Columns from group `first` on: those below `columns` get their gradient, the rest of the width 0.
template <int THREADS, class E, bool ALIGNED>
OR_FN void thread_gradient_end(
    int thread, const Row<E, ALIGNED>& row, const RowGradient& r, int64_t first, int64_t columns, int64_t width) {
  const Group<E> zero{};
  for (int64_t g = first + thread; g * kGroup < width; g += THREADS) {
    const int64_t column = g * kGroup;
    if (column >= columns && column + kGroup <= width) {
      row.store(g, zero);
      continue;
    }
    for (int64_t c = column; c < column + kGroup && c < width; ++c) {
      float x = 0.f;
      if (c < columns) x = c == r.label ? label_entry(r) : column_entry(r, Group<E>::load(row.get(c)));
      row.put(c, Group<E>::store(x));
    }
  }
}

template <int THREADS, int UNROLL, class E, bool ALIGNED>
OR_FN void thread_gradient(int thread, const Row<E, ALIGNED>& row, const GradientArguments& a, const RowGradient& r) {
  if (r.factor == 0.f) {
    thread_gradient_end<THREADS>(thread, row, r, 0, 0, a.logits.width);
    return;
  }
  const int groups = static_cast<int>(a.columns / kGroup);
  int g = thread;
  for (; g < groups - (UNROLL - 1) * THREADS; g += UNROLL * THREADS) {
    Group<E> v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) v[u] = row.load(g + u * THREADS);
#pragma unroll
    for (int u = 0; u < UNROLL; ++u) row.store(g + u * THREADS, gradient_group(r, v[u]));
  }
  if (g < groups) {
    Group<E> v[UNROLL];
#pragma unroll
    for (int u = 0; u < UNROLL - 1; ++u)
      if (g + u * THREADS < groups) v[u] = row.load(g + u * THREADS);
#pragma unroll
    for (int u = 0; u < UNROLL - 1; ++u)
      if (g + u * THREADS < groups) row.store(g + u * THREADS, gradient_group(r, v[u]));
  }
  // The thread that has stored the label's group stores the label again: one thread's stores stay in order.
  const int64_t label_group = r.label / kGroup;
  if (r.label >= 0 && label_group < groups && label_group % THREADS == thread)
    row.put(r.label, Group<E>::store(label_entry(r)));
  thread_gradient_end<THREADS>(thread, row, r, groups, a.columns, a.logits.width);
}

}  // namespace oreal
