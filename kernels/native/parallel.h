// Work sharing on the pool. Results never depend on who computes what: every output element is computed by one thread,
// in an order that its own inputs fix.
#pragma once

#include <atomic>
#include <cstdint>

#include "ops.h"
#include "pool.h"
#include "shares.h"

namespace peftserve::PEFTSERVE_ISA {

// body(begin, end) over a split of 0 .. count into one contiguous range a thread; then, unless it is null, the sequel.
template <class Body>
inline void parallel_ranges(int threads, std::int64_t count, const Body& body, const Sequel* sequel = nullptr) {
  const auto job = [&](int index, int team) {
    const std::int64_t begin = count * index / team, end = count * (index + 1) / team;
    if (begin < end) body(begin, end);
    if (sequel == nullptr) return;
    sequel->begin(sequel->op, index);
    Pool::shared().meet(team);
    sequel->end(sequel->op, index);
  };
  if (threads <= 1 || (count <= 1 && sequel == nullptr)) return job(0, 1);
  Pool::shared().run(threads, job);
}

// Two splits, one after the other: all of `first` is done before any of `second` begins.
template <class First, class Second>
inline void parallel_phases(int threads, std::int64_t first_count, const First& first, std::int64_t second_count,
                            const Second& second, const Sequel* sequel = nullptr) {
  parallel_ranges(threads, first_count, first);
  parallel_ranges(threads, second_count, second, sequel);
}

// body(index) for each of the shares, by their team.
template <class Body>
inline void parallel_shares(Shares& shares, const Body& body) {
  if (shares.threads() <= 1 || shares.count() <= 1) return shares.take(0, body);
  Pool::shared().run(shares.threads(), [&](int own, int) { shares.take(own, body); });
}

// Two of one team: all of the first is done before any of the second begins.
template <class First, class Second>
inline void parallel_shares(Shares& first_shares, const First& first, Shares& second_shares, const Second& second) {
  const auto job = [&](int own, int team) {
    first_shares.take(own, first);
    Pool::shared().meet(team);
    second_shares.take(own, second);
  };
  if (first_shares.threads() <= 1) return job(0, 1);
  Pool::shared().run(first_shares.threads(), job);
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
