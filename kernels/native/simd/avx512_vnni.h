// Sixteen float lanes, with dot products of 16-bit integers: AVX-512 (F, BW, DQ, VL) with VNNI.
#pragma once

#include <cstdint>

#include <immintrin.h>

#include "types.h"
#include "unroll.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kLanes = 16;
using Vec = __m512;
using Words = __m512i;  // uint32 lanes

inline __mmask16 first_lanes(int count) { return static_cast<__mmask16>((1u << count) - 1u); }

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec broadcast(float x) { return _mm512_set1_ps(x); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
inline Vec load(const Bf16* p) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load(const Int8* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The first `count` lanes, zeros in the others; memory past them is not touched.
inline Vec load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline Vec load_first(const Bf16* p, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load_first(const Int8* p, int count) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(first_lanes(count), p)));
}
inline Vec load_first(const Half* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
// bfloat16 in the high half of each lane: rounded to nearest, ties to even. Not for NaN, which `quieted` keeps.
inline __m512i rounded(Vec x) {
  const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  return _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
}
inline __m512i quieted(__m512i rounded, Vec x) {
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_mask_or_epi32(rounded, is_nan, _mm512_castps_si512(x), _mm512_set1_epi32(0x400000));
}
inline __m256i narrow(Vec x) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(quieted(rounded(x), x), 16)); }
inline void store(Bf16* p, Vec x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x)); }
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline void store_first(float* p, int count, Vec x) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
inline void store_first(Bf16* p, int count, Vec x) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), narrow(x));
}
inline void store_first(Half* p, int count, Vec x) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec max(Vec a, Vec b) { return _mm512_max_ps(a, b); }
inline Vec min(Vec a, Vec b) { return _mm512_min_ps(a, b); }

// Two bf16 in a word, as it was loaded: the even columns moved up, the odd ones masked. Less work than widening each by
// itself.
inline void split_pairs(Vec pairs, Vec& even, Vec& odd) {
  const __m512i words = _mm512_castps_si512(pairs);
  even = _mm512_castsi512_ps(_mm512_slli_epi32(words, 16));
  odd = _mm512_castsi512_ps(_mm512_and_si512(words, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
// The inverse, rounded as by `narrow`: half the work of narrowing each by itself.
inline Vec merge_pairs(Vec even, Vec odd) {
  __m512i low = rounded(even), high = rounded(odd);
  if (__builtin_expect(_mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q) != 0, false)) {
    low = quieted(low, even);
    high = quieted(high, odd);
  }
  return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(low, 16), high));
}
// Even and odd columns back in order: the first sixteen, and the other sixteen.
inline void join_pairs(Vec& even, Vec& odd) {
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const Vec low = _mm512_permutex2var_ps(even, first, odd);
  odd = _mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
  even = low;
}

// a > b ? yes : no, lane by lane; NaN gives `no`.
inline Vec select_greater(Vec a, Vec b, Vec yes, Vec no) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), no, yes);
}

inline Vec round_to_integer(Vec x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x * 2^n for whole n in -126 .. 127.
inline Vec scale_by_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }

// Horizontal, always in the same order.
inline float sum(Vec x) {
  const __m256 a = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
}
// The sums of sixteen vectors, each in the order of `sum`: lane 4 i + j is that of rows[4 j + i].
[[gnu::always_inline]] inline Vec sum_each(const Vec (&rows)[kLanes]) {
  Vec a[8], b[4], c[2];
  unroll<8>([&](auto i) __attribute__((always_inline)) {
    const Vec x = rows[2 * i.value], y = rows[2 * i.value + 1];
    a[i.value] = add(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xee));
  });
  unroll<4>([&](auto i) __attribute__((always_inline)) {
    const Vec x = a[2 * i.value], y = a[2 * i.value + 1];
    b[i.value] = add(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xdd));
  });
  unroll<2>([&](auto i) __attribute__((always_inline)) {
    const __m512d x = _mm512_castps_pd(b[2 * i.value]), y = _mm512_castps_pd(b[2 * i.value + 1]);
    c[i.value] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
  });
  return add(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
}
inline float maximum(Vec x) {
  const __m256 a = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 b = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  const __m128 c = _mm_max_ps(b, _mm_movehl_ps(b, b));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_movehdup_ps(c)));
}

