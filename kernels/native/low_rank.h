// Products with low-rank factors in rank pages (see peftserve_kernels/rank_pages.py), for LoRA and bottleneck adapters.
// With kSplit all rows of floats are in split order (widen_row_as): x, and the sums that `expand` gives.
//
// shrink: t[m, i] = sum over k of x[m, k] * a[i, k], lanes over k, one chain a value, then the lanes' sum.
// expand: the sum over i of t[m, i] * b[i, n], lanes over n, i ascending. Neither depends on which rows share a tile.
#pragma once

#include <type_traits>

#include "dtypes.h"
#include "low_rank_plan.h"
#include "prefetch.h"
#include "rank_pages.h"
#include "scratch.h"
#include "sums.h"
#include "unroll.h"
#include "widen.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kRankTile = 4;              // rank rows side by side in registers
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
constexpr int kTokenTile = 4;
#else
constexpr int kTokenTile = 3;
#endif
constexpr std::int64_t kTokenBlock = 16 / kTokenTile * kTokenTile;  // tokens a task
constexpr int kWideRows = 1;  // which scratch memory holds widened rows

// The pages of one factor: row i begins at arena + page[i / 8] + (i % 8) * width.
template <class W>
struct Factor {
  const W* arena;
  const std::int64_t* page;
  std::int64_t rank, width;

  const W* row(std::int64_t i) const { return arena + page[i / kRankPage] + i % kRankPage * width; }
  // Rows first .. end, `first` a multiple of kRankPage.
  Factor rows(std::int64_t first, std::int64_t end) const { return {arena, page + first / kRankPage, end - first, width}; }
};

// The one that a part of a plan is of.
template <class W>
inline Factor<W> factor_of(const LowRankPlan& plan, const LowRankPart& part, const W* arena) {
  return {arena, plan.pages(part), part.rank, part.width};
}

struct Columns {
  std::int64_t first, end;
  std::int64_t count() const { return end - first; }
};

// What is fetched while a tile is computed, in the steps of its loop: rows are too short for the hardware to run ahead.
struct Ahead {
  const char* from = nullptr;
  int step = 0;  // bytes

  [[gnu::always_inline]] void fetch() {
    for (int at = 0; at < step; at += 64) __builtin_prefetch(from + at, 0, kSecondLevel);
    from += step;
  }
};

// t[m, i] for kTokens rows of x and kRanks adjacent rows of a.
template <int kTokens, int kRanks, bool kSplit, class W>
inline void shrink_tile(const float* x, const W* a, std::int64_t columns, float* t, std::int64_t t_stride, Ahead ahead) {
  constexpr int kCount = kTokens * kRanks;
  Vec sums[kTokens][kRanks];
  unroll<kCount>([&](auto i) __attribute__((always_inline)) { sums[i.value / kRanks][i.value % kRanks] = zero(); });
  for_vectors_as<kSplit>(columns, [&](std::int64_t column, auto n, int count) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(n)::value;
    unroll<kVectors>([&](auto) __attribute__((always_inline)) { ahead.fetch(); });
    Vec inputs[kTokens][kVectors];
    unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
      read_as(x + m.value * columns + column, count, inputs[m.value]);
    });
    unroll<kRanks>([&](auto i) __attribute__((always_inline)) {
      Vec weights[kVectors];
      read_as(a + i.value * columns + column, count, weights);
      unroll<kTokens * kVectors>([&](auto at) __attribute__((always_inline)) {
        constexpr int kVector = decltype(at)::value / kTokens, kToken = decltype(at)::value % kTokens;
        sums[kToken][i.value] = fma(weights[kVector], inputs[kToken][kVector], sums[kToken][i.value]);
      });
    });
  });
  store_sums(sums, t, t_stride);
}

// body(Index<n>, m) for tiles of n tokens from m on: whole ones, a pair, and single ones.
template <class Body>
[[gnu::always_inline]] inline void for_token_tiles(std::int64_t tokens, const Body& body) {
  std::int64_t m = 0;
  for (; m + kTokenTile <= tokens; m += kTokenTile) body(Index<kTokenTile>{}, m);
  if (m + 2 <= tokens) {
    body(Index<2>{}, m);
    m += 2;
  }
  for (; m < tokens; ++m) body(Index<1>{}, m);
}

