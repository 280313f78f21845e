// Four float lanes in GCC's and Clang's vector extension: SSE2 on x86-64, NEON on Arm.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "types.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kLanes = 4;
typedef float Vec __attribute__((vector_size(16)));
typedef std::int32_t Integers __attribute__((vector_size(16)));
typedef std::uint32_t Words __attribute__((vector_size(16)));

inline Vec zero() { return Vec{}; }
inline Vec broadcast(float x) { return Vec{x, x, x, x}; }

inline float widen(Bf16 x) {
  const std::uint32_t bits = std::uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
inline float widen(Half x) {
  const std::uint32_t sign = std::uint32_t{x.bits} >> 15 << 31;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  std::uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity, NaN
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + (112u << 23));
  } else {  // subnormal: magnitude * 2^-24, exact
    value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, sizeof bits);
    bits |= sign;
  }
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline float widen(Int8 x) { return static_cast<float>(x.value); }

// Round to nearest, ties to even; NaN stays NaN.
inline Bf16 narrow(float x, Bf16) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  if (x != x) return {static_cast<std::uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<std::uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
inline Half narrow(float x, Half) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t sign = bits >> 16 & 0x8000u;
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  std::uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude >= 0x38800000u) {
    half = (magnitude - (112u << 23) + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  } else {  // subnormal: the addition rounds to a multiple of 2^-24
    float value;
    std::memcpy(&value, &magnitude, sizeof value);
    value += 0.5f;
    std::memcpy(&half, &value, sizeof half);
    half -= 0x3f000000u;
  }
  return {static_cast<std::uint16_t>(sign | half)};
}

inline Vec load(const float* p) {
  Vec x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
template <class T>
inline Vec load(const T* p) {
  return Vec{widen(p[0]), widen(p[1]), widen(p[2]), widen(p[3])};
}

// The first `count` lanes, zeros in the others; memory past them is not touched.
template <class T>
inline Vec load_first(const T* p, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(T));
  return load(buffer);
}

inline void store(float* p, Vec x) { std::memcpy(p, &x, sizeof x); }
template <class T>
inline void store(T* p, Vec x) {
  for (int lane = 0; lane < kLanes; ++lane) p[lane] = narrow(x[lane], T{});
}
template <class T>
inline void store_first(T* p, int count, Vec x) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, static_cast<std::size_t>(count) * sizeof(T));
}

inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec div(Vec a, Vec b) { return a / b; }
#if defined(__FMA__) || defined(__aarch64__)
inline Vec fma(Vec a, Vec b, Vec c) {
  for (int lane = 0; lane < kLanes; ++lane) c[lane] = __builtin_fmaf(a[lane], b[lane], c[lane]);
  return c;
}
#else
// Without the instruction a fused multiply-add would be a library call: two roundings here.
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
#endif
inline Vec max(Vec a, Vec b) { return a > b ? a : b; }
inline Vec min(Vec a, Vec b) { return a < b ? a : b; }

// a > b ? yes : no, lane by lane; NaN gives `no`.
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) { return a > b ? yes : no; }

// For |x| < 2^22: adding 1.5 * 2^23 leaves no room for a fraction.
inline Vec round_to_integer(Vec x) {
  const Vec shift = broadcast(0x1.8p23f);
  return (x + shift) - shift;
}
// x * 2^n for whole n in -126 .. 127.
inline Vec scale_by_power(Vec x, Vec n) {
  const Integers exponent = (__builtin_convertvector(n, Integers) + 127) << 23;
  Vec power;
  std::memcpy(&power, &exponent, sizeof power);
  return x * power;
}

// Horizontal, always in the same order.
inline float sum(Vec x) { return (x[0] + x[2]) + (x[1] + x[3]); }
inline float maximum(Vec x) {
  const float a = x[0] > x[2] ? x[0] : x[2];
  const float b = x[1] > x[3] ? x[1] : x[3];
  return a > b ? a : b;
}

// Four rows of four lanes become columns, in place.
inline void transpose(Vec (&rows)[kLanes]) {
  const Vec a = __builtin_shufflevector(rows[0], rows[1], 0, 4, 1, 5);
  const Vec b = __builtin_shufflevector(rows[0], rows[1], 2, 6, 3, 7);
  const Vec c = __builtin_shufflevector(rows[2], rows[3], 0, 4, 1, 5);
  const Vec d = __builtin_shufflevector(rows[2], rows[3], 2, 6, 3, 7);
  rows[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
  rows[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
  rows[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
  rows[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
}

inline Words load_words(const std::uint32_t* p) {
  Words words;
  std::memcpy(&words, p, sizeof words);
  return words;
}

// A table of sixteen floats, looked up by the `kStep`-th nibble of each word.
using Table = const float*;
inline Table load_table(const float* levels) { return levels; }
template <int kStep>
inline Vec look_up(Table table, Words words) {
  const Words index = words >> (4 * kStep) & 15u;
  return Vec{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}

}  // namespace peftserve::PEFTSERVE_ISA
