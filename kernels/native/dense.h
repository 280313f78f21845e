// Row-major matrices as operands of gemm.h: rows of x as units, and blocks of weights transposed into a tile.
#pragma once

#include <cstdint>

#include "gemm.h"
#include "rows.h"

namespace peftserve::PEFTSERVE_ISA {

// `count` <= kLanes units of a row from unit `unit` on, as bits.
template <class T>
[[gnu::always_inline]] inline Vec load_units(FloatDot, const T* row, std::int64_t unit, int count) {
  return load_part(row + unit, count);
}
#if defined(PEFTSERVE_SIMD_AVX512_BF16)
// An even number of columns, else the last unit would reach past the row.
[[gnu::always_inline]] inline Vec load_units(PairDot, const Bf16* row, std::int64_t unit, int count) {
  return load_part(reinterpret_cast<const float*>(row + 2 * unit), count);
}
#endif

// One row of x: its units in blocks, zeros behind the last.
template <class Dot, class T>
inline void pack_units(const T* row, std::int64_t units, std::ptrdiff_t block_stride, std::uint32_t* packed) {
  for (std::int64_t block = 0; block < units; block += Dot::kUnits, packed += block_stride) {
    for (int at = 0; at < Dot::kUnits; at += kLanes) {
      const std::int64_t left = units - block - at;
      const int count = left < 0 ? 0 : left < kLanes ? static_cast<int>(left) : kLanes;
      const Vec values = count == 0 ? zero() : load_units(Dot{}, row, block + at, count);
      store(reinterpret_cast<float*>(packed + at), values);
    }
  }
}

// Units first .. first + kUnits of sixteen rows, as [unit][16]; zeros where there is no row (null) or no unit.
template <class Dot, class T>
inline void transpose_block(const T* const* rows, std::int64_t first, std::int64_t units, std::uint32_t* tile) {
  bool is_whole = first + Dot::kUnits <= units;
  for (int row = 0; row < kGroup; ++row) is_whole = is_whole && rows[row] != nullptr;
  for (int column = 0; column < Dot::kUnits; column += kLanes) {
    const std::int64_t left = units - first - column;
    const int count = left < 0 ? 0 : left < kLanes ? static_cast<int>(left) : kLanes;
    for (int group_row = 0; group_row < kGroup; group_row += kLanes) {
      Vec values[kLanes];
      unroll<kLanes>([&](auto lane) __attribute__((always_inline)) {
        const T* row = rows[group_row + lane.value];
        if (is_whole) {
          values[lane.value] = load_units(Dot{}, row, first + column, kLanes);
        } else {
          values[lane.value] = count > 0 && row != nullptr ? load_units(Dot{}, row, first + column, count) : zero();
        }
      });
      transpose(values);
      unroll<kLanes>([&](auto lane) __attribute__((always_inline)) {
        store(reinterpret_cast<float*>(tile + (column + lane.value) * kGroup + group_row), values[lane.value]);
      });
    }
  }
}

}  // namespace peftserve::PEFTSERVE_ISA
