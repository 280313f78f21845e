// Attention over pages with a running softmax (Milakov and Gimelshein 2018, arXiv:1805.02867).
//
// A task is a block of queries of one sequence with all heads that share one KV head. It goes over the keys in blocks
// of 64 positions counted from position 0 of the sequence. For each block: keys transposed, so that lanes are keys;
// scores, one chain over head_dim a key; maximum and sum of the block, folded into the row's; values added in ascending
// order of position. None of this depends on which queries are in the task, so a row has the same bits in a whole
// prefill, in any chunk of it and as a decode step. Positions that no row of a task sees are never read: pages hold
// anything there.
#include <cstring>
#include <type_traits>

#include "attention_plan.h"
#include "dtypes.h"
#include "kernels.h"
#include "math.h"
#include "parallel.h"
#include "prefetch.h"
#include "scratch.h"
#include "unroll.h"
#include "widen.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

constexpr int kKeys = 64;                    // positions in a block
constexpr int kKeyVectors = kKeys / kLanes;  // vectors of scores a row
constexpr std::int64_t kTaskRows = 64;       // rows (queries x heads) a task, unless one query has more
constexpr float kInfinity = __builtin_inff();

// Rows side by side in registers, and the vectors of keys (or of a value) that each of so many rows has there.
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
constexpr int kTile = 4;
constexpr int pass(int) { return 4; }
#elif defined(PEFTSERVE_SIMD_AVX2)
constexpr int kTile = 4;
constexpr int pass(int rows) { return rows == 1 ? 8 : rows == 4 ? 2 : 4; }
#else
constexpr int kTile = 2;
constexpr int pass(int) { return 4; }
#endif

// Positions first .. end of a block.
struct Range {
  int first, end;
  bool empty() const { return first >= end; }
};

// Which of the positions first .. end lie in the block that begins at `block`.
Range within(std::int64_t block, std::int64_t first, std::int64_t end) {
  const auto clamp = [](std::int64_t x) { return static_cast<int>(x < 0 ? 0 : x > kKeys ? kKeys : x); };
  return {clamp(first - block), clamp(end - block)};
}

// How many lanes of a vector `count` values fill.
int lanes_of(std::int64_t count) { return count < kLanes ? static_cast<int>(count) : kLanes; }

// One head of one query, widened.
void read_query(const void* q, Dtype dtype, std::int64_t at, std::int64_t columns, float* query) {
  with_type(dtype, [&](auto element) {
    using T = typename decltype(element)::type;
    widen_row(static_cast<const T*>(q) + at, columns, query);
  });
}

template <class T>
class Attention {
 public:
  explicit Attention(const PagedAttention& args)
      : args_(args),
        k_(static_cast<const T*>(args.k_cache)),
        v_(static_cast<const T*>(args.v_cache)),
        shared_(args.num_heads / args.num_kv_heads),
        stride_((args.head_dim + kLanes - 1) / kLanes * kLanes),
        pairs_(Pairs<T>::kSplit ? args.head_dim / kPair : 0) {
    for (int i = 0; i < kKeys; ++i) positions_[i] = static_cast<float>(i);
  }

  void run(AttentionPlan& plan) const {
    const AttentionTask* tasks = plan.tasks();
    const std::int64_t count = plan.count(), heads = plan.heads();
    parallel_shares(plan.shares(), [&](std::int64_t group) {
      for (std::int64_t index = group * heads; index < (group + 1) * heads; ++index) {
        attend(tasks[index], index + 1 < count ? &tasks[index + 1] : nullptr);
      }
    });
  }

 private:
  // A block as far as a task sees it: the positions start + range, and where in the caches each of them begins.
  struct Block {
    std::int64_t start;
    Range range;
    std::int64_t at[kKeys];
  };

  // What a thread works in: the rows of a task and the keys of a block.
  struct Memory {
    float* keys;     // [column][kKeys]
    float* queries;  // [rows][stride]
    float* sums;     // [rows][stride], of weights x values
    float* maximum;  // [rows], of scores
    float* total;    // [rows], of weights
  };

  Memory memory(std::int64_t rows) const {
    const std::int64_t keys = stride_ * kKeys, size = rows * stride_;
    Memory work;
    work.keys = scratch<float>(static_cast<std::size_t>(keys + 2 * size + 2 * rows));
    work.queries = work.keys + keys;
    work.sums = work.queries + size;
    work.maximum = work.sums + size;
    work.total = work.maximum + rows;
    return work;
  }

