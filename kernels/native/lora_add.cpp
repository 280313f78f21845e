// y += scale * (x A^T) B^T by segment and slice, and a DoRA's columns scaled. All of the products with A are done before any
// of those with B begins. Both are shared out in parts of about equal cost, since adapters differ in rank: by the rows of
// A, and by the columns of B, which change no value.
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
};

constexpr int kInner = 2;  // which scratch memory holds the products with A

template <class T, class W>
class Update {
 public:
  explicit Update(const LoraAdd& args)
      : args_(args), y_(static_cast<T*>(args.y)), arena_(static_cast<const W*>(args.arena)) {}

  void run() {
    static thread_local Scratch block_memory, part_memory;
    const std::int64_t most = (args_.segments + args_.tokens / kTokenBlock) * args_.slices;
    blocks_ = static_cast<Block*>(block_memory.reserve(static_cast<std::size_t>(most) * sizeof(Block)));
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
          shrinking += cost(block, args_.columns);
          expanding += cost(block, args_.slice[slice].outputs);
        }
      }
    }
    inner_ = scratch<float, kInner>(static_cast<std::size_t>(inner));
    const int team = team_size(args_.threads, shrinking + expanding);
    // Cut to pieces of total / (team * kParts) at most, there are at most so many more parts than blocks.
    const std::int64_t most_parts = count_ + team * kParts;
    auto* parts = static_cast<Part*>(part_memory.reserve(static_cast<std::size_t>(most_parts) * sizeof(Part)));
    share(parts, team, shrinking, kRankPage, [&](const Block& block) { return Size{block.rank, args_.columns}; },
          [&](const Part& part) { shrink_part(blocks_[part.block], part.first, part.end); });
    share(parts, team, expanding, kPanel,
          [&](const Block& block) { return Size{args_.slice[block.slice].outputs, args_.slice[block.slice].outputs}; },
          [&](const Part& part) { expand_part(blocks_[part.block], {part.first, part.end}); });
  }

 private:
  // What of a block can be cut, and the width of the factor.
  struct Size {
    std::int64_t length, width;
  };

  static std::int64_t cost(const Block& block, std::int64_t width) {
    return (block.tokens + kReadWork) * block.rank * width;
  }

  // body(part) for all parts of all blocks, cut at multiples of `unit`.
  template <class SizeOf, class Body>
  void share(Part* parts, int team, std::int64_t total, std::int64_t unit, const SizeOf& size_of, const Body& body) const {
    const std::int64_t limit = total / (team * kParts) + 1;
    std::int64_t count = 0;
    for (std::int64_t index = 0; index < count_; ++index) {
      const auto [length, width] = size_of(blocks_[index]);
      const std::int64_t pieces = team == 1 ? 1 : cost(blocks_[index], width) / limit + 1;
      const std::int64_t step = ((length + pieces - 1) / pieces + unit - 1) / unit * unit;
      for (std::int64_t first = 0; first < length; first += step) {
        parts[count++] = {index, first, length - first < step ? length : first + step};
      }
    }
    parallel_tasks(team, count, [&](std::int64_t index) { body(parts[index]); });
  }

  void shrink_part(const Block& block, std::int64_t first, std::int64_t end) const {
    const Factor<W> a{arena_, args_.a_page + block.table * args_.pages, block.rank, args_.columns};
    auto* x = scratch<float>(static_cast<std::size_t>(block.tokens * args_.columns));
    widen_row(static_cast<const T*>(args_.x) + block.token * args_.columns, block.tokens * args_.columns, x);
    shrink(x, block.tokens, a.rows(first, end), inner_ + block.inner + first, block.rank);
  }

  void expand_part(const Block& block, Columns columns) const {
    const LoraAdd::Slice& slice = args_.slice[block.slice];
    const Factor<W> b{arena_, args_.b_page + block.table * args_.pages, block.rank, slice.outputs};
    const float* t = inner_ + block.inner;
    const Vec scale = broadcast(args_.scale[block.table]);
    const std::int64_t y_stride = args_.y_stride, row_scale = args_.row_scale[block.table];
    T* y = y_ + block.token * y_stride + slice.offset;
    const auto sum = [&](const T* to, int lanes, const float* delta) __attribute__((always_inline)) {
      return fma(scale, load_part(delta, lanes), load_part(to, lanes));
    };
    if (row_scale < 0) {
      expand(t, block.tokens, b, columns, [&](std::int64_t m, std::int64_t column, std::int64_t count, const float* delta) {
        T* to = y + m * y_stride + column;
        for_vectors(count, [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
          store_part(to + at, lanes, sum(to + at, lanes, delta + at));
        });
      });
    } else {
      const W* excess = arena_ + row_scale;  // of g over 1
      expand(t, block.tokens, b, columns, [&](std::int64_t m, std::int64_t column, std::int64_t count, const float* delta) {
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
  Block* blocks_ = nullptr;
  std::int64_t count_ = 0;
  float* inner_ = nullptr;
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
