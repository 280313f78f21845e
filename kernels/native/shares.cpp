#include "shares.h"

namespace peftserve {

Shares::Shares() {
  make(1, 0, [](std::int64_t) { return std::int64_t{0}; });
}

Shares::~Shares() {
  delete[] bounds_;
  delete[] next_;
}

void Shares::reserve(int threads) {
  threads_ = threads;
  if (threads <= most_threads_) return;
  delete[] bounds_;
  delete[] next_;
  most_threads_ = threads;
  bounds_ = new std::int64_t[static_cast<std::size_t>(threads) + 1];
  next_ = new Next[static_cast<std::size_t>(threads) + 1];
}

}  // namespace peftserve
