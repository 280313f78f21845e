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

// The pages of one factor: row i begins at arena + page[i / 8] + header + (i % 8) * width.
template <class W>
struct Factor {
  const W* arena;
  const std::int64_t* page;
  std::int64_t rank, width;
  std::int64_t header = 0;  // elements of a page before its rows

  const W* row(std::int64_t i) const { return arena + page[i / kRankPage] + header + i % kRankPage * width; }
  // Of a first factor of int8: eight scales of the rows of page `p`, and eight of the same rows of the second.
  const float* scales(std::int64_t p) const { return reinterpret_cast<const float*>(arena + page[p]); }
  // Rows first .. end, `first` a multiple of kRankPage.
  Factor rows(std::int64_t first, std::int64_t end) const {
    return {arena, page + first / kRankPage, end - first, width, header};
  }
};

// The one that a part of a plan is of: of its products with A, and of those with B.
template <class W>
inline Factor<W> first_factor(const LowRankPlan& plan, const LowRankPart& part, const W* arena) {
  constexpr std::int64_t kHeader = std::is_same_v<W, Int8> ? kScalesBytes : 0;
  return {arena, plan.pages(part), part.rank, part.width, kHeader};
}
template <class W>
inline Factor<W> second_factor(const LowRankPlan& plan, const LowRankPart& part, const W* arena) {
  return {arena, plan.pages(part), part.rank, part.width};
}

// Whether the product before gave each thread rows of y, not columns: of a LoraAdd or a BottleneckAdd.
template <class Args>
inline bool is_by_rows(const Args& args) {
  return args.own_rows && args.tokens >= args.threads * kOwnRows;
}

