#include "pool.h"

#include <chrono>
#include <system_error>

#include <pthread.h>
#if defined(__linux__)
#include <sched.h>
#endif

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace peftserve {
namespace {

// How long a thread looks for work, or for the end of it, whatever else wants its core: longer than what lies between two
// ops of a replayed step.
constexpr auto kSpin = std::chrono::microseconds(100);
// How long it looks in all before it sleeps, where no other thread of the pool is on its core: longer than what lies
// between two steps of a busy engine. A core that sleeps wakes late, in a virtual machine above all, and every op waits
// for the last thread (measured on two cores: a third more tokens/s of one stream, a fifth more of eight).
constexpr auto kAwake = std::chrono::milliseconds(1);
constexpr int kLooks = 32;  // between two looks at the clock

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The core that this thread is on, or -1.
inline int core() {
#if defined(__linux__)
  return sched_getcpu();
#else
  return -1;
#endif
}

// Returns when `value` is no longer `old`. `may_stay()`: whether looking on keeps nobody of the pool waiting.
template <class MayStay>
void wait_for_change(const std::atomic<std::uint32_t>& value, std::uint32_t old, const MayStay& may_stay) {
  const auto has_changed = [&] {
    for (int look = 0; look < kLooks; ++look) {
      if (value.load(std::memory_order_acquire) != old) return true;
      relax();
    }
    return false;
  };
  if (has_changed()) return;  // mostly; the clock takes longer to read
  const auto start = std::chrono::steady_clock::now();
  for (auto waited = start - start; waited < kSpin || (waited < kAwake && may_stay());
       waited = std::chrono::steady_clock::now() - start) {
    if (has_changed()) return;
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

std::atomic<Pool*> pool{nullptr};

thread_local int this_thread = 0;

}  // namespace

// In a forked child: the parent's pool is left as it lies, without threads.
void Pool::forget() { pool.store(new Pool); }

Pool& Pool::shared() {
  static const bool made = [] {
    pool.store(new Pool);
    pthread_atfork(nullptr, nullptr, forget);
    return true;
  }();
  (void)made;
  return *pool.load(std::memory_order_acquire);
}

int Pool::thread() { return this_thread; }

void Pool::start(int threads, Call call, const void* context) {
  const std::unique_lock<std::mutex> use(in_use_, std::try_to_lock);
  if (threads <= 1 || !use.owns_lock()) return call(context, 0, 1);
  while (static_cast<int>(workers_.size()) < threads - 1) {
    const int index = static_cast<int>(workers_.size()) + 1;
    try {
      workers_.emplace_back(&Pool::work, this, index, epoch_.load(std::memory_order_relaxed));
    } catch (const std::system_error&) {  // no more threads to be had: fewer do it
      threads = index;
    }
  }
  call_ = call;
  context_ = context;
  team_ = threads;
  unfinished_.store(static_cast<std::uint32_t>(workers_.size()), std::memory_order_relaxed);
  met_.store(0, std::memory_order_relaxed);
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  note_core(0);
  call(context, 0, threads);
  for (;;) {
    const std::uint32_t left = unfinished_.load(std::memory_order_acquire);
    if (left == 0) return;
    wait_for_change(unfinished_, left, [&] { return has_core(0); });
  }
}

void Pool::meet(int team) {
  if (team <= 1) return;
  const auto size = static_cast<std::uint32_t>(team);
  const std::uint32_t came = met_.fetch_add(1, std::memory_order_acq_rel) + 1, all = (came + size - 1) / size * size;
  if (came == all) return met_.notify_all();
  for (std::uint32_t now; (now = met_.load(std::memory_order_acquire)) < all;) {
    wait_for_change(met_, now, [&] { return has_core(this_thread); });
  }
}

void Pool::note_core(int index) {
  if (index >= kMostCores) return;
  const int now = core();  // mostly the same: not written, the line stays everybody's
  if (cores_[index].load(std::memory_order_relaxed) != now) cores_[index].store(now, std::memory_order_relaxed);
}

bool Pool::has_core(int index) const {
  const int mine = core(), team = team_, last = team < kMostCores ? team : kMostCores;
  for (int other = 0; other < last; ++other) {
    if (other != index && mine >= 0 && cores_[other].load(std::memory_order_relaxed) == mine) return false;
  }
  return true;
}

void Pool::work(int index, std::uint32_t seen) {
  this_thread = index;
  for (;;) {
    wait_for_change(epoch_, seen, [&] { return has_core(index); });
    ++seen;  // the next job does not come before this one is answered
    note_core(index);
    if (index < team_) call_(context_, index, team_);
    if (unfinished_.fetch_sub(1, std::memory_order_acq_rel) == 1) unfinished_.notify_one();
  }
}

}  // namespace peftserve
