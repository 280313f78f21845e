// AVX-512 with VNNI, and besides products of bfloat16.
#pragma once

#include "avx512_vnni.h"

namespace peftserve::PEFTSERVE_ISA {

// sums + the two products of each lane's pair of bfloat16, in float32. (Intel 64 and IA-32 Software Developer's Manual,
// VDPBF16PS: rounded after each of the two products; what is below the normal range, operand or result, becomes zero.)
inline Vec dot_pairs(Vec sums, Vec a, Vec b) {
  asm("vdpbf16ps %2, %1, %0" : "+v"(sums) : "v"(a), "v"(b));
  return sums;
}

// Pairs of bfloat16 as they lie in memory, or as 8 bits: 2 kLanes of them, or the first `count` and zeros after; memory
// past them is not touched.
inline Vec to_pairs(Vec low, Vec high) {
  Vec pairs;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(pairs) : "v"(high), "v"(low));
  return pairs;
}
inline Vec load_pairs(const Bf16* p) { return _mm512_castsi512_ps(_mm512_loadu_si512(p)); }
inline Vec load_pairs(const Int8* p) { return to_pairs(load(p), load(p + kLanes)); }
inline Vec load_first_pairs(const Bf16* p, int count) {
  return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16((1u << count) - 1u, p));
}
inline Vec load_first_pairs(const Int8* p, int count) {
  if (count < kLanes) return to_pairs(load_first(p, count), zero());
  return to_pairs(load(p), load_first(p + kLanes, count - kLanes));
}

}  // namespace peftserve::PEFTSERVE_ISA