// Sixteen rows of sixteen lanes become columns, in place.
[[gnu::always_inline]] inline void transpose(Vec (&rows)[kLanes]) {
  __m512i a[16], b[16];
  unroll<8>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = 2 * decltype(step)::value;
    a[i] = _mm512_unpacklo_epi32(_mm512_castps_si512(rows[i]), _mm512_castps_si512(rows[i + 1]));
    a[i + 1] = _mm512_unpackhi_epi32(_mm512_castps_si512(rows[i]), _mm512_castps_si512(rows[i + 1]));
  });
  unroll<4>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = 4 * decltype(step)::value;
    b[i] = _mm512_unpacklo_epi64(a[i], a[i + 2]);
    b[i + 1] = _mm512_unpackhi_epi64(a[i], a[i + 2]);
    b[i + 2] = _mm512_unpacklo_epi64(a[i + 1], a[i + 3]);
    b[i + 3] = _mm512_unpackhi_epi64(a[i + 1], a[i + 3]);
  });
  unroll<4>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = decltype(step)::value;
    a[i] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_i32x4(b[i], b[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_i32x4(b[i + 8], b[i + 12], 0xdd);
  });
  unroll<4>([&](auto step) __attribute__((always_inline)) {
    constexpr int i = decltype(step)::value;
    rows[i] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[i], a[i + 8], 0x88));
    rows[i + 8] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[i], a[i + 8], 0xdd));
    rows[i + 4] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0x88));
    rows[i + 12] = _mm512_castsi512_ps(_mm512_shuffle_i32x4(a[i + 4], a[i + 12], 0xdd));
  });
}

inline Words load_words(const std::uint32_t* p) { return _mm512_loadu_si512(p); }

// A table of sixteen floats, looked up by the `kStep`-th nibble of each word.
using Table = __m512;
inline Table load_table(const float* levels) { return _mm512_loadu_ps(levels); }
template <int kStep>
inline Vec look_up(Table table, Words words) {
  return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * kStep), table);
}

// Sixteen 16-bit levels, twice: the index of vpermw has five bits, the fifth of which is the next nibble's first.
using ShortTable = __m512i;
inline ShortTable load_short_table(const std::int16_t* levels) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels)));
}
// The levels of the `kStep`-th nibble of each half word.
template <int kStep>
inline __m512i look_up_shorts(ShortTable table, Words words) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * kStep), table);
}

// Sixteen unsigned 8-bit levels, in each quarter.
using ByteTable = __m512i;
inline ByteTable load_byte_table(const std::uint8_t* levels) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(levels)));
}
// The levels of the `kStep`-th nibble of each byte.
template <int kStep>
inline __m512i look_up_bytes(ByteTable table, Words words) {
  const __m512i nibbles = _mm512_and_si512(_mm512_srli_epi32(words, 4 * kStep), _mm512_set1_epi8(15));
  return _mm512_shuffle_epi8(table, nibbles);
}

// acc + the four products of each lane's bytes, unsigned a and signed b.
inline __m512i dot_bytes(__m512i acc, __m512i a, __m512i b) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

// acc + a0 * b0 + a1 * b1 over the two 16-bit integers of each lane. As the instruction itself, since GCC 12 copies the
// sums of the intrinsic to and fro: a third of the time of a product.
inline __m512i dot_shorts(__m512i acc, __m512i a, __m512i b) {
  asm("vpdpwssd %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  return acc;
}

}  // namespace peftserve::PEFTSERVE_ISA
