// linear_logits of bfloat16 with tiles. Rows of weights are the rows of a tile product, as they lie in memory; rows of x
// are its columns, in pairs. So the weights, which are read once and are much the larger part, are read in place.
//
// An output is one chain of tile products, columns ascending, whatever the other rows and outputs of a tile are.
#include "kernels.h"
#include "parallel.h"
#include "rows.h"
#include "scratch.h"
#include "unroll.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

constexpr int kRows = 4, kPairs = 6;  // tile registers, two each, in turn; the first four are sums

// A row of a tile, of which `columns` exist; zeros past them.
__m512i load_row(const Bf16* row, std::int64_t columns) {
  const __mmask32 mask = columns < kTileColumns ? (std::uint32_t{1} << columns) - 1 : 0xffffffffu;
  return _mm512_maskz_loadu_epi16(mask, row);
}

class TileProduct {
 public:
  explicit TileProduct(const LinearLogits& args)
      : args_(args),
        x_(static_cast<const Bf16*>(args.x)),
        weights_(static_cast<const Bf16*>(args.weight)),
        steps_((args.columns + kTileColumns - 1) / kTileColumns),
        whole_(args.columns / kTileColumns),
        panels_((args.outputs + kTileHeight - 1) / kTileHeight) {}

  void run() const {
    const int team = team_size(args_.threads, args_.rows * args_.columns * args_.outputs);
    parallel_ranges(team, panels_, [&](std::int64_t begin, std::int64_t end) {
      const TileShapes shapes;
      std::int64_t row = 0;
      for (; args_.rows - row > 2 * kTileHeight; row += 4 * kTileHeight) multiply<4, 1>(row, begin, end);
      if (args_.rows - row > kTileHeight) return multiply<2, 2>(row, begin, end);
      if (args_.rows > row) multiply<1, 1>(row, begin, end);
    });
  }

 private:
  struct Work {
    alignas(64) float sums[4][kTileHeight][kTileHeight];  // [output][row of x]
    alignas(64) Bf16 edge[4][kTileHeight][kTileColumns];  // weights at the end of rows or outputs, and zeros
  };

  // kTiles tiles of rows of x from `row` on, with the panels begin .. end of outputs, kPanels at a time.
  template <int kTiles, int kPanels>
  void multiply(std::int64_t row, std::int64_t begin, std::int64_t end) const {
    const std::uint32_t* pairs = pack<kTiles>(row);
    Work work;
    std::int64_t panel = begin;
    for (; panel + kPanels <= end; panel += kPanels) outputs<kTiles, kPanels>(pairs, row, panel, work);
    for (; panel < end; ++panel) outputs<kTiles, 1>(pairs, row, panel, work);
  }

  // [steps][kTiles][pair of columns][row], zeros past the last row and column. Each thread for itself.
  template <int kTiles>
  const std::uint32_t* pack(std::int64_t first) const {
    auto* pairs = scratch<std::uint32_t>(static_cast<std::size_t>(steps_ * kTiles * kTileWords));
    for (std::int64_t step = 0; step < steps_; ++step) {
      const std::int64_t column = step * kTileColumns;
      for (int tile = 0; tile < kTiles; ++tile) {
        Vec square[kLanes];
        for (int i = 0; i < kTileHeight; ++i) {
          const std::int64_t row = first + tile * kTileHeight + i;
          const Bf16* x = x_ + row * args_.columns + column;
          square[i] = row < args_.rows ? _mm512_castsi512_ps(load_row(x, args_.columns - column)) : zero();
        }
        transpose(square);
        std::uint32_t* to = pairs + (step * kTiles + tile) * kTileWords;
        for (int i = 0; i < kTileHeight; ++i) store(reinterpret_cast<float*>(to + i * kTileHeight), square[i]);
      }
    }
    return pairs;
  }

