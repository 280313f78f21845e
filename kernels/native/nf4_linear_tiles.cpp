// nf4_linear of bfloat16 with tiles: weights are decoded to the sixteen levels in bfloat16 (bitsandbytes rounds level
// times scale to it), products and sums are float32.
//
// An output's block of 64 columns is two tile products, one after the other, from zero; then the block's sum is added to
// the output's total times the block's scale. That order is the same wherever a row lies in a tile, and for any number of
// them; the rows that fill a tile up are zeros.
#include <cstring>

#include "fetcher.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

constexpr int kHalves = kBlock / kTileColumns;
constexpr int kRowWords = kBlock / 2;  // of a block of x
constexpr int kMostGroups = 4;         // side by side
constexpr std::int64_t kTurnLines = 10;  // fetched beside a tile, which takes little time (measured: more take longer)
constexpr int kSums = 0, kRows = kMostGroups, kPairs = kRows + kHalves;  // tile registers; two of kPairs, in turn

// Sixteen bfloat16 levels, for look_up_shorts.
ShortTable levels() {
  alignas(32) std::int16_t bits[16];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bits), narrow(load(kLevels)));
  return load_short_table(bits);
}

// Rows of x that meet the weights together, in tiles of equal height: as few as possible, the last rows perhaps padding.
struct Chunk {
  std::int64_t first, rows;
  int tiles, height;
  const std::uint32_t* units;  // [block][tiles * height][kRowWords], in unit order

  Chunk(std::int64_t first, std::int64_t rows)
      : first(first),
        rows(rows),
        tiles(static_cast<int>((rows + kTileHeight - 1) / kTileHeight)),
        height(static_cast<int>((rows + tiles - 1) / tiles)) {}
  std::int64_t padded() const { return std::int64_t{tiles} * height; }
};

class TileProduct {
 public:
  explicit TileProduct(const Nf4Linear& args)
      : args_(args),
        x_(static_cast<const Bf16*>(args.x)),
        y_(static_cast<Bf16*>(args.y)),
        blocks_(args.columns / kBlock),
        groups_((args.outputs + kGroup - 1) / kGroup),
        packed_{args.packed, args.absmax, groups_, blocks_},
        levels_(levels()) {}