template <int kRanks, bool kSplit, class W>
inline void shrink_rows(const float* x, std::int64_t tokens, const W* a, std::int64_t columns, float* t,
                        std::int64_t t_stride, Ahead ahead) {
  for_token_tiles(tokens, [&](auto count, std::int64_t m) __attribute__((always_inline)) {
    shrink_tile<count.value, kRanks, kSplit>(x + m * columns, a, columns, t + m * t_stride, t_stride, m == 0 ? ahead : Ahead{});
  });
}

// Rows `stride` elements apart, from one that begins at `from` on; null for none.
template <class W>
struct NextRows {
  const W* from = nullptr;
  std::int64_t stride = 0;
};

// The tile of rows after the one from row i on, from a column on: the factor's own, or where it ends the first of those
// `after` it. None where single rows follow.
template <class W>
inline NextRows<W> next_rows(const Factor<W>& factor, std::int64_t i, std::int64_t column, const NextRows<W>& after) {
  if (i + 2 * kRankTile <= factor.rank) return {factor.row(i + kRankTile) + column, factor.width};
  return i + kRankTile >= factor.rank ? after : NextRows<W>{};
}

// As they lie side by side in a page.
template <class W>
inline Ahead fetch_ahead(const NextRows<W>& next) {
  if (next.from == nullptr) return {};
  return {reinterpret_cast<const char*>(next.from), kRankTile * kLanes * static_cast<int>(sizeof(W))};
}

// x: [tokens][a.width]; t: [tokens][a.rank], rows `t_stride` apart. `after`: rows of the same width that come next.
template <bool kSplit = false, class W>
inline void shrink(const float* x, std::int64_t tokens, const Factor<W>& a, float* t, std::int64_t t_stride,
                   const NextRows<W>& after = {}) {
  const auto rows = [&](auto count, std::int64_t i) {
    const Ahead ahead = fetch_ahead(next_rows(a, i, 0, after));
    if constexpr (!std::is_same_v<W, float>) {
      if (tokens > 2) {  // each weight is widened once for all of them
        auto* wide = scratch<float, kWideRows>(static_cast<std::size_t>(kRankTile * a.width));
        for (int row = 0; row < count.value; ++row) widen_row_as<kSplit>(a.row(i + row), a.width, wide + row * a.width);
        return shrink_rows<count.value, false>(x, tokens, wide, a.width, t + i, t_stride, ahead);
      }
    }
    shrink_rows<count.value, kSplit && !std::is_same_v<W, float>>(x, tokens, a.row(i), a.width, t + i, t_stride, ahead);
  };
  std::int64_t i = 0;
  for (; i + kRankTile <= a.rank; i += kRankTile) rows(Index<kRankTile>{}, i);
  for (; i < a.rank; ++i) rows(Index<1>{}, i);
}

#if defined(PEFTSERVE_SIMD_AVX512_BF16)
// The same for bfloat16, multiplied as it is: a chain is of pairs of columns.
template <int kTokens, int kRanks>
inline void shrink_pairs_tile(const Bf16* x, const Bf16* a, std::int64_t columns, float* t, std::int64_t t_stride,
                              Ahead ahead) {
  constexpr int kCount = kTokens * kRanks;
  Vec sums[kTokens][kRanks];
  unroll<kCount>([&](auto i) __attribute__((always_inline)) { sums[i.value / kRanks][i.value % kRanks] = zero(); });
  const auto step = [&](const auto& load) __attribute__((always_inline)) {
    Vec inputs[kTokens];
    unroll<kTokens>([&](auto m) __attribute__((always_inline)) { inputs[m.value] = load(x + m.value * columns); });
    unroll<kRanks>([&](auto i) __attribute__((always_inline)) {
      const Vec weights = load(a + i.value * columns);
      unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
        sums[m.value][i.value] = dot_pairs(sums[m.value][i.value], weights, inputs[m.value]);
      });
    });
  };
  std::int64_t column = 0;
  for (; column + kPair <= columns; column += kPair) {
    ahead.fetch();
    ahead.fetch();
    step([&](const Bf16* row) __attribute__((always_inline)) { return Pairs<Bf16>::load(row + column); });
  }
  if (column < columns) {
    const int count = static_cast<int>(columns - column);
    step([&](const Bf16* row) __attribute__((always_inline)) { return load_first_pairs(row + column, count); });
  }
  store_sums(sums, t, t_stride);
}

