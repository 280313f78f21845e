#include "attention_plan.h"

#include <algorithm>

namespace peftserve {

AttentionPlan::AttentionPlan() = default;
AttentionPlan::~AttentionPlan() = default;

const AttentionTask* AttentionPlan::tasks() const { return tasks_.data(); }
std::int64_t AttentionPlan::count() const { return static_cast<std::int64_t>(tasks_.size()); }
std::int64_t AttentionPlan::heads() const { return heads_; }
Shares& AttentionPlan::shares() { return shares_; }

void AttentionPlan::make(const PagedAttention& args, std::int64_t rows) {
  args_ = args;
  const std::int64_t shared = args.num_heads / args.num_kv_heads, block = std::max<std::int64_t>(rows / shared, 1);
  tasks_.clear();
  std::int64_t seen = 0;
  for (std::int64_t s = 0; s < args.sequences; ++s) {
    const std::int64_t queries = args.query_start[s + 1] - args.query_start[s], before = args.context_len[s] - queries;
    for (std::int64_t query = 0; query < queries; query += block) {
      const std::int64_t length = std::min(queries - query, block);
      seen += length * (before + query + length);
      for (std::int64_t head = 0; head < args.num_kv_heads; ++head) {
        tasks_.push_back({args.query_start[s] + query, before + query, length, s, head});
      }
    }
  }
  const int team = team_size(args.threads, 2 * seen * args.num_heads * args.head_dim);
  // Heads lie side by side in a page: where there are tasks enough, one thread has all of them.
  heads_ = count() / args.num_kv_heads >= 4 * team ? args.num_kv_heads : 1;
  shares_.make(team, count() / heads_, [this](std::int64_t group) {
    const AttentionTask& task = tasks_[static_cast<std::size_t>(group * heads_)];
    return task.queries * (task.position + task.queries);
  });
  restart(team);
}

std::int64_t AttentionPlan::position_bytes() const {
  return args_.head_dim * bytes_of(args_.cache_dtype);
}

std::int64_t AttentionPlan::bytes(int thread) const {
  std::int64_t positions = 0;
  for (std::int64_t group = shares_.begin(thread); group < shares_.end(thread); ++group) {
    const AttentionTask& task = tasks_[static_cast<std::size_t>(group * heads_)];
    positions += task.position + task.queries - first_seen(args_, task.position);
  }
  return positions * heads_ * 2 * position_bytes();
}

// Of a thread's tasks the keys and values, page by page: an item is a group of tasks, its parts are the positions that they
// see, first as keys (even) and then as values (odd).
bool AttentionPlan::next(int thread, Cursor& cursor, Span& span) const {
  const std::int64_t group = shares_.begin(thread) + cursor.item;
  if (group >= shares_.end(thread)) return false;
  const AttentionTask& task = tasks_[static_cast<std::size_t>(group * heads_)];
  const std::int64_t position = first_seen(args_, task.position) + cursor.part / 2, end = task.position + task.queries;
  const bool is_value = cursor.part % 2 == 1;
  const std::int64_t page = position / args_.page_size, in_page = position % args_.page_size;
  const std::int64_t here = std::min(args_.page_size - in_page, end - position);
  const std::int64_t id = args_.block_tables[task.sequence * args_.max_blocks + page];
  const auto* cache = static_cast<const char*>(is_value ? args_.v_cache : args_.k_cache);
  span.at = cache + ((id * args_.num_kv_heads + task.kv_head) * args_.page_size + in_page) * position_bytes();
  span.bytes = here * position_bytes();
  span.stride = args_.page_size * position_bytes();
  span.count = heads_;
  if (!is_value) {
    ++cursor.part;
  } else if (position + here < end) {
    cursor.part += 2 * here - 1;
  } else {
    cursor = {cursor.item + 1, 0};
  }
  return true;
}

}  // namespace peftserve