  void run() const {
    const int team = team_size(args_.threads, args_.rows * args_.columns * args_.outputs);
    parallel_ranges(team, groups_, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t first = 0; first < args_.rows; first += kChunkRows) {
        Chunk chunk(first, args_.rows - first < kChunkRows ? args_.rows - first : kChunkRows);
        multiply(chunk, begin, end);
      }
    }, args_.sequel);
  }

 private:
  struct Work {
    alignas(64) std::uint32_t weights[2][kMostGroups][kHalves][kTileWords];  // of this block and of the next
    alignas(64) float sums[kMostGroups][kTileHeight][kGroup];
    alignas(64) float totals[kChunkRows * kMostGroups * kGroup];
  };

  void multiply(Chunk& chunk, std::int64_t begin, std::int64_t end) const {
    chunk.units = pack(chunk);
    const TileShapes shapes(kPairs, chunk.height);
    Work work;
    const std::int64_t turns = (end - begin) / 4 * blocks_ * chunk.tiles;
    Fetcher fetcher(chunk.first == 0 ? args_.upcoming : nullptr, turns, kTurnLines);
    std::int64_t group = begin;
    for (; group + 4 <= end; group += 4) multiply_groups<4>(chunk, group, work, fetcher);
    for (; group + 2 <= end; group += 2) multiply_groups<2>(chunk, group, work, fetcher);
    for (; group < end; ++group) multiply_groups<1>(chunk, group, work, fetcher);
  }

  // Each thread for itself: it takes less time than waiting for one another.
  const std::uint32_t* pack(const Chunk& chunk) const {
    static constexpr UnitOrder kOrder;
    const __m512i order = _mm512_load_si512(kOrder.column);
    const std::int64_t padded = chunk.padded();
    auto* units = scratch<std::uint32_t>(static_cast<std::size_t>(blocks_ * padded * kRowWords));
    for (std::int64_t row = 0; row < padded; ++row) {
      const Bf16* x = x_ + (chunk.first + row) * args_.columns;
      std::uint32_t* to = units + row * kRowWords;
      for (std::int64_t block = 0; block < blocks_; ++block, to += padded * kRowWords) {
        for (int half = 0; half < kHalves; ++half) {
          const __m512i columns = row < chunk.rows ? _mm512_loadu_si512(x + block * kBlock + half * kTileColumns)
                                                   : _mm512_setzero_si512();
          _mm512_store_si512(to + half * kRowWords / kHalves, _mm512_permutexvar_epi16(order, columns));
        }
      }
    }
    return units;
  }

  [[gnu::always_inline]] void decode(const std::uint32_t* words, std::uint32_t* pairs) const {
    constexpr int kSteps = kCell / 2;
    for (int cell = 0; cell < kBlock / kCell; ++cell) {
      const Words codes = load_words(words + cell * kGroup);
      unroll<kSteps>([&](auto step) __attribute__((always_inline)) {
        _mm512_store_si512(pairs + (cell * kSteps + step.value) * kGroup, look_up_shorts<step.value>(levels_, codes));
      });
    }
  }

  template <int kGroups>
  [[gnu::always_inline]] void fetch(const PackedBlocks::Place& place) const {
    for (int g = 0; g < kGroups; ++g) {
      for (int cell = 0; cell < kBlock / kCell; ++cell) {
        __builtin_prefetch(packed_.words(place.group + g, place.block) + cell * kGroup, 0, kFirstLevel);
      }
      __builtin_prefetch(packed_.scales(place.group + g, place.block), 0, kFirstLevel);
    }
  }

  template <int kGroups>
  [[gnu::noinline]] void multiply_groups(const Chunk& chunk, std::int64_t group, Work& work, Fetcher& fetcher) const {
    constexpr std::ptrdiff_t kStride = kGroups * kGroup;
    std::memset(work.totals, 0, static_cast<std::size_t>(chunk.padded() * kStride) * sizeof(float));
    for (int g = 0; g < kGroups; ++g) decode(packed_.words(group + g, 0), work.weights[0][g][0]);
    for (std::int64_t block = 0; block < blocks_; ++block) {
      const auto& weights = work.weights[block % 2];
      auto& next = work.weights[(block + 1) % 2];
      Vec scales[kGroups];
      for (int g = 0; g < kGroups; ++g) scales[g] = load(packed_.scales(group + g, block));
      const auto add_sums = [&](int tile) __attribute__((always_inline)) {
        float* totals = work.totals + std::int64_t{tile} * chunk.height * kStride;
        for (int row = 0; row < chunk.height; ++row, totals += kStride) {
          unroll<kGroups>([&](auto g) __attribute__((always_inline)) {
            float* total = totals + g.value * kGroup;
            store(total, fma(load(work.sums[g.value][row]), scales[g.value], load(total)));
          });
        }
      };
      for (int tile = 0; tile < chunk.tiles; ++tile) {
        const std::uint32_t* rows =
            chunk.units + (block * chunk.padded() + std::int64_t{tile} * chunk.height) * kRowWords;
        unroll<kHalves>([&](auto half) __attribute__((always_inline)) {
          constexpr int kHalf = decltype(half)::value;
          load_tile<kRows + kHalf>(rows + kHalf * kRowWords / kHalves, kRowWords * sizeof(std::uint32_t));
          unroll<kGroups>([&](auto g) __attribute__((always_inline)) {
            constexpr int kOf = decltype(g)::value, kTile = kPairs + (kHalf * kGroups + kOf) % 2;
            if constexpr (kHalf == 0) zero_tile<kSums + kOf>();
            load_tile<kTile>(weights[kOf][kHalf], kGroup * sizeof(std::uint32_t));
            dot_tiles<kSums + kOf, kRows + kHalf, kTile>();
          });
        });
        fetcher.turn();
        if (tile == 0) {  // while the tiles are multiplied
          fetch<kGroups>(packed_.after<kGroups>(group, block, kAhead));
          for (int g = 0; g < kGroups && block + 1 < blocks_; ++g) {
            decode(packed_.words(group + g, block + 1), next[g][0]);
          }
        } else {
          add_sums(tile - 1);
        }
        unroll<kGroups>([&](auto g) __attribute__((always_inline)) {
          store_tile<kSums + g.value>(work.sums[g.value], kGroup * sizeof(float));
        });
      }
      add_sums(chunk.tiles - 1);
    }
    store_totals(work.totals, kStride, chunk.rows, group * kGroup, kGroups, args_.bias, y_ + chunk.first * args_.outputs,
                 args_.outputs);
  }

  const Nf4Linear& args_;
  const Bf16* x_;
  Bf16* y_;
  std::int64_t blocks_, groups_;
  PackedBlocks packed_;
  ShortTable levels_;
};

}  // namespace

void nf4_linear(const Nf4Linear& args) {
  if (args.dtype != Dtype::kBfloat16 || args.int8_inputs) return avx512_vnni::kOps.nf4_linear(args);
  TileProduct(args).run();
}

}  // namespace peftserve::PEFTSERVE_ISA
