// Fetches what comes next, a few cache lines at a time.
#pragma once

#include <cstdint>

#include "nf4_format.h"
#include "pool.h"
#include "prefetch.h"
#include "upcoming.h"

namespace peftserve::PEFTSERVE_ISA {

// The lines of a turn, to be fetched in the course of a block of columns, a run of them with each cell. A core has only so
// many lines on their way at a time: of more at once it drops some, or waits (all before the block instead: 32 adapters in a
// step of 32 take 6 % longer). In runs, since to note and read the address of each takes time beside the product (8 and 32
// streams: 2 %); the last run of a row ends with the row, and begins the earlier (8 and 32 streams: 0.5 %).
struct TurnLines {
  static constexpr int kCells = kBlock / kCell, kRun = 3;
  static constexpr std::int64_t kLine = 64;

  const char* at[kCells];

  [[gnu::always_inline]] void fetch(int cell) const {
    for (int line = 0; line < kRun; ++line) __builtin_prefetch(at[cell] + line * kLine, 0, kSecondLevel);
  }
};

class Fetcher {
 public:
  // Without large registers blocks are small, and have few lines each.
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
  static constexpr bool kSpread = true;
  static constexpr std::int64_t kMostLines = TurnLines::kCells * TurnLines::kRun;
#else
  static constexpr bool kSpread = false;
  static constexpr std::int64_t kMostLines = 20;
#endif

  // What the calling thread has in `upcoming` (or nothing, for null), in `turns` turns, at most so many lines in each.
  Fetcher(const Upcoming* upcoming, std::int64_t turns, std::int64_t most_lines) {
    if (upcoming == nullptr || turns == 0) return;
    upcoming_ = upcoming;
    thread_ = Pool::thread();
    const std::int64_t lines = upcoming->lines(thread_);
    lines_ = (lines + turns - 1) / turns;
    if (lines_ > most_lines) lines_ = most_lines;
  }

  // A turn whose lines are fetched at once.
  [[gnu::always_inline]] void turn() {
    for (std::int64_t line = 0; line < lines_; ++line) {
      if (at_ >= end_ && !next_row()) return;
      __builtin_prefetch(at_, 0, kSecondLevel);
      at_ += kLine;
    }
  }

  // A turn whose lines, kMostLines at most, are left to the caller, to be fetched before the next one; null for nothing.
  [[gnu::always_inline]] const TurnLines* lines() {
    if (lines_ == 0) return nullptr;
    if constexpr (!kSpread) {
      turn();
      return nullptr;
    }
    constexpr std::int64_t kRunBytes = TurnLines::kRun * kLine;
    for (int cell = 0; cell < TurnLines::kCells; ++cell) {
      const bool any = cell * TurnLines::kRun < lines_ && (at_ < end_ || next_row());
      const char* run = at_ < last_run_ ? at_ : last_run_;
      turn_.at[cell] = any ? run : reinterpret_cast<const char*>(this);  // which is at hand
      at_ += any ? kRunBytes : 0;
    }
    return &turn_;
  }

 private:
  static constexpr std::int64_t kLine = TurnLines::kLine;

  [[gnu::noinline]] bool next_row() {
    if (row_ == span_.count) {
      if (!upcoming_->next(thread_, plan_, span_)) {
        lines_ = 0;
        return false;
      }
      row_ = 0;
    }
    const char* at = static_cast<const char*>(span_.at) + row_++ * span_.stride;
    end_ = at + span_.bytes;
    at_ = at - reinterpret_cast<std::uintptr_t>(at) % kLine;
    const char* last_line = end_ - 1 - reinterpret_cast<std::uintptr_t>(end_ - 1) % kLine;
    last_run_ = last_line - (TurnLines::kRun - 1) * kLine;
    if (last_run_ < at_) last_run_ = at_;
    return true;
  }

  TurnLines turn_;
  const Upcoming* upcoming_ = nullptr;
  int thread_ = 0;
  int plan_ = 0;
  Span span_{};
  std::int64_t row_ = 0, lines_ = 0;
  const char* at_ = nullptr;
  const char* end_ = nullptr;
  const char* last_run_ = nullptr;  // where the last run of the row begins
};

}  // namespace peftserve::PEFTSERVE_ISA
