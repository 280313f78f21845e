// Fetches what comes next, a few cache lines at a time.
#pragma once

#include <cstdint>

#include "pool.h"
#include "prefetch.h"
#include "upcoming.h"

namespace peftserve::PEFTSERVE_ISA {

// How many lines at most in a turn beside a block of few rows, and beside a tile of many. A core has so many lines on their
// way at a time, and the weights of the product are among them (measured: more of either takes longer).
constexpr std::int64_t kFewRowsLines = 12, kTileLines = 20;

class Fetcher {
 public:
  // What the calling thread has in `upcoming` (or nothing, for null), in `turns` turns, at most so many lines in each.
  Fetcher(const Upcoming* upcoming, std::int64_t turns, std::int64_t most_lines) {
    if (upcoming == nullptr) return;
    list_ = upcoming->of(Pool::thread());
    lines_ = turns > 0 ? (list_.lines + turns - 1) / turns : 0;
    if (lines_ > most_lines) lines_ = most_lines;
  }

  [[gnu::always_inline]] void turn() {
    for (std::int64_t line = 0; line < lines_; ++line) {
      if (at_ >= end_ && !next_row()) return;
      __builtin_prefetch(at_, 0, kSecondLevel);
      at_ += kLine;
    }
  }

 private:
  static constexpr std::int64_t kLine = 64;

  [[gnu::noinline]] bool next_row() {
    while (row_ == rows_) {
      if (list_.count == 0) {
        lines_ = 0;
        return false;
      }
      span_ = *list_.spans++;
      --list_.count;
      row_ = 0;
      rows_ = span_.count;
    }
    const char* at = static_cast<const char*>(span_.at) + row_++ * span_.stride;
    end_ = at + span_.bytes;
    at_ = at - reinterpret_cast<std::uintptr_t>(at) % kLine;
    return true;
  }

  Upcoming::List list_{nullptr, 0, 0};
  Upcoming::Span span_{};
  std::int64_t row_ = 0, rows_ = 0, lines_ = 0;
  const char* at_ = nullptr;
  const char* end_ = nullptr;
};

}  // namespace peftserve::PEFTSERVE_ISA
