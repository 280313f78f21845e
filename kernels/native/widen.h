// Rows of any element type as float32.
#pragma once

#include "rows.h"

namespace peftserve::PEFTSERVE_ISA {

template <class T>
inline void widen_row(const T* from, std::int64_t size, float* to) {
  for_vectors(size, [&](std::int64_t at, int count) __attribute__((always_inline)) {
    store_part(to + at, count, load_part(from + at, count));
  });
}

// Whether, and how, elements of a type are widened two in a word: `load` takes the words of two vectors of columns,
// `split` makes them the even and the odd columns, `join` puts those back in order.
template <class T>
struct Pairs {
  static constexpr bool kSplit = false;
};
#if defined(PEFTSERVE_SIMD_SHORTS)
template <>
struct Pairs<Bf16> {
  static constexpr bool kSplit = true;
  static Vec load(const Bf16* p) { return peftserve::PEFTSERVE_ISA::load(reinterpret_cast<const float*>(p)); }
  static void split(Vec pairs, Vec& even, Vec& odd) { split_pairs(pairs, even, odd); }
  static void join(Vec& even, Vec& odd) { join_pairs(even, odd); }
};
#endif
constexpr int kPair = 2 * kLanes;  // columns of two vectors

}  // namespace peftserve::PEFTSERVE_ISA
