#include <type_traits>

#include "fetcher.h"
#include "gemm.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "shorts.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

// Up to how many rows weights are decoded on the way to the product, and for how many groups at a time.
template <class Dot>
struct Fused {
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
  static constexpr int kRows = 8;
  static constexpr int groups(int rows) { return rows <= 4 ? 4 : 3; }
#elif defined(PEFTSERVE_SIMD_AVX2)
  static constexpr int kRows = 4;
  static constexpr int groups(int rows) { return rows <= 2 ? 2 : 1; }
#else
  static constexpr int kRows = 2;
  static constexpr int groups(int) { return 1; }
#endif
};
#if defined(PEFTSERVE_SIMD_AVX2)
template <>
struct Fused<ShortDot> {
  static constexpr int kRows = 2;
  static constexpr int groups(int) { return 1; }
};
#endif

// Up to so many rows wait for memory more than they compute. Then they fetch only so many lines beside a block: the weights
// are on their way too (measured on Zen 5: twice as many make a step of one stream 1 % longer, and of 8 streams 5 % shorter).
constexpr int kWaitingRows = 4;
constexpr std::int64_t kWaitingLines = 12;

template <class Dot>
typename Dot::Levels levels();
template <>
FloatDot::Levels levels<FloatDot>() {
  return load_table(kLevels);
}

// One row of x as units, permuted as the nibbles are.
template <class T>
void pack_row(FloatDot, const T* x, std::int64_t columns, std::ptrdiff_t block_stride, std::uint32_t* units) {
  for (std::int64_t column = 0; column < columns; column += kBlock, units += block_stride) {
    alignas(64) float block[kBlock];
    for (int lane = 0; lane < kBlock; lane += kLanes) store(block + lane, load(x + column + lane));
    for (int i = 0; i < kBlock; ++i) std::memcpy(units + i, block + i / kCell * kCell + kColumnOfNibble[i % kCell], 4);
  }
}

#if defined(PEFTSERVE_SIMD_SHORTS)
template <>
ShortDot::Levels levels<ShortDot>() {
  alignas(32) std::int16_t shorts[16];
  for (int i = 0; i < 16; ++i) {
    const float scaled = kLevels[i] * ShortDot::kLevelScale;
    shorts[i] = static_cast<std::int16_t>(scaled < 0.0f ? scaled - 0.5f : scaled + 0.5f);
  }
  return load_short_table(shorts);
}
#endif
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
template <>
ByteDot::Levels levels<ByteDot>() {
  std::uint8_t bytes[16];
  for (int i = 0; i < 16; ++i) {
    bytes[i] = static_cast<std::uint8_t>(kLevels[i] * ByteDot::kLevelScale + ByteDot::kZero + 0.5f);
  }
  return load_byte_table(bytes);
}
#endif

// Weights decoded on the way from memory to the product. With each cell of a block the same cell of one that comes later is
// fetched, to the cache of kLocality.
template <class Dot, int kLocality = kFirstLevel>
struct PackedSource {
  const std::uint32_t* words;
  std::ptrdiff_t word_stride;  // between groups
  const float* scales;
  std::ptrdiff_t scale_stride;
  typename Dot::Levels levels;
  const std::uint32_t* next_words;  // of the block to be fetched, its groups as far apart

  template <int kGroups>
  struct Cell {
    Words words[kGroups * kVectors];
  };
  template <int kGroups>
  Cell<kGroups> prepare(int cell) const {
    Cell<kGroups> prepared;
    unroll<kGroups>([&](auto g) __attribute__((always_inline)) {
      __builtin_prefetch(next_words + g.value * word_stride + std::ptrdiff_t{cell} * kGroup, 0, kLocality);
    });
    unroll<kGroups * kVectors>([&](auto v) __attribute__((always_inline)) {
      prepared.words[v.value] = load_words(words + (v.value / kVectors) * word_stride + std::ptrdiff_t{cell} * kGroup +
                                           (v.value % kVectors) * kLanes);
    });
    return prepared;
  }
  template <int kStep, int kSum, int kGroups>
  typename Dot::Weights weights(const Cell<kGroups>& prepared, int) const {
    return decoded<kStep, kSum>(Dot{}, prepared);
  }
  Vec finish(int vector, Vec sum, Vec total) const {
    return fma(sum, load(scales + (vector / kVectors) * scale_stride + (vector % kVectors) * kLanes), total);
  }

