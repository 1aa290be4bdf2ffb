// Copy data to where other ranks read it.
//
// What is written next to be read by another core is of no use in this one's cache, and the other
// core's stale copy of it only slows the stores down: above a few pages they go past the caches.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace fixpass {

constexpr size_t kStreamed = 32 * 1024;

// `to` is on a boundary of a cache line.
inline void copy_for_others(char* to, const char* from, size_t bytes) {
  size_t done = 0;
#if defined(__AVX2__)
  if (bytes >= kStreamed) {
    for (; done + sizeof(__m256i) <= bytes; done += sizeof(__m256i)) {
      const auto part = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + done));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + done), part);
    }
    // Streamed stores are ordered by nothing else.
    _mm_sfence();
  }
#endif
  std::memcpy(to + done, from + done, bytes - done);
}

}  // namespace fixpass
