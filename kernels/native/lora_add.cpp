// y += scale * (x A^T) B^T by segment and slice, and a DoRA's columns scaled. All of the products with A are done before any
// of those with B begins. Adapters differ in rank, so both are cut to parts, by the rows of A and by the columns of B, which
// changes no value, and the threads share them out by their cost: those with A in order of tokens, those with B in order of
// columns. So it is known before who will read which weights (lora_reads), and y is for the most part where the linear layer
// left it.
#include "kernels.h"
#include "low_rank.h"
#include "parallel.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

// A weight that is read takes the time of so many multiply-adds: adapters are larger than the caches.
constexpr std::int64_t kReadWork = 3;
constexpr std::int64_t kParts = 4;  // a thread, or more

// Some tokens of one segment in one slice.
struct Block {
  std::int64_t token, tokens;
  std::int64_t table;  // index of (slot, layer, target) in the tables
  std::int64_t slice;
  std::int64_t rank;
  std::int64_t inner;  // where its products with A begin, [tokens][rank]
};

struct Part {
  std::int64_t block, first, end;  // rows of A, or columns of B
  std::int64_t cost;
};

template <class T, class W>
class Update {
 public:
  explicit Update(const LoraAdd& args)
      : args_(args), y_(static_cast<T*>(args.y)), arena_(static_cast<const W*>(args.arena)) {}

  void run() {
    plan();
    parallel_shares(team_, shrinks_.bounds, [&](std::int64_t index) { shrink_part(index); });
    parallel_shares(team_, expands_.bounds, [&](std::int64_t index) { expand_part(index); });
  }

  // What each thread will read of the adapters.
  void tell(Upcoming& upcoming) {
    plan();
    for (int thread = 0; thread < team_; ++thread) {
      for (std::int64_t index = shrinks_.bounds[thread]; index < shrinks_.bounds[thread + 1]; ++index) {
        const Part& part = shrinks_.parts[index];
        tell_rows(factor_a(blocks_[part.block]), part.first, part.end, {0, args_.columns}, thread, upcoming);
      }
    }
    for (int thread = 0; thread < team_; ++thread) {
      for (std::int64_t index = expands_.bounds[thread]; index < expands_.bounds[thread + 1]; ++index) {
        const Part& part = expands_.parts[index];
        const Block& block = blocks_[part.block];
        tell_rows(factor_b(block), 0, block.rank, {part.first, part.end}, thread, upcoming);
      }
    }
  }

 private:
  static constexpr bool kSplit = Pairs<T>::kSplit && std::is_same_v<T, W>;

  // Which scratch memory holds the products with A, and the parts of each kind with their bounds.
  static constexpr int kInner = 2, kShrinks = 0, kExpands = 1;

  struct Share {
    Part* parts;
    std::int64_t* bounds;  // of each thread's
  };

  void plan() {
    const std::int64_t most = (args_.segments + args_.tokens / kTokenBlock) * args_.slices;
    blocks_ = scratch<Block>(static_cast<std::size_t>(most));
    std::int64_t inner = 0, shrinking = 0, expanding = 0;
    for (std::int64_t s = 0; s < args_.segments; ++s) {
      const std::int64_t first = args_.start[s], end = args_.start[s + 1];
      if (first == end) continue;
      for (std::int64_t slice = 0; slice < args_.slices; ++slice) {
        const std::int64_t table = (args_.slot[s] * args_.layers + args_.layer) * args_.targets + args_.slice[slice].target;
        const std::int64_t rank = args_.rank[table];
        if (rank == 0) continue;
        for (std::int64_t token = first; token < end; token += kTokenBlock) {
          Block& block = blocks_[count_++];
          block = {token, end - token < kTokenBlock ? end - token : kTokenBlock, table, slice, rank, inner};
          inner += block.tokens * rank;
          shrinking += cost(block, rank, args_.columns);
          expanding += cost(block, rank, args_.slice[slice].outputs);
        }
      }
    }
    inner_ = scratch<float, kInner>(static_cast<std::size_t>(inner));
    team_ = team_size(args_.threads, shrinking + expanding);
    plan_shrinks(shrinking);
    plan_expands();
  }