 private:
  template <int kStep, int kSum, class AnyDot, int kGroups>
  typename Dot::Weights decoded(AnyDot, const Cell<kGroups>& prepared) const {
    return Dot::template decode<kStep>(levels, prepared.words[kSum]);
  }
#if defined(PEFTSERVE_SIMD_AVX2)
  // Two vectors of sums for each vector of words.
  template <int kStep, int kSum, int kGroups>
  __m256i decoded(ShortDot, const Cell<kGroups>& prepared) const {
    const __m256i words = prepared.words[kSum / 2];
    const __m256i index = _mm256_and_si256(kStep == 0 ? words : _mm256_srli_epi32(words, 4), _mm256_set1_epi8(15));
    return look_up_shorts<kSum % 2 == 1>(levels, index);
  }
#endif
};

// The same, and they are kept in a tile for the other rows.
template <class Dot>
struct KeepingSource : PackedSource<Dot> {
  std::uint32_t* tile;

  template <int kStep, int kSum, int kGroups>
  typename Dot::Weights weights(const typename PackedSource<Dot>::template Cell<kGroups>& prepared, int cell) const {
    const auto decoded = PackedSource<Dot>::template weights<kStep, kSum>(prepared, cell);
    Dot::write(tile + tile_offset<Dot>(kSum, cell, kStep), decoded);
    return decoded;
  }
};

template <class Dot, class T>
class Product {
 public:
  explicit Product(const Nf4Linear& args)
      : args_(args),
        x_(static_cast<const T*>(args.x)),
        y_(static_cast<T*>(args.y)),
        blocks_(args.columns / kBlock),
        groups_((args.outputs + kGroup - 1) / kGroup),
        packed_{args.packed, args.absmax, groups_, blocks_},
        levels_(levels<Dot>()) {}

  void run() const {
    const int team = team_size(args_.threads, args_.rows * args_.columns * args_.outputs);
    if (args_.rows <= Fused<Dot>::kRows) {
      return parallel_ranges(team, groups_, [&](std::int64_t begin, std::int64_t end) { few_rows<1>(begin, end); },
                             args_.sequel);
    }
    if (args_.rows >= team * kOwnRows) return own_rows(team);
    for_chunks(0, args_.rows, [&](std::int64_t first, std::int64_t rows) {
      own_outputs(team, first, rows, first + rows == args_.rows ? args_.sequel : nullptr);
    });
  }

 private:
  using Tiled = typename Dot::Tiled;

  std::size_t unit_count(std::int64_t rows) const { return static_cast<std::size_t>(rows * blocks_) * Dot::kUnits; }

  // Rows first + begin .. first + end as units [block][rows][kUnits].
  void pack(std::int64_t first, std::int64_t rows, std::int64_t begin, std::int64_t end, std::uint32_t* units) const {
    for (std::int64_t row = begin; row < end; ++row) {
      pack_row(Dot{}, x_ + (first + row) * args_.columns, args_.columns, rows * Dot::kUnits, units + row * Dot::kUnits);
    }
  }

  // body(first, rows) for chunks of the rows first .. end, each about as large.
  template <class Body>
  static void for_chunks(std::int64_t first, std::int64_t end, const Body& body) {
    const std::int64_t chunks = (end - first + kChunkRows - 1) / kChunkRows;
    const std::int64_t most = (end - first + chunks - 1) / chunks, size = (most + kTileRows - 1) / kTileRows * kTileRows;
    for (; first < end; first += size) body(first, end - first < size ? end - first : size);
  }

  // With rows enough to be worth decoding all weights for, each thread computes all outputs of rows of its own. It then reads
  // no x that another core packed, and writes mostly the rows that it reads next (measured: 164 rows 14 % faster, 512 3 %).
  void own_rows(int team) const {
    parallel_ranges(team, args_.rows, [&](std::int64_t begin, std::int64_t end) {
      for_chunks(begin, end, [&](std::int64_t first, std::int64_t rows) { packed_chunk(first, rows, 0, groups_); });
    }, args_.sequel);
  }

  // Else each thread computes some outputs of all rows. From so many outputs a thread on, packing all of x oneself costs less
  // than reading what another core packed.
  static constexpr std::int64_t kOwnPack = 256;
  void own_outputs(int team, std::int64_t first, std::int64_t rows, const Sequel* sequel) const {
    if (args_.outputs >= team * kOwnPack) {
      return parallel_ranges(team, groups_, [&](std::int64_t begin, std::int64_t end) {
        packed_chunk(first, rows, begin, end);
      }, sequel);
    }
    auto* units = scratch<std::uint32_t>(unit_count(rows));
    parallel_phases(
        team, rows, [&](std::int64_t begin, std::int64_t end) { pack(first, rows, begin, end, units); }, groups_,
        [&](std::int64_t begin, std::int64_t end) { chunk(units, first, rows, begin, end); }, sequel);
  }

