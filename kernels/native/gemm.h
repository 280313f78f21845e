// The inner loops of products with NF4 weights: y[m, n] = sum over k of x[m, k] * w[n, k].
//
// Lanes are output columns n, in groups of sixteen; k runs in blocks of 64. Within a block each output is one chain of
// dot-product instructions in the order of k, starting from zero; the block's sum is then added to the output's total
// times the block's scale. Every path below keeps exactly this order, whatever the number of rows and wherever a row or
// column lies in a tile: that is what makes results independent of the batch. (Sums of integers are exact, so their order
// within a block is free.)
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "fetcher.h"
#include "nf4_format.h"
#include "rows.h"
#include "simd.h"
#include "types.h"
#include "unroll.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kVectors = kGroup / kLanes;    // vectors a group
constexpr std::int64_t kChunkRows = 128;     // rows of x that share one decoding of the weights

// The registers decide how many rows x groups of totals a tile holds.
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
constexpr int kTileRows = 8;
constexpr int kTileGroups = 3;
#elif defined(PEFTSERVE_SIMD_AVX2)
constexpr int kTileRows = 4;
constexpr int kTileGroups = 1;
#else
constexpr int kTileRows = 2;
constexpr int kTileGroups = 1;
#endif

// Operands are 32-bit units. FloatDot: one column of x a unit, float32 weights.
struct FloatDot {
  static constexpr int kBlockUnits = kBlock;                // units a block
  static constexpr int kUnits = kBlockUnits;                // words of a block of a row of x, with what comes beside
  static constexpr int kStepUnits = 1;                      // units that one step multiplies
  static constexpr int kSteps = kCell;                      // steps a cell
  static constexpr int kSums = kVectors;                    // vectors of sums a group
  static constexpr int kTileRows = peftserve::PEFTSERVE_ISA::kTileRows;
  using Weights = Vec;
  using Sum = Vec;
  using Levels = Table;
  using Tiled = FloatDot;  // what multiplies decoded tiles, with the same bits
  static Vec broadcast(const std::uint32_t* unit) {
    float value;
    std::memcpy(&value, unit, sizeof value);
    return peftserve::PEFTSERVE_ISA::broadcast(value);
  }
  static Sum start(const std::uint32_t*) { return zero(); }  // what sums with a row's block of x begin with
  static Vec dot(Vec sum, Vec weights, Vec x) { return fma(weights, x, sum); }
  // The sums of vector `v` of a row as floats, given the row's block of x.
  static Vec value(const Sum* sums, int v, const std::uint32_t*) { return sums[v]; }
  static Vec read(const std::uint32_t* tile) { return load(reinterpret_cast<const float*>(tile)); }
  static void write(std::uint32_t* tile, Vec weights) { store(reinterpret_cast<float*>(tile), weights); }
  template <int kStep>
  static Vec decode(const Levels& levels, Words words) {
    return look_up<kStep>(levels, words);
  }
};

#if defined(PEFTSERVE_SIMD_SHORTS)
// ShortDot: x and the weights as 16-bit integers. They make two (AVX2) or four times (VNNI on Intel) the products of
// floats or bfloat16.
//
// Each block of 64 columns of x is scaled so that its largest value becomes kLargest; the levels of NF4 are scaled to
// kLevelScale. Both roundings are finer than bf16's: half a step is 2^-14 of the block's largest value, and 2^-13 of
// the largest level. Sums of a block are exact in 32 bits: 64 * kLargest * kLevelScale < 2^31.
struct ShortBlock {
  static constexpr int kBlockUnits = kBlock / 2;
  static constexpr int kUnits = kBlockUnits + 1;  // the last word is the scale of the block, a float
  static constexpr float kLargest = 8191.0f, kLevelScale = 4095.0f;
};
#endif

#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
// What products of integers have in common, whatever their size: a unit a step, and one vector of sums a group.
template <class Block>
struct IntegerDot : Block {
  static constexpr int kStepUnits = 1;
  static constexpr int kSums = kVectors;
  static constexpr int kTileRows = peftserve::PEFTSERVE_ISA::kTileRows;
  using Weights = __m512i;
  using Sum = __m512i;
  static __m512i broadcast(const std::uint32_t* unit) { return _mm512_set1_epi32(static_cast<int>(*unit)); }
  static Vec value(const Sum* sums, int v, const std::uint32_t* x) {
    return mul(_mm512_cvtepi32_ps(sums[v]), FloatDot::broadcast(x + Block::kBlockUnits));
  }
  static __m512i read(const std::uint32_t* tile) { return _mm512_loadu_si512(tile); }
  static void write(std::uint32_t* tile, __m512i weights) { _mm512_storeu_si512(tile, weights); }
};

struct ShortDot : IntegerDot<ShortBlock> {
  static constexpr int kSteps = kCell / 2;
  using Levels = ShortTable;
  using Tiled = ShortDot;
  static Sum start(const std::uint32_t*) { return _mm512_setzero_si512(); }
  static __m512i dot(__m512i sum, __m512i weights, __m512i x) { return dot_shorts(sum, weights, x); }
  template <int kStep>
  static __m512i decode(const Levels& levels, Words words) {
    return look_up_shorts<kStep>(levels, words);
  }
};

