// Products with low-rank factors in rank pages (see peftserve_kernels/rank_pages.py), for LoRA and bottleneck adapters.
//
// shrink: t[m, i] = sum over k of x[m, k] * a[i, k], lanes over k, one chain a value, then the lanes' sum.
// expand: the sum over i of t[m, i] * b[i, n], lanes over n, i ascending. Neither depends on which rows share a tile.
#pragma once

#include "dtypes.h"
#include "scratch.h"
#include "unroll.h"
#include "widen.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kRankPage = 8;              // rank rows in a page
constexpr int kRankTile = 4;              // rank rows side by side in registers
constexpr std::int64_t kTokenBlock = 16;  // tokens a task
#if defined(PEFTSERVE_SIMD_AVX512_BF16)
constexpr int kTokenTile = 4;
#else
constexpr int kTokenTile = 2;
#endif

// The pages of one factor: row i begins at arena + page[i / 8] + (i % 8) * width.
template <class W>
struct Factor {
  const W* arena;
  const std::int64_t* page;
  std::int64_t rank, width;

  const W* row(std::int64_t i) const { return arena + page[i / kRankPage] + i % kRankPage * width; }
};

// Operands of shrink. WideRows: float32 inputs, weights widened.
template <class W>
struct WideRows {
  using Input = float;
  using Weight = W;
  using Operand = Vec;
  static constexpr int kColumns = kLanes;
  template <class T>
  static Vec read(const T* p) {
    return load(p);
  }
  template <class T>
  static Vec read_first(const T* p, int count) {
    return load_first(p, count);
  }
  static Vec dot(Vec sum, Vec weight, Vec x) { return fma(weight, x, sum); }
};

#if defined(PEFTSERVE_SIMD_AVX512_BF16)
// PairRows: both bfloat16, two columns a lane, summed in float32.
struct PairRows {
  using Input = Bf16;
  using Weight = Bf16;
  using Operand = __m512i;
  static constexpr int kColumns = 2 * kLanes;
  static __m512i read(const Bf16* p) { return load_pairs(p); }
  static __m512i read_first(const Bf16* p, int count) { return load_first_pairs(p, count); }
  static Vec dot(Vec sum, __m512i weight, __m512i x) { return dot_pairs(sum, weight, x); }
};
#endif

// t[m, i] for kTokens rows of x and kRanks adjacent rows of a.
template <class Rows, int kTokens, int kRanks>
inline void shrink_tile(const typename Rows::Input* x, const typename Rows::Weight* a, std::int64_t columns, float* t,
                        std::int64_t t_stride) {
  constexpr int kCount = kTokens * kRanks;
  Vec sums[kTokens][kRanks];
  unroll<kCount>([&](auto i) __attribute__((always_inline)) { sums[i.value / kRanks][i.value % kRanks] = zero(); });
  const auto step = [&](const auto& read) __attribute__((always_inline)) {
    typename Rows::Operand inputs[kTokens];
    unroll<kTokens>([&](auto m) __attribute__((always_inline)) { inputs[m.value] = read(x + m.value * columns); });
    unroll<kRanks>([&](auto i) __attribute__((always_inline)) {
      const auto weight = read(a + i.value * columns);
      unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
        sums[m.value][i.value] = Rows::dot(sums[m.value][i.value], weight, inputs[m.value]);
      });
    });
  };
  std::int64_t column = 0;
  for (; column + Rows::kColumns <= columns; column += Rows::kColumns) {
    step([&](const auto* row) __attribute__((always_inline)) { return Rows::read(row + column); });
  }
  if (column < columns) {
    const int left = static_cast<int>(columns - column);
    step([&](const auto* row) __attribute__((always_inline)) { return Rows::read_first(row + column, left); });
  }
  unroll<kCount>([&](auto i) __attribute__((always_inline)) {
    constexpr int kToken = decltype(i)::value / kRanks, kRank = decltype(i)::value % kRanks;
    t[kToken * t_stride + kRank] = sum(sums[kToken][kRank]);
  });
}

