// Loops over a row in vectors, the last one partial.
#pragma once

#include <cstdint>

#include "simd.h"

namespace peftserve::PEFTSERVE_ISA {

// body(at, count) for at = 0, kLanes, ...; count < kLanes in the last call only. Inlined twice: with count = kLanes
// known, partial loads and stores fold into whole ones.
template <class Body>
[[gnu::always_inline]] inline void for_vectors(std::int64_t size, const Body& body) {
  std::int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) body(at, kLanes);
  if (at < size) body(at, static_cast<int>(size - at));
}

template <class T>
[[gnu::always_inline]] inline Vec load_part(const T* p, int count) {
  return count == kLanes ? load(p) : load_first(p, count);
}
template <class T>
[[gnu::always_inline]] inline void store_part(T* p, int count, Vec x) {
  if (count == kLanes) {
    store(p, x);
  } else {
    store_first(p, count, x);
  }
}

// 1 / sqrt(mean(x^2) + eps) in a fixed order: four partial sums, so that additions overlap.
template <class T>
inline float inverse_rms(const T* x, std::int64_t size, float eps) {
  Vec sums[4] = {zero(), zero(), zero(), zero()};
  std::int64_t at = 0;
  for (; at + 4 * kLanes <= size; at += 4 * kLanes) {
    for (int i = 0; i < 4; ++i) {
      const Vec value = load(x + at + i * kLanes);
      sums[i] = fma(value, value, sums[i]);
    }
  }
  for_vectors(size - at, [&](std::int64_t rest, int count) __attribute__((always_inline)) {
    const Vec value = load_part(x + at + rest, count);
    sums[0] = fma(value, value, sums[0]);
  });
  const float squares = sum(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  return 1.0f / __builtin_sqrtf(squares / static_cast<float>(size) + eps);
}

}  // namespace peftserve::PEFTSERVE_ISA
