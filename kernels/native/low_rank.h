// Products with low-rank factors in rank pages (see peftserve_kernels/rank_pages.py), for LoRA and bottleneck adapters.
//
// shrink: t[m, i] = sum over k of x[m, k] * a[i, k], lanes over k, one chain a value, then the lanes' sum.
// expand: the sum over i of t[m, i] * b[i, n], lanes over n, i ascending. Neither depends on which rows share a tile.
#pragma once

#include <type_traits>

#include "dtypes.h"
#include "scratch.h"
#include "sums.h"
#include "unroll.h"
#include "widen.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kRankPage = 8;              // rank rows in a page
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
};

// What is fetched while a tile is computed, in the steps of its loop: rows are too short for the hardware to run ahead.
struct Ahead {
  const char* from = nullptr;
  int step = 0;  // bytes

  [[gnu::always_inline]] void fetch() {
    for (int at = 0; at < step; at += 64) __builtin_prefetch(from + at);
    from += step;
  }
};

// t[m, i] for kTokens rows of x and kRanks adjacent rows of a.
template <int kTokens, int kRanks, class W>
inline void shrink_tile(const float* x, const W* a, std::int64_t columns, float* t, std::int64_t t_stride, Ahead ahead) {
  constexpr int kCount = kTokens * kRanks;
  Vec sums[kTokens][kRanks];
  unroll<kCount>([&](auto i) __attribute__((always_inline)) { sums[i.value / kRanks][i.value % kRanks] = zero(); });
  for_vectors(columns, [&](std::int64_t column, int count) __attribute__((always_inline)) {
    ahead.fetch();
    Vec inputs[kTokens];
    unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
      inputs[m.value] = load_part(x + m.value * columns + column, count);
    });
    unroll<kRanks>([&](auto i) __attribute__((always_inline)) {
      const Vec weight = load_part(a + i.value * columns + column, count);
      unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
        sums[m.value][i.value] = fma(weight, inputs[m.value], sums[m.value][i.value]);
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

template <int kRanks, class W>
inline void shrink_rows(const float* x, std::int64_t tokens, const W* a, std::int64_t columns, float* t,
                        std::int64_t t_stride, Ahead ahead) {
  for_token_tiles(tokens, [&](auto count, std::int64_t m) __attribute__((always_inline)) {
    shrink_tile<count.value, kRanks>(x + m * columns, a, columns, t + m * t_stride, t_stride, m == 0 ? ahead : Ahead{});
  });
}

// The tile of rows after the one from row i on; none where single rows follow.
template <class W>
inline Ahead next_rows(const Factor<W>& a, std::int64_t i) {
  if (i + 2 * kRankTile > a.rank) return {};
  return {reinterpret_cast<const char*>(a.row(i + kRankTile)), kRankTile * kLanes * static_cast<int>(sizeof(W))};
}

// x: [tokens][a.width]; t: [tokens][a.rank].
template <class W>
inline void shrink(const float* x, std::int64_t tokens, const Factor<W>& a, float* t) {
  const auto rows = [&](auto count, std::int64_t i) {
    const Ahead ahead = next_rows(a, i);
    if constexpr (!std::is_same_v<W, float>) {
      if (tokens > 2) {  // each weight is widened once for all of them
        auto* wide = scratch<float, kWideRows>(static_cast<std::size_t>(kRankTile * a.width));
        widen_row(a.row(i), count.value * a.width, wide);  // rows of a tile share a page
        return shrink_rows<count.value>(x, tokens, wide, a.width, t + i, a.rank, ahead);
      }
    }
    shrink_rows<count.value>(x, tokens, a.row(i), a.width, t + i, a.rank, ahead);
  };
  std::int64_t i = 0;
  for (; i + kRankTile <= a.rank; i += kRankTile) rows(Index<kRankTile>{}, i);
  for (; i < a.rank; ++i) rows(Index<1>{}, i);
}

constexpr int kPanelVectors = 4;
constexpr int kPanel = kPanelVectors * kLanes;  // columns of the product that are computed together

// The cache lines of a row's next panel.
template <class W>
[[gnu::always_inline]] inline void prefetch_next_panel(const W* row) {
  constexpr int kLine = 64 / sizeof(W);
  for (int at = 0; at < kPanel; at += kLine) __builtin_prefetch(row + kPanel + at);
}

// kPanel columns of a factor from `first` on, widened, [rank][kPanel]; zeros past the last column. The next panel's are
// fetched meanwhile: rows lie so far apart that the hardware does not foresee it.
template <class W>
inline void widen_panel(const Factor<W>& b, std::int64_t first, float* wide) {
  const std::int64_t count = b.width - first < kPanel ? b.width - first : kPanel;
  for (std::int64_t i = 0; i < b.rank; ++i, wide += kPanel) {
    const W* row = b.row(i) + first;
    prefetch_next_panel(row);
    if (count == kPanel) {
      unroll<kPanelVectors>([&](auto v) __attribute__((always_inline)) {
        store(wide + v.value * kLanes, load(row + v.value * kLanes));
      });
    } else {
      for (std::int64_t column = 0; column < kPanel; ++column) wide[column] = 0.0f;
      widen_row(row, count, wide);
    }
  }
}

// sums[m][kPanel]: the products of kTokens tokens with kPanel columns, which begin at row(i) for rank row i.
template <int kTokens, class Row>
inline void expand_tile(const float* t, std::int64_t rank, const Row& row, float* sums) {
  constexpr int kCount = kTokens * kPanelVectors;
  Vec totals[kTokens][kPanelVectors];
  unroll<kCount>([&](auto i) __attribute__((always_inline)) {
    totals[i.value / kPanelVectors][i.value % kPanelVectors] = zero();
  });
  for (std::int64_t i = 0; i < rank; ++i) {
    const auto* weights = row(i);
    Vec inner[kTokens];
    unroll<kTokens>([&](auto m) __attribute__((always_inline)) { inner[m.value] = broadcast(t[m.value * rank + i]); });
    unroll<kPanelVectors>([&](auto v) __attribute__((always_inline)) {
      const Vec weight = opaque(load(weights + v.value * kLanes));
      unroll<kTokens>([&](auto m) __attribute__((always_inline)) {
        totals[m.value][v.value] = fma(inner[m.value], weight, totals[m.value][v.value]);
      });
    });
  }
  unroll<kCount>([&](auto i) __attribute__((always_inline)) {
    store(sums + i.value * kLanes, totals[i.value / kPanelVectors][i.value % kPanelVectors]);
  });
}

// t: [tokens][b.rank]. add_to(token, column, count, sums) for all of [tokens][b.width], `count` columns at a time.
template <class W, class Add>
inline void expand(const float* t, std::int64_t tokens, const Factor<W>& b, const Add& add_to) {
  auto* wide = scratch<float, kWideRows>(static_cast<std::size_t>((b.rank + tokens) * kPanel));
  float* sums = wide + b.rank * kPanel;
  for (std::int64_t first = 0; first < b.width; first += kPanel) {
    const std::int64_t count = b.width - first < kPanel ? b.width - first : kPanel;
    const auto tiles = [&](const auto& row) __attribute__((always_inline)) {
      for_token_tiles(tokens, [&](auto tile, std::int64_t m) __attribute__((always_inline)) {
        expand_tile<tile.value>(t + m * b.rank, b.rank, row, sums + m * kPanel);
      });
    };
    if (tokens <= 2 && count == kPanel) {  // as much work as widening them beforehand
      tiles([&](std::int64_t i) __attribute__((always_inline)) {
        const W* row = b.row(i) + first;
        prefetch_next_panel(row);
        return row;
      });
    } else {
      widen_panel(b, first, wide);
      tiles([&](std::int64_t i) __attribute__((always_inline)) { return wide + i * kPanel; });
    }
    for (std::int64_t m = 0; m < tokens; ++m) add_to(m, first, count, sums + m * kPanel);
  }
}

}  // namespace peftserve::PEFTSERVE_ISA
