// Weights (K, N) with rows of unit stride: rows of W, scaled by elements of x, are added up.
#pragma once

#include "work.h"

namespace fixpass {

// Steps of columns at once, as registers allow.
template <class E>
constexpr int kColumnVectors = (kRegisterRows > 4 ? 4 : 2) / E::kParts;

// kM rows of x by kVectors steps of columns of W, over `depth` rows of W.
template <class E, int kM, int kVectors>
static __attribute__((noinline)) void add_rows(Floats (*totals)[kVectors * E::kParts],
                                               const typename E::T* w, int64_t pitch,
                                               const float* x, int64_t depth, int64_t ahead) {
  constexpr int kSums = kVectors * E::kParts;
  Floats sums[kM][kSums] = {};
  for (int64_t k = 0; k < depth; ++k, w += pitch) {
    Floats loaded[kSums];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      const auto part = E::load(w + v * E::kStep);
#pragma GCC unroll 2
      for (int p = 0; p < E::kParts; ++p) loaded[v * E::kParts + p] = part.part[p];
      if (ahead) __builtin_prefetch(w + ahead + v * E::kStep);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      Floats all = x[k * kM + m] - Floats{};
      FIXPASS_HOLD(all);
#pragma GCC unroll 8
      for (int v = 0; v < kSums; ++v) sums[m][v] += loaded[v] * all;
    }
  }
  // Sums of blocks are added up, which rounds less than one long sum.
  for (int m = 0; m < kM; ++m) {
    for (int v = 0; v < kSums; ++v) totals[m][v] += sums[m][v];
  }
}

// Groups `begin` to `end` of kVectors steps of columns each of a weight (K, N). Some groups side by
// side share the walk down the rows, so that each row is read in longer pieces.
template <class E>
static void multiply_columns(const Work& work, const Matrix& matrix, int64_t begin, int64_t end) {
  using T = typename E::T;
  constexpr int kVectors = kColumnVectors<E>, kWidth = kVectors * E::kStep;
  constexpr int kSums = kVectors * E::kParts;
  constexpr int64_t kSide = 2048 / (kWidth * int64_t(sizeof(T))), kBlock = 128;
  constexpr int64_t kRowsAhead = 32;
  const auto* x = static_cast<const float*>(work.x);
  Floats totals[kSide][kMaxRows][kSums];
  for (int64_t first = begin; first < end; first += kSide) {
    const int64_t last = std::min(first + kSide, end);
    for (auto& group : totals) {
      for (auto& row : group) {
        for (auto& sum : row) sum = Floats{};
      }
    }
    for (int64_t k = 0; k < work.depth; k += kBlock) {
      const int64_t depth = std::min(kBlock, work.depth - k);
      for (int64_t group = first; group < last; ++group) {
        const int64_t column = group * kWidth, width = matrix.size - column;
        const T* w = static_cast<const T*>(matrix.weight) + k * matrix.pitch + column;
        int64_t pitch = matrix.pitch;
        alignas(64) T padded[kBlock][kWidth];
        if (width < kWidth) {
          for (int64_t i = 0; i < depth; ++i) {
            __builtin_memset(padded[i], 0, sizeof(padded[i]));
            __builtin_memcpy(padded[i], w + i * pitch, width * sizeof(T));
          }
          w = padded[0], pitch = kWidth;
        }
        for (int tile = 0; tile < work.tiles; ++tile) {
          const int64_t m = work.first_row(tile), size = work.first_row(tile + 1) - m;
          const float* part = x + m * work.padded + k * size;
          const int64_t ahead = tile == 0 && width >= kWidth ? kRowsAhead * pitch : 0;
          auto* sums = totals[group - first] + m;
          switch (size) {
            case 1: add_rows<E, 1, kVectors>(sums, w, pitch, part, depth, ahead); break;
            case 2: add_rows<E, 2, kVectors>(sums, w, pitch, part, depth, ahead); break;
            case 3: add_rows<E, 3, kVectors>(sums, w, pitch, part, depth, ahead); break;
            default: add_rows<E, 4, kVectors>(sums, w, pitch, part, depth, ahead);
          }
        }
      }
    }
    for (int64_t group = first; group < last; ++group) {
      for (int64_t m = 0; m < work.rows; ++m) {
        const auto* sums = reinterpret_cast<const float*>(totals[group - first][m]);
        for (int i = 0; i < kWidth; ++i) {
          const int64_t column = group * kWidth + i / E::kStep * E::kStep + E::spread(i % E::kStep);
          if (column < matrix.size) put<E>(matrix, m, column, sums[i]);
        }
      }
    }
  }
}

// x as floats, those beside one row of W side by side.
template <class E>
static void pack_for_columns(const void* from, int64_t pitch, const Work& work, void* to) {
  for (int tile = 0; tile < work.tiles; ++tile) {
    const int64_t first = work.first_row(tile), size = work.first_row(tile + 1) - first;
    for (int64_t m = 0; m < size; ++m) {
      const auto* row = static_cast<const typename E::T*>(from) + (first + m) * pitch;
      auto* out = static_cast<float*>(to) + first * work.padded + m;
      for (int64_t k = 0; k < work.depth; ++k) out[k * size] = E::to_float(row[k]);
    }
  }
}

}  // namespace fixpass
