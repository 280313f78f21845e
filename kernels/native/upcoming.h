// What the ops after a product of a tape will read. The product has it fetched meanwhile: it computes, and leaves the memory
// little to do, while adapters and attention do little but wait for the memory.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace peftserve {

class Upcoming {
 public:
  // `count` rows of `bytes` bytes, `stride` bytes apart.
  struct Span {
    const void* at;
    std::int64_t bytes, stride, count;
  };
  struct List {
    const Span* spans;
    std::int64_t count, lines;  // how many cache lines they have in all
  };

  // None of this is inline: kernels, compiled for one instruction set each, must not bring along a copy for all.
  Upcoming();
  void clear();
  // One more for a thread of the pool, after those that it has. What would be too much is left out.
  void add(int thread, const Span& span);
  List of(int thread) const;

 private:
  struct Thread {
    std::vector<Span> spans;
    std::int64_t lines = 0;
  };
  std::vector<Thread> threads_;
  std::int64_t most_lines_;
};

}  // namespace peftserve
