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

}  // namespace peftserve::PEFTSERVE_ISA
