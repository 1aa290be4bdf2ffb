// Copies cells of 16 bytes from one order of two dimensions into the other.
//
// out[outer][j * column + i] = in[outer][i * row + j] for i < rows, j < columns; strides are in
// cells, and each outer dimension has one stride in `out` and one in `in`. The inner loops take
// four rows and four columns at a time: few enough rows for the prefetcher, and four cells of a
// column fill a cache line. Streaming stores bypass the cache, for results that nobody reads soon.
#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace {

#if defined(__SSE2__)
using Cell = __m128i;
inline Cell load(const Cell* from) { return _mm_loadu_si128(from); }
inline void store(Cell* to, Cell cell) { _mm_storeu_si128(to, cell); }
inline void stream(Cell* to, Cell cell) { _mm_stream_si128(to, cell); }
inline void finish_streaming() { _mm_sfence(); }
#else
struct Cell {
  uint64_t low, high;
};
inline Cell load(const Cell* from) { return *from; }
inline void store(Cell* to, Cell cell) { *to = cell; }
inline void stream(Cell* to, Cell cell) { *to = cell; }
inline void finish_streaming() {}
#endif

constexpr int64_t kTile = 4, kMaxOuter = 8;

// The sizes and strides of a copy. `row` is a stride of the input, `column` one of the output.
struct Geometry {
  int64_t rows, columns, row, column;
  int64_t num_outer;
  const int64_t *sizes, *out_strides, *in_strides;
};

template <void (*put)(Cell*, Cell)>
void transpose(Cell* out, const Cell* in, const Geometry& g) {
  const int64_t whole_rows = g.rows - g.rows % kTile, whole_columns = g.columns - g.columns % kTile;
  for (int64_t i = 0; i < whole_rows; i += kTile)
    for (int64_t j = 0; j < whole_columns; j += kTile)
      for (int64_t b = 0; b < kTile; b++)
        for (int64_t a = 0; a < kTile; a++)
          put(out + (j + b) * g.column + i + a, load(in + (i + a) * g.row + j + b));
  for (int64_t j = 0; j < g.columns; j++)
    for (int64_t i = j < whole_columns ? whole_rows : 0; i < g.rows; i++)
      store(out + j * g.column + i, load(in + i * g.row + j));
}

template <void (*put)(Cell*, Cell)>
void transpose_all(Cell* out, const Cell* in, const Geometry& g) {
  int64_t at[kMaxOuter] = {0};
  for (;;) {
    const Cell* from = in;
    Cell* to = out;
    for (int64_t d = 0; d < g.num_outer; d++) {
      from += at[d] * g.in_strides[d];
      to += at[d] * g.out_strides[d];
    }
    transpose<put>(to, from, g);
    int64_t d = g.num_outer - 1;
    while (d >= 0 && ++at[d] == g.sizes[d]) at[d--] = 0;
    if (d < 0) break;
  }
}

}  // namespace

extern "C" {

// From one tensor into another, past the cache.
void copy_tiles(Cell* out, const Cell* in, int64_t rows, int64_t columns, int64_t row,
                int64_t column, int64_t num_outer, const int64_t* sizes,
                const int64_t* out_strides, const int64_t* in_strides) {
  const Geometry g{rows, columns, row, column, num_outer, sizes, out_strides, in_strides};
  transpose_all<stream>(out, in, g);
  finish_streaming();
}

// Each of `blocks` dense blocks of `cells` cells within itself, through a staging block.
void permute_blocks(Cell* memory, Cell* staging, int64_t blocks, int64_t cells, int64_t rows,
                    int64_t columns, int64_t row, int64_t column, int64_t num_outer,
                    const int64_t* sizes, const int64_t* out_strides, const int64_t* in_strides) {
  const Geometry g{rows, columns, row, column, num_outer, sizes, out_strides, in_strides};
  for (int64_t b = 0; b < blocks; b++, memory += cells) {
    std::memcpy(static_cast<void*>(staging), memory, cells * sizeof(Cell));
    transpose_all<store>(memory, staging, g);
  }
}

}  // extern "C"
