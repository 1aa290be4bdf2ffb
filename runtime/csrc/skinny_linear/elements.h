// How elements are read into vector registers, for the processor that this is compiled for.
//
// GCC and Clang compile vectors of any size for any processor. Only products of bfloat16 and
// conversions of float16 need instructions of their own.
#pragma once

#include <cstdint>
#ifdef __x86_64__
#include <immintrin.h>
#endif

namespace fixpass {

#define FIXPASS_INLINE inline __attribute__((always_inline))
// Keeps a vector in a register. Else GCC loads x again for each product, and loads are the limit.
#if defined(__x86_64__)
#define FIXPASS_HOLD(vector) asm("" : "+v"(vector))
#elif defined(__aarch64__)
#define FIXPASS_HOLD(vector) asm("" : "+w"(vector))
#else
#define FIXPASS_HOLD(vector)
#endif

// Floats in a vector register, and rows of W that are multiplied at once: as registers allow.
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__)
constexpr int kLanes = 16, kRegisterRows = 6;
#define FIXPASS_AVX512
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int kLanes = 8, kRegisterRows = 3;
#elif defined(__x86_64__)
constexpr int kLanes = 4, kRegisterRows = 3;
#else
constexpr int kLanes = 4, kRegisterRows = 6;
#endif
#if defined(__F16C__) || defined(__aarch64__)
#define FIXPASS_HALF
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), may_alias));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes), may_alias));
typedef float LooseFloats __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint32_t LooseWords __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));

// How a dtype is read. A step is kStep elements, kParts vectors in registers. `spread` says which
// element of a step a float of these vectors is. X: the type that x is kept in beside W.
struct Float32 {
  using T = float;
  using X = float;
  static constexpr int kStep = kLanes, kParts = 1, kRows = kRegisterRows;
  struct Loaded {
    Floats part[1];
  };
  static FIXPASS_INLINE Loaded load(const T* p) { return {*reinterpret_cast<const LooseFloats*>(p)}; }
  static FIXPASS_INLINE Loaded load_x(const X* p) { return {*reinterpret_cast<const Floats*>(p)}; }
  static FIXPASS_INLINE void store_x(X* p, const Loaded& x) { *reinterpret_cast<Floats*>(p) = x.part[0]; }
  static FIXPASS_INLINE void hold(Loaded& x) { FIXPASS_HOLD(x.part[0]); }
  static FIXPASS_INLINE Floats add(Floats sum, const Loaded& w, const Loaded& x) {
    return sum + w.part[0] * x.part[0];
  }
  static FIXPASS_INLINE int spread(int i) { return i; }
  static FIXPASS_INLINE float to_float(T value) { return value; }
  static FIXPASS_INLINE T from_float(float value) { return value; }
};

// A bfloat16 is the upper half of a float. The first part has the even elements, the other the odd.
struct Bfloat16 {
  using T = uint16_t;
  using X = float;
  static constexpr int kStep = 2 * kLanes, kParts = 2, kRows = kRegisterRows > 4 ? 4 : 2;
  struct Loaded {
    Floats part[2];
  };
  static FIXPASS_INLINE Loaded load(const T* p) {
    const Words raw = *reinterpret_cast<const LooseWords*>(p);
    return {(Floats)(raw << 16), (Floats)(raw & 0xffff0000u)};
  }
  static FIXPASS_INLINE Loaded load_x(const X* p) {
    return {*reinterpret_cast<const Floats*>(p), *reinterpret_cast<const Floats*>(p + kLanes)};
  }
  static FIXPASS_INLINE void store_x(X* p, const Loaded& x) {
    *reinterpret_cast<Floats*>(p) = x.part[0];
    *reinterpret_cast<Floats*>(p + kLanes) = x.part[1];
  }
  static FIXPASS_INLINE void hold(Loaded& x) {
    FIXPASS_HOLD(x.part[0]);
    FIXPASS_HOLD(x.part[1]);
  }
  static FIXPASS_INLINE Floats add(Floats sum, const Loaded& w, const Loaded& x) {
    sum += w.part[0] * x.part[0];
    return sum + w.part[1] * x.part[1];
  }
  static FIXPASS_INLINE int spread(int i) { return i < kLanes ? 2 * i : 2 * (i - kLanes) + 1; }
  static FIXPASS_INLINE float to_float(T value) {
    const uint32_t bits = uint32_t(value) << 16;
    float result;
    __builtin_memcpy(&result, &bits, sizeof(result));
    return result;
  }
  static FIXPASS_INLINE T from_float(float value) {
    uint32_t bits;
    __builtin_memcpy(&bits, &value, sizeof(bits));
    if (value != value) return 0x7fc0;
    return T((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
  }
};

#if defined(FIXPASS_AVX512) && defined(__AVX512BF16__)
struct DotBfloat16 : Bfloat16 {
  using X = uint16_t;
  static constexpr int kRows = kRegisterRows;
  using Loaded = __m512i;
  static FIXPASS_INLINE Loaded load(const T* p) { return _mm512_loadu_si512(p); }
  static FIXPASS_INLINE Loaded load_x(const X* p) { return _mm512_load_si512(p); }
  static FIXPASS_INLINE void store_x(X* p, const Loaded& x) { _mm512_store_si512(p, x); }
  static FIXPASS_INLINE void hold(Loaded& x) { FIXPASS_HOLD(x); }
  static FIXPASS_INLINE Floats add(Floats sum, const Loaded& w, const Loaded& x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)w, (__m512bh)x);
  }
};
#else
using DotBfloat16 = Bfloat16;
#endif

#ifdef FIXPASS_HALF
struct Float16 : Float32 {
  using T = uint16_t;
#ifdef FIXPASS_AVX512
  static FIXPASS_INLINE Loaded load(const T* p) {
    return {(Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
#elif defined(__AVX2__) && defined(__FMA__)
  static FIXPASS_INLINE Loaded load(const T* p) {
    return {(Floats)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
#elif defined(__x86_64__)
  static FIXPASS_INLINE Loaded load(const T* p) {
    return {(Floats)_mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }
#else
  typedef __fp16 LooseHalves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
  static FIXPASS_INLINE Loaded load(const T* p) {
    return {__builtin_convertvector(*reinterpret_cast<const LooseHalves*>(p), Floats)};
  }
#endif
#ifdef __x86_64__
  static FIXPASS_INLINE float to_float(T value) { return _cvtsh_ss(value); }
  static FIXPASS_INLINE T from_float(float value) { return _cvtss_sh(value, 0); }
#else
  static FIXPASS_INLINE float to_float(T value) {
    __fp16 half;
    __builtin_memcpy(&half, &value, sizeof(half));
    return half;
  }
  static FIXPASS_INLINE T from_float(float value) {
    const __fp16 half = value;
    T result;
    __builtin_memcpy(&result, &half, sizeof(result));
    return result;
  }
#endif
};
#endif

// The sum of the lanes, halves first.
template <int kSize>
static FIXPASS_INLINE float sum_lanes(const float* lanes) {
  typedef float Half __attribute__((vector_size(2 * kSize), may_alias));
  Half halves[2];
  __builtin_memcpy(halves, lanes, sizeof(halves));
  halves[0] += halves[1];
  float sum[kSize / 2];
  __builtin_memcpy(sum, halves, sizeof(sum));
  if constexpr (kSize > 4) return sum_lanes<kSize / 2>(sum);
  return sum[0] + sum[1];
}

}  // namespace fixpass
