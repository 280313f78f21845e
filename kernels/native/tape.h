// Calls of ops, recorded to be made again: a step without Python between its ops.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <stdexcept>
#include <type_traits>
#include <utility>
#include <vector>

#include "attention_plan.h"
#include "low_rank_plan.h"
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

// Whether two ops do the same for different layers.
inline bool same_place(const LoraAdd& a, const LoraAdd& b) {
  return a.columns == b.columns && a.slices == b.slices && std::equal(a.slice, a.slice + a.slices, b.slice);
}
inline bool same_place(const BottleneckAdd& a, const BottleneckAdd& b) { return a.site == b.site; }
inline bool same_place(const PagedAttention&, const PagedAttention&) { return true; }

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

// Which products before an op fetch what it will read: from the `first` on to the `last`, counted backwards from the op, the
// nearest being 1. While few rows are computed weights keep the memory busy, and the last of them alone does.
struct Lead {
  int first, last;
};

// How the work of an op is planned.
template <class Args, class SomePlan>
struct Planned {
  void (*plan)(const Args&, SomePlan&);
  Lead lead;
  void (*begin)(const void*, int) = nullptr;  // the op as a Sequel of a product that it follows and adds to; or null
  void (*end)(const void*, int) = nullptr;
};

// Calls of ops in order, with all their arguments, to be made for steps of any size up to the recorded one: addresses must
// stay valid, what lies there may change. Since it is known what comes, products of weights fetch what other calls will
// read (see Upcoming), and their threads go on with what is added to the result (see Sequel).
class Tape {
 public:
  Tape() = default;
  Tape(const Tape&) = delete;
  Tape& operator=(const Tape&) = delete;

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
    lora_.next_step();
    bottleneck_.next_step();
    attention_.next_step();
    for (std::size_t at = 0; at < calls_.size(); ++at) {
      const std::int64_t rows = step.count(calls_[at].rows);
      if (rows == 0) continue;
      if (calls_[at].fetches) look_ahead(at + 1, step);
      if (!calls_[at].make(rows, step.sequences)) return false;
    }
    return true;
  }

  template <class Result, class Args>
  void add(Result (*op)(const Args&), const Args& args) {
    Call& call = note(args);
    call.make = [this, op, args = Args(args)](std::int64_t rows, std::int64_t sequences) mutable {
      resize(args, rows, sequences);
      if constexpr (std::is_same_v<Args, Nf4Linear>) {
        args.upcoming = &upcoming_;
        args.sequel = sequel_.op == nullptr ? nullptr : &sequel_;
      }
      if constexpr (std::is_same_v<Result, bool>) {
        return op(args);
      } else {
        op(args);
        return true;
      }
    };
    if constexpr (std::is_same_v<Args, Nf4Linear>) {
      call.fetches = true;
      product_ = {calls_.size() - 1, args.x, args.y};
    }
  }

  template <class Args, class SomePlan>
  void add(void (*op)(const Args&), const Args& args, const Planned<Args, SomePlan>& planned) {
    const std::size_t index = calls_.size();
    PlanOf<SomePlan>* one = plan_of(args);
    const Sequel sequel = sequel_of(index, args, planned);
    Call& call = note(args);
    call.lead = planned.lead;
    call.plan = [this, make_plan = planned.plan, sequel, one, index, args = Args(args)](std::int64_t rows,
                                                                                       std::int64_t sequences) mutable {
      if (one->call == index) return upcoming_.add(one->plan);  // the rest of it
      if (one->call != kNone) return;  // for an op that comes before
      resize(args, rows, sequences);
      make_plan(args, one->plan);
      one->call = index;
      upcoming_.add(one->plan);
      if constexpr (std::is_same_v<Args, LoraAdd>) {
        if (sequel.begin == nullptr || one->plan.empty()) return;
        args.plan = &one->plan;
        sequel_ = {sequel.begin, sequel.end, &args};
        one->has_run = true;  // when it is its turn
      }
    };
    call.make = [op, one, index, args = Args(args)](std::int64_t rows, std::int64_t sequences) mutable {
      resize(args, rows, sequences);
      args.plan = one->call == index ? &one->plan : nullptr;
      if (args.plan == nullptr || !one->has_run) op(args);
      if (args.plan != nullptr) one->forget();
      return true;
    };
  }

  static inline thread_local Tape* recording = nullptr;  // other threads' calls are made meanwhile

 private:
  static constexpr std::size_t kNone = static_cast<std::size_t>(-1);
  static constexpr int kMostLead = 3;
  static constexpr std::int64_t kFewRows = 8;

  struct Call {
    std::function<bool(std::int64_t rows, std::int64_t sequences)> make{};
    std::function<void(std::int64_t rows, std::int64_t sequences)> plan{};  // may be empty
    Rows rows;
    Lead lead{1, 1};
    bool fetches = false;  // whether it is a product that fetches what others read
  };

  // The plan of ops of one place in a layer: each is planned after the one before has run.
  template <class SomePlan>
  struct PlanOf {
    SomePlan plan;
    std::size_t call = kNone;  // that it is for
    bool has_run = false;      // by the time of that call, as the sequel of a product

    void forget() {
      call = kNone;
      has_run = false;
    }
  };

  // Those of all ops of a kind.
  template <class Args, class SomePlan>
  class PlansOf {
   public:
    PlanOf<SomePlan>* of(const Args& args) {
      for (auto& [like, plan] : plans_) {
        if (same_place(like, args)) return &plan;
      }
      plans_.emplace_back();
      plans_.back().first = args;
      return &plans_.back().second;
    }
    // Whatever became of the step before.
    void next_step() {
      for (auto& [like, plan] : plans_) {
        plan.forget();
        if constexpr (std::is_same_v<SomePlan, LowRankPlan>) plan.plan.next_step();
      }
    }

   private:
    std::deque<std::pair<Args, PlanOf<SomePlan>>> plans_;  // which stay where they are
  };

  auto* plan_of(const LoraAdd& args) { return lora_.of(args); }
  auto* plan_of(const BottleneckAdd& args) { return bottleneck_.of(args); }
  auto* plan_of(const PagedAttention& args) { return attention_.of(args); }

  // The op at `index` as the sequel of the call before it, where that is a product of the same x to the same y.
  template <class Args, class SomePlan>
  Sequel sequel_of(std::size_t index, const Args& args, const Planned<Args, SomePlan>& planned) const {
    if constexpr (std::is_same_v<Args, LoraAdd>) {
      if (product_.call + 1 == index && product_.x == args.x && product_.y == args.y) {
        return {planned.begin, planned.end, nullptr};
      }
    }
    return {};
  }

  template <class Args>
  Call& note(const Args& args) {
    auto& most = rows_ == Rows::kTokens ? most_.tokens : most_.sampled;
    most = std::max(most, rows_of(args));
    most_.sequences = std::max(most_.sequences, sequences_of(args));
    calls_.push_back({.rows = rows_});
    return calls_.back();
  }

  void look_ahead(std::size_t at, const Extent& step) {
    upcoming_.clear();
    sequel_ = {};
    for (int lead = 1; at < calls_.size(); ++at) {
      const Call& call = calls_[at];
      if (call.fetches && ++lead > kMostLead) return;
      if (!call.plan) continue;
      const std::int64_t rows = step.count(call.rows);
      const int first = rows <= kFewRows ? call.lead.last : call.lead.first;
      if (call.lead.last <= lead && lead <= first) call.plan(rows, step.sequences);
    }
  }

  std::vector<Call> calls_;
  Extent most_;
  Rows rows_ = Rows::kTokens;
  Upcoming upcoming_;
  Sequel sequel_{};  // of the next product
  // The last product that was recorded.
  struct {
    std::size_t call;
    const void* x;
    const void* y;
  } product_{};
  PlansOf<LoraAdd, LowRankPlan> lora_;
  PlansOf<BottleneckAdd, LowRankPlan> bottleneck_;
  PlansOf<PagedAttention, AttentionPlan> attention_;
};

// Makes the call, or records it where a tape is being recorded; `more`: how it is Planned, if it is.
template <class Result, class Args, class... More>
bool call(Result (*op)(const Args&), const Args& args, More... more) {
  if (Tape::recording != nullptr) {
    Tape::recording->add(op, args, more...);
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
