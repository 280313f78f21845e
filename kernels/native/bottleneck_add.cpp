// A task is a block of tokens of one segment: z, down, activation, up, add to the stream. All in float32.
#include <cmath>

#include "kernels.h"
#include "low_rank.h"
#include "parallel.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

struct Task {
  std::int64_t token, tokens, slot;
};

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

template <class W>
class Bottleneck {
 public:
  explicit Bottleneck(const BottleneckAdd& args) : args_(args), arena_(static_cast<const W*>(args.arena)) {}

  void run() const {
    static thread_local Scratch plan;
    const std::int64_t most = args_.segments + args_.tokens / kTokenBlock;
    auto* tasks = static_cast<Task*>(plan.reserve(static_cast<std::size_t>(most) * sizeof(Task)));
    std::int64_t count = 0, work = 0;
    for (std::int64_t s = 0; s < args_.segments; ++s) {
      const std::int64_t first = args_.start[s], end = args_.start[s + 1], width = args_.width[table(args_.slot[s])];
      if (width == 0) continue;
      work += (end - first) * width * 2 * args_.columns;
      for (std::int64_t token = first; token < end; token += kTokenBlock) {
        tasks[count++] = {token, end - token < kTokenBlock ? end - token : kTokenBlock, args_.slot[s]};
      }
    }
    parallel_tasks(team_size(args_.threads, work), count, [&](std::int64_t index) { update(tasks[index]); });
  }

 private:
  std::int64_t table(std::int64_t slot) const { return (slot * args_.layers + args_.layer) * 2 + args_.site; }

  void update(const Task& task) const {
    const std::int64_t at = table(task.slot), width = args_.width[at], columns = args_.columns;
    const Factor<W> down{arena_, args_.down_page + at * args_.pages, width, columns};
    const Factor<W> up{arena_, args_.up_page + at * args_.pages, width, columns};
    auto* t = scratch<float>(static_cast<std::size_t>(task.tokens * (width + columns) + width));
    float* bias = t + task.tokens * width;
    float* z = bias + width;
    read_input(static_cast<Input>(args_.input_mode[task.slot]), task.token * columns, task.tokens * columns, z);
    shrink(z, task.tokens, down, t, width);
    widen_row(arena_ + args_.down_bias[at], width, bias);
    const auto kind = static_cast<Activation>(args_.activation[task.slot]);
    for (std::int64_t m = 0; m < task.tokens; ++m) {
      for (std::int64_t i = 0; i < width; ++i) t[m * width + i] = activate(kind, t[m * width + i] + bias[i]);
    }
    const Vec scale = broadcast(args_.scale[at]);
    const W* up_bias = arena_ + args_.up_bias[at];
    float* stream = args_.stream + task.token * columns;
    expand(t, task.tokens, up, {0, columns}, [&](std::int64_t m, std::int64_t first, std::int64_t count, const float* sums) {
      float* to = stream + m * columns + first;
      for_vectors(count, [&](std::int64_t at, int lanes) __attribute__((always_inline)) {
        const Vec delta = add(load_part(up_bias + first + at, lanes), load_part(sums + at, lanes));
        store_part(to + at, lanes, fma(scale, delta, load_part(to + at, lanes)));
      });
    });
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
  const W* arena_;
};

}  // namespace

void bottleneck_add(const BottleneckAdd& args) {
  with_type(args.arena_dtype, [&](auto weight) { Bottleneck<typename decltype(weight)::type>(args).run(); });
}

}  // namespace peftserve::PEFTSERVE_ISA