template <class Rows, int kRanks>
inline void shrink_rows(const typename Rows::Input* x, std::int64_t tokens, const typename Rows::Weight* a,
                        std::int64_t columns, float* t, std::int64_t t_stride) {
  std::int64_t m = 0;
  for (; m + kTokenTile <= tokens; m += kTokenTile) {
    shrink_tile<Rows, kTokenTile, kRanks>(x + m * columns, a, columns, t + m * t_stride, t_stride);
  }
  for (; m < tokens; ++m) shrink_tile<Rows, 1, kRanks>(x + m * columns, a, columns, t + m * t_stride, t_stride);
}

// x: [tokens][a.width]; t: [tokens][a.rank].
template <class Rows>
inline void shrink(const typename Rows::Input* x, std::int64_t tokens, const Factor<typename Rows::Weight>& a,
                   float* t) {
  std::int64_t i = 0;
  for (; i + kRankTile <= a.rank; i += kRankTile) {
    shrink_rows<Rows, kRankTile>(x, tokens, a.row(i), a.width, t + i, a.rank);
  }
  for (; i < a.rank; ++i) shrink_rows<Rows, 1>(x, tokens, a.row(i), a.width, t + i, a.rank);
}

template <int kTokens, int kVectorCount, class W, class Add>
inline void expand_tile(const float* t, const Factor<W>& b, std::int64_t m, std::int64_t column, const Add& add_to) {
  constexpr int kCount = kTokens * kVectorCount;
  const bool is_whole = kVectorCount > 1 || b.width - column >= kLanes;
  const int count = is_whole ? kLanes : static_cast<int>(b.width - column);
  Vec sums[kTokens][kVectorCount];
  unroll<kCount>([&](auto i) __attribute__((always_inline)) {
    sums[i.value / kVectorCount][i.value % kVectorCount] = zero();
  });
  for (std::int64_t i = 0; i < b.rank; ++i) {
    const W* row = b.row(i) + column;
    Vec weights[kVectorCount];
    unroll<kVectorCount>([&](auto v) __attribute__((always_inline)) {
      weights[v.value] = load_part(row + v.value * kLanes, count);
    });
    unroll<kTokens>([&](auto r) __attribute__((always_inline)) {
      const Vec inner = broadcast(t[(m + r.value) * b.rank + i]);
      unroll<kVectorCount>([&](auto v) __attribute__((always_inline)) {
        sums[r.value][v.value] = fma(inner, weights[v.value], sums[r.value][v.value]);
      });
    });
  }
  unroll<kCount>([&](auto i) __attribute__((always_inline)) {
    constexpr int kToken = decltype(i)::value / kVectorCount, kVector = decltype(i)::value % kVectorCount;
    add_to(m + kToken, column + kVector * kLanes, count, sums[kToken][kVector]);
  });
}

// t: [tokens][b.rank]. add_to(token, column, count, vector) for all of [tokens][b.width]; count < kLanes only at the
// end of a row.
template <class W, class Add>
inline void expand(const float* t, std::int64_t tokens, const Factor<W>& b, const Add& add_to) {
  constexpr int kWide = 4;
  const auto rows = [&](auto vectors, std::int64_t column) {
    std::int64_t m = 0;
    for (; m + kTokenTile <= tokens; m += kTokenTile) {
      expand_tile<kTokenTile, vectors.value>(t, b, m, column, add_to);
    }
    for (; m < tokens; ++m) expand_tile<1, vectors.value>(t, b, m, column, add_to);
  };
  std::int64_t column = 0;
  for (; column + kWide * kLanes <= b.width; column += kWide * kLanes) rows(Index<kWide>{}, column);
  for (; column < b.width; column += kLanes) rows(Index<1>{}, column);
}

}  // namespace peftserve::PEFTSERVE_ISA
