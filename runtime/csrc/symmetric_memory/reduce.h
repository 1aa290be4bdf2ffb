// Sum the ranks' elements in rank order, in float, rounding once at the end.
//
// Every rank that sums the same elements gets the same bits. The loops are plain: the compiler
// turns them into vectors for the machine that it builds on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fixpass {

struct BFloat16 {
  uint16_t bits;
};

inline float to_float(float x) { return x; }

inline float to_float(BFloat16 x) {
  uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void round_to(float value, float& out) { out = value; }

// To nearest, ties to even, as torch rounds; a NaN stays one.
inline void round_to(float value, BFloat16& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

inline float to_float(_Float16 x) { return static_cast<float>(x); }
inline void round_to(float value, _Float16& out) { out = static_cast<_Float16>(value); }

// out[i] = sum of in[rank][i] for a number of ranks that the compiler knows: one pass over the data,
// the sum in a register. `in` may hold `out` itself.
template <int kRanks, typename T>
void sum_known_ranks(const T* const* in, size_t begin, size_t end, T* out) {
  const T* source[kRanks];
  for (int rank = 0; rank < kRanks; ++rank) source[rank] = in[rank];
#pragma GCC ivdep
  for (size_t i = begin; i < end; ++i) {
    float total = to_float(source[0][i]);
#pragma GCC unroll 8
    for (int rank = 1; rank < kRanks; ++rank) total += to_float(source[rank][i]);
    round_to(total, out[i]);
  }
}

constexpr size_t kBlock = 512;

// The same for any number of ranks, through a block of sums.
template <typename T>
void sum_many_ranks(const T* const* in, int num_ranks, size_t begin, size_t end, T* out) {
  float total[kBlock];
  for (size_t start = begin; start < end; start += kBlock) {
    const size_t count = end - start < kBlock ? end - start : kBlock;
    for (size_t i = 0; i < count; ++i) total[i] = to_float(in[0][start + i]);
    for (int rank = 1; rank < num_ranks; ++rank) {
      const T* next = in[rank] + start;
      for (size_t i = 0; i < count; ++i) total[i] += to_float(next[i]);
    }
    T* __restrict__ target = out + start;
    for (size_t i = 0; i < count; ++i) round_to(total[i], target[i]);
  }
}

template <typename T>
void sum_ranks(const T* const* in, int num_ranks, size_t begin, size_t end, T* out) {
  switch (num_ranks) {
    case 2: return sum_known_ranks<2>(in, begin, end, out);
    case 3: return sum_known_ranks<3>(in, begin, end, out);
    case 4: return sum_known_ranks<4>(in, begin, end, out);
    case 8: return sum_known_ranks<8>(in, begin, end, out);
    default: return sum_many_ranks(in, num_ranks, begin, end, out);
  }
}

}  // namespace fixpass
