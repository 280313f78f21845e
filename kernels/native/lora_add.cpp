// A task is a block of tokens of one segment in one slice: shrink to the adapter's rank, expand, add to y, scale its
// columns if the adapter is a DoRA.
#include "kernels.h"
#include "low_rank.h"
#include "parallel.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

struct Task {
  std::int64_t token, tokens;
  std::int64_t table;  // index of (slot, layer, target) in the tables
  std::int64_t slice;
};

template <class T, class W>
class Update {
 public:
  explicit Update(const LoraAdd& args)
      : args_(args), y_(static_cast<T*>(args.y)), arena_(static_cast<const W*>(args.arena)) {}

  void run() const {
    static thread_local Scratch plan;
    const std::int64_t most = args_.segments * args_.slices + args_.tokens / kTokenBlock * args_.slices;
    auto* tasks = static_cast<Task*>(plan.reserve(static_cast<std::size_t>(most) * sizeof(Task)));
    std::int64_t count = 0, work = 0;
    for (std::int64_t s = 0; s < args_.segments; ++s) {
      const std::int64_t first = args_.start[s], end = args_.start[s + 1];
      if (first == end) continue;
      for (std::int64_t slice = 0; slice < args_.slices; ++slice) {
        const LoraAdd::Slice& piece = args_.slice[slice];
        const std::int64_t table = (args_.slot[s] * args_.layers + args_.layer) * args_.targets + piece.target;
        const std::int64_t rank = args_.rank[table];
        if (rank == 0) continue;
        work += (end - first) * rank * (args_.columns + piece.outputs);
        for (std::int64_t token = first; token < end; token += kTokenBlock) {
          tasks[count++] = {token, end - token < kTokenBlock ? end - token : kTokenBlock, table, slice};
        }
      }
    }
    parallel_tasks(team_size(args_.threads, work), count, [&](std::int64_t index) { update(tasks[index]); });
  }

 private:
  void update(const Task& task) const {
    const LoraAdd::Slice& piece = args_.slice[task.slice];
    const std::int64_t rank = args_.rank[task.table], pages = task.table * args_.pages;
    const Factor<W> a{arena_, args_.a_page + pages, rank, args_.columns};
    const Factor<W> b{arena_, args_.b_page + pages, rank, piece.outputs};
    auto* t = scratch<float>(static_cast<std::size_t>(task.tokens * (rank + args_.columns)));
    float* x = t + task.tokens * rank;
    widen_row(static_cast<const T*>(args_.x) + task.token * args_.columns, task.tokens * args_.columns, x);
    shrink(x, task.tokens, a, t);
    const Vec scale = broadcast(args_.scale[task.table]);
    const std::int64_t y_stride = args_.y_stride, row_scale = args_.row_scale[task.table];
    T* y = y_ + task.token * y_stride + piece.offset;
    const auto sum = [&](const T* to, int lanes, const float* delta) __attribute__((always_inline)) {
      return fma(scale, load_part(delta, lanes), load_part(to, lanes));
    };
    if (row_scale < 0) {
      expand(t, task.tokens, b, [&](std::int64_t m, std::int64_t column, std::int64_t count, const float* delta) {
        T* to = y + m * y_stride + column;
        for_vectors(count, [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
          store_part(to + at, lanes, sum(to + at, lanes, delta + at));
        });
      });
    } else {
      const W* excess = arena_ + row_scale;  // of g over 1
      expand(t, task.tokens, b, [&](std::int64_t m, std::int64_t column, std::int64_t count, const float* delta) {
        T* to = y + m * y_stride + column;
        for_vectors(count, [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
          const Vec updated = sum(to + at, lanes, delta + at);
          store_part(to + at, lanes, fma(load_part(excess + column + at, lanes), updated, updated));
        });
      });
    }
  }

  const LoraAdd& args_;
  T* y_;
  const W* arena_;
};

}  // namespace

void lora_add(const LoraAdd& args) {
  with_type(args.dtype, [&](auto element) {
    with_type(args.arena_dtype, [&](auto weight) {
      Update<typename decltype(element)::type, typename decltype(weight)::type>(args).run();
    });
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
