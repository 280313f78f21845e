// Sixteen float lanes, with bf16 dot products.
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
inline Vec load(const Half* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// The first `count` lanes, zeros in the others; memory past them is not touched.
inline Vec load_first(const float* p, int count) { return _mm512_maskz_loadu_ps(first_lanes(count), p); }
inline Vec load_first(const Bf16* p, int count) {
  const __m256i bits = _mm256_maskz_loadu_epi16(first_lanes(count), p);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec load_first(const Half* p, int count) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(count), p));
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
inline void store(Bf16* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x));
}
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}

inline void store_first(float* p, int count, Vec x) { _mm512_mask_storeu_ps(p, first_lanes(count), x); }
inline void store_first(Bf16* p, int count, Vec x) {
  _mm256_mask_storeu_epi16(p, first_lanes(count), (__m256i)_mm512_cvtneps_pbh(x));
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

// Sixteen bf16 levels, twice: the index of vpermw has five bits, the fifth of which is the next nibble's first.
using PairTable = __m512i;
inline PairTable load_pair_table(const Bf16* levels) {
  return _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(levels)));
}
template <int kStep>
inline __m512i look_up_pairs(PairTable table, Words words) {
  return _mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * kStep), table);
}

// acc + a0 * b0 + a1 * b1 over the two bf16 of each lane.
inline Vec dot_pairs(Vec acc, __m512i a, __m512i b) { return _mm512_dpbf16_ps(acc, (__m512bh)a, (__m512bh)b); }

// Thirty-two bf16, or the first `count` of them and zeros.
inline __m512i load_pairs(const Bf16* p) { return _mm512_loadu_si512(p); }
inline __m512i load_first_pairs(const Bf16* p, int count) {
  return _mm512_maskz_loadu_epi16(static_cast<__mmask32>((1ull << count) - 1ull), p);
}

}  // namespace peftserve::PEFTSERVE_ISA
