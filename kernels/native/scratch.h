// Memory for intermediate results.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace peftserve::PEFTSERVE_ISA {

// Memory of the calling thread that lives as long as the thread and only grows; contents do not survive a call.
class Scratch {
 public:
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(memory_); }

  void* reserve(std::size_t bytes) {
    if (bytes > capacity_) {
      std::free(memory_);
      capacity_ = (bytes + 63) / 64 * 64;
      memory_ = std::aligned_alloc(64, capacity_);
      if (memory_ == nullptr) std::abort();
    }
    return memory_;
  }

 private:
  void* memory_ = nullptr;
  std::size_t capacity_ = 0;
};

// kUse: one number for each memory of a type that is held beside others.
template <class T, int kUse = 0>
inline T* scratch(std::size_t count) {
  static thread_local Scratch memory;
  return static_cast<T*>(memory.reserve(count * sizeof(T)));
}

}  // namespace peftserve::PEFTSERVE_ISA
