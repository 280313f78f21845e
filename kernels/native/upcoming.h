// What the ops after a product of a tape will read. The product has it fetched meanwhile: it computes, and leaves the memory
// little to do, while adapters and attention do little but wait for the memory.
#pragma once

#include <cstdint>

namespace peftserve {

// `count` rows of `bytes` bytes, `stride` bytes apart.
struct Span {
  const void* at;
  std::int64_t bytes, stride, count;
};

// How far a thread has come in what an op reads. It begins as zeros; the op alone knows what they stand for.
struct Cursor {
  std::int64_t item = 0, part = 0;
};

// An op's work, shared out before it runs: so it is known what each thread will read.
//
// None of this is inline: kernels, compiled for one instruction set each, must not bring along a copy for all.
class Plan {
 public:
  Plan();
  virtual ~Plan();
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;

  // About how much a thread will read.
  virtual std::int64_t bytes(int thread) const = 0;
  // The next of it; false at the end.
  virtual bool next(int thread, Cursor& cursor, Span& span) const = 0;
};

class Upcoming {
 public:
  struct Place {
    int plan = 0;
    Cursor cursor;
  };

  Upcoming();
  void clear();
  // One more, after those that it has; not kept. What would be too many is left out.
  void add(const Plan& plan);
  // How many cache lines a thread should fetch.
  std::int64_t lines(int thread) const;
  // What a thread reads next after `place`; false at the end.
  bool next(int thread, Place& place, Span& span) const;

 private:
  static constexpr int kMostPlans = 4;

  const Plan* plans_[kMostPlans];
  int count_ = 0;
  std::int64_t most_lines_;
};

}  // namespace peftserve