// ByteDot: x as signed and the weights as unsigned 8-bit integers, twice the products of ShortDot. An option, since it is
// less exact: each block of 64 columns of x is scaled so that its largest value becomes kLargest, and half a step is 2^-8
// of that. The levels become kZero + kLevelScale level, rounded (that scale, below 127, hits the sixteen best). What kZero
// adds to a sum, the sum begins with, taken off.
struct ByteBlock {
  static constexpr int kBlockUnits = kBlock / 4;
  static constexpr int kUnits = kBlockUnits + 2;  // the last words are the scale of the block, a float, and that start
  static constexpr float kLargest = 127.0f, kLevelScale = 112.0f;
  static constexpr std::uint32_t kZero = 128;
};

struct ByteDot : IntegerDot<ByteBlock> {
  static constexpr int kSteps = kCell / 4;
  using Levels = ByteTable;
  using Tiled = ByteDot;
  static Sum start(const std::uint32_t* x) { return broadcast(x + kBlockUnits + 1); }
  static __m512i dot(__m512i sum, __m512i weights, __m512i x) { return dot_bytes(sum, weights, x); }
  template <int kStep>
  static __m512i decode(const Levels& levels, Words words) {
    return look_up_bytes<kStep>(levels, words);
  }
};
#elif defined(PEFTSERVE_SIMD_AVX2)
// A step multiplies four columns, in pairs: the sums of output n lie in two lanes side by side, since that is how bytes
// interleave. What is decoded for many rows is worth sorting: see ShortTileDot.
struct ShortTileDot;
struct ShortDot : ShortBlock {
  static constexpr int kStepUnits = 2;
  static constexpr int kSteps = 2;  // the low nibbles of a cell, then the high ones
  static constexpr int kSums = 2 * kVectors;
  using Weights = __m256i;
  using Sum = __m256i;
  using Levels = ShortTable;
  using Tiled = ShortTileDot;
  static __m256i broadcast(const std::uint32_t* unit) {
    long long pairs;
    std::memcpy(&pairs, unit, sizeof pairs);
    return _mm256_set1_epi64x(pairs);
  }
  static Sum start(const std::uint32_t*) { return _mm256_setzero_si256(); }
  static __m256i dot(__m256i sum, __m256i weights, __m256i x) {
    // GCC would regroup the integer sums of several steps, which then outgrow the registers.
    return opaque(_mm256_add_epi32(sum, _mm256_madd_epi16(weights, x)));
  }
  static Vec value(const Sum* sums, int v, const std::uint32_t* x) {
    const Vec exact = _mm256_cvtepi32_ps(_mm256_hadd_epi32(sums[2 * v], sums[2 * v + 1]));
    return mul(exact, FloatDot::broadcast(x + kBlockUnits));
  }
};

// The same products from tiles in the order of outputs, one pair of columns a step and eight outputs a vector: no
// horizontal sums, and more rows in the registers.
struct ShortTileDot : ShortBlock {
  static constexpr int kStepUnits = 1;
  static constexpr int kSteps = kCell / 2;
  static constexpr int kSums = kVectors;
  static constexpr int kTileRows = peftserve::PEFTSERVE_ISA::kTileRows;
  using Weights = __m256i;
  using Sum = __m256i;
  static __m256i broadcast(const std::uint32_t* unit) { return _mm256_set1_epi32(static_cast<int>(*unit)); }
  static Sum start(const std::uint32_t* x) { return ShortDot::start(x); }
  static __m256i dot(__m256i sum, __m256i weights, __m256i x) { return ShortDot::dot(sum, weights, x); }
  static Vec value(const Sum* sums, int v, const std::uint32_t* x) {
    return mul(_mm256_cvtepi32_ps(sums[v]), FloatDot::broadcast(x + kBlockUnits));
  }
  static __m256i read(const std::uint32_t* tile) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(tile)); }
};
#endif

// Decoded weights of one block: for each group, units in order, sixteen columns a unit.
template <class Dot>
struct Tile {
  static constexpr std::ptrdiff_t kGroupWords = std::ptrdiff_t{Dot::kBlockUnits} * kGroup;
  alignas(64) std::uint32_t words[kTileGroups * kGroupWords];
};

// Where in a tile the weights of one vector of sums lie.
template <class Dot>
constexpr std::ptrdiff_t tile_offset(int sum, int cell, int step) {
  return (sum / Dot::kSums) * Tile<Dot>::kGroupWords + (sum % Dot::kSums) * kLanes +
         std::ptrdiff_t{cell * Dot::kSteps + step} * kGroup;
}

// Totals of one tile, one row of x after the other.
struct Totals {
  static constexpr std::ptrdiff_t kStride = std::ptrdiff_t{kTileGroups} * kGroup;
  alignas(64) float values[kChunkRows * kStride];
};

