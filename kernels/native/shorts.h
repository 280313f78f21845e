// Rows of bfloat16 as integers: the units of ShortDot and of ByteDot, in the order of the nibbles of packed NF4.
#pragma once

#include <cstdint>
#include <cstring>

#include "gemm.h"

#if defined(PEFTSERVE_SIMD_SHORTS)

namespace peftserve::PEFTSERVE_ISA {

// The largest of sixteen positive 16-bit integers, found by the one horizontal instruction there is: the smallest, of the
// complements.
inline int largest_of(__m256i x) {
  const __m128i half = _mm_max_epi16(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  return 0xffff ^ (_mm_cvtsi128_si32(_mm_minpos_epu16(_mm_xor_si128(half, _mm_set1_epi16(-1)))) & 0xffff);
}

// largest_bits: the largest magnitude among 64 bf16, as bits; from 0x7f80 on it is infinite or NaN.
// pack_block: 64 columns times `factor`, rounded, in the order of the nibbles.
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
inline int largest_bits(const Bf16* x) {
  const __m512i magnitude = _mm512_set1_epi16(0x7fff);
  const __m512i largest = _mm512_max_epi16(_mm512_and_si512(_mm512_loadu_si512(x), magnitude),
                                           _mm512_and_si512(_mm512_loadu_si512(x + 32), magnitude));
  return largest_of(_mm256_max_epi16(_mm512_castsi512_si256(largest), _mm512_extracti64x4_epi64(largest, 1)));
}

inline void pack_block(ShortDot, const Bf16* x, Vec factor, std::uint32_t* units) {
  static constexpr UnitOrder kOrder;
  for (int half = 0; half < 2; ++half) {
    const __m512i pairs = _mm512_permutexvar_epi16(_mm512_load_si512(kOrder.column), _mm512_loadu_si512(x + half * 32));
    Vec even, odd;
    split_pairs(_mm512_castsi512_ps(pairs), even, odd);
    const __m512i low = _mm512_cvtps_epi32(mul(even, factor)), high = _mm512_cvtps_epi32(mul(odd, factor));
    _mm512_storeu_si512(units + half * 16, _mm512_mask_blend_epi16(0xaaaaaaaau, low, _mm512_slli_epi32(high, 16)));
  }
}

// And behind the units' scale what a sum with them begins with.
inline void pack_block(ByteDot, const Bf16* x, Vec factor, std::uint32_t* units) {
  __m512i total = _mm512_setzero_si512();
  for (int half = 0; half < 2; ++half) {
    Vec even, odd;
    split_pairs(_mm512_loadu_ps(x + half * 32), even, odd);
    const __m512i low = _mm512_cvtps_epi32(mul(even, factor)), high = _mm512_cvtps_epi32(mul(odd, factor));
    total = _mm512_add_epi32(total, _mm512_add_epi32(low, high));
    // The low nibble of each byte is an odd column, the high one the even column before it.
    const __m128i evens = _mm512_cvtepi32_epi8(low), odds = _mm512_cvtepi32_epi8(high);
    auto* to = reinterpret_cast<__m128i*>(units + half * 8);
    _mm_storeu_si128(to, _mm_unpacklo_epi32(odds, evens));
    _mm_storeu_si128(to + 1, _mm_unpackhi_epi32(odds, evens));
  }
  // Modulo 2^32, like the sums: NaN counts as the least integer.
  const std::uint32_t start = 0u - ByteDot::kZero * static_cast<std::uint32_t>(_mm512_reduce_add_epi32(total));
  std::memcpy(units + ByteDot::kBlockUnits + 1, &start, sizeof start);
}
#else
inline int largest_bits(const Bf16* x) {
  __m256i largest = _mm256_setzero_si256();
  for (int at = 0; at < kBlock; at += 16) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + at));
    largest = _mm256_max_epi16(largest, _mm256_and_si256(bits, _mm256_set1_epi16(0x7fff)));
  }
  return largest_of(largest);
}

inline void pack_block(ShortDot, const Bf16* x, Vec factor, std::uint32_t* units) {
  // columns 1 3 5 7 of a cell, then 0 2 4 6
  const __m128i order = _mm_setr_epi8(2, 3, 6, 7, 10, 11, 14, 15, 0, 1, 4, 5, 8, 9, 12, 13);
  for (int cell = 0; cell < kBlock / kCell; ++cell) {
    const __m256i whole = _mm256_cvtps_epi32(mul(load(x + cell * kCell), factor));
    const __m128i shorts = _mm_packs_epi32(_mm256_castsi256_si128(whole), _mm256_extracti128_si256(whole, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(units + cell * 4), _mm_shuffle_epi8(shorts, order));
  }
}
#endif

// A row of x, its columns a multiple of 64, in blocks of units with their scales, which hold that of the levels too. A
// block that holds an infinity or NaN gives NaN: its scale is NaN. One of nothing but zeros (or magnitudes below 1e-34,
// whose inverse overflows) counts as zero.
template <class Dot>
  requires requires { Dot::kLevelScale; }
inline void pack_row(Dot, const Bf16* x, std::int64_t columns, std::ptrdiff_t block_stride, std::uint32_t* units) {
  for (std::int64_t column = 0; column < columns; column += kBlock, units += block_stride) {
    const std::uint32_t bits = static_cast<std::uint32_t>(largest_bits(x + column)) << 16;
    float largest;
    std::memcpy(&largest, &bits, sizeof largest);
    const bool is_finite = bits < 0x7f800000u, is_zero = largest < 1e-34f;
    const float scale = is_finite ? largest / (Dot::kLargest * Dot::kLevelScale) : __builtin_nanf("");
    pack_block(Dot{}, x + column, broadcast(!is_finite || is_zero ? 0.0f : Dot::kLargest / largest), units);
    const float kept = is_zero ? 0.0f : scale;
    std::memcpy(units + Dot::kBlockUnits, &kept, sizeof kept);
  }
}

}  // namespace peftserve::PEFTSERVE_ISA

#endif
