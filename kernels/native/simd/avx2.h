// Eight float lanes: AVX2, FMA and F16C.
#pragma once

#include <cstdint>
#include <cstring>

#include <immintrin.h>

#include "types.h"
#include "unroll.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kLanes = 8;
using Vec = __m256;
using Words = __m256i;  // uint32 lanes

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec broadcast(float x) { return _mm256_set1_ps(x); }

inline Vec widen(__m128i bits, Bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16)); }
inline Vec widen(__m128i bits, Half) { return _mm256_cvtph_ps(bits); }

// Round to nearest, ties to even; NaN stays NaN.
inline __m256i rounded(Vec x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i sum = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(sum, _mm256_or_si256(bits, _mm256_set1_epi32(0x400000)), is_nan);
}
inline __m128i narrow(Vec x, Bf16) {
  const __m256i wide = _mm256_srli_epi32(rounded(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
}
inline __m128i narrow(Vec x, Half) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
inline Vec load(const Int8* p) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
template <class T>
inline Vec load(const T* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), T{});
}

// The first `count` lanes, zeros in the others; memory past them is not touched.
inline __m256i first_lanes(int count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Vec load_first(const float* p, int count) { return _mm256_maskload_ps(p, first_lanes(count)); }
template <class T>
inline Vec load_first(const T* p, int count) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, static_cast<std::size_t>(count) * sizeof(T));
  return load(buffer);
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
template <class T>
inline void store(T* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, T{}));
}

inline void store_first(float* p, int count, Vec x) { _mm256_maskstore_ps(p, first_lanes(count), x); }
template <class T>
inline void store_first(T* p, int count, Vec x) {
  T buffer[kLanes];
  store(buffer, x);
  std::memcpy(p, buffer, static_cast<std::size_t>(count) * sizeof(T));
}

inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm256_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm256_min_ps(a, b); }

// Two bf16 in a word, as it was loaded: the even columns moved up, the odd ones masked. Half the work of widening each by
// itself.
inline void split_pairs(Vec pairs, Vec& even, Vec& odd) {
  const __m256i words = _mm256_castps_si256(pairs);
  even = _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
  odd = _mm256_castsi256_ps(_mm256_and_si256(words, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}
// The inverse, rounded as by `narrow`.
inline Vec merge_pairs(Vec even, Vec odd) {
  return _mm256_castsi256_ps(_mm256_blend_epi16(_mm256_srli_epi32(rounded(even), 16), rounded(odd), 0xaa));
}
// Even and odd columns back in order: the first eight, and the other eight.
inline void join_pairs(Vec& even, Vec& odd) {
  const Vec low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  even = _mm256_permute2f128_ps(low, high, 0x20);
  odd = _mm256_permute2f128_ps(low, high, 0x31);
}

// a > b ? yes : no, lane by lane; NaN gives `no`.
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_GT_OQ));
}

inline Vec round_to_integer(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for whole n in -126 .. 127.
inline Vec scale_by_power(Vec x, Vec n) {
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

// Horizontal, always in the same order.
inline float sum(Vec x) {
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
inline float maximum(Vec x) {
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

// Eight rows of eight lanes become columns, in place.
[[gnu::always_inline]] inline void transpose(Vec (&rows)[kLanes]) {
  __m256 a[8], b[8];
  unroll<4>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = 2 * decltype(step)::value;
    a[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  });
  unroll<2>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = 4 * decltype(step)::value;
    b[i] = _mm256_shuffle_ps(a[i], a[i + 2], 0x44);
    b[i + 1] = _mm256_shuffle_ps(a[i], a[i + 2], 0xee);
    b[i + 2] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0x44);
    b[i + 3] = _mm256_shuffle_ps(a[i + 1], a[i + 3], 0xee);
  });
  unroll<4>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = decltype(step)::value;
    rows[i] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x20);
    rows[i + 4] = _mm256_permute2f128_ps(b[i], b[i + 4], 0x31);
  });
}

inline Words load_words(const std::uint32_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

// A table of sixteen floats, looked up by the `kStep`-th nibble of each word.
struct Table {
  __m256 low, high;
};
inline Table load_table(const float* levels) { return {_mm256_loadu_ps(levels), _mm256_loadu_ps(levels + 8)}; }
template <int kStep>
inline Vec look_up(const Table& table, Words words) {
  const __m256i index = _mm256_srli_epi32(words, 4 * kStep);
  // the nibble's top bit, moved to the sign, chooses the half
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * kStep));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, index), _mm256_permutevar8x32_ps(table.high, index), upper);
}

// Sixteen 16-bit levels as two tables of bytes.
struct ShortTable {
  __m256i low, high;
};
inline ShortTable load_short_table(const std::int16_t* levels) {
  alignas(16) std::uint8_t low[16], high[16];
  for (int i = 0; i < 16; ++i) {
    low[i] = static_cast<std::uint8_t>(levels[i] & 0xff);
    high[i] = static_cast<std::uint8_t>(levels[i] >> 8 & 0xff);
  }
  const auto twice = [](const std::uint8_t* table) {
    return _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(table)));
  };
  return {twice(low), twice(high)};
}
// The levels of bytes 0 .. 7 of each half (or 8 .. 15), looked up by the low four bits of each byte (high four zero).
template <bool kUpper>
inline __m256i look_up_shorts(const ShortTable& table, __m256i index) {
  const __m256i low = _mm256_shuffle_epi8(table.low, index), high = _mm256_shuffle_epi8(table.high, index);
  return kUpper ? _mm256_unpackhi_epi8(low, high) : _mm256_unpacklo_epi8(low, high);
}

}  // namespace peftserve::PEFTSERVE_ISA
