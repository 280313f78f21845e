#include "upcoming.h"

#include <unistd.h>

namespace peftserve {
namespace {

constexpr std::int64_t kLine = 64;

// Half of the second-level cache of a core: the other half is the product's own.
std::int64_t most_lines() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  const long size = sysconf(_SC_LEVEL2_CACHE_SIZE);
  if (size > 0) return size / 2 / kLine;
#endif
  return (std::int64_t{256} << 10) / kLine;
}

}  // namespace

Upcoming::Upcoming() : most_lines_(most_lines()) {}

void Upcoming::clear() {
  for (Thread& thread : threads_) {
    thread.spans.clear();
    thread.lines = 0;
  }
}

void Upcoming::add(int thread, const Span& span) {
  if (static_cast<int>(threads_.size()) <= thread) threads_.resize(static_cast<std::size_t>(thread) + 1);
  Thread& to = threads_[static_cast<std::size_t>(thread)];
  const std::int64_t lines = ((span.bytes + kLine - 1) / kLine + 1) * span.count;
  if (to.lines + lines > most_lines_) return;
  to.spans.push_back(span);
  to.lines += lines;
}

Upcoming::List Upcoming::of(int thread) const {
  if (static_cast<int>(threads_.size()) <= thread) return {nullptr, 0, 0};
  const Thread& from = threads_[static_cast<std::size_t>(thread)];
  return {from.spans.data(), static_cast<std::int64_t>(from.spans.size()), from.lines};
}

}  // namespace peftserve