  // Where the head of a row lies in q and out.
  std::int64_t offset(const AttentionTask& task, std::int64_t row) const {
    return ((task.token + row / shared_) * args_.num_heads + task.kv_head * shared_ + row % shared_) * args_.head_dim;
  }

  void attend(const AttentionTask& task, const AttentionTask* following) const {
    const std::int64_t rows = task.queries * shared_;
    Memory work = memory(rows);
    for (std::int64_t row = 0; row < rows; ++row) {
      read_query(args_.q, args_.dtype, offset(task, row), args_.head_dim, work.queries + row * stride_);
      work.maximum[row] = -kInfinity;
      work.total[row] = 0.0f;
    }
    std::memset(work.sums, 0, static_cast<std::size_t>(rows * stride_) * sizeof(float));

    const std::int64_t end = task.position + task.queries;
    Block blocks[2];
    std::int64_t start = first_block(task);
    locate(task, start, blocks[0]);
    for (int turn = 0; start < end; start += kKeys, turn = 1 - turn) {
      const Block& block = blocks[turn];
      Block& next = blocks[1 - turn];
      if (start + kKeys < end) {
        locate(task, start + kKeys, next);
      } else if (following != nullptr) {
        locate(*following, first_block(*following), next);
      } else {
        next.range = {0, 0};
      }
      read_keys(block, work);
      std::int64_t row = 0;
      for (; row + kTile <= rows; row += kTile) tile<kTile>(task, block, row, row == 0 ? &next : nullptr, work);
      last_rows<kTile - 1>(task, block, row, rows, row == 0 ? &next : nullptr, work);
    }
    with_type(args_.dtype, [&](auto element) {
      finish(static_cast<typename decltype(element)::type*>(args_.out), task, rows, work);
    });
  }

  template <int kRows>
  void last_rows(const AttentionTask& task, const Block& block, std::int64_t row, std::int64_t rows, const Block* next,
                 const Memory& work) const {
    if constexpr (kRows > 0) {
      if (rows - row == kRows) {
        tile<kRows>(task, block, row, next, work);
      } else {
        last_rows<kRows - 1>(task, block, row, rows, next, work);
      }
    }
  }

  std::int64_t first_block(const AttentionTask& task) const { return first_seen(args_, task.position) / kKeys * kKeys; }

  void locate(const AttentionTask& task, std::int64_t start, Block& block) const {
    block.start = start;
    block.range = within(start, first_seen(args_, task.position), task.position + task.queries);
    std::int64_t position = start + block.range.first;
    for (int j = block.range.first; j < block.range.end;) {
      const std::int64_t page = position / args_.page_size, in_page = position % args_.page_size;
      const std::int64_t id = args_.block_tables[task.sequence * args_.max_blocks + page];
      std::int64_t at = ((id * args_.num_kv_heads + task.kv_head) * args_.page_size + in_page) * args_.head_dim;
      const std::int64_t left = args_.page_size - in_page, here = left < block.range.end - j ? left : block.range.end - j;
      for (std::int64_t i = 0; i < here; ++i, at += args_.head_dim) block.at[j + i] = at;
      j += static_cast<int>(here);
      position += here;
    }
  }

  // Transposes the keys of a block, zeros for positions outside its range.
  void read_keys(const Block& block, const Memory& work) const {
    for (int group = 0; group < kKeys; group += kLanes) {
      const bool any = group + kLanes > block.range.first && group < block.range.end;
      const T* keys[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const int j = group + i;
        keys[i] = j >= block.range.first && j < block.range.end ? k_ + block.at[j] : nullptr;
      }
      if constexpr (Pairs<T>::kSplit) {
        for (std::int64_t pair = 0; pair < pairs_; ++pair) {
          transpose_pairs(keys, pair * kPair, any, work.keys + pair * kPair * kKeys + group);
        }
      }
      for (std::int64_t column = pairs_ * kPair; column < args_.head_dim; column += kLanes) {
        Vec square[kLanes];
        const int count = lanes_of(args_.head_dim - column);
        for (int i = 0; i < kLanes; ++i) square[i] = keys[i] == nullptr ? zero() : load_part(keys[i] + column, count);
        if (any) transpose(square);
        float* to = work.keys + column * kKeys + group;
        for (int i = 0; i < kLanes; ++i) store(to + i * kKeys, square[i]);
      }
    }
  }

