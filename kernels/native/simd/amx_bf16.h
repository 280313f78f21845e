// AVX-512 with VNNI, and besides tiles: AMX with products of bfloat16.
//
// A tile register holds up to sixteen rows of 64 bytes. A product takes a tile of rows of 32 bfloat16 each, and one of
// sixteen rows of pairs: row i holds columns 2 i and 2 i + 1 of sixteen outputs. It adds to a tile of float32 sums, each
// row of which depends on the same row of the first operand alone, and in the same way wherever that row lies; and
// likewise each column on the same column of the second. (Intel 64 and IA-32 Software Developer's Manual, TDPBF16PS:
// even and odd columns are summed apart, in order, then added to each other and to the sum so far; results below the
// normal range become zero.)
#pragma once

#include <cstddef>
#include <cstdint>

#include "avx512_vnni.h"

namespace peftserve::PEFTSERVE_ISA {

constexpr int kTileHeight = 16;   // rows
constexpr int kTileColumns = 32;  // bfloat16 in a row
constexpr int kTileWords = kTileHeight * kTileColumns / 2;  // of 32 bits, in a whole tile
constexpr int kTiles = 8;         // registers

// The shapes of the tile registers of this thread, while it lives: the first `count` have `height` rows, the others all.
class TileShapes {
 public:
  explicit TileShapes(int count = 0, int height = kTileHeight) {
    for (int tile = 0; tile < kTiles; ++tile) {
      config_.row_bytes[tile] = 64;
      config_.rows[tile] = static_cast<std::uint8_t>(tile < count ? height : kTileHeight);
    }
    asm volatile("ldtilecfg %0" : : "m"(config_));
  }
  ~TileShapes() { asm volatile("tilerelease"); }  // else every switch of threads would save them
  TileShapes(const TileShapes&) = delete;
  TileShapes& operator=(const TileShapes&) = delete;

 private:
  struct Config {
    std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
    std::uint16_t row_bytes[16] = {};
    std::uint8_t rows[16] = {};
  };
  Config config_;
};

// The instructions themselves: GCC 12's intrinsics don't tell the compiler that they read and write memory.
// `stride`: bytes between rows.
template <int kTile>
[[gnu::always_inline]] inline void load_tile(const void* from, std::ptrdiff_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void store_tile(void* to, std::ptrdiff_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
[[gnu::always_inline]] inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
}
// sums += rows . pairs
template <int kSums, int kRows, int kPairs>
[[gnu::always_inline]] inline void dot_tiles() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSums), "i"(kRows), "i"(kPairs));
}

}  // namespace peftserve::PEFTSERVE_ISA
