// What the ops after a product of a tape will read. The product has it fetched meanwhile: it computes, and leaves the memory
// little to do, while adapters and attention do little but wait for the memory.
#pragma once

#include <cstdint>
#include <vector>

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

  // What a thread will read after what it got here so far; false at the end. Each thread asks for its own.
  bool next(int thread, Span& span);
  // About how many bytes of it are left.
  std::int64_t left(int thread) const;

 protected:
  // From the beginning again, for so many threads.
  void restart(int threads);

 private:
  // About how much a thread will read.
  virtual std::int64_t bytes(int thread) const = 0;
  // The next of it; false at the end.
  virtual bool next(int thread, Cursor& cursor, Span& span) const = 0;

  struct alignas(64) Place {  // in a cache line of its own
    Cursor cursor;
    std::int64_t bytes = 0;
  };

  std::vector<Place> places_;  // [threads]
};

class Upcoming {
 public:
  Upcoming();
  void clear();
  // One more, after those that it has; not kept. What would be too many is left out.
  void add(Plan& plan);
  // How many cache lines a thread should fetch.
  std::int64_t lines(int thread) const;
  // What a thread reads next, of the plans from `plan` on, which is set to the one that it is of; false at the end.
  bool next(int thread, int& plan, Span& span) const;

 private:
  static constexpr int kMostPlans = 4;

  Plan* plans_[kMostPlans];
  int count_ = 0;
  std::int64_t most_lines_;
};

}  // namespace peftserve
