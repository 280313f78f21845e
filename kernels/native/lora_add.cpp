// y += scale * (x A^T) B^T by segment and slice, and a DoRA's columns scaled. Who computes what, low_rank_plan.h says.
#include "kernels.h"
#include "low_rank.h"
#include "low_rank_plan.h"
#include "parallel.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

// The plan of `args` must be made.
template <class T, class W>
class Update {
 public:
  explicit Update(const LoraAdd& args)
      : args_(args), plan_(*args.plan), y_(static_cast<T*>(args.y)), arena_(static_cast<const W*>(args.arena)) {}

  void run() const {
    parallel_shares(
        plan_.shrink_shares(), [&](std::int64_t index) { shrink_part(index); },  //
        plan_.expand_shares(), [&](std::int64_t index) { expand_part(index); });
  }
  void begin(int thread) const {
    plan_.shrink_shares().take(thread, [&](std::int64_t index) { shrink_part(index); });
  }
  void end(int thread) const {
    plan_.expand_shares().take(thread, [&](std::int64_t index) { expand_part(index); });
  }

 private:
  static constexpr bool kSplit = Pairs<T>::kSplit && std::is_same_v<T, W>;

  // What weights pushed out of the second level since the linear layer wrote it: the columns first .. end of one token.
  // Inlined, since GCC takes a function that only prefetches for one without effect.
  [[gnu::always_inline]] void fetch_output(const LowRankBlock& block, std::int64_t first, std::int64_t end) const {
    const T* y = y_ + block.token * args_.y_stride + args_.slice[block.slice].offset;
    for (; first < end; first += 64 / static_cast<std::int64_t>(sizeof(T))) __builtin_prefetch(y + first, 1);
  }

  // Rows are too few and too short for the hardware to run ahead, so each part fetches the first of the part after it.
  void shrink_part(std::int64_t index) const {
    const LowRankPart& part = plan_.shrinks()[index];
    const W* after = nullptr;
    if (index + 1 < plan_.shrink_shares().count()) {
      const LowRankPart& next = plan_.shrinks()[index + 1];
      after = first_factor(plan_, next, arena_).row(next.first);
    }
    const LowRankBlock& block = plan_.block(part.block);
    const T* from = static_cast<const T*>(args_.x) + block.token * args_.columns;
    const Factor<W> rows = first_factor(plan_, part, arena_).rows(part.first, part.end);
    float* t = plan_.inner() + block.inner + part.first;
    multiply(block, rows, from, t, after);
    if constexpr (std::is_same_v<W, Int8>) scale_inner(rows, block, t);
  }

  void multiply(const LowRankBlock& block, const Factor<W>& rows, const T* from, float* t, const W* after) const {
#if defined(PEFTSERVE_SIMD_AVX512_BF16)
    if constexpr (std::is_same_v<T, Bf16> && !std::is_same_v<W, float> && !std::is_same_v<W, Half>) {
      return shrink_pairs(from, block.tokens, rows, t, block.rank, after);
    }
#endif
    auto* x = scratch<float>(static_cast<std::size_t>(block.tokens * args_.columns));
    for (std::int64_t m = 0; m < block.tokens; ++m) {
      widen_row_as<kSplit>(from + m * args_.columns, args_.columns, x + m * args_.columns);
    }
    shrink<kSplit>(x, block.tokens, rows, t, block.rank, after);
  }

  // Both factors' scales at once: between the two there is nothing but t.
  static void scale_inner(const Factor<W>& rows, const LowRankBlock& block, float* t) {
    for (std::int64_t first = 0; first < rows.rank; first += kRankPage) {
      const float* scales = rows.scales(first / kRankPage);
      const std::int64_t count = rows.rank - first < kRankPage ? rows.rank - first : kRankPage;
      for (std::int64_t m = 0; m < block.tokens; ++m) {
        float* inner = t + m * block.rank + first;
        for (std::int64_t i = 0; i < count; ++i) inner[i] = inner[i] * scales[i] * scales[kRankPage + i];
      }
    }
  }

  void expand_part(std::int64_t index) const {
    const LowRankPart& part = plan_.expands()[index];
    if (index + 1 < plan_.expand_shares().count()) {
      const LowRankPart& next = plan_.expands()[index + 1];
      fetch_output(plan_.block(next.block), next.first, next.end);
    }
    const LowRankBlock& block = plan_.block(part.block);
    const Columns columns{part.first, part.end};
    const LoraAdd::Slice& slice = args_.slice[block.slice];
    const Factor<W> b = second_factor(plan_, part, arena_);
    const float* t = plan_.inner() + block.inner;
    const Vec scale = broadcast(args_.scale[plan_.table(block)]);
    const std::int64_t y_stride = args_.y_stride, row_scale = args_.row_scale[plan_.table(block)];
    T* y = y_ + block.token * y_stride + slice.offset;
    // Of g over 1, and then what is added.
    const VectorOf<W>* excess = row_scale < 0 ? nullptr : vector_at(arena_, row_scale);
    const auto add_to = [&](std::int64_t m, const float* sums) {
      T* to = y + m * y_stride + part.first;
      for_vectors_as<kSplit>(columns.count(), [&](std::int64_t at, auto n, int lanes) __attribute__((always_inline)) {
        Vec sum[n.value], before[n.value], more[n.value] = {}, shift[n.value] = {};
        read_as(sums + at, lanes, sum);
        read_as(to + at, lanes, before);
        if (excess != nullptr) {
          read_as(excess + part.first + at, lanes, more);
          read_as(excess + slice.outputs + part.first + at, lanes, shift);
        }
        unroll<n.value>([&](auto v) __attribute__((always_inline)) {
          sum[v.value] = fma(scale, sum[v.value], before[v.value]);
          if (excess != nullptr) sum[v.value] = add(fma(more[v.value], sum[v.value], sum[v.value]), shift[v.value]);
        });
        store_as(to + at, lanes, sum);
      });
    };
    expand<kSplit>(t, block.tokens, b, columns, add_to);
  }

  const LoraAdd& args_;
  LowRankPlan& plan_;
  T* y_;
  const W* arena_;
};

// body(Update) of the types of `args`.
template <class Body>
void with_update(const LoraAdd& args, const Body& body) {
  with_type(args.dtype, [&](auto element) {
    with_weight_type(args.arena_dtype, [&](auto weight) {
      body(Update<typename decltype(element)::type, typename decltype(weight)::type>(args));
    });
  });
}

const LoraAdd& lora(const void* args) { return *static_cast<const LoraAdd*>(args); }

}  // namespace

void plan_lora(const LoraAdd& args, LowRankPlan& plan) {
  plan.make({args.start, args.slot, args.arena, args.rank, args.a_page, args.b_page, args.slice, args.arena_dtype,
             args.columns, args.segments, args.slices, args.layer, args.layers, args.targets, args.pages, args.threads,
             is_by_rows(args)},
            {kTokenBlock, kPanel});
}

void lora_begin(const void* args, int thread) {
  with_update(lora(args), [&](const auto& update) { update.begin(thread); });
}

void lora_end(const void* args, int thread) {
  with_update(lora(args), [&](const auto& update) { update.end(thread); });
}

void lora_add(const LoraAdd& args) {
  if (args.plan != nullptr) return with_update(args, [](const auto& update) { update.run(); });
  LowRankPlan plan;
  plan_lora(args, plan);
  LoraAdd planned = args;
  planned.plan = &plan;
  lora_add(planned);
}

}  // namespace peftserve::PEFTSERVE_ISA
