// The threads of all native ops.
//
// Not OpenMP: its pools belong to whichever thread starts a region, so a library's region on another thread makes a
// second one, and once there are more threads than cores every barrier of GNU's runtime sleeps (measured: 48 instead of
// 95 to 127 tokens/s of one stream, from the first adapter that a loader thread copied).
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace peftserve {

class Pool {
 public:
  // The one pool of this process, which is never destroyed. A forked child gets a new one: threads do not survive a fork.
  static Pool& shared();

  // job(index, team) on `threads` threads, of which the caller is index 0; returns when all are done. Alone, as job(0, 1),
  // while another thread has the pool. What a job writes is seen by the caller, and by every later job.
  template <class Job>
  void run(int threads, const Job& job) {
    start(threads, [](const void* context, int index, int team) { (*static_cast<const Job*>(context))(index, team); },
          &job);
  }

  // Within a job: returns when all threads of the team have come here as often. What they wrote before, all see.
  void meet(int team);

  // Which of a team the calling thread is; 0 for one that is not of the pool.
  static int thread();

  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

 private:
  using Call = void (*)(const void* context, int index, int team);

  Pool() = default;
  static void forget();
  void start(int threads, Call call, const void* context);
  void work(int index, std::uint32_t seen);
  void note_core(int index);
  // Whether no other thread of the team was last seen on the core of this one, the team's `index`.
  bool has_core(int index) const;

  std::mutex in_use_;
  std::vector<std::thread> workers_;
  static constexpr int kMostCores = 256;
  std::atomic<int> cores_[kMostCores] = {};  // where each thread of the team began its last job
  alignas(64) std::atomic<std::uint32_t> epoch_{0};  // raised for every job
  // Written before that, read after: in the cache line that workers look at anyway.
  Call call_ = nullptr;
  const void* context_ = nullptr;
  std::atomic<int> team_{0};
  alignas(64) std::atomic<std::uint32_t> unfinished_{0};  // workers that have not answered the job yet
  alignas(64) std::atomic<std::uint32_t> met_{0};         // how often threads came to `meet` in this job
};

}  // namespace peftserve
