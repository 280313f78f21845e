// How work is split among the threads of a team. What kernels call is inlined throughout, since sources compiled for one
// instruction set use it and others.
#pragma once

#include <atomic>
#include <cstdint>

namespace peftserve {

// Work below this many multiply-adds (or comparable operations) is not worth a barrier: about 10 microseconds.
constexpr std::int64_t kSerialWork = 1 << 18;

[[gnu::always_inline]] inline int team_size(int threads, std::int64_t work) { return work < kSerialWork ? 1 : threads; }

// 0 .. count, split into one contiguous range a thread such that all cost about the same. Who is done with his own helps the
// others, so that each index is taken once.
class Shares {
 public:
  Shares();
  ~Shares();
  Shares(const Shares&) = delete;
  Shares& operator=(const Shares&) = delete;

  // cost(index) for each of 0 .. count, 0 and up.
  template <class Cost>
  [[gnu::always_inline]] void make(int threads, std::int64_t count, const Cost& cost) {
    reserve(threads);
    std::int64_t total = 0, before = 0;
    for (std::int64_t index = 0; index < count; ++index) total += cost(index);
    int thread = 0;
    for (std::int64_t index = 0; index < count; ++index) {
      const std::int64_t here = cost(index);
      // An index belongs to the thread in whose part of the total its middle lies.
      while (thread + 1 < threads && (2 * before + here) * threads >= 2 * total * (thread + 1)) begin_at(++thread, index);
      before += here;
    }
    while (thread < threads) begin_at(++thread, count);
    begin_at(0, 0);
  }

  // All of them again.
  [[gnu::always_inline]] void restart() {
    for (int thread = 0; thread <= threads_; ++thread) next_[thread].index.store(bounds_[thread], std::memory_order_relaxed);
  }

  [[gnu::always_inline]] int threads() const { return threads_; }
  [[gnu::always_inline]] std::int64_t count() const { return bounds_[threads_]; }
  // The share of one thread.
  [[gnu::always_inline]] std::int64_t begin(int thread) const { return bounds_[thread]; }
  [[gnu::always_inline]] std::int64_t end(int thread) const { return bounds_[thread + 1]; }

  // body(index) for what is left, those of thread `own` first; any thread may call it, a member of the team or not.
  template <class Body>
  [[gnu::always_inline]] void take(int own, const Body& body) {
    for (int turn = 0; turn < threads_; ++turn) {
      const int of = (own + turn) % threads_;
      for (std::int64_t count, first; first = take_some(of, count), count > 0;) {
        for (std::int64_t index = first; index < first + count; ++index) body(index);
      }
    }
  }

 private:
  // In a cache line of its own: each thread takes from its own nearly always.
  struct alignas(64) Next {
    std::atomic<std::int64_t> index;
  };

  // Some of what is left of a share: fewer the less there is, since who takes waits for all its stores before, and who takes
  // last others wait for. The first one, and in `count` how many; none at the end.
  [[gnu::always_inline]] std::int64_t take_some(int of, std::int64_t& count) {
    std::atomic<std::int64_t>& next = next_[of].index;
    std::int64_t first = next.load(std::memory_order_relaxed);
    do {
      count = end(of) > first ? (end(of) - first + 3) / 4 : 0;
    } while (count > 0 && !next.compare_exchange_weak(first, first + count, std::memory_order_relaxed));
    return first;
  }

  void reserve(int threads);
  [[gnu::always_inline]] void begin_at(int thread, std::int64_t index) {
    bounds_[thread] = index;
    next_[thread].index.store(index, std::memory_order_relaxed);
  }

  int threads_ = 0, most_threads_ = 0;
  std::int64_t* bounds_ = nullptr;  // [threads + 1]
  Next* next_ = nullptr;            // [threads + 1], the last for nobody
};

}  // namespace peftserve
