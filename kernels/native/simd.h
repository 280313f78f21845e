// The vectors of the instruction set that this file is compiled for. Every kernel source is compiled once for each, with
// PEFTSERVE_ISA naming it. All code lives in a namespace of that name: the linker merges equal inline functions, and one
// compiled with AVX-512 must never stand in for the portable one. For the same reason kernels call no inline function of
// the standard library.
#pragma once

#if defined(PEFTSERVE_SIMD_AVX512_BF16)
#include "simd/avx512_bf16.h"
#elif defined(PEFTSERVE_SIMD_AVX2)
#include "simd/avx2.h"
#else
#include "simd/portable.h"
#endif
