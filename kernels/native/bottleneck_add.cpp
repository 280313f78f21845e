// stream += scale * up(activation(down(z))) by segment, all in float32. Who computes what, low_rank_plan.h says.
#include <cmath>

#include "kernels.h"
#include "low_rank.h"
#include "low_rank_plan.h"
#include "parallel.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

// The numbers of `Activation` in peftserve_kernels/activation.py.
enum class Activation : std::int32_t {
  kLinear,
  kRelu,
  kGelu,
  kGeluTanh,
  kGelu10,
  kQuickGelu,
  kSilu,
  kLeakyRelu,
  kRelu2,
  kRelu6,
  kSigmoid,
  kTanh,
  kMish,
  kLaplace,
};

// The numbers of `BottleneckInput` in peftserve_kernels/bottleneck.py.
enum class Input : std::int32_t { kHidden, kHiddenPlusResidual, kResidual };

constexpr std::int64_t kSites = 2;  // of a layer

// C's functions rather than C++'s overloads: those are inline, and one compiled for AVX-512 could stand in for all.
float sigmoid(float x) { return 1.0f / (1.0f + ::expf(-x)); }
float normal_cdf(float x) { return 0.5f * (1.0f + ::erff(x * 0.70710678118654752f)); }

float activate(Activation kind, float x) {
  const float positive = x < 0.0f ? 0.0f : x;  // a NaN stays
  switch (kind) {
    case Activation::kLinear:
      return x;
    case Activation::kRelu:
      return positive;
    case Activation::kGelu:
      return x * normal_cdf(x);
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + ::tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
    case Activation::kGelu10: {
      const float y = x * normal_cdf(x);
      return y < -10.0f ? -10.0f : y > 10.0f ? 10.0f : y;
    }
    case Activation::kQuickGelu:
      return x * sigmoid(1.702f * x);
    case Activation::kSilu:
      return x * sigmoid(x);
    case Activation::kLeakyRelu:
      return x < 0.0f ? 0.01f * x : x;
    case Activation::kRelu2:
      return positive * positive;
    case Activation::kRelu6:
      return positive > 6.0f ? 6.0f : positive;
    case Activation::kSigmoid:
      return sigmoid(x);
    case Activation::kTanh:
      return ::tanhf(x);
    case Activation::kMish:
      return x * ::tanhf(x > 20.0f ? x : ::log1pf(::expf(x)));
    case Activation::kLaplace:  // Ma et al. 2022, arXiv:2209.10655
      return normal_cdf((x - 0.707107f) / 0.282095f);
  }
  return x;
}

// The plan of `args` must be made.
template <class W>
class Bottleneck {
 public:
  explicit Bottleneck(const BottleneckAdd& args)
      : args_(args), plan_(*args.plan), arena_(static_cast<const W*>(args.arena)) {}

  void run() const {
    parallel_shares(
        plan_.shrink_shares(), [&](std::int64_t index) { down(index); },  //
        plan_.expand_shares(), [&](std::int64_t index) { up(index); });
  }

 private:
  void down(std::int64_t index) const {
    const LowRankPart& part = plan_.shrinks()[index];
    const LowRankBlock& block = plan_.block(part.block);
    const std::int64_t columns = args_.columns, rows = part.end - part.first;
    auto* z = scratch<float>(static_cast<std::size_t>(block.tokens * columns + rows));
    float* bias = z + block.tokens * columns;
    read_input(static_cast<Input>(args_.input_mode[block.slot]), block.token * columns, block.tokens * columns, z);
    float* t = plan_.inner() + block.inner + part.first;
    const Factor<W> factor = first_factor(plan_, part, arena_).rows(part.first, part.end);
    shrink(z, block.tokens, factor, t, block.rank);
    widen_row(vector_at(arena_, args_.down_bias[plan_.table(block)]) + part.first, rows, bias);
    const auto kind = static_cast<Activation>(args_.activation[block.slot]);
    for (std::int64_t m = 0; m < block.tokens; ++m, t += block.rank) {
      for (std::int64_t i = 0; i < rows; ++i) {
        if constexpr (std::is_same_v<W, Int8>) {
          const float* scales = factor.scales(i / kRankPage) + i % kRankPage;
          t[i] = activate(kind, t[i] * scales[0] + bias[i]) * scales[kRankPage];
        } else {
          t[i] = activate(kind, t[i] + bias[i]);
        }
      }
    }
  }

  void up(std::int64_t index) const {
    const LowRankPart& part = plan_.expands()[index];
    const LowRankBlock& block = plan_.block(part.block);
    const Vec scale = broadcast(args_.scale[plan_.table(block)]);
    const auto* bias = vector_at(arena_, args_.up_bias[plan_.table(block)]);
    float* stream = args_.stream + block.token * args_.columns;
    const auto add_to = [&](std::int64_t m, const float* sums) {
      float* to = stream + m * args_.columns + part.first;
      for_vectors(part.end - part.first, [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
        const Vec delta = add(load_part(bias + part.first + at, lanes), load_part(sums + at, lanes));
        store_part(to + at, lanes, fma(scale, delta, load_part(to + at, lanes)));
      });
    };
    expand(plan_.inner() + block.inner, block.tokens, second_factor(plan_, part, arena_), {part.first, part.end}, add_to);
  }

  void read_input(Input mode, std::int64_t first, std::int64_t count, float* z) const {
    if (mode == Input::kResidual) return widen_row(args_.residual + first, count, z);
    with_type(args_.dtype, [&](auto element) {
      widen_row(static_cast<const typename decltype(element)::type*>(args_.hidden) + first, count, z);
    });
    if (mode == Input::kHidden) return;
    const float* residual = args_.residual + first;
    for_vectors(count, [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
      store_part(z + at, lanes, add(load_part(z + at, lanes), load_part(residual + at, lanes)));
    });
  }

  const BottleneckAdd& args_;
  LowRankPlan& plan_;
  const W* arena_;
};

}  // namespace

void plan_bottleneck(const BottleneckAdd& args, LowRankPlan& plan) {
  const LoraAdd::Slice all{args.site, 0, args.columns};
  plan.make({args.start, args.slot, args.arena, args.width, args.down_page, args.up_page, &all, args.arena_dtype,
             args.columns, args.segments, 1, args.layer, args.layers, kSites, args.pages, args.threads,
             is_by_rows(args)},
            {kTokenBlock, kPanel});
}

void bottleneck_add(const BottleneckAdd& args) {
  if (args.plan == nullptr) {
    LowRankPlan plan;
    plan_bottleneck(args, plan);
    BottleneckAdd planned = args;
    planned.plan = &plan;
    return bottleneck_add(planned);
  }
  with_weight_type(args.arena_dtype, [&](auto weight) { Bottleneck<typename decltype(weight)::type>(args).run(); });
}

}  // namespace peftserve::PEFTSERVE_ISA