  template <int kTiles, int kPanels>
  void outputs(const std::uint32_t* pairs, std::int64_t row, std::int64_t panel, Work& work) const {
    const std::int64_t first = panel * kTileHeight, left = args_.outputs - first;
    const Bf16* weights = weights_ + first * args_.columns;
    const bool is_whole = left >= kPanels * kTileHeight;
    const bool fetches = left >= 2 * kPanels * kTileHeight;
    const auto* ahead = reinterpret_cast<const char*>(weights + std::int64_t{kPanels} * kTileHeight * args_.columns);
    unroll<kTiles * kPanels>([&](auto i) __attribute__((always_inline)) { zero_tile<i.value>(); });
    for (std::int64_t step = 0; step < steps_; ++step, pairs += kTiles * kTileWords) {
      const std::int64_t column = step * kTileColumns;
      const bool in_place = is_whole && step < whole_;
      if (!in_place) copy_edge<kPanels>(weights + column, left, args_.columns - column, work);
      unroll<kPanels>([&](auto p) __attribute__((always_inline)) {
        constexpr int kPanel = decltype(p)::value, kRow = kRows + kPanel % 2;
        if (in_place) {
          load_tile<kRow>(weights + kPanel * kTileHeight * args_.columns + column, args_.columns * 2);
        } else {
          load_tile<kRow>(work.edge[kPanel], kTileColumns * 2);
        }
        unroll<kTiles>([&](auto t) __attribute__((always_inline)) {
          constexpr int kTile = decltype(t)::value, kPair = kPairs + kTile % 2;
          if (kPanel == 0 || kTiles > 2) load_tile<kPair>(pairs + kTile * kTileWords, kTileHeight * 4);
          dot_tiles<kPanel * kTiles + kTile, kRow, kPair>();
        });
      });
      if (fetches) {  // the next panels, a line of each row a step
        for (int line = 0; line < kPanels * kTileHeight; ++line) __builtin_prefetch(ahead + line * 64);
        ahead += kPanels * kTileHeight * 64;
      }
    }
    unroll<kTiles * kPanels>([&](auto i) __attribute__((always_inline)) {
      constexpr int kTile = decltype(i)::value % kTiles, kPanel = decltype(i)::value / kTiles;
      store_tile<i.value>(work.sums[i.value], kTileHeight * 4);
      store_sums(work.sums[i.value], row + kTile * kTileHeight, first + kPanel * kTileHeight);
    });
  }

  // Up to kPanels tiles of weights, of which `outputs` rows and `columns` columns exist.
  template <int kPanels>
  void copy_edge(const Bf16* weights, std::int64_t outputs, std::int64_t columns, Work& work) const {
    for (int output = 0; output < kPanels * kTileHeight; ++output) {
      const __m512i row =
          output < outputs ? load_row(weights + output * args_.columns, columns) : _mm512_setzero_si512();
      _mm512_store_si512(work.edge[output / kTileHeight][output % kTileHeight], row);
    }
  }

  void store_sums(const float (&sums)[kTileHeight][kTileHeight], std::int64_t row, std::int64_t output) const {
    const std::int64_t rows = args_.rows - row, outputs = args_.outputs - output;
    if (rows <= 0 || outputs <= 0) return;
    const int count = outputs < kLanes ? static_cast<int>(outputs) : kLanes;
    Vec square[kLanes];
    for (int i = 0; i < kTileHeight; ++i) square[i] = load(sums[i]);
    transpose(square);
    for (int i = 0; i < kTileHeight && i < rows; ++i) {
      store_part(args_.y + (row + i) * args_.outputs + output, count, square[i]);
    }
  }

  const LinearLogits& args_;
  const Bf16* x_;
  const Bf16* weights_;
  std::int64_t steps_, whole_;  // tiles of columns, and those without columns past the end
  std::int64_t panels_;         // tiles of outputs
};

}  // namespace

void linear_logits(const LinearLogits& args) {
  if (args.x_dtype != Dtype::kBfloat16) return avx512_vnni::kOps.linear_logits(args);
  TileProduct(args).run();
}

}  // namespace peftserve::PEFTSERVE_ISA
