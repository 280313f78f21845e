// The inner loops of all products with a weight matrix: y[m, n] = sum over k of x[m, k] * w[n, k].
//
// Lanes are output columns n, in groups of sixteen; k runs in blocks of 64. Within a block each output is one chain of
// dot-product instructions in the order of k, starting from zero; the block's sum is then added to the output's total
// (times the block's scale, for NF4). Every path below keeps exactly this order, whatever the number of rows and
// wherever a row or column lies in a tile: that is what makes results independent of the batch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "simd.h"
#include "types.h"
#include "unroll.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kGroup = 16;                   // output columns side by side in a tile
constexpr int kVectors = kGroup / kLanes;    // vectors a group
constexpr int kBlock = 64;                   // columns of x between two additions to the total
constexpr int kCell = 8;                     // columns of x in one packed NF4 word
constexpr std::int64_t kChunkRows = 128;     // rows of x that share one decoding of the weights

// The registers decide how many rows x groups of totals a tile holds.
#if defined(PEFTSERVE_SIMD_AVX512_BF16)
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
  static constexpr int kColumns = 1;             // columns of x a unit
  static constexpr int kUnits = kBlock;          // units a block
  static constexpr int kSteps = kCell;           // units a cell
  using Weights = Vec;
  using Levels = Table;
  static Vec broadcast(const std::uint32_t* unit) {
    float value;
    std::memcpy(&value, unit, sizeof value);
    return peftserve::PEFTSERVE_ISA::broadcast(value);
  }
  static Vec dot(Vec sum, Vec weights, Vec x) { return fma(weights, x, sum); }
  static Vec read(const std::uint32_t* tile) { return load(reinterpret_cast<const float*>(tile)); }
  static void write(std::uint32_t* tile, Vec weights) { store(reinterpret_cast<float*>(tile), weights); }
  template <int kStep>
  static Vec decode(const Levels& levels, Words words) {
    return look_up<kStep>(levels, words);
  }
};

#if defined(PEFTSERVE_SIMD_AVX512_BF16)
// PairDot: two columns of x a unit, both bfloat16 like the weights, summed in float32.
struct PairDot {
  static constexpr int kColumns = 2;
  static constexpr int kUnits = kBlock / 2;
  static constexpr int kSteps = kCell / 2;
  using Weights = __m512i;
  using Levels = PairTable;
  static __m512i broadcast(const std::uint32_t* unit) { return _mm512_set1_epi32(static_cast<int>(*unit)); }
  static Vec dot(Vec sum, __m512i weights, __m512i x) { return dot_pairs(sum, weights, x); }
  static __m512i read(const std::uint32_t* tile) { return _mm512_loadu_si512(tile); }
  static void write(std::uint32_t* tile, __m512i weights) { _mm512_storeu_si512(tile, weights); }
  template <int kStep>
  static __m512i decode(const Levels& levels, Words words) {
    return look_up_pairs<kStep>(levels, words);
  }
};
#endif

// Decoded weights of one block: for each group, units in order, sixteen columns a unit.
template <class Dot>
struct Tile {
  static constexpr std::ptrdiff_t kGroupWords = std::ptrdiff_t{Dot::kUnits} * kGroup;
  alignas(64) std::uint32_t words[kTileGroups * kGroupWords];
};

// Totals of one tile, one row of x after the other.
struct Totals {
  static constexpr std::ptrdiff_t kStride = std::ptrdiff_t{kTileGroups} * kGroup;
  alignas(64) float values[kChunkRows * kStride];
};