  static std::int64_t cost(const Block& block, std::int64_t rank, std::int64_t width) {
    return (block.tokens + kReadWork) * rank * width;
  }

  // In order of tokens. A block that costs more than `limit` is cut.
  void plan_shrinks(std::int64_t total) {
    const std::int64_t limit = total / (team_ * kParts) + 1;
    const std::int64_t most = count_ + team_ * kParts;  // pieces but the last of each block cost as much
    Part* parts = scratch<Part, kShrinks>(static_cast<std::size_t>(most));
    std::int64_t count = 0;
    for (std::int64_t index = 0; index < count_; ++index) {
      const std::int64_t rank = blocks_[index].rank;
      const std::int64_t all = cost(blocks_[index], rank, args_.columns);
      std::int64_t step = rank;
      if (team_ > 1 && all > limit) {
        const std::int64_t pieces = all / limit + 1;
        step = ((rank + pieces - 1) / pieces + kRankPage - 1) / kRankPage * kRankPage;
      }
      for (std::int64_t first = 0; first < rank; first += step) {
        const std::int64_t rows = rank - first < step ? rank - first : step;
        parts[count++] = {index, first, first + rows, cost(blocks_[index], rows, args_.columns)};
      }
    }
    shrinks_ = shared<kShrinks>(parts, count);
  }

  // In order of columns: a slice is cut at the same ones in all blocks.
  void plan_expands() {
    // As many columns a piece as make kParts parts a thread, but one thread never needs all.
    const std::int64_t pieces = team_ == 1 || count_ == 0 ? 1 : team_ * (1 + (kParts - 1) * args_.slices / count_);
    Part* parts = scratch<Part, kExpands>(static_cast<std::size_t>(count_ * pieces));
    std::int64_t count = 0;
    for (std::int64_t slice = 0; slice < args_.slices; ++slice) {
      const std::int64_t outputs = args_.slice[slice].outputs;
      const std::int64_t step = ((outputs + pieces - 1) / pieces + kPanel - 1) / kPanel * kPanel;
      for (std::int64_t first = 0; first < outputs; first += step) {
        const std::int64_t columns = outputs - first < step ? outputs - first : step;
        for (std::int64_t index = 0; index < count_; ++index) {
          if (blocks_[index].slice != slice) continue;
          parts[count++] = {index, first, first + columns, cost(blocks_[index], blocks_[index].rank, columns)};
        }
      }
    }
    expands_ = shared<kExpands>(parts, count);
  }

  template <int kUse>
  Share shared(Part* parts, std::int64_t count) const {
    auto* bounds = scratch<std::int64_t, kUse>(static_cast<std::size_t>(team_) + 1);
    share(team_, count, [parts](std::int64_t index) { return parts[index].cost; }, bounds);
    return {parts, bounds};
  }

  Factor<W> factor_a(const Block& block) const {
    return {arena_, args_.a_page + block.table * args_.pages, block.rank, args_.columns};
  }
  Factor<W> factor_b(const Block& block) const {
    return {arena_, args_.b_page + block.table * args_.pages, block.rank, args_.slice[block.slice].outputs};
  }

  // These columns of rows first .. end of a factor, page by page; `first` begins one.
  static void tell_rows(const Factor<W>& factor, std::int64_t first, std::int64_t end, Columns columns, int thread,
                        Upcoming& upcoming) {
    constexpr auto kBytes = static_cast<std::int64_t>(sizeof(W));
    for (; first < end; first += kRankPage) {
      upcoming.add(thread, {factor.row(first) + columns.first, columns.count() * kBytes, factor.width * kBytes,
                            end - first < kRankPage ? end - first : kRankPage});
    }
  }