inline void shrink_pairs(const Bf16* x, std::int64_t tokens, const Factor<Bf16>& a, float* t, std::int64_t t_stride,
                         const NextRows<Bf16>& after) {
  const auto rows = [&](auto count, std::int64_t i) {
    const Ahead ahead = fetch_ahead(next_rows(a, i, 0, after));
    for_token_tiles(tokens, [&](auto tile, std::int64_t m) __attribute__((always_inline)) {
      shrink_pairs_tile<tile.value, count.value>(x + m * a.width, a.row(i), a.width, t + m * t_stride + i, t_stride,
                                                 m == 0 ? ahead : Ahead{});
    });
  };
  std::int64_t i = 0;
  for (; i + kRankTile <= a.rank; i += kRankTile) rows(Index<kRankTile>{}, i);
  for (; i < a.rank; ++i) rows(Index<1>{}, i);
}
#endif

constexpr int kPanelVectors = 4;
constexpr int kPanel = kPanelVectors * kLanes;  // columns of the product that are computed together

// The cache lines of a row's next panel.
template <class W>
[[gnu::always_inline]] inline void prefetch_next_panel(const W* row) {
  constexpr int kLine = 64 / sizeof(W);
  for (int at = 0; at < kPanel; at += kLine) __builtin_prefetch(row + kPanel + at, 0, kSecondLevel);
}

// `count` columns of a factor from `first` on, widened, [rank][kPanel]; zeros past the last one. The next panel's are
// fetched meanwhile: rows lie so far apart that the hardware does not foresee it.
template <bool kSplit, class W>
inline void widen_panel(const Factor<W>& b, std::int64_t first, std::int64_t count, float* wide) {
  for (std::int64_t i = 0; i < b.rank; ++i, wide += kPanel) {
    const W* row = b.row(i) + first;
    prefetch_next_panel(row);
    if (count == kPanel) {
      widen_row_as<kSplit>(row, kPanel, wide);
    } else {
      for (std::int64_t column = 0; column < kPanel; ++column) wide[column] = 0.0f;
      widen_row_as<kSplit>(row, count, wide);
    }
  }
}

// sums[m][kPanel]: the products of kTokens tokens with widened columns, [rank][kPanel].
template <int kTokens>
inline void expand_tile(const float* t, std::int64_t rank, const float* weights, float* sums) {
  constexpr int kCount = kTokens * kPanelVectors;
  Vec totals[kTokens][kPanelVectors];
  unroll<kCount>([&](auto i) __attribute__((always_inline)) {
    totals[i.value / kPanelVectors][i.value % kPanelVectors] = zero();
  });
  for (std::int64_t i = 0; i < rank; ++i) {
    Vec inner[kTokens];
    unroll<kTokens>([&](auto m) __attribute__((always_inline)) { inner[m.value] = broadcast(t[m.value * rank + i]); });
    unroll<kPanelVectors>([&](auto v) __attribute__((always_inline)) {
      const Vec weight = opaque(load(weights + i * kPanel + v.value * kLanes));
      unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
        totals[m.value][v.value] = fma(inner[m.value], weight, totals[m.value][v.value]);
      });
    });
  }
  unroll<kCount>([&](auto i) __attribute__((always_inline)) {
    store(sums + i.value * kLanes, totals[i.value / kPanelVectors][i.value % kPanelVectors]);
  });
}

