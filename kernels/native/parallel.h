// Work sharing on torch's OpenMP pool. Results never depend on who computes what: every output element is computed by
// one thread, in an order that its own inputs fix.
#pragma once

#include <cstdint>

#include <omp.h>

namespace peftserve::PEFTSERVE_ISA {

// Work below this many multiply-adds (or comparable operations) is not worth a barrier: about 10 microseconds.
constexpr std::int64_t kSerialWork = 1 << 18;

inline int team_size(int threads, std::int64_t work) { return work < kSerialWork ? 1 : threads; }

// body(begin, end) over a split of 0 .. count into one contiguous range a thread.
template <class Body>
inline void parallel_ranges(int threads, std::int64_t count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    if (count > 0) body(std::int64_t{0}, count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t team = omp_get_num_threads();
    const std::int64_t me = omp_get_thread_num();
    const std::int64_t begin = count * me / team;
    const std::int64_t end = count * (me + 1) / team;
    if (begin < end) body(begin, end);
  }
}

// Two splits with a barrier between them: all of `first` is done before any of `second` begins.
template <class First, class Second>
inline void parallel_phases(int threads, std::int64_t first_count, const First& first, std::int64_t second_count,
                            const Second& second) {
  if (threads <= 1) {
    first(std::int64_t{0}, first_count);
    second(std::int64_t{0}, second_count);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    const std::int64_t team = omp_get_num_threads();
    const std::int64_t me = omp_get_thread_num();
    first(first_count * me / team, first_count * (me + 1) / team);
#pragma omp barrier
    second(second_count * me / team, second_count * (me + 1) / team);
  }
}

// body(index) for each of 0 .. count, uneven tasks: threads take the next one as they get free.
template <class Body>
inline void parallel_tasks(int threads, std::int64_t count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (std::int64_t index = 0; index < count; ++index) body(index);
    return;
  }
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
  for (std::int64_t index = 0; index < count; ++index) body(index);
}

}  // namespace peftserve::PEFTSERVE_ISA
