// Horizontal sums of a tile of vectors.
#pragma once

#include <cstdint>

#include "simd.h"
#include "unroll.h"

namespace peftserve::PEFTSERVE_ISA {

// y[r, o] = the sum of the lanes of sums[r][o], for any size of tile in the order of `sum`.
template <int kRows, int kOutputs>
[[gnu::always_inline]] inline void store_sums(const Vec (&sums)[kRows][kOutputs], float* y, std::int64_t stride) {
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
  if constexpr (kRows == 4 && kOutputs == 4) {  // sixteen at once take a third of the instructions
    Vec all[kLanes];
    unroll<kLanes>([&](auto i) __attribute__((always_inline)) { all[i.value] = sums[i.value % 4][i.value / 4]; });
    const Vec totals = sum_each(all);
    unroll<4>([&](auto r) __attribute__((always_inline)) {
      _mm_storeu_ps(y + r.value * stride, _mm512_extractf32x4_ps(totals, r.value));
    });
    return;
  }
#endif
  unroll<kRows * kOutputs>([&](auto i) __attribute__((always_inline)) {
    constexpr int kRow = decltype(i)::value / kOutputs, kOutput = decltype(i)::value % kOutputs;
    y[kRow * stride + kOutput] = sum(sums[kRow][kOutput]);
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
