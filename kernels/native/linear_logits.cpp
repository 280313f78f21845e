#include "dense.h"
#include "dtypes.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

// Fetches one of `shares` parts of the `count` values from `first` on: a panel of the weights is contiguous, but read in
// short pieces of many rows, which the hardware does not see coming.
template <class W>
void prefetch_share(const W* weights, std::int64_t first, std::int64_t end, std::int64_t share, std::int64_t shares,
                    std::int64_t count) {
  constexpr std::int64_t kLine = 64 / sizeof(W);
  const std::int64_t stop = first + count * (share + 1) / shares;
  for (std::int64_t at = first + count * share / shares; at < stop && at < end; at += kLine) {
    __builtin_prefetch(weights + at);
  }
}

template <class Dot, class X, class W>
void product(const LinearLogits& args) {
  const X* x = static_cast<const X*>(args.x);
  const W* weights = static_cast<const W*>(args.weight);
  const std::int64_t units = args.columns / Dot::kColumns;
  const std::int64_t blocks = (units + Dot::kUnits - 1) / Dot::kUnits;
  const std::int64_t panels = (args.outputs + Totals::kStride - 1) / Totals::kStride;
  const int team = team_size(args.threads, args.rows * args.columns * args.outputs);
  for (std::int64_t first = 0; first < args.rows; first += kChunkRows) {
    const std::int64_t rows = args.rows - first < kChunkRows ? args.rows - first : kChunkRows;
    auto* packed = scratch<std::uint32_t>(static_cast<std::size_t>(rows * blocks) * Dot::kUnits);
    const auto pack = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        pack_units<Dot>(x + (first + row) * args.columns, units, rows * Dot::kUnits, packed + row * Dot::kUnits);
      }
    };
    const auto multiply = [&](std::int64_t begin, std::int64_t end) {
      Tile<Dot> tile;
      Totals totals;
      for (std::int64_t panel = begin; panel < end; ++panel) {
        const std::int64_t column = panel * Totals::kStride;
        std::memset(totals.values, 0, static_cast<std::size_t>(rows * Totals::kStride) * sizeof(float));
        for (std::int64_t block = 0; block < blocks; ++block) {
          prefetch_share(weights, (column + Totals::kStride) * args.columns, args.outputs * args.columns, block, blocks,
                         Totals::kStride * args.columns);
          for (int group = 0; group < kTileGroups; ++group) {
            const W* group_rows[kGroup];
            for (int i = 0; i < kGroup; ++i) {
              const std::int64_t output = column + group * kGroup + i;
              group_rows[i] = output < args.outputs ? weights + output * args.columns : nullptr;
            }
            transpose_block<Dot>(group_rows, block * Dot::kUnits, units, tile.words + group * Tile<Dot>::kGroupWords);
          }
          const TileSource<Dot, false> source{tile.words, nullptr, 0};
          multiply_rows<Dot, kTileGroups>(source, packed + block * rows * Dot::kUnits, rows, totals);
        }
        store_totals(totals.values, Totals::kStride, rows, column, kTileGroups, nullptr, args.y + first * args.outputs,
                     args.outputs);
      }
    };
    parallel_phases(team, rows, pack, panels, multiply);
  }
}

}  // namespace

void linear_logits(const LinearLogits& args) {
#if defined(PEFTSERVE_SIMD_AVX512_BF16)
  if (args.x_dtype == Dtype::kBfloat16 && args.weight_dtype == Dtype::kBfloat16 && args.columns % 2 == 0) {
    return product<PairDot, Bf16, Bf16>(args);
  }
#endif
  if (args.x_dtype == Dtype::kBfloat16) return product<FloatDot, Bf16, Bf16>(args);
  with_type(args.weight_dtype, [&](auto weight) { product<FloatDot, float, typename decltype(weight)::type>(args); });
}

}  // namespace peftserve::PEFTSERVE_ISA