  // Position j of a block, unless it is null. Inlined, since GCC takes a function that only prefetches for one without
  // effect.
  [[gnu::always_inline]] void prefetch(const T* cache, const Block* block, int j) const {
    if (block == nullptr || j < block->range.first || j >= block->range.end) return;
    constexpr std::int64_t kLine = 64 / sizeof(T);
    const T* row = cache + block->at[j];
    for (std::int64_t column = 0; column < args_.head_dim; column += kLine) {
      __builtin_prefetch(row + column, 0, kSecondLevel);
    }
  }

  // Sixteen columns of eight keys (or 32 of sixteen): transposed two columns at a time and split afterwards, half the
  // shuffles.
  void transpose_pairs(const T* const* keys, std::int64_t column, bool any, float* to) const {
    Vec square[kLanes];
    for (int i = 0; i < kLanes; ++i) square[i] = keys[i] == nullptr ? zero() : Pairs<T>::load(keys[i] + column);
    if (any) transpose(square);
    for (int i = 0; i < kLanes; ++i) {
      Vec even, odd;
      Pairs<T>::split(square[i], even, odd);
      store(to + 2 * i * kKeys, even);
      store(to + (2 * i + 1) * kKeys, odd);
    }
  }

  // Rows `row` .. row + kRows of a task. Meanwhile the keys and values of the next block, unless it is null, are fetched:
  // pages lie anywhere, which the processor does not foresee. A few at a time, a key with each column of the scores and a
  // value with each position of the sums (all while keys are read instead: 6 % more of a step of 32 streams on Zen 5).
  template <int kRows>
  void tile(const AttentionTask& task, const Block& block, std::int64_t row, const Block* next, const Memory& work) const {
    Range seen[kRows];
    Range common{0, kKeys};
    bool any = false;
    for (int r = 0; r < kRows; ++r) {
      const std::int64_t position = task.position + (row + r) / shared_;
      seen[r] = within(block.start, first_seen(args_, position), position + 1);
      any = any || !seen[r].empty();
      common.first = seen[r].first > common.first ? seen[r].first : common.first;
      common.end = seen[r].end < common.end ? seen[r].end : common.end;
    }
    if (!any) return;
    alignas(64) float weights[kRows][kKeys];
    // Of the keys up to the last that any of the rows sees: before the diagonal there are few.
    int end = 0;
    for (int r = 0; r < kRows; ++r) end = seen[r].end > end ? seen[r].end : end;
    score<kRows>(work.queries + row * stride_, work.keys, end, next, weights);
    for (int r = 0; r < kRows; ++r) {
      if (!seen[r].empty()) soften(weights[r], seen[r], row + r, work);
    }
    // Most blocks are seen whole by all rows; at the ends each row has its own positions besides the common ones.
    float* sums = work.sums + row * stride_;
    if (common.empty()) common.first = common.end = kKeys;
    for (int r = 0; r < kRows; ++r) {
      const int end = common.first < seen[r].end ? common.first : seen[r].end;
      add_values<1>(weights + r, {seen[r].first, end}, block.at, sums + r * stride_, nullptr);
    }
    for (int j = 0; j < common.first; ++j) prefetch(v_, next, j);
    add_values<kRows>(weights, common, block.at, sums, next);
    for (int j = common.end; j < kKeys; ++j) prefetch(v_, next, j);
    for (int r = 0; r < kRows; ++r) {
      add_values<1>(weights + r, {common.end, seen[r].end}, block.at, sums + r * stride_, nullptr);
    }
  }

  // scores[r][j] = q[r] . k[j] for j < end; zeros after, or scores too.
  template <int kRows>
  void score(const float* q, const float* keys, int end, const Block* next, float (&scores)[kRows][kKeys]) const {
    constexpr int kPass = pass(kRows);
    int group = 0;
    if constexpr (kPass == kKeyVectors) {
      // Half of the vectors take half as long; fewer would wait for one another's sums.
      if (end <= kKeys / 2) {
        score_keys<kRows, kPass / 2>(q, keys, 0, next, scores);
        group = kKeys / 2;
      }
    }
    for (; group < end; group += kPass * kLanes) {
      score_keys<kRows, kPass>(q, keys, group, group == 0 ? next : nullptr, scores);
    }
    for (; group < kKeys; group += kLanes) {
      for (int r = 0; r < kRows; ++r) store(scores[r] + group, zero());
    }
  }

