#include <cstring>

#include "dtypes.h"
#include "kernels.h"
#include "parallel.h"
#include "prefetch.h"
#include "scratch.h"
#include "sums.h"
#include "unroll.h"
#include "widen.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

// Lanes are columns of x and of the weights: nothing is transposed and nothing broadcast. An output is one chain of
// products a lane, columns ascending, and then the lanes' sum.

// How a step reads one row of weights: kVectors vectors, which pair up with as many of x in the order that `pack` gives,
// and how those are multiplied. The packed row has as many words as the vectors have lanes.
template <class X, class W>
struct Step {
  static constexpr int kVectors = Pairs<W>::kSplit ? 2 : 1;
  static constexpr int kColumns = kVectors * kLanes;
  static constexpr bool kInPlace = false;  // whether weights of many rows are better read where they lie
  static void read(const W* p, Vec (&weights)[kVectors]) {
    if constexpr (Pairs<W>::kSplit) {
      Pairs<W>::split(Pairs<W>::load(p), weights[0], weights[1]);
    } else {
      weights[0] = load(p);
    }
  }
  static void pack(const X (&x)[kColumns], float* packed) {
    float values[kColumns];
    widen_row(x, kColumns, values);
    for (int i = 0; i < kColumns; ++i) packed[i % kVectors * kLanes + i / kVectors] = values[i];
  }
  static Vec multiply(Vec weights, Vec x, Vec sum) { return fma(weights, x, sum); }
};

#if defined(PEFTSERVE_SIMD_AVX512_BF16)
// As they are, two in a word: half the vectors, and nothing to widen.
template <>
struct Step<Bf16, Bf16> {
  static constexpr int kVectors = 1, kColumns = 2 * kLanes;
  static constexpr bool kInPlace = true;
  static void read(const Bf16* p, Vec (&weights)[1]) { weights[0] = Pairs<Bf16>::load(p); }
  static void pack(const Bf16 (&x)[kColumns], float* packed) { std::memcpy(packed, x, sizeof x); }
  static Vec multiply(Vec weights, Vec x, Vec sum) { return dot_pairs(sum, weights, x); }
};
#endif

template <class X, class W>
class RowProduct {
 public:
  explicit RowProduct(const LinearLogits& args)
      : args_(args),
        x_(static_cast<const X*>(args.x)),
        weights_(static_cast<const W*>(args.weight)),
        steps_((args.columns + kColumns - 1) / kColumns),
        whole_(args.columns / kColumns),
        width_(steps_ * kWords) {}

  void run() const {
    if (args_.rows == 0) return;
    auto* packed = scratch<float>(static_cast<std::size_t>(args_.rows * width_));
    const auto pack = [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) pack_row(x_ + row * args_.columns, packed + row * width_);
    };
    const auto multiply = [&](std::int64_t begin, std::int64_t end) {
      if (args_.rows <= kFewRows) {
        few_rows(packed, begin * kPanel, end * kPanel);
      } else {
        auto* wide = scratch<float, 1>(static_cast<std::size_t>(kPanel * width_));
        for (std::int64_t panel = begin; panel < end; ++panel) many_rows(packed, panel * kPanel, wide);
      }
    };
    const int team = team_size(args_.threads, args_.rows * args_.columns * args_.outputs);
    parallel_phases(team, args_.rows, pack, (args_.outputs + kPanel - 1) / kPanel, multiply);
  }

 private:
  using Way = Step<X, W>;
  static constexpr int kColumns = Way::kColumns, kVectors = Way::kVectors, kWords = kVectors * kLanes;
  static constexpr std::int64_t kFewRows = 2;  // of x, which meet the weights as they come from memory
  static constexpr std::int64_t kPanel = 8;    // rows of weights that are widened for all rows of x
  static constexpr std::int64_t kLine = 64 / sizeof(W);
  // Of x and of weights: as many sums as the registers hold.
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
  static constexpr int kTileRows = 4, kTileOutputs = 4;
#else
  static constexpr int kTileRows = 3, kTileOutputs = 4;
