// How work is split among the threads of a team. Inlined throughout, since sources compiled for one instruction set use it
// and others.
#pragma once

#include <cstdint>

namespace peftserve {

// Work below this many multiply-adds (or comparable operations) is not worth a barrier: about 10 microseconds.
constexpr std::int64_t kSerialWork = 1 << 18;

[[gnu::always_inline]] inline int team_size(int threads, std::int64_t work) { return work < kSerialWork ? 1 : threads; }

// A split of 0 .. count into one contiguous range a thread, such that all cost about the same: thread t has those from
// bounds[t] up to bounds[t + 1].
template <class Cost>
[[gnu::always_inline]] inline void share(int threads, std::int64_t count, const Cost& cost, std::int64_t* bounds) {
  std::int64_t total = 0, before = 0;
  for (std::int64_t index = 0; index < count; ++index) total += cost(index);
  int thread = 0;
  bounds[0] = 0;
  for (std::int64_t index = 0; index < count; ++index) {
    const std::int64_t here = cost(index);
    // An index belongs to the thread in whose part of the total its middle lies.
    while (thread + 1 < threads && (2 * before + here) * threads >= 2 * total * (thread + 1)) bounds[++thread] = index;
    before += here;
  }
  while (thread < threads) bounds[++thread] = count;
}

}  // namespace peftserve