  // Those of kPass vectors of keys from `group` on. With each column a key of the next block is fetched.
  template <int kRows, int kPass>
  void score_keys(const float* q, const float* keys, int group, const Block* next, float (&scores)[kRows][kKeys]) const {
    constexpr int kCount = kRows * kPass;
    Vec dots[kRows][kPass];
    unroll<kCount>([&](auto i) __attribute__((always_inline)) { dots[i.value / kPass][i.value % kPass] = zero(); });
    for (std::int64_t column = 0; column < args_.head_dim; ++column) {
      prefetch(k_, next, static_cast<int>(column));
      Vec x[kRows];
      unroll<kRows>([&](auto r) __attribute__((always_inline)) {
        x[r.value] = broadcast(q[r.value * stride_ + column]);
      });
      unroll<kPass>([&](auto v) __attribute__((always_inline)) {
        const Vec k = opaque(load(keys + column * kKeys + group + v.value * kLanes));
        unroll<kRows>([&](auto r) __attribute__((always_inline)) {
          dots[r.value][v.value] = fma(k, x[r.value], dots[r.value][v.value]);
        });
      });
    }
    for (auto j = static_cast<int>(args_.head_dim); j < kKeys; ++j) prefetch(k_, next, j);
    unroll<kCount>([&](auto i) __attribute__((always_inline)) {
      store(scores[i.value / kPass] + group + i.value % kPass * kLanes, dots[i.value / kPass][i.value % kPass]);
    });
  }

  // Scores to weights e^(scale score - maximum), 0 where the row does not see; what it has so far is rescaled.
  void soften(float* scores, Range seen, std::int64_t row, const Memory& work) const {
    Vec x[kKeyVectors];
    for (int v = 0; v < kKeyVectors; ++v) x[v] = mul(load(scores + v * kLanes), broadcast(args_.scale));
    if (seen.first > 0 || seen.end < kKeys) {
      const Vec hidden = broadcast(-kInfinity);
      const Vec first = broadcast(static_cast<float>(seen.first)), end = broadcast(static_cast<float>(seen.end));
      for (int v = 0; v < kKeyVectors; ++v) {
        const Vec position = load(positions_ + v * kLanes);
        x[v] = select_greater(first, position, hidden, select_greater(end, position, x[v], hidden));
      }
    }
    Vec largest = x[0];
    for (int v = 1; v < kKeyVectors; ++v) largest = max(largest, x[v]);
    const float before = work.maximum[row], here = peftserve::PEFTSERVE_ISA::maximum(largest);
    const float now = here > before ? here : before;
    Vec weight = zero();
    for (int v = 0; v < kKeyVectors; ++v) {
      x[v] = exp(sub(x[v], broadcast(now)));
      weight = add(weight, x[v]);
      store(scores + v * kLanes, x[v]);
    }
    if (now > before) {
      const Vec factor = exp(broadcast(before - now));
      float* sums = work.sums + row * stride_;
      for (std::int64_t i = 0; i < stride_; i += kLanes) store(sums + i, mul(load(sums + i), factor));
      work.total[row] *= factor[0];
      work.maximum[row] = now;
    }
    work.total[row] += sum(weight);
  }

  // sums[r] += weights[r][j] * v[j], j ascending; v[j] begins at `at[j]`
  template <int kRows>
  void add_values(const float (*weights)[kKeys], Range range, const std::int64_t* at, float* sums, const Block* next) const {
    if (range.empty()) return;
    std::int64_t column = 0;
    const auto wide = [&](auto count) {
      constexpr int kCount = decltype(count)::value;
      for (; column + kCount * kLanes <= args_.head_dim; column += kCount * kLanes) {
        add_columns<kRows, kCount>(weights, range, at, column, kLanes, sums + column, column == 0 ? next : nullptr);
      }
    };
    wide(Index<pass(kRows)>{});
    if constexpr (Pairs<T>::kSplit && pass(kRows) > 2) wide(Index<2>{});
    for (; column < args_.head_dim; column += kLanes) {
      const int lanes = lanes_of(args_.head_dim - column);
      add_columns<kRows, 1>(weights, range, at, column, lanes, sums + column, column == 0 ? next : nullptr);
    }
  }

