// Work sharing on the pool. Results never depend on who computes what: every output element is computed by one thread,
// in an order that its own inputs fix.
#pragma once

#include <atomic>
#include <cstdint>

#include "pool.h"
#include "scratch.h"
#include "shares.h"

namespace peftserve::PEFTSERVE_ISA {

// body(begin, end) over a split of 0 .. count into one contiguous range a thread.
template <class Body>
inline void parallel_ranges(int threads, std::int64_t count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    if (count > 0) body(std::int64_t{0}, count);
    return;
  }
  Pool::shared().run(threads, [&](int index, int team) {
    const std::int64_t begin = count * index / team, end = count * (index + 1) / team;
    if (begin < end) body(begin, end);
  });
}

// Two splits, one after the other: all of `first` is done before any of `second` begins.
template <class First, class Second>
inline void parallel_phases(int threads, std::int64_t first_count, const First& first, std::int64_t second_count,
                            const Second& second) {
  parallel_ranges(threads, first_count, first);
  parallel_ranges(threads, second_count, second);
}

// A thread's next index, in a cache line of its own: each takes from its own nearly always.
struct alignas(64) NextIndex {
  std::atomic<std::int64_t> value;
};

// Takes some of what is left up to `end`: fewer the less there is, since who takes waits for all its stores before, and who
// takes last others wait for. The first one, and in `count` how many; none at the end.
inline std::int64_t take(NextIndex& next, std::int64_t end, std::int64_t& count) {
  std::int64_t first = next.value.load(std::memory_order_relaxed);
  do {
    count = end > first ? (end - first + 3) / 4 : 0;
  } while (count > 0 && !next.value.compare_exchange_weak(first, first + count, std::memory_order_relaxed));
  return first;
}

// body(index) for each of bounds[0] .. bounds[threads], split as `share` has it; who is done helps the others.
template <class Body>
inline void parallel_shares(int threads, const std::int64_t* bounds, const Body& body) {
  const std::int64_t count = bounds[threads];
  if (threads <= 1 || count <= 1) {
    for (std::int64_t index = 0; index < count; ++index) body(index);
    return;
  }
  auto* next = scratch<NextIndex>(static_cast<std::size_t>(threads));
  for (int thread = 0; thread < threads; ++thread) next[thread].value.store(bounds[thread], std::memory_order_relaxed);
  Pool::shared().run(threads, [&](int own, int) {
    for (int turn = 0; turn < threads; ++turn) {
      const int of = own + turn < threads ? own + turn : own + turn - threads;
      for (std::int64_t count, first; first = take(next[of], bounds[of + 1], count), count > 0;) {
        for (std::int64_t index = first; index < first + count; ++index) body(index);
      }
    }
  });
}

// body(index) for each of 0 .. count, uneven tasks: threads take the next one as they get free.
template <class Body>
inline void parallel_tasks(int threads, std::int64_t count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (std::int64_t index = 0; index < count; ++index) body(index);
    return;
  }
  std::atomic<std::int64_t> next{0};
  Pool::shared().run(threads, [&](int, int) {
    for (std::int64_t index; (index = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(index);
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
