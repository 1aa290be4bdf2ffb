/* Copy cells of 16 bytes from one order of two dimensions into the other.
 *
 * out[outer][j * column + i] = in[outer][i * row + j] for i < rows, j < columns; strides are in
 * cells, and the outer dimensions have a stride on either side. Four rows at a time: few enough to
 * be read ahead, and what is written of each column is a whole line of the cache. With `stream` it
 * goes past the cache, where nobody reads it soon.
 */
#include <stdint.h>
#include <string.h>

#if defined(__SSE2__)
#include <emmintrin.h>
typedef __m128i cell;
#define LOAD(from) _mm_loadu_si128(from)
#define STORE(to, value) _mm_storeu_si128(to, value)
#define STREAM(to, value) _mm_stream_si128(to, value)
#define SETTLE() _mm_sfence()
#else
typedef struct { uint64_t low, high; } cell;
#define LOAD(from) (*(from))
#define STORE(to, value) (*(to) = (value))
#define STREAM(to, value) (*(to) = (value))
#define SETTLE()
#endif

enum { GROUP = 4, MOST_OUTER = 8 };

#define TURN(NAME, KEEP)                                                                           \
  static void NAME(cell *out, const cell *in, int64_t rows, int64_t columns, int64_t row,          \
                   int64_t column) {                                                               \
    int64_t whole_rows = rows - rows % GROUP, whole_columns = columns - columns % GROUP;           \
    for (int64_t i = 0; i < whole_rows; i += GROUP)                                                \
      for (int64_t j = 0; j < whole_columns; j += GROUP)                                           \
        for (int64_t b = 0; b < GROUP; b++)                                                        \
          for (int64_t a = 0; a < GROUP; a++)                                                      \
            KEEP(out + (j + b) * column + i + a, LOAD(in + (i + a) * row + j + b));                \
    for (int64_t j = 0; j < columns; j++)                                                          \
      for (int64_t i = j < whole_columns ? whole_rows : 0; i < rows; i++)                          \
        STORE(out + j * column + i, LOAD(in + i * row + j));                                       \
  }

TURN(turn_into_cache, STORE)
TURN(turn_past_cache, STREAM)

void turn(cell *out, const cell *in, int64_t rows, int64_t columns, int64_t row, int64_t column,
          int64_t dims, const int64_t *sizes, const int64_t *out_strides, const int64_t *in_strides,
          int64_t stream) {
  int64_t at[MOST_OUTER] = {0};
  for (;;) {
    const cell *from = in;
    cell *to = out;
    for (int64_t d = 0; d < dims; d++) {
      from += at[d] * in_strides[d];
      to += at[d] * out_strides[d];
    }
    (stream ? turn_past_cache : turn_into_cache)(to, from, rows, columns, row, column);
    int64_t d = dims - 1;
    while (d >= 0 && ++at[d] == sizes[d]) at[d--] = 0;
    if (d < 0) break;
  }
  SETTLE();
}

/* Each of `blocks` of so many cells, from `memory` on, through a staging buffer of one of them. */
void turn_in_place(cell *memory, cell *staging, int64_t blocks, int64_t cells, int64_t rows,
                   int64_t columns, int64_t row, int64_t column, int64_t dims, const int64_t *sizes,
                   const int64_t *out_strides, const int64_t *in_strides) {
  for (int64_t b = 0; b < blocks; b++, memory += cells) {
    memcpy(staging, memory, cells * sizeof(cell));
    turn(memory, staging, rows, columns, row, column, dims, sizes, out_strides, in_strides, 0);
  }
}
