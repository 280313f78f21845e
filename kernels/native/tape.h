// Calls of ops, recorded to be made again: a step without Python between its ops.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "ops.h"

namespace peftserve {

// Calls of ops in order, with all their arguments, to be made again as they are: addresses must stay valid, what lies
// there may change. Since it is known what comes, products of weights fetch what other calls will read (see Upcoming).
class Tape {
 public:
  void start() {
    calls_.clear();
    recording = this;
  }
  void stop() { recording = nullptr; }
  std::size_t size() const { return calls_.size(); }
  // False when a call refused its arguments; the rest is then not made.
  bool replay() {
    for (std::size_t at = 0; at < calls_.size(); ++at) {
      if (calls_[at].fetches) look_ahead(at + 1);
      if (!calls_[at].make(upcoming_)) return false;
    }
    return true;
  }

  struct Call {
    std::function<bool(const Upcoming&)> make{};
    std::function<void(Upcoming&)> reads{};  // what it will read, or empty; and by which product before it
    int lead = 1;                            // that is fetched: the last, or the one before
    bool fetches = false;                    // whether it is such a product
  };
  void add(Call call) { calls_.push_back(std::move(call)); }

  static inline Tape* recording = nullptr;

 private:
  void look_ahead(std::size_t at) {
    upcoming_.clear();
    for (int lead = 1; at < calls_.size(); ++at) {
      if (calls_[at].fetches && ++lead > kMostLead) return;
      if (calls_[at].reads && calls_[at].lead == lead) calls_[at].reads(upcoming_);
    }
  }

  static constexpr int kMostLead = 2;

  std::vector<Call> calls_;
  Upcoming upcoming_;
};

// Makes the call, and records it where a tape is being recorded; `reads` and `lead` as in Tape::Call.
template <class Args>
void call(void (*op)(const Args&), const Args& args, void (*reads)(const Args&, Upcoming&) = nullptr,
          int lead = 1) {
  op(args);
  if (Tape::recording == nullptr) return;
  Tape::Call again{[op, args](const Upcoming&) {
                     op(args);
                     return true;
                   }};
  if (reads != nullptr) again.reads = [reads, args](Upcoming& upcoming) { reads(args, upcoming); };
  again.lead = lead;
  Tape::recording->add(std::move(again));
}
inline void call(void (*op)(const Nf4Linear&), const Nf4Linear& args) {
  op(args);
  if (Tape::recording == nullptr) return;
  Tape::recording->add({.make = [op, args = Nf4Linear(args)](const Upcoming& upcoming) mutable {
                          args.upcoming = &upcoming;
                          op(args);
                          return true;
                        },
                        .fetches = true});
}
template <class Args>
bool call(bool (*op)(const Args&), const Args& args) {
  const bool done = op(args);
  if (done && Tape::recording != nullptr) Tape::recording->add({[op, args](const Upcoming&) { return op(args); }});
  return done;
}

}  // namespace peftserve