  // kCount vectors of columns from `column` on, `lanes` of them each.
  template <int kRows, int kCount>
  void add_columns(const float (*weights)[kKeys], Range range, const std::int64_t* at, std::int64_t column, int lanes,
                   float* sums, const Block* next) const {
    Vec sum[kRows][kCount];
    unroll<kRows * kCount>([&](auto i) __attribute__((always_inline)) {
      constexpr int kRow = decltype(i)::value / kCount, kVector = decltype(i)::value % kCount;
      sum[kRow][kVector] = load(sums + kRow * stride_ + kVector * kLanes);
    });
    for (int j = range.first; j < range.end; ++j) {
      prefetch(v_, next, j);
      Vec weight[kRows];
      unroll<kRows>([&](auto r) __attribute__((always_inline)) { weight[r.value] = broadcast(weights[r.value][j]); });
      const auto add_vector = [&](auto v, Vec value) __attribute__((always_inline)) {
        unroll<kRows>([&](auto r) __attribute__((always_inline)) {
          sum[r.value][v.value] = fma(weight[r.value], value, sum[r.value][v.value]);
        });
      };
      const T* from = v_ + at[j] + column;
      if constexpr (Pairs<T>::kSplit && kCount > 1) {
        unroll<kCount / 2>([&](auto pair) __attribute__((always_inline)) {
          Vec even, odd;
          Pairs<T>::split(Pairs<T>::load(from + pair.value * kPair), even, odd);
          add_vector(Index<2 * pair.value>{}, even);
          add_vector(Index<2 * pair.value + 1>{}, odd);
        });
      } else {
        unroll<kCount>([&](auto v) __attribute__((always_inline)) {
          const T* part = from + v.value * kLanes;
          add_vector(v, kCount == 1 ? load_part(part, lanes) : load(part));
        });
      }
    }
    unroll<kRows * kCount>([&](auto i) __attribute__((always_inline)) {
      constexpr int kRow = decltype(i)::value / kCount, kVector = decltype(i)::value % kCount;
      store(sums + kRow * stride_ + kVector * kLanes, sum[kRow][kVector]);
    });
  }

  template <class Out>
  void finish(Out* out, const AttentionTask& task, std::int64_t rows, const Memory& work) const {
    for (std::int64_t row = 0; row < rows; ++row) {
      const Vec total = broadcast(work.total[row]);
      const float* sums = work.sums + row * stride_;
      Out* to = out + offset(task, row);
      const std::int64_t joined = pairs_ * kPair;
      if constexpr (Pairs<T>::kSplit) {
        for (std::int64_t at = 0; at < joined; at += kPair) {
          Vec even = div(load(sums + at), total), odd = div(load(sums + at + kLanes), total);
          if constexpr (std::is_same_v<Out, T>) {
            Pairs<T>::store(to + at, even, odd);
          } else {
            Pairs<T>::join(even, odd);
            store(to + at, even);
            store(to + at + kLanes, odd);
          }
        }
      }
      for_vectors(args_.head_dim - joined, [&](std::int64_t at, int count) __attribute__((always_inline)) {
        store_part(to + joined + at, count, div(load(sums + joined + at), total));
      });
    }
  }

  const PagedAttention& args_;
  const T* k_;
  const T* v_;
  std::int64_t shared_;       // heads that read one KV head
  std::int64_t stride_;       // room for the columns of a head, in whole vectors
  // Pairs of vectors in a head whose elements are widened two in a word. Until the end the sums of such a pair lie as its
  // even and its odd columns.
  std::int64_t pairs_;
  alignas(64) float positions_[kKeys];  // 0, 1, 2, ...
};

}  // namespace

void plan_attention(const PagedAttention& args, AttentionPlan& plan) { plan.make(args, kTaskRows); }

void paged_attention(const PagedAttention& args) {
  const std::int64_t row = args.num_heads * args.head_dim, used = args.query_start[args.sequences];
  if (args.tokens == 0) return;
  with_type(args.dtype, [&](auto element) {
    using Out = typename decltype(element)::type;
    const auto padding = static_cast<std::size_t>((args.tokens - used) * row);
    std::memset(static_cast<Out*>(args.out) + used * row, 0, padding * sizeof(Out));
  });
  with_type(args.cache_dtype, [&](auto element) {
    const Attention<typename decltype(element)::type> attention(args);
    if (args.plan != nullptr) return attention.run(*args.plan);
    AttentionPlan plan;
    plan_attention(args, plan);
    attention.run(plan);
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
