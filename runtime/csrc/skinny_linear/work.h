// The operands as the kernels get them.
#pragma once

#include <algorithm>
#include <cstdint>

#include "elements.h"

namespace fixpass {

constexpr int64_t kMaxRows = 16, kTileRows = 4;

// x of `rows` by `depth`, packed in `tiles` tiles of at most kTileRows rows. `padded`: K in whole
// steps.
struct Work {
  const void* x;
  int64_t rows, depth, padded;
  int tiles;

  int64_t first_row(int tile) const {
    return tile * (rows / tiles) + std::min<int64_t>(tile, rows % tiles);
  }
};

// A weight with N = `size`, its bias (or null) and its output. `pitch`: elements from one row of the
// weight's memory to the next.
struct Matrix {
  const void* weight;
  int64_t size, pitch;
  const void* bias;
  int64_t bias_stride;
  void* out;
};

template <class E>
static FIXPASS_INLINE void put(const Matrix& matrix, int64_t row, int64_t column, float sum) {
  using T = typename E::T;
  if (matrix.bias) {
    sum += E::to_float(static_cast<const T*>(matrix.bias)[column * matrix.bias_stride]);
  }
  static_cast<T*>(matrix.out)[row * matrix.size + column] = E::from_float(sum);
}

}  // namespace fixpass