// Adds rows i .. i + kRanks of b to the sums [kTokens][columns], where row 0 begins them: the same chains of products as
// expand_tile's. Meanwhile as many columns of the next tile of rows are fetched.
template <int kTokens, int kRanks, bool kSplit, class W>
inline void expand_rows(const float* t, const Factor<W>& b, std::int64_t i, Columns columns, const NextRows<W>& next,
                        float* sums) {
  const W* weights = b.row(i) + columns.first;
  Vec inner[kTokens][kRanks];
  unroll<kTokens * kRanks>([&](auto at) __attribute__((always_inline)) {
    constexpr int kToken = decltype(at)::value / kRanks, kRank = decltype(at)::value % kRanks;
    inner[kToken][kRank] = broadcast(t[kToken * b.rank + i + kRank]);
  });
  for_vectors_as<kSplit>(columns.count(), [&](std::int64_t column, auto n, int count) __attribute__((always_inline)) {
    constexpr int kVectors = decltype(n)::value;
    if (next.from != nullptr) {
      unroll<kRankTile>([&](auto r) __attribute__((always_inline)) {
        __builtin_prefetch(next.from + r.value * next.stride + column, 0, kSecondLevel);
      });
    }
    Vec totals[kTokens][kVectors];
    unroll<kTokens * kVectors>([&](auto at) __attribute__((always_inline)) {
      constexpr int kToken = decltype(at)::value / kVectors, kVector = decltype(at)::value % kVectors;
      const float* from = sums + kToken * columns.count() + column + kVector * kLanes;
      totals[kToken][kVector] = i == 0 ? zero() : load_part(from, count);
    });
    unroll<kRanks>([&](auto r) __attribute__((always_inline)) {
      Vec weight[kVectors];
      read_as(weights + r.value * b.width + column, count, weight);
      unroll<kTokens * kVectors>([&](auto at) __attribute__((always_inline)) {
        constexpr int kToken = decltype(at)::value / kVectors, kVector = decltype(at)::value % kVectors;
        totals[kToken][kVector] = fma(inner[kToken][r.value], weight[kVector], totals[kToken][kVector]);
      });
    });
    unroll<kTokens * kVectors>([&](auto at) __attribute__((always_inline)) {
      constexpr int kToken = decltype(at)::value / kVectors, kVector = decltype(at)::value % kVectors;
      store_part(sums + kToken * columns.count() + column + kVector * kLanes, count, totals[kToken][kVector]);
    });
  });
}

// Row after row, as they lie in memory: for so few tokens that their sums stay in the cache.
template <int kTokens, bool kSplit, class W>
inline void expand_few(const float* t, const Factor<W>& b, Columns columns, const NextRows<W>& after, float* sums) {
  const auto next = [&](std::int64_t i) { return next_rows(b, i, columns.first, after); };
  std::int64_t i = 0;
  for (; i + kRankTile <= b.rank; i += kRankTile) {
    expand_rows<kTokens, kRankTile, kSplit>(t, b, i, columns, next(i), sums);
  }
  for (; i < b.rank; ++i) expand_rows<kTokens, 1, kSplit>(t, b, i, columns, next(i), sums);
}

// t: [tokens][b.rank]. add_to(token, column, count, sums) for all tokens and columns, `count` columns at a time. `after`:
// where the rows that come next have about as many columns.
template <bool kSplit = false, class W, class Add>
inline void expand(const float* t, std::int64_t tokens, const Factor<W>& b, Columns columns, const Add& add_to,
                   const NextRows<W>& after = {}) {
  if (tokens <= 2) {
    auto* sums = scratch<float, kWideRows>(static_cast<std::size_t>(tokens * columns.count()));
    if (tokens == 1) {
      expand_few<1, kSplit>(t, b, columns, after, sums);
    } else {
      expand_few<2, kSplit>(t, b, columns, after, sums);
    }
    for (std::int64_t m = 0; m < tokens; ++m) add_to(m, columns.first, columns.count(), sums + m * columns.count());
    return;
  }
  auto* wide = scratch<float, kWideRows>(static_cast<std::size_t>((b.rank + tokens) * kPanel));
  float* sums = wide + b.rank * kPanel;
  for (std::int64_t first = columns.first; first < columns.end; first += kPanel) {
    const std::int64_t count = columns.end - first < kPanel ? columns.end - first : kPanel;
    widen_panel<kSplit>(b, first, count, wide);
    for_token_tiles(tokens, [&](auto tile, std::int64_t m) __attribute__((always_inline)) {
      expand_tile<tile.value>(t + m * b.rank, b.rank, wide, sums + m * kPanel);
    });
    for (std::int64_t m = 0; m < tokens; ++m) add_to(m, first, count, sums + m * kPanel);
  }
}

}  // namespace peftserve::PEFTSERVE_ISA