  void packed_chunk(std::int64_t first, std::int64_t rows, std::int64_t begin, std::int64_t end) const {
    auto* units = scratch<std::uint32_t>(unit_count(rows));
    pack(first, rows, 0, rows, units);
    chunk(units, first, rows, begin, end);
  }

  // With what comes `distance` blocks later to be fetched meanwhile.
  template <int kGroups, int kLocality = kFirstLevel>
  [[gnu::always_inline]] PackedSource<Dot, kLocality> source(std::int64_t group, std::int64_t block,
                                                             std::int64_t distance) const {
    const auto next = packed_.after<kGroups>(group, block, distance);
    for (int g = 0; g < kGroups; ++g) __builtin_prefetch(packed_.scales(next.group + g, next.block), 0, kLocality);
    return {packed_.words(group, block), packed_.group_words(), packed_.scales(group, block), packed_.group_scales(),
            levels_, packed_.words(next.group, next.block)};
  }

  template <int kRows>
  void few_rows(std::int64_t begin, std::int64_t end) const {
    if (args_.rows == kRows) {
      auto* units = scratch<std::uint32_t>(unit_count(kRows));
      pack(0, kRows, 0, kRows, units);
      constexpr int kGroups = Fused<Dot>::groups(kRows);
      Fetcher fetcher(args_.upcoming, (end - begin) / kGroups * blocks_,
                      kRows <= kWaitingRows ? kWaitingLines : Fetcher::kMostLines);
      std::int64_t group = begin;
      for (; group + kGroups <= end; group += kGroups) fused<kRows, kGroups>(units, group, fetcher);
      if constexpr (kGroups >= 4) {
        for (; group + kGroups / 2 <= end; group += kGroups / 2) fused<kRows, kGroups / 2>(units, group, fetcher);
      }
      for (; group < end; ++group) fused<kRows, 1>(units, group, fetcher);
    } else if constexpr (kRows < Fused<Dot>::kRows) {
      few_rows<kRows + 1>(begin, end);
    }
  }

  template <int kRows, int kGroups>
  void fused(const std::uint32_t* units, std::int64_t group, Fetcher& fetcher) const {
    constexpr std::ptrdiff_t kStride = kGroups * kGroup;
    alignas(64) float totals[kRows * kStride] = {};
    for (std::int64_t block = 0; block < blocks_; ++block) {
      // One group alone the hardware follows.
      constexpr int kLocality = kRows <= kWaitingRows ? kSecondLevel : kFirstLevel;
      const auto packed = source<kGroups, kLocality>(group, block, kGroups > 1 ? kAhead : blocks_);
      multiply_block<Dot, kRows, kGroups>(packed, units + block * kRows * Dot::kUnits, totals, kStride, fetcher.lines());
    }
    store_totals(totals, kStride, kRows, group * kGroup, kGroups, args_.bias, y_, args_.outputs);
  }

  void chunk(const std::uint32_t* units, std::int64_t first, std::int64_t rows, std::int64_t begin,
             std::int64_t end) const {
    const std::int64_t tiles = (end - begin) / kTileGroups * blocks_;
    Fetcher fetcher(first == 0 ? args_.upcoming : nullptr, tiles * (rows / Tiled::kTileRows), Fetcher::kMostLines);
    std::int64_t group = begin;
    for (; group + kTileGroups <= end; group += kTileGroups) tiled<kTileGroups>(units, first, rows, group, fetcher);
    for (; group < end; ++group) tiled<1>(units, first, rows, group, fetcher);
  }

  template <int kGroups>
  void tiled(const std::uint32_t* units, std::int64_t first, std::int64_t rows, std::int64_t group,
             Fetcher& fetcher) const {
    Tile<Tiled> tile;
    Totals totals;
    std::memset(totals.values, 0, static_cast<std::size_t>(rows * Totals::kStride) * sizeof(float));
    for (std::int64_t block = 0; block < blocks_; ++block) {
      fetch_outputs<kGroups>(first + rows * block / blocks_, first + rows * (block + 1) / blocks_, group);
      const PackedSource<Dot> packed = source<kGroups>(group, block, 1);
      const std::uint32_t* x = units + block * rows * Dot::kUnits;
      const std::int64_t row = decode_and_multiply<kGroups>(packed, x, rows, tile, totals, fetcher);
      const TileSource<Tiled> decoded{tile.words, packed.scales, packed.scale_stride};
      multiply_rows<Tiled, kGroups>(decoded, x, row, rows, totals, fetcher);
    }
    store_totals(totals.values, Totals::kStride, rows, group * kGroup, kGroups, args_.bias, y_ + first * args_.outputs,
                 args_.outputs);
  }

