// Loops that are unrolled for certain: arrays of vectors stay in registers only when every index is a constant.
#pragma once

#include <utility>

namespace peftserve::PEFTSERVE_ISA {

template <int kIndex>
struct Index {
  static constexpr int value = kIndex;
};

// body(Index<0>), body(Index<1>), ... so that what depends on the index is known at compile time.
template <int kCount, class Body>
[[gnu::always_inline]] inline void unroll(const Body& body) {
  [&]<int... kIndices>(std::integer_sequence<int, kIndices...>) __attribute__((always_inline)) {
    (body(Index<kIndices>{}), ...);
  }(std::make_integer_sequence<int, kCount>{});
}

}  // namespace peftserve::PEFTSERVE_ISA
