// The vectors of the instruction set that this file is compiled for. Every kernel source is compiled once for each, with
// PEFTSERVE_ISA naming it. All code lives in a namespace of that name: the linker merges equal inline functions, and one
// compiled with AVX-512 must never stand in for the portable one. For the same reason kernels call no inline function of
// the standard library.
#pragma once

#if defined(PEFTSERVE_SIMD_AMX_BF16)
#define PEFTSERVE_SIMD_AVX512_VNNI
#include "simd/amx_bf16.h"
#elif defined(PEFTSERVE_SIMD_AVX512_BF16)
#define PEFTSERVE_SIMD_AVX512_VNNI
#include "simd/avx512_bf16.h"
#elif defined(PEFTSERVE_SIMD_AVX512_VNNI)
#include "simd/avx512_vnni.h"
#elif defined(PEFTSERVE_SIMD_AVX2)
#include "simd/avx2.h"
#else
#include "simd/portable.h"
#endif

// Both x86 paths have products of 16-bit integers (ShortTable), and bf16 as pairs in a word (split_pairs).
#if defined(PEFTSERVE_SIMD_AVX512_VNNI) || defined(PEFTSERVE_SIMD_AVX2)
#define PEFTSERVE_SIMD_SHORTS
#endif

namespace peftserve::PEFTSERVE_ISA {

// `x` in a register, and nothing known about how it came there: what is loaded once is not loaded again at each use, and
// what is summed in one order is not regrouped.
template <class Register>
[[gnu::always_inline]] inline Register opaque(Register x) {
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
  asm("" : "+v"(x));  // all 32 registers; x names sixteen of them
#elif defined(__x86_64__)
  asm("" : "+x"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#endif
  return x;
}

}  // namespace peftserve::PEFTSERVE_ISA