  // Decodes a block to a tile. Where the first rows can be multiplied on the way they are, as many as it says: other parts of
  // the core decode than multiply (16 rows 5 % faster, 32 rows 2 %).
  template <int kGroups>
  static std::int64_t decode_and_multiply(const PackedSource<Dot>& packed, const std::uint32_t* x, std::int64_t rows,
                                          Tile<Tiled>& tile, Totals& totals, Fetcher& fetcher) {
    if constexpr (std::is_same_v<Dot, Tiled>) {
      if (rows >= Dot::kTileRows) {
        multiply_block<Dot, Dot::kTileRows, kGroups>(KeepingSource<Dot>{packed, tile.words}, x, totals.values,
                                                     Totals::kStride, fetcher.lines());
        return Dot::kTileRows;
      }
    }
    decode<kGroups>(packed, tile);
    return 0;
  }

  // The lines of y that these rows of a tile will be stored to. Fetched block by block while others are multiplied: all at
  // once, at the end, a thread would wait for them (measured: 5 % from 128 rows on).
  template <int kGroups>
  [[gnu::always_inline]] void fetch_outputs(std::int64_t row, std::int64_t end, std::int64_t group) const {
    for (; row < end; ++row) {
      const T* tile = y_ + row * args_.outputs + group * kGroup;
      __builtin_prefetch(tile, 1);
      __builtin_prefetch(tile + kGroups * kGroup - 1, 1);
    }
  }

  template <int kGroups>
  static void decode(const PackedSource<Dot>& packed, Tile<Tiled>& tile) {
    for (int cell = 0; cell < kBlock / kCell; ++cell) {
      const auto prepared = packed.template prepare<kGroups>(cell);
      unroll<Dot::kSteps>([&](auto step) __attribute__((always_inline)) {
        typename Dot::Weights weights[kGroups * Dot::kSums];
        unroll<kGroups * Dot::kSums>([&](auto v) __attribute__((always_inline)) {
          weights[v.value] = packed.template weights<step.value, v.value>(prepared, cell);
        });
        write_step<step.value, kGroups>(Dot{}, weights, cell, tile.words);
      });
    }
  }

  template <int kStep, int kGroups, class AnyDot>
  static void write_step(AnyDot, const typename Dot::Weights* weights, int cell, std::uint32_t* tile) {
    unroll<kGroups * Dot::kSums>([&](auto v) __attribute__((always_inline)) {
      Dot::write(tile + tile_offset<Dot>(v.value, cell, kStep), weights[v.value]);
    });
  }
#if defined(PEFTSERVE_SIMD_AVX2)
  // Outputs with two pairs of columns each become two vectors of one pair each.
  template <int kStep, int kGroups>
  static void write_step(ShortDot, const __m256i* weights, int cell, std::uint32_t* tile) {
    unroll<kGroups * kVectors>([&](auto v) __attribute__((always_inline)) {
      const __m256 low = _mm256_castsi256_ps(weights[2 * v.value]), high = _mm256_castsi256_ps(weights[2 * v.value + 1]);
      store(reinterpret_cast<float*>(tile + tile_offset<Tiled>(v.value, cell, 2 * kStep)),
            _mm256_shuffle_ps(low, high, 0x88));
      store(reinterpret_cast<float*>(tile + tile_offset<Tiled>(v.value, cell, 2 * kStep + 1)),
            _mm256_shuffle_ps(low, high, 0xdd));
    });
  }
#endif

  const Nf4Linear& args_;
  const T* x_;
  T* y_;
  std::int64_t blocks_, groups_;
  PackedBlocks packed_;
  typename Dot::Levels levels_;
};

}  // namespace

void nf4_linear(const Nf4Linear& args) {
  switch (args.dtype) {
    case Dtype::kFloat32:
      return Product<FloatDot, float>(args).run();
    case Dtype::kBfloat16:
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
      if (args.int8_inputs) return Product<ByteDot, Bf16>(args).run();
#endif
#if defined(PEFTSERVE_SIMD_SHORTS)
      return Product<ShortDot, Bf16>(args).run();
#else
      return Product<FloatDot, Bf16>(args).run();
#endif
    case Dtype::kFloat16:
      return Product<FloatDot, Half>(args).run();
    case Dtype::kInt8:  // none that activations have
      return;
  }
}

}  // namespace peftserve::PEFTSERVE_ISA
