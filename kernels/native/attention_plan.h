// Who computes what of a PagedAttention: tasks, blocks of queries of one sequence with all heads that share one KV head.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"
#include "shares.h"
#include "upcoming.h"

namespace peftserve {

struct AttentionTask {
  std::int64_t token;     // of the flat batch, the first query's
  std::int64_t position;  // of that query in its sequence
  std::int64_t queries;
  std::int64_t sequence;
  std::int64_t kv_head;
};

// The first position that a query at `position` sees.
[[gnu::always_inline]] inline std::int64_t first_seen(const PagedAttention& args, std::int64_t position) {
  return args.window > 0 && position >= args.window ? position - args.window + 1 : 0;
}

class AttentionPlan final : public Plan {
 public:
  AttentionPlan();
  ~AttentionPlan() override;

  // Of at most `rows` rows (queries x heads) a task, unless one query has more. The inputs of the op need not be there yet,
  // its tables must, and stay until it has run.
  void make(const PagedAttention& args, std::int64_t rows);

  const AttentionTask* tasks() const;
  std::int64_t count() const;
  std::int64_t heads() const;  // how many tasks, side by side, a thread takes at a time
  Shares& shares();            // of tasks / heads

 private:
  std::int64_t bytes(int thread) const override;
  bool next(int thread, Cursor& cursor, Span& span) const override;

  std::int64_t position_bytes() const;  // of a key, or a value

  PagedAttention args_{};
  std::vector<AttentionTask> tasks_;
  Shares shares_;
  std::int64_t heads_ = 1;
};

}  // namespace peftserve
