// Calls of ops, recorded to be made again: a step without Python between its ops.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

namespace peftserve {

// Calls of ops in order, with all their arguments, to be made again as they are: addresses must stay valid, what lies
// there may change.
class Tape {
 public:
  void start() {
    calls_.clear();
    recording = this;
  }
  void stop() { recording = nullptr; }
  std::size_t size() const { return calls_.size(); }
  // False when a call refused its arguments; the rest is then not made.
  bool replay() const {
    for (const auto& call : calls_) {
      if (!call()) return false;
    }
    return true;
  }
  void add(std::function<bool()> call) { calls_.push_back(std::move(call)); }

  static inline Tape* recording = nullptr;

 private:
  std::vector<std::function<bool()>> calls_;
};

// Makes the call, and records it where a tape is being recorded.
template <class Args>
void call(void (*op)(const Args&), const Args& args) {
  op(args);
  if (Tape::recording != nullptr) {
    Tape::recording->add([op, args] {
      op(args);
      return true;
    });
  }
}
template <class Args>
bool call(bool (*op)(const Args&), const Args& args) {
  const bool done = op(args);
  if (done && Tape::recording != nullptr) Tape::recording->add([op, args] { return op(args); });
  return done;
}

}  // namespace peftserve