// totals[r, :] += scale * (block of x[r] . block of weights) for kRows rows and kGroups groups.
//
// Source: `prepare<kVectorCount>(cell)` reads what a cell needs, `weights<step>(prepared, vector, cell)` is a vector of
// weights of Dot, `finish(vector, block_sum, total)` the new total.
//
// Never inlined: one copy serves the element types of x and y, and compiles once.
template <class Dot, int kRows, int kGroups, class Source>
[[gnu::noinline]] void multiply_block(const Source& source, const std::uint32_t* x, float* totals, std::ptrdiff_t stride) {
  constexpr int kCount = kGroups * kVectors;
  Vec sums[kRows][kCount];
  unroll<kRows * kCount>([&](auto i) __attribute__((always_inline)) { sums[i.value / kCount][i.value % kCount] = zero(); });
#pragma GCC unroll 1
  for (int cell = 0; cell < kBlock / kCell; ++cell) {
    const auto prepared = source.template prepare<kCount>(cell);
    unroll<Dot::kSteps>([&](auto step) __attribute__((always_inline)) {
      typename Dot::Weights weights[kCount];
      unroll<kCount>([&](auto v) __attribute__((always_inline)) {
        weights[v.value] = source.template weights<step.value>(prepared, v.value, cell);
      });
      unroll<kRows>([&](auto row) __attribute__((always_inline)) {
        const auto unit = Dot::broadcast(x + row.value * Dot::kUnits + cell * Dot::kSteps + step.value);
        unroll<kCount>([&](auto v) __attribute__((always_inline)) {
          sums[row.value][v.value] = Dot::dot(sums[row.value][v.value], weights[v.value], unit);
        });
      });
    });
  }
  unroll<kRows * kCount>([&](auto i) __attribute__((always_inline)) {
    constexpr int kRow = decltype(i)::value / kCount, kVector = decltype(i)::value % kCount;
    float* total = totals + kRow * stride + kVector * kLanes;
    store(total, source.finish(kVector, sums[kRow][kVector], load(total)));
  });
}

// Weights decoded to a tile; scales [group][16], or none.
template <class Dot, bool kScaled>
struct TileSource {
  const std::uint32_t* tile;
  const float* scales;
  std::ptrdiff_t scale_stride;

  struct Nothing {};
  template <int kCount>
  Nothing prepare(int) const {
    return {};
  }
  template <int kStep>
  typename Dot::Weights weights(Nothing, int vector, int cell) const {
    const std::ptrdiff_t at = (vector / kVectors) * Tile<Dot>::kGroupWords + (vector % kVectors) * kLanes;
    return Dot::read(tile + at + std::ptrdiff_t{cell * Dot::kSteps + kStep} * kGroup);
  }
  Vec finish(int vector, Vec sum, Vec total) const {
    if constexpr (kScaled) {
      return fma(sum, load(scales + (vector / kVectors) * scale_stride + (vector % kVectors) * kLanes), total);
    } else {
      return add(total, sum);
    }
  }
};

// One block of all rows of a chunk: x is [rows][kUnits].
template <class Dot, int kGroups, class Source>
inline void multiply_rows(const Source& source, const std::uint32_t* x, std::int64_t rows, Totals& totals) {
  std::int64_t row = 0;
  for (; row + kTileRows <= rows; row += kTileRows) {
    multiply_block<Dot, kTileRows, kGroups>(source, x + row * Dot::kUnits, totals.values + row * Totals::kStride,
                                            Totals::kStride);
  }
  if constexpr (kTileRows > 4) {
    if (row + 4 <= rows) {
      multiply_block<Dot, 4, kGroups>(source, x + row * Dot::kUnits, totals.values + row * Totals::kStride,
                                      Totals::kStride);
      row += 4;
    }
  }
  if constexpr (kTileRows > 2) {
    if (row + 2 <= rows) {
      multiply_block<Dot, 2, kGroups>(source, x + row * Dot::kUnits, totals.values + row * Totals::kStride,
                                      Totals::kStride);
      row += 2;
    }
  }
  if (row < rows) {
    multiply_block<Dot, 1, kGroups>(source, x + row * Dot::kUnits, totals.values + row * Totals::kStride,
                                    Totals::kStride);
  }
}

// Totals of `rows` rows and `groups` groups, plus bias, to y[:, column ...] of a matrix with `outputs` columns.
template <class T>
inline void store_totals(const float* totals, std::ptrdiff_t stride, std::int64_t rows, std::int64_t column, int groups,
                         const float* bias, T* y, std::int64_t outputs) {
  for (int v = 0; v < groups * kVectors && column < outputs; ++v, column += kLanes) {
    const int count = outputs - column < kLanes ? static_cast<int>(outputs - column) : kLanes;
    const Vec added = bias == nullptr ? zero() : load_first(bias + column, count);
    for (std::int64_t row = 0; row < rows; ++row) {
      const Vec total = add(load(totals + row * stride + v * kLanes), added);
      T* out = y + row * outputs + column;
      if (count == kLanes) {
        store(out, total);
      } else {
        store_first(out, count, total);
      }
    }
  }
}

}  // namespace peftserve::PEFTSERVE_ISA
