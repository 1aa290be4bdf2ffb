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

constexpr size_t kBlock = 512;

// out[i] = sum over ranks of in[rank][i]; `copy` gets the same, where there is one.
template <typename T>
void sum_ranks(const T* const* in, int num_ranks, size_t begin, size_t end, T* out, T* copy) {
  float total[kBlock];
  for (size_t start = begin; start < end; start += kBlock) {
    const size_t count = end - start < kBlock ? end - start : kBlock;
    const T* first = in[0] + start;
    for (size_t i = 0; i < count; ++i) total[i] = to_float(first[i]);
    for (int rank = 1; rank < num_ranks; ++rank) {
      const T* next = in[rank] + start;
      for (size_t i = 0; i < count; ++i) total[i] += to_float(next[i]);
    }
    T* __restrict__ target = out + start;
    for (size_t i = 0; i < count; ++i) round_to(total[i], target[i]);
    if (copy != nullptr) std::memcpy(copy + start, target, count * sizeof(T));
  }
}

}  // namespace fixpass
