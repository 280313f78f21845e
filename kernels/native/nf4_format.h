// The levels of NF4, and how its codes are packed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "prefetch.h"

namespace peftserve::PEFTSERVE_ISA {

// bitsandbytes' levels (functional.get_4bit_type).
alignas(64) constexpr float kLevels[16] = {
    -1.0f,
    -0.6961928009986877f,
    -0.5250730514526367f,
    -0.39491748809814453f,
    -0.28444138169288635f,
    -0.18477343022823334f,
    -0.09105003625154495f,
    0.0f,
    0.07958029955625534f,
    0.16093020141124725f,
    0.24611230194568634f,
    0.33791524171829224f,
    0.44070982933044434f,
    0.5626170039176941f,
    0.7229568362236023f,
    1.0f,
};

constexpr int kGroup = 16;  // outputs side by side in packed weights
constexpr int kBlock = 64;  // columns that share a scale
constexpr int kCell = 8;    // columns in one word

// Which of a cell's eight columns lies in which nibble of its word, from the low bits up: the high nibble comes first.
constexpr int kColumnOfNibble[kCell] = {1, 0, 3, 2, 5, 4, 7, 6};

// A word holds four columns in its low half and the next four in its high half. In unit order, where a unit is two 16-bit
// values in a word, each pairs one of the low half with one of the high half, as the nibbles are.
struct UnitOrder {
  alignas(64) std::uint16_t column[32] = {};
  constexpr UnitOrder() {
    for (int i = 0; i < 32; ++i) {
      column[i] = static_cast<std::uint16_t>(i / kCell * kCell + kColumnOfNibble[i % kCell / 2] + i % 2 * 4);
    }
  }
};

// Packed weights: words [group][block][kBlock / kCell][kGroup], scales [group][block][kGroup].
struct PackedBlocks {
  struct Place {
    std::int64_t group, block;
  };

  const std::uint32_t* all_words;
  const float* all_scales;
  std::int64_t groups, blocks;

  std::ptrdiff_t group_words() const { return blocks * (kBlock / kCell * kGroup); }
  std::ptrdiff_t group_scales() const { return blocks * kGroup; }
  const std::uint32_t* words(std::int64_t group, std::int64_t block) const {
    return all_words + (group * blocks + block) * (kBlock / kCell * kGroup);
  }
  const float* scales(std::int64_t group, std::int64_t block) const {
    return all_scales + (group * blocks + block) * kGroup;
  }

  // The block `distance` after this one where kGroups groups are read side by side, and then the next as many; where
  // there is none, this one.
  template <int kGroups>
  Place after(std::int64_t group, std::int64_t block, std::int64_t distance) const {
    Place next{group, block + distance};
    if (next.block >= blocks) {
      next.block -= blocks;
      next.group += kGroups;
    }
    return next.block >= blocks || next.group + kGroups > groups ? Place{group, block} : next;
  }
};

// How many blocks before its turn a block is fetched where little is computed meanwhile. Groups are read side by side,
// each too short a stream for the hardware to run far ahead in it (measured: 10 to 40 % up to eight rows).
constexpr std::int64_t kAhead = 5;

}  // namespace peftserve::PEFTSERVE_ISA