#endif

  void pack_row(const X* x, float* packed) const {
    for (std::int64_t step = 0; step < steps_; ++step) {
      X values[kColumns] = {};
      const std::int64_t left = args_.columns - step * kColumns;
      std::memcpy(values, x + step * kColumns, static_cast<std::size_t>(left < kColumns ? left : kColumns) * sizeof(X));
      Way::pack(values, packed + step * kWords);
    }
  }

  void few_rows(const float* x, std::int64_t first, std::int64_t end) const {
    if (end > args_.outputs) end = args_.outputs;
    if (args_.rows == 1) {
      outputs<1, 8>(x, first, end);
    } else {
      outputs<2, 4>(x, first, end);
    }
  }

  template <int kRows, int kOutputs>
  void outputs(const float* x, std::int64_t output, std::int64_t end) const {
    for (; output + kOutputs <= end; output += kOutputs) tile<kRows, kOutputs>(x, output);
    for (; output < end; ++output) tile<kRows, 1>(x, output);
  }

  template <int kRows, int kOutputs>
  void tile(const float* x, std::int64_t output) const {
    const W* weights = weights_ + output * args_.columns;
    // So few rows of x leave no time to wait for memory: the next rows of weights are fetched meanwhile.
    const bool fetches = output + 2 * kOutputs <= args_.outputs;
    Vec sums[kRows][kOutputs];
    unroll<kRows * kOutputs>([&](auto i) __attribute__((always_inline)) {
      sums[i.value / kOutputs][i.value % kOutputs] = zero();
    });
    const auto multiply = [&](std::int64_t step, const auto& row_of) __attribute__((always_inline)) {
      Vec inputs[kRows][kVectors];
      unroll<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
        constexpr int kRow = decltype(i)::value / kVectors, kVector = decltype(i)::value % kVectors;
        inputs[kRow][kVector] = load(x + kRow * width_ + step * kWords + kVector * kLanes);
      });
      unroll<kOutputs>([&](auto o) __attribute__((always_inline)) {
        Vec read[kVectors];
        Way::read(row_of(o), read);
        unroll<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
          constexpr int kRow = decltype(i)::value / kVectors, kVector = decltype(i)::value % kVectors;
          sums[kRow][o.value] = Way::multiply(read[kVector], inputs[kRow][kVector], sums[kRow][o.value]);
        });
      });
    };
    for (std::int64_t step = 0; step < whole_; ++step) {
      const W* const here = weights + step * kColumns;
      if (fetches) {
        unroll<kOutputs>([&](auto o) __attribute__((always_inline)) {
          __builtin_prefetch(here + (kOutputs + o.value) * args_.columns, 0, kSecondLevel);
        });
      }
      multiply(step, [&](auto o) __attribute__((always_inline)) { return here + o.value * args_.columns; });
    }
    if (whole_ < steps_) {
      const std::int64_t column = whole_ * kColumns;
      W last[kOutputs][kColumns] = {};
      for (int o = 0; o < kOutputs; ++o) {
        std::memcpy(last[o], weights + o * args_.columns + column,
                    static_cast<std::size_t>(args_.columns - column) * sizeof(W));
      }
      multiply(whole_, [&](auto o) __attribute__((always_inline)) { return last[o.value]; });
    }
    store_sums(sums, args_.y + output, args_.outputs);
  }

  // A panel of weights in the order of packed x, and then all rows of x on it: the same chains of products.
  void many_rows(const float* x, std::int64_t first, float* scratch) const {
    Panel panel{scratch, width_, first, args_.outputs - first < kPanel ? args_.outputs - first : kPanel};
    const W* weights = weights_ + first * args_.columns;
    if (Way::kInPlace && whole_ == steps_) {
      panel.weights = reinterpret_cast<const float*>(weights);
    } else {
      for (std::int64_t output = 0; output < panel.count; ++output) {
        unpack_row(weights + output * args_.columns, scratch + output * width_);
      }
    }
    std::int64_t row = 0;
    for (; row + kTileRows <= args_.rows; row += kTileRows) panel_tiles<kTileRows>(x, row, panel);
    if (row + 2 <= args_.rows) {
      panel_tiles<2>(x, row, panel);
      row += 2;
    }
    if (row < args_.rows) panel_tiles<1>(x, row, panel);
  }

  // Weights of outputs first .. first + count, `width` words each.
  struct Panel {
    const float* weights;
    std::int64_t width, first, count;
  };

  // A row of weights as the steps read it.
  void unpack_row(const W* weights, float* words) const {
    const auto unpack = [&](const W* from) __attribute__((always_inline)) {
      Vec read[kVectors];
      Way::read(from, read);
      for (int v = 0; v < kVectors; ++v, words += kLanes) store(words, read[v]);
    };
    for (std::int64_t step = 0; step < whole_; ++step) unpack(weights + step * kColumns);
    if (whole_ < steps_) {
      W last[kColumns] = {};
      const std::int64_t column = whole_ * kColumns;
      std::memcpy(last, weights + column, static_cast<std::size_t>(args_.columns - column) * sizeof(W));
      unpack(last);
    }
  }

  template <int kRows>
  void panel_tiles(const float* x, std::int64_t row, const Panel& panel) const {
    // While these rows pass, their share of the next panel is fetched, bit by bit.
    const std::int64_t share = kPanel * args_.columns * kRows / args_.rows;
    const bool fetches = width_ > 0 && panel.first + 2 * kPanel <= args_.outputs;
    const W* ahead = weights_ + (fetches ? (panel.first + kPanel) * args_.columns + share * row / kRows : 0);
    const std::int64_t step = fetches ? share * kTileOutputs / kPanel / (width_ / kLanes) : 0;
    std::int64_t output = 0;
    for (; output + kTileOutputs <= panel.count; output += kTileOutputs) {
      panel_tile<kRows, kTileOutputs>(x, row, panel, output, ahead, step);
      ahead += step * (width_ / kLanes);
    }
    for (; output < panel.count; ++output) panel_tile<kRows, 1>(x, row, panel, output, ahead, 0);
  }

  template <int kRows, int kOutputs>
  void panel_tile(const float* x, std::int64_t row, const Panel& panel, std::int64_t output, const W* ahead,
                  std::int64_t step) const {
    x += row * width_;
    const float* weights = panel.weights + output * panel.width;
    Vec sums[kRows][kOutputs];
    unroll<kRows * kOutputs>([&](auto i) __attribute__((always_inline)) {
      sums[i.value / kOutputs][i.value % kOutputs] = zero();
    });
    for (std::int64_t word = 0; word < width_; word += kLanes) {
      for (std::int64_t at = 0; at < step; at += kLine) __builtin_prefetch(ahead + at, 0, kFirstLevel);
      ahead += step;
      Vec inputs[kRows];
      unroll<kRows>([&](auto r) __attribute__((always_inline)) { inputs[r.value] = load(x + r.value * width_ + word); });
      unroll<kOutputs>([&](auto o) __attribute__((always_inline)) {
        const Vec read = opaque(load(weights + o.value * panel.width + word));
        unroll<kRows>([&](auto r) __attribute__((always_inline)) {
          sums[r.value][o.value] = Way::multiply(read, inputs[r.value], sums[r.value][o.value]);
        });
      });
    }
    store_sums(sums, args_.y + row * args_.outputs + panel.first + output, args_.outputs);
  }

  const LinearLogits& args_;
  const X* x_;
  const W* weights_;
  std::int64_t steps_, whole_;  // all steps of a row, and those without columns past its end
  std::int64_t width_;          // words of a packed row of x
};

}  // namespace

void linear_logits(const LinearLogits& args) {
  if (args.x_dtype == Dtype::kBfloat16) return RowProduct<Bf16, Bf16>(args).run();
  if (args.x_dtype == Dtype::kFloat16) return RowProduct<Half, Half>(args).run();
  with_type(args.weight_dtype, [&](auto weight) { RowProduct<float, typename decltype(weight)::type>(args).run(); });
}

}  // namespace peftserve::PEFTSERVE_ISA