// What an arena of W holds besides pages is of this type.
template <class W>
using VectorOf = std::conditional_t<std::is_same_v<W, Int8>, Bf16, W>;
template <class W>
inline const VectorOf<W>* vector_at(const W* arena, std::int64_t offset) {
  return reinterpret_cast<const VectorOf<W>*>(arena + offset);
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

// The tile of rows after the one from row i on, as they lie side by side in a page: the factor's own, or where it ends those
// that come `after`, null for none. Nothing where single rows follow.
template <class W>
inline Ahead fetch_ahead(const Factor<W>& factor, std::int64_t i, const W* after) {
  const bool is_own = i + 2 * kRankTile <= factor.rank;
  if (!is_own && (after == nullptr || i + kRankTile < factor.rank)) return {};
  const W* next = is_own ? factor.row(i + kRankTile) : after;
  return {reinterpret_cast<const char*>(next), kRankTile * kLanes * static_cast<int>(sizeof(W))};
}

// x: [tokens][a.width]; t: [tokens][a.rank], rows `t_stride` apart. `after`: rows of the same width that come next.
template <bool kSplit = false, class W>
inline void shrink(const float* x, std::int64_t tokens, const Factor<W>& a, float* t, std::int64_t t_stride,
                   const W* after = nullptr) {
  const auto rows = [&](auto count, std::int64_t i) {
    const Ahead ahead = fetch_ahead(a, i, after);
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
// The same for bfloat16, multiplied as it is, as are 8 bits, which bfloat16 holds: a chain is of pairs of columns.
template <int kTokens, int kRanks, class W>
inline void shrink_pairs_tile(const Bf16* x, const W* a, std::int64_t columns, float* t, std::int64_t t_stride,
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
    step([&](const auto* row) __attribute__((always_inline)) { return load_pairs(row + column); });
  }
  if (column < columns) {
    const int count = static_cast<int>(columns - column);
    step([&](const auto* row) __attribute__((always_inline)) { return load_first_pairs(row + column, count); });
  }
  store_sums(sums, t, t_stride);
}

template <class W>
inline void shrink_pairs(const Bf16* x, std::int64_t tokens, const Factor<W>& a, float* t, std::int64_t t_stride,
                         const W* after) {
  const auto rows = [&](auto count, std::int64_t i) {
    const Ahead ahead = fetch_ahead(a, i, after);
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

// Of so many tokens and vectors of columns at most are sums in registers together, beside the weights that they meet.
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
constexpr int kExpandTokens = 6, kMostSums = 24, kMostVectors = 16;
#else
constexpr int kExpandTokens = 3, kMostSums = 12, kMostVectors = 8;
#endif
constexpr int kPanel = 4 * kLanes;  // columns: parts are whole ones, but for the last of a slice

// Sums of some columns of kTokens tokens, rank row after rank row, to sums[m]; `count` lanes of a single vector. The columns
// of the next panel are fetched meanwhile: rows lie so far apart that the hardware does not foresee it.
template <int kTokens, int kVectors, bool kSplit, class W>
[[gnu::always_inline]] inline void expand_panel(const float* t, const Factor<W>& b, std::int64_t column, int count,
                                                float* sums, std::int64_t stride) {
  constexpr int kTogether = kSplit && kVectors > 1 ? 2 : 1;  // vectors that are widened together
  constexpr int kWidth = kVectors * kLanes, kLine = 64 / sizeof(W);
  Vec totals[kTokens][kVectors];
  unroll<kTokens * kVectors>([&](auto at) __attribute__((always_inline)) {
    totals[at.value / kVectors][at.value % kVectors] = zero();
  });
  for (std::int64_t page = 0; page < b.rank; page += kRankPage) {
    const std::int64_t end = b.rank - page < kRankPage ? b.rank : page + kRankPage;
    const W* row = b.row(page) + column;
    for (std::int64_t i = page; i < end; ++i, row += b.width) {
      for (int at = kWidth; at < 2 * kWidth; at += kLine) __builtin_prefetch(row + at, 0, kSecondLevel);
      Vec inner[kTokens];
      unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
        inner[m.value] = broadcast(t[m.value * b.rank + i]);
      });
      unroll<kVectors / kTogether>([&](auto v) __attribute__((always_inline)) {
        constexpr int kFirst = decltype(v)::value * kTogether;
        Vec weights[kTogether];
        read_as(row + kFirst * kLanes, count, weights);
        unroll<kTokens * kTogether>([&](auto at) __attribute__((always_inline)) {
          constexpr int kToken = decltype(at)::value / kTogether, kVector = decltype(at)::value % kTogether;
          Vec& total = totals[kToken][kFirst + kVector];
          total = fma(inner[kToken], weights[kVector], total);
        });
      });
    }
  }
  unroll<kTokens * kVectors>([&](auto at) __attribute__((always_inline)) {
    constexpr int kToken = decltype(at)::value / kVectors, kVector = decltype(at)::value % kVectors;
    store_part(sums + kToken * stride + kVector * kLanes, count, totals[kToken][kVector]);
  });
}

// As many panels of kVectors and then of fewer vectors as fit, from `column` on. Returns where they end.
template <int kTokens, int kVectors, bool kSplit, class W>
[[gnu::always_inline]] inline std::int64_t expand_panels(const float* t, const Factor<W>& b, const Columns& columns,
                                                         std::int64_t column, float* sums) {
  if constexpr (kTokens * kVectors <= kMostSums) {
    constexpr std::int64_t kWidth = kVectors * kLanes;
    for (; column + kWidth <= columns.end; column += kWidth) {
      expand_panel<kTokens, kVectors, kSplit>(t, b, column, kLanes, sums + (column - columns.first), columns.count());
    }
  }
  if constexpr (kVectors > (kSplit ? 2 : 1)) {
    return expand_panels<kTokens, kVectors / 2, kSplit>(t, b, columns, column, sums);
  } else {
    return column;
  }
}

// sums: [kTokens][columns], with kSplit in split order.
template <int kTokens, bool kSplit, class W>
[[gnu::noinline]] void expand_tile(const float* t, const Factor<W>& b, Columns columns, float* sums) {
  const std::int64_t column = expand_panels<kTokens, kMostVectors, kSplit>(t, b, columns, columns.first, sums);
  for_vectors(columns.end - column, [&](std::int64_t at, int count) __attribute__((always_inline)) {
    expand_panel<kTokens, 1, kSplit>(t, b, column + at, count, sums + (column + at - columns.first), columns.count());
  });
}

// body(Index<n>, m) for tiles of n tokens from m on: as few as possible, each about as large.
template <class Body>
[[gnu::always_inline]] inline void for_even_tiles(std::int64_t tokens, const Body& body) {
  std::int64_t m = 0;
  for (std::int64_t tiles = (tokens + kExpandTokens - 1) / kExpandTokens; tiles > 0; --tiles) {
    const std::int64_t size = (tokens - m + tiles - 1) / tiles;
    unroll<kExpandTokens>([&](auto at) __attribute__((always_inline)) {
      if (size == at.value + 1) body(Index<at.value + 1>{}, m);
    });
    m += size;
  }
}

// t: [tokens][b.rank]. add_to(token, sums) for each token, [columns].
template <bool kSplit = false, class W, class Add>
inline void expand(const float* t, std::int64_t tokens, const Factor<W>& b, Columns columns, const Add& add_to) {
  auto* sums = scratch<float, kWideRows>(static_cast<std::size_t>(kExpandTokens * columns.count()));
  for_even_tiles(tokens, [&](auto tile, std::int64_t m) __attribute__((always_inline)) {
    expand_tile<tile.value, kSplit>(t + m * b.rank, b, columns, sums);
    for (int row = 0; row < tile.value; ++row) add_to(m + row, sums + row * columns.count());
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