// totals[r, :] += scale * (block of x[r] . block of weights) for kRows rows and kGroups groups.
//
// Source: `prepare<kGroups>(cell)` reads what a cell needs, `weights<step, sum>(prepared, cell)` are the weights of Dot
// that go into vector `sum` of the sums, `finish(vector, block_sum, total)` is the new total. `lines`, unless null, are
// fetched meanwhile.
//
// Never inlined: one copy serves the element types of x and y, and compiles once.
template <class Dot, int kRows, int kGroups, class Source>
[[gnu::noinline]] void multiply_block(const Source& source, const std::uint32_t* x, float* totals,
                                      std::ptrdiff_t stride, const TurnLines* lines) {
  constexpr int kSums = kGroups * Dot::kSums, kCount = kGroups * kVectors;
  typename Dot::Sum sums[kRows][kSums];
  unroll<kRows * kSums>([&](auto i) __attribute__((always_inline)) {
    sums[i.value / kSums][i.value % kSums] = Dot::start(x + i.value / kSums * Dot::kUnits);
  });
#pragma GCC unroll 1
  for (int cell = 0; cell < kBlock / kCell; ++cell) {
    const auto prepared = source.template prepare<kGroups>(cell);
    if (lines != nullptr) lines->fetch(cell);
    unroll<Dot::kSteps>([&](auto step) __attribute__((always_inline)) {
      typename Dot::Weights weights[kSums];
      unroll<kSums>([&](auto v) __attribute__((always_inline)) {
        weights[v.value] = source.template weights<step.value, v.value>(prepared, cell);
      });
      unroll<kRows>([&](auto row) __attribute__((always_inline)) {
        constexpr int kRow = decltype(row)::value * Dot::kUnits;
        const auto units = Dot::broadcast(x + kRow + (cell * Dot::kSteps + step.value) * Dot::kStepUnits);
        unroll<kSums>([&](auto v) __attribute__((always_inline)) {
          sums[row.value][v.value] = Dot::dot(sums[row.value][v.value], weights[v.value], units);
        });
      });
    });
  }
  unroll<kRows * kCount>([&](auto i) __attribute__((always_inline)) {
    constexpr int kRow = decltype(i)::value / kCount, kVector = decltype(i)::value % kCount;
    float* total = totals + kRow * stride + kVector * kLanes;
    const Vec sum = Dot::value(sums[kRow], kVector, x + kRow * Dot::kUnits);
    store(total, source.finish(kVector, sum, load(total)));
  });
}

// Weights decoded to a tile; scales [group][16].
template <class Dot>
struct TileSource {
  const std::uint32_t* tile;
  const float* scales;
  std::ptrdiff_t scale_stride;

  struct Nothing {};
  template <int kGroups>
  Nothing prepare(int) const {
    return {};
  }
  template <int kStep, int kSum>
  typename Dot::Weights weights(Nothing, int cell) const {
    return Dot::read(tile + tile_offset<Dot>(kSum, cell, kStep));
  }
  Vec finish(int vector, Vec sum, Vec total) const {
    return fma(sum, load(scales + (vector / kVectors) * scale_stride + (vector % kVectors) * kLanes), total);
  }
};

// One block of the rows of a chunk from `row` on: x is [rows][kUnits]. With each whole tile of rows the fetcher has a turn.
template <class Dot, int kGroups, class Source>
inline void multiply_rows(const Source& source, const std::uint32_t* x, std::int64_t row, std::int64_t rows,
                          Totals& totals, Fetcher& fetcher) {
  const auto multiply = [&](auto count, std::int64_t row, const TurnLines* lines) __attribute__((always_inline)) {
    multiply_block<Dot, count.value, kGroups>(source, x + row * Dot::kUnits, totals.values + row * Totals::kStride,
                                              Totals::kStride, lines);
  };
  constexpr int kRows = Dot::kTileRows;
  for (; row + kRows <= rows; row += kRows) {
    multiply(Index<kRows>{}, row, fetcher.lines());
  }
  if constexpr (kRows > 4) {
    if (row + 4 <= rows) {
      multiply(Index<4>{}, row, nullptr);
      row += 4;
    }
  }
  if constexpr (kRows > 2) {
    if (row + 2 <= rows) {
      multiply(Index<2>{}, row, nullptr);
      row += 2;
    }
  }
  if (row < rows) multiply(Index<1>{}, row, nullptr);
}

// Totals of `rows` rows and `groups` groups, plus bias, to y[:, column ...] of a matrix with `outputs` columns.
template <class T>
inline void store_totals(const float* totals, std::ptrdiff_t stride, std::int64_t rows, std::int64_t column, int groups,
                         const float* bias, T* y, std::int64_t outputs) {
  // Row by row: rows of y may lie a power of two apart, and then their lines push one another out of the cache.
  for (std::int64_t row = 0; row < rows; ++row) {
    const float* from = totals + row * stride;
    T* to = y + row * outputs + column;
    const std::int64_t left = outputs - column, size = std::int64_t{groups} * kGroup;
    for_vectors(size < left ? size : left, [&](std::int64_t at, int count) __attribute__((always_inline)) {
      const Vec added = bias == nullptr ? zero() : load_part(bias + column + at, count);
      store_part(to + at, count, add(load(from + at), added));
    });
  }
}

}  // namespace peftserve::PEFTSERVE_ISA
