// Weights (N, K) with rows of unit stride: each output is a dot product along K.
#pragma once

#include "work.h"

namespace fixpass {

// Steps of a row of W, 2 KiB, that are summed on their own. Sums of blocks are added up, which
// rounds less than one long sum.
template <class E>
constexpr int64_t kBlock = 2048 / (E::kStep * int64_t(sizeof(typename E::T)));
// While x takes at most kNearBytes of the first cache, one row of W at a time is read as fast as
// memory gives it. The prefetch of that row is kAheadBytes ahead.
constexpr int64_t kNearBytes = 20 << 10, kAheadBytes = 10 << 10;

// kM rows of x by kN rows of W over `steps` steps, added to `totals`; kAhead rows are prefetched.
// `hold` keeps a vector in a register: the compiler would load it again for each product.
template <class E, int kM, int kN, int kAhead>
static __attribute__((noinline)) void add_steps(Floats (*totals)[kN], const typename E::T* const* w,
                                                const typename E::X* x, int64_t steps,
                                                const typename E::T* const* ahead) {
  for (int64_t s = 0; s < steps;) {
    const int64_t end = std::min(s + kBlock<E>, steps);
    Floats sums[kM][kN] = {};
    for (; s < end; ++s) {
      typename E::Loaded rows[kN];
#pragma GCC unroll 8
      for (int n = 0; n < kAhead; ++n) __builtin_prefetch(ahead[n] + s * E::kStep);
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) {
        rows[n] = E::load(w[n] + s * E::kStep);
        if (kAhead < kN) E::hold(rows[n]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
        auto part = E::load_x(x + (s * kM + m) * E::kStep);
        if (kN > 1) E::hold(part);
#pragma GCC unroll 8
        for (int n = 0; n < kN; ++n) sums[m][n] = E::add(sums[m][n], rows[n], part);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 8
      for (int n = 0; n < kN; ++n) totals[m][n] += sums[m][n];
    }
  }
}

template <class E, int kN, int kAhead, class... Args>
static FIXPASS_INLINE void add_steps_of(int64_t rows_of_x, Args... args) {
  switch (rows_of_x) {
    case 1: return add_steps<E, 1, kN, kAhead>(args...);
    case 2: return add_steps<E, 2, kN, kAhead>(args...);
    case 3: return add_steps<E, 3, kN, kAhead>(args...);
    default: return add_steps<E, 4, kN, kAhead>(args...);
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

// kN rows of W by all of x. A block of W stays in the cache while the tiles of x pass over it, and
// each tile prefetches a part of the next block.
template <class E, int kN, int kTiles>
static void multiply_group(const Work& work, const Matrix& matrix, int64_t row,
                           Floats (*totals)[kN]) {
  using T = typename E::T;
  constexpr int kAhead = (kN + kTiles - 1) / kTiles;
  const int64_t steps = work.depth / E::kStep, rest = work.depth % E::kStep;
  const auto* x = static_cast<const typename E::X*>(work.x);
  const T *rows[kN], *ahead[kTiles * kAhead];
  for (int64_t m = 0; m < work.rows; ++m) {
    for (int n = 0; n < kN; ++n) totals[m][n] = Floats{};
  }
  const auto pass = [&](int64_t step, int64_t count) {
    for (int tile = 0; tile < kTiles; ++tile) {
      const int64_t m = work.first_row(tile), size = work.first_row(tile + 1) - m;
      const auto* part = x + m * work.padded + step * size * E::kStep;
      add_steps_of<E, kN, kAhead>(size, totals + m, rows, part, count, ahead + tile * kAhead);
    }
  };
  for (int64_t step = 0; step < steps;) {
    // One tile takes all blocks but the last in one call.
    const int64_t left = steps - step;
    const int64_t most = kTiles > 1 ? kBlock<E> : (left - 1) / kBlock<E> * kBlock<E>;
    const int64_t count = kN == 1 ? left : std::min(left, std::max(most, kBlock<E>));
    const int64_t next = step + kBlock<E>;
    point_at<E>(rows, kN, matrix, row, step * E::kStep);
    if (kN == 1) {
      ahead[0] = rows[0] + kAheadBytes / int64_t(sizeof(T));
    } else {
      point_at<E>(ahead, kTiles * kAhead, matrix, next < steps ? row : row + kN,
                  next < steps ? next * E::kStep : 0);
    }
    pass(step, count);
    step += count;
  }
  if (rest == 0) return;
  alignas(64) T padded[kN][E::kStep] = {};
  point_at<E>(rows, kN, matrix, row, steps * E::kStep);
  point_at<E>(ahead, kTiles * kAhead, matrix, row, 0);
  for (int n = 0; n < kN; ++n) {
    __builtin_memcpy(padded[n], rows[n], rest * sizeof(T));
    rows[n] = padded[n];
  }
  pass(steps, 1);
}

// Rows `begin` to `end` of a weight (N, K), kN at once.
template <class E, int kN>
static void multiply_by(const Work& work, const Matrix& matrix, int64_t begin, int64_t end) {
  Floats totals[kMaxRows][kN];
  for (int64_t row = begin; row < end; row += kN) {
    switch (kN == 1 ? 1 : work.tiles) {
      case 1: multiply_group<E, kN, 1>(work, matrix, row, totals); break;
      case 2: multiply_group<E, kN, 2>(work, matrix, row, totals); break;
      case 3: multiply_group<E, kN, 3>(work, matrix, row, totals); break;
      default: multiply_group<E, kN, 4>(work, matrix, row, totals);
    }
    const int64_t count = std::min<int64_t>(kN, matrix.size - row);
    for (int64_t m = 0; m < work.rows; ++m) {
      for (int64_t n = 0; n < count; ++n) {
        const auto* lanes = reinterpret_cast<const float*>(&totals[m][n]);
        put<E>(matrix, m, row + n, sum_lanes<kLanes>(lanes));
      }
    }
  }
}

// Groups `begin` to `end` of kRows rows each of a weight (N, K).
template <class E>
static void multiply_groups(const Work& work, const Matrix& matrix, int64_t begin, int64_t end) {
  const int64_t first = begin * E::kRows, last = std::min(end * E::kRows, matrix.size);
  const int64_t bytes = work.rows * work.padded * int64_t(sizeof(typename E::X));
  if (work.tiles == 1 && bytes <= kNearBytes) return multiply_by<E, 1>(work, matrix, first, last);
  multiply_by<E, E::kRows>(work, matrix, first, last);
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
