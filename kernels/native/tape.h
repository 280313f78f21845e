// Calls of ops, recorded to be made again: a step without Python between its ops.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "ops.h"

namespace peftserve {

// What a recorded op has a row for.
enum class Rows { kTokens, kSampled };

// The size of a step.
struct Extent {
  std::int64_t tokens = 0;     // of all sequences
  std::int64_t sequences = 0;  // there are as many segments of tokens with one adapter, or fewer and then empty ones
  std::int64_t sampled = 0;    // tokens whose logits are wanted

  std::int64_t count(Rows rows) const { return rows == Rows::kTokens ? tokens : sampled; }
};

// Gives the arguments of an op the size of a step.
template <class Args>
void resize(Args& args, std::int64_t rows, std::int64_t) {
  args.rows = rows;
}
inline void resize(PagedAttention& args, std::int64_t tokens, std::int64_t sequences) {
  args.tokens = tokens;
  args.sequences = sequences;
}
inline void resize(LoraAdd& args, std::int64_t tokens, std::int64_t sequences) {
  args.tokens = tokens;
  args.segments = sequences;
}
inline void resize(BottleneckAdd& args, std::int64_t tokens, std::int64_t sequences) {
  args.tokens = tokens;
  args.segments = sequences;
}

template <class Args>
std::int64_t rows_of(const Args& args) {
  if constexpr (requires { args.rows; }) return args.rows;
  if constexpr (requires { args.tokens; }) return args.tokens;
}
template <class Args>
std::int64_t sequences_of(const Args& args) {
  if constexpr (requires { args.sequences; }) return args.sequences;
  if constexpr (requires { args.segments; }) return args.segments;
  return 0;
}

// Calls of ops in order, with all their arguments, to be made for steps of any size up to the recorded one: addresses must
// stay valid, what lies there may change. Since it is known what comes, products of weights fetch what other calls will
// read (see Upcoming).
class Tape {
 public:
  // From here on calls are noted instead of made; `rows`: what they have a row for.
  void start(Rows rows) {
    rows_ = rows;
    recording = this;
  }
  void stop() { recording = nullptr; }
  std::size_t size() const { return calls_.size(); }

  // False when a call refused its arguments; the rest is then not made. Throws std::invalid_argument for a step that is
  // larger than the recorded one.
  bool replay(const Extent& step) {
    if (step.tokens > most_.tokens || step.sequences > most_.sequences || step.sampled > most_.sampled) {
      throw std::invalid_argument("this tape was recorded for smaller steps");
    }
    for (std::size_t at = 0; at < calls_.size(); ++at) {
      const std::int64_t rows = step.count(calls_[at].rows);
      if (rows == 0) continue;
      if (calls_[at].fetches) look_ahead(at + 1, step);
      if (!calls_[at].make(rows, step.sequences, upcoming_)) return false;
    }
    return true;
  }

  // `reads`: what the op will read; `lead`: which product before it fetches that, the last (1) or the one before (2).
  template <class Result, class Args>
  void add(Result (*op)(const Args&), const Args& args, void (*reads)(const Args&, Upcoming&), int lead) {
    constexpr bool kFetches = std::is_same_v<Args, Nf4Linear>;
    auto& most = rows_ == Rows::kTokens ? most_.tokens : most_.sampled;
    most = std::max(most, rows_of(args));
    most_.sequences = std::max(most_.sequences, sequences_of(args));
    Call call{.rows = rows_, .lead = lead, .fetches = kFetches};
    call.make = [op, args = Args(args)](std::int64_t rows, std::int64_t sequences, const Upcoming& upcoming) mutable {
      resize(args, rows, sequences);
      if constexpr (kFetches) args.upcoming = &upcoming;
      if constexpr (std::is_same_v<Result, bool>) {
        return op(args);
      } else {
        op(args);
        return true;
      }
    };
    if (reads != nullptr) {
      call.reads = [reads, args = Args(args)](std::int64_t rows, std::int64_t sequences, Upcoming& upcoming) mutable {
        resize(args, rows, sequences);
        reads(args, upcoming);
      };
    }
    calls_.push_back(std::move(call));
  }

  static inline Tape* recording = nullptr;

 private:
  struct Call {
    std::function<bool(std::int64_t rows, std::int64_t sequences, const Upcoming&)> make{};
    std::function<void(std::int64_t rows, std::int64_t sequences, Upcoming&)> reads{};  // may be empty
    Rows rows;
    int lead;
    bool fetches;  // whether it is a product that fetches what others read
  };

  void look_ahead(std::size_t at, const Extent& step) {
    upcoming_.clear();
    for (int lead = 1; at < calls_.size(); ++at) {
      const Call& call = calls_[at];
      if (call.fetches && ++lead > kMostLead) return;
      if (call.reads && call.lead == lead) call.reads(step.count(call.rows), step.sequences, upcoming_);
    }
  }

  static constexpr int kMostLead = 2;

  std::vector<Call> calls_;
  Extent most_;
  Rows rows_ = Rows::kTokens;
  Upcoming upcoming_;
};

// Makes the call, or records it where a tape is being recorded; `reads` and `lead` as in Tape::add.
template <class Result, class Args>
bool call(Result (*op)(const Args&), const Args& args, void (*reads)(const Args&, Upcoming&) = nullptr, int lead = 1) {
  if (Tape::recording != nullptr) {
    Tape::recording->add(op, args, reads, lead);
    return true;
  }
  if constexpr (std::is_same_v<Result, bool>) {
    return op(args);
  } else {
    op(args);
    return true;
  }
}

}  // namespace peftserve
