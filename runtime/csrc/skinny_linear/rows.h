// Weights (N, K) with rows of unit stride: each output is a dot product along K.
#pragma once

#include "work.h"

namespace fixpass {

// kM rows of x by kN rows of W over `steps` steps, and a prefetch of `kAhead` other rows.
template <class E, int kM, int kN, int kAhead>
static FIXPASS_INLINE void multiply_rows(Floats (&sums)[kM][kN], const typename E::T* const* w,
                                         const typename E::X* x, int64_t steps,
                                         const typename E::T* const* ahead) {
  for (int64_t s = 0; s < steps; ++s) {
    typename E::Loaded rows[kN];
#pragma GCC unroll 8
    for (int n = 0; n < kAhead; ++n) __builtin_prefetch(ahead[n] + s * E::kStep);
#pragma GCC unroll 8
    for (int n = 0; n < kN; ++n) rows[n] = E::load(w[n] + s * E::kStep);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      auto part = E::load_x(x + (s * kM + m) * E::kStep);
      E::hold(part);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) sums[m][n] = E::add(sums[m][n], rows[n], part);
    }
  }
}

// Pointers to `count` rows of W, each at one element. Rows past the last one repeat it.
template <class E>
static FIXPASS_INLINE void point_at(const typename E::T** rows, int count, const Matrix& matrix,
                                    int64_t row, int64_t element) {
  const auto* weight = static_cast<const typename E::T*>(matrix.weight);
  for (int i = 0; i < count; ++i) {
    rows[i] = weight + std::min(row + i, matrix.size - 1) * matrix.pitch + element;
  }
}

// The next steps of a tile of kM rows of x and kRows of W; `totals` carries its sums.
template <class E, int kM, int kAhead>
static __attribute__((noinline)) void add_steps(Floats (*totals)[E::kRows],
                                                const typename E::T* const* w,
                                                const typename E::X* x, int64_t steps,
                                                const typename E::T* const* ahead) {
  Floats sums[kM][E::kRows];
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < E::kRows; ++n) sums[m][n] = totals[m][n];
  }
  multiply_rows<E, kM, E::kRows, kAhead>(sums, w, x, steps, ahead);
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < E::kRows; ++n) totals[m][n] = sums[m][n];
  }
}

template <class E, int kAhead, class... Args>
static FIXPASS_INLINE void add_steps_of(int64_t rows_of_x, Args... args) {
  switch (rows_of_x) {
    case 1: return add_steps<E, 1, kAhead>(args...);
    case 2: return add_steps<E, 2, kAhead>(args...);
    case 3: return add_steps<E, 3, kAhead>(args...);
    default: return add_steps<E, 4, kAhead>(args...);
  }
}

// kRows rows of W by all of x. Of few rows of x each row of W is read in one go. For more, W is read
// in blocks that stay in the cache while the tiles of x pass over them, and each tile prefetches a
// part of the next block.
template <class E, int kTiles>
static void multiply_group(const Work& work, const Matrix& matrix, int64_t row,
                           Floats (*totals)[E::kRows]) {
  using T = typename E::T;
  constexpr int kRows = E::kRows, kAhead = (kRows + kTiles - 1) / kTiles;
  constexpr int64_t kBlock = (kTiles == 1 ? 1024 : 2048) / (E::kStep * int64_t(sizeof(T)));
  const int64_t steps = work.depth / E::kStep, rest = work.depth % E::kStep;
  const auto* x = static_cast<const typename E::X*>(work.x);
  const T *rows[kRows], *ahead[kTiles * kAhead];
  for (int64_t m = 0; m < work.rows; ++m) {
    for (int n = 0; n < kRows; ++n) totals[m][n] = Floats{};
  }
  for (int64_t step = 0; step < steps;) {
    const int64_t left = steps - step;
    const int64_t count = kTiles > 1 || left <= kBlock ? std::min(kBlock, left) : left - kBlock;
    const int64_t next = step + (kTiles > 1 ? count : kBlock);
    point_at<E>(rows, kRows, matrix, row, step * E::kStep);
    point_at<E>(ahead, kTiles * kAhead, matrix, next < steps ? row : row + kRows,
                next < steps ? next * E::kStep : 0);
    for (int tile = 0; tile < kTiles; ++tile) {
      const int64_t m = work.first_row(tile), size = work.first_row(tile + 1) - m;
      add_steps_of<E, kAhead>(size, totals + m, rows, x + m * work.padded + step * size * E::kStep,
                              count, ahead + tile * kAhead);
    }
    step += count;
  }
  if (rest == 0) return;
  alignas(64) T padded[kRows][E::kStep] = {};
  point_at<E>(rows, kRows, matrix, row, steps * E::kStep);
  for (int n = 0; n < kRows; ++n) {
    __builtin_memcpy(padded[n], rows[n], rest * sizeof(T));
    rows[n] = padded[n];
  }
  for (int tile = 0; tile < kTiles; ++tile) {
    const int64_t m = work.first_row(tile), size = work.first_row(tile + 1) - m;
    add_steps_of<E, kAhead>(size, totals + m, rows, x + m * work.padded + steps * size * E::kStep,
                            int64_t(1), rows);
  }
}

// Groups `begin` to `end` of kRows rows each of a weight (N, K).
template <class E>
static void multiply_groups(const Work& work, const Matrix& matrix, int64_t begin, int64_t end) {
  Floats totals[kMaxRows][E::kRows];
  for (int64_t row = begin * E::kRows; row < std::min(end * E::kRows, matrix.size); row += E::kRows) {
    switch (work.tiles) {
      case 1: multiply_group<E, 1>(work, matrix, row, totals); break;
      case 2: multiply_group<E, 2>(work, matrix, row, totals); break;
      case 3: multiply_group<E, 3>(work, matrix, row, totals); break;
      default: multiply_group<E, 4>(work, matrix, row, totals);
    }
    const int count = int(std::min<int64_t>(E::kRows, matrix.size - row));
    for (int64_t m = 0; m < work.rows; ++m) {
      for (int n = 0; n < count; ++n) put<E>(matrix, m, row + n, sum_lanes<kLanes>(reinterpret_cast<const float*>(&totals[m][n])));
    }
  }
}

// x in the order in which tiles of kM rows read it, padded with zeros to whole steps.
template <class E>
static void pack_for_rows(const void* from, int64_t pitch, const Work& work, void* to) {
  using T = typename E::T;
  const int64_t steps = work.depth / E::kStep, rest = work.depth % E::kStep;
  for (int tile = 0; tile < work.tiles; ++tile) {
    const int64_t first = work.first_row(tile), size = work.first_row(tile + 1) - first;
    for (int64_t m = 0; m < size; ++m) {
      const T* row = static_cast<const T*>(from) + (first + m) * pitch;
      auto* out = static_cast<typename E::X*>(to) + first * work.padded + m * E::kStep;
      for (int64_t s = 0; s < steps; ++s) E::store_x(out + s * size * E::kStep, E::load(row + s * E::kStep));
      if (rest == 0) continue;
      alignas(64) T padded[E::kStep] = {};
      __builtin_memcpy(padded, row + steps * E::kStep, rest * sizeof(T));
      E::store_x(out + steps * size * E::kStep, E::load(padded));
    }
  }
}

}  // namespace fixpass