  // Rows are too few and too short for the hardware to run ahead, so each part fetches the first of the part after it.
  void shrink_part(std::int64_t index) const {
    const Part& part = shrinks_.parts[index];
    NextRows<W> after;
    if (index + 1 < shrinks_.bounds[team_]) {
      const Part& next = shrinks_.parts[index + 1];
      after = {factor_a(blocks_[next.block]).row(next.first), args_.columns};
    }
    const Block& block = blocks_[part.block];
    const T* from = static_cast<const T*>(args_.x) + block.token * args_.columns;
    const Factor<W> rows = factor_a(block).rows(part.first, part.end);
    float* t = inner_ + block.inner + part.first;
#if defined(PEFTSERVE_SIMD_AVX512_BF16)
    if constexpr (kSplit) return shrink_pairs(from, block.tokens, rows, t, block.rank, after);
#endif
    auto* x = scratch<float>(static_cast<std::size_t>(block.tokens * args_.columns));
    for (std::int64_t m = 0; m < block.tokens; ++m) {
      widen_row_as<kSplit>(from + m * args_.columns, args_.columns, x + m * args_.columns);
    }
    shrink<kSplit>(x, block.tokens, rows, t, block.rank, after);
  }

  void expand_part(std::int64_t index) const {
    const Part& part = expands_.parts[index];
    NextRows<W> after;
    if (index + 1 < expands_.bounds[team_]) {
      const Part& next = expands_.parts[index + 1];
      const Factor<W> factor = factor_b(blocks_[next.block]);
      after = {factor.row(0) + next.first, factor.width};
    }
    const Block& block = blocks_[part.block];
    const Columns columns{part.first, part.end};
    const LoraAdd::Slice& slice = args_.slice[block.slice];
    const Factor<W> b = factor_b(block);
    const float* t = inner_ + block.inner;
    const Vec scale = broadcast(args_.scale[block.table]);
    const std::int64_t y_stride = args_.y_stride, row_scale = args_.row_scale[block.table];
    T* y = y_ + block.token * y_stride + slice.offset;
    const W* excess = row_scale < 0 ? nullptr : arena_ + row_scale;  // of g over 1
    const auto add_to = [&](std::int64_t m, std::int64_t first, std::int64_t count, const float* sums) {
      T* to = y + m * y_stride + first;
      for_vectors_as<kSplit>(count, [&](std::int64_t at, auto n, int lanes) __attribute__((always_inline)) {
        Vec sum[n.value], before[n.value], more[n.value] = {};
        read_as(sums + at, lanes, sum);
        read_as(to + at, lanes, before);
        if (excess != nullptr) read_as(excess + first + at, lanes, more);
        unroll<n.value>([&](auto v) __attribute__((always_inline)) {
          sum[v.value] = fma(scale, sum[v.value], before[v.value]);
          if (excess != nullptr) sum[v.value] = fma(more[v.value], sum[v.value], sum[v.value]);
        });
        store_as(to + at, lanes, sum);
      });
    };
    expand<kSplit>(t, block.tokens, b, columns, add_to, after);
  }

  const LoraAdd& args_;
  T* y_;
  const W* arena_;
  Block* blocks_ = nullptr;
  std::int64_t count_ = 0;
  float* inner_ = nullptr;
  int team_ = 1;
  Share shrinks_{}, expands_{};
};

template <class Body>
void with_update(const LoraAdd& args, const Body& body) {
  with_type(args.dtype, [&](auto element) {
    with_type(args.arena_dtype, [&](auto weight) {
      Update<typename decltype(element)::type, typename decltype(weight)::type> update(args);
      body(update);
    });
  });
}

}  // namespace

void lora_add(const LoraAdd& args) {
  with_update(args, [](auto& update) { update.run(); });
}

void lora_reads(const LoraAdd& args, Upcoming& upcoming) {
  with_update(args, [&](auto& update) { update.tell(upcoming); });
}

}  // namespace peftserve::PEFTSERVE_ISA
