// Rows of any element type as float32.
#pragma once

#include "rows.h"
#include "unroll.h"

namespace peftserve::PEFTSERVE_ISA {

template <class T>
inline void widen_row(const T* from, std::int64_t size, float* to) {
  for_vectors(size, [&](std::int64_t at, int count) __attribute__((always_inline)) {
    store_part(to + at, count, load_part(from + at, count));
  });
}

// Whether, and how, elements of a type are widened two in a word: `load` takes the words of two vectors of columns,
// `split` makes them the even and the odd columns, `join` puts those back in order, `store` rounds them to words again.
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
  static void store(Bf16* p, Vec even, Vec odd) {
    peftserve::PEFTSERVE_ISA::store(reinterpret_cast<float*>(p), merge_pairs(even, odd));
  }
};
#endif
constexpr int kPair = 2 * kLanes;  // columns of two vectors

// body(at, Index<n>, count) over a row: with kSplit by whole pairs of vectors first, n = 2, and then one at a time as
// for_vectors. `read_as` reads so many vectors, in split order where there are two; floats are in that order already.
template <bool kSplit, class Body>
[[gnu::always_inline]] inline void for_vectors_as(std::int64_t size, const Body& body) {
  std::int64_t at = 0;
  if constexpr (kSplit) {
    for (; at + kPair <= size; at += kPair) body(at, Index<2>{}, kLanes);
  }
  for_vectors(size - at, [&](std::int64_t rest, int count) __attribute__((always_inline)) {
    body(at + rest, Index<1>{}, count);
  });
}
template <class T>
[[gnu::always_inline]] inline void read_as(const T* p, int count, Vec (&vectors)[1]) {
  vectors[0] = load_part(p, count);
}
template <class T>
[[gnu::always_inline]] inline void read_as(const T* p, int, Vec (&vectors)[2]) {
  Pairs<T>::split(Pairs<T>::load(p), vectors[0], vectors[1]);
}
[[gnu::always_inline]] inline void read_as(const float* p, int, Vec (&vectors)[2]) {
  vectors[0] = load(p);
  vectors[1] = load(p + kLanes);
}
// Rounds them to p, in order.
template <class T>
[[gnu::always_inline]] inline void store_as(T* p, int count, const Vec (&vectors)[1]) {
  store_part(p, count, vectors[0]);
}
template <class T>
[[gnu::always_inline]] inline void store_as(T* p, int, const Vec (&vectors)[2]) {
  Pairs<T>::store(p, vectors[0], vectors[1]);
}

// `widen_row`, or with kSplit in split order: of each whole pair of vectors first the even columns, then the odd ones, and
// what is left in order. That takes the least work, where all agree on it.
template <bool kSplit, class T>
inline void widen_row_as(const T* from, std::int64_t size, float* to) {
  for_vectors_as<kSplit>(size, [&](std::int64_t at, auto n, int count) __attribute__((always_inline)) {
    Vec vectors[n.value];
    read_as(from + at, count, vectors);
    unroll<n.value>([&](auto v) __attribute__((always_inline)) {
      store_part(to + at + v.value * kLanes, count, vectors[v.value]);
    });
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
