#include <cstring>

#include "dtypes.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"
#include "sums.h"
#include "unroll.h"
#include "widen.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

// Lanes are columns of x and of the weights: nothing is transposed and nothing broadcast. An output is one chain of
// products a lane, columns ascending, and then the lanes' sum.

// How a step reads one row of weights: kVectors vectors, which pair up with as many of x in the order that `pack` gives.
template <class W>
struct Step {
  static constexpr int kVectors = Pairs<W>::kSplit ? 2 : 1;
  static constexpr int kColumns = kVectors * kLanes;
  static void read(const W* p, Vec (&weights)[kVectors]) {
    if constexpr (Pairs<W>::kSplit) {
      Pairs<W>::split(Pairs<W>::load(p), weights[0], weights[1]);
    } else {
      weights[0] = load(p);
    }
  }
  static void pack(const float (&x)[kColumns], float* packed) {
    for (int i = 0; i < kColumns; ++i) packed[i % kVectors * kLanes + i / kVectors] = x[i];
  }
};

template <class X, class W>
class RowProduct {
 public:
  explicit RowProduct(const LinearLogits& args)
      : args_(args),
        x_(static_cast<const X*>(args.x)),
        weights_(static_cast<const W*>(args.weight)),
        steps_((args.columns + kColumns - 1) / kColumns),
        whole_(args.columns / kColumns),
        width_(steps_ * kColumns) {}

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
  static constexpr int kColumns = Step<W>::kColumns, kVectors = Step<W>::kVectors;
  static constexpr std::int64_t kFewRows = 2;  // of x, which meet the weights as they come from memory
  static constexpr std::int64_t kPanel = 8;    // rows of weights that are widened for all rows of x
  // Of x and of weights: as many sums as the registers hold.
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
  static constexpr int kTileRows = 4, kTileOutputs = 4;
#else
  static constexpr int kTileRows = 3, kTileOutputs = 4;
#endif

  void pack_row(const X* x, float* packed) const {
    for (std::int64_t column = 0; column < width_; column += kColumns) {
      float values[kColumns] = {};
      const std::int64_t left = args_.columns - column;
      widen_row(x + column, left < kColumns ? left : kColumns, values);
      Step<W>::pack(values, packed + column);
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
    const auto step = [&](std::int64_t column, const auto& row_of) __attribute__((always_inline)) {
      Vec inputs[kRows][kVectors];
      unroll<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
        constexpr int kRow = decltype(i)::value / kVectors, kVector = decltype(i)::value % kVectors;
        inputs[kRow][kVector] = load(x + kRow * width_ + column + kVector * kLanes);
      });
      unroll<kOutputs>([&](auto o) __attribute__((always_inline)) {
        Vec read[kVectors];
        Step<W>::read(row_of(o), read);
        unroll<kRows * kVectors>([&](auto i) __attribute__((always_inline)) {
          constexpr int kRow = decltype(i)::value / kVectors, kVector = decltype(i)::value % kVectors;
          sums[kRow][o.value] = fma(read[kVector], inputs[kRow][kVector], sums[kRow][o.value]);
        });
      });
    };
    for (std::int64_t column = 0; column < whole_ * kColumns; column += kColumns) {
      if (fetches) {
        unroll<kOutputs>([&](auto o) __attribute__((always_inline)) {
          __builtin_prefetch(weights + (kOutputs + o.value) * args_.columns + column);
        });
      }
      step(column, [&](auto o) __attribute__((always_inline)) { return weights + o.value * args_.columns + column; });
    }
    if (whole_ < steps_) {
      const std::int64_t column = whole_ * kColumns;
      W last[kOutputs][kColumns] = {};
      for (int o = 0; o < kOutputs; ++o) {
        std::memcpy(last[o], weights + o * args_.columns + column,
                    static_cast<std::size_t>(args_.columns - column) * sizeof(W));
      }
      step(column, [&](auto o) __attribute__((always_inline)) { return last[o.value]; });
    }
    store_sums(sums, args_.y + output, args_.outputs);
  }

  // A panel of weights in the order of packed x, and then all rows of x on it: the same chains of products.
  void many_rows(const float* x, std::int64_t first, float* wide) const {
    const std::int64_t count = args_.outputs - first < kPanel ? args_.outputs - first : kPanel;
    for (std::int64_t output = 0; output < count; ++output) {
      widen_weights(weights_ + (first + output) * args_.columns, wide + output * width_);
    }
    std::int64_t row = 0;
    for (; row + kTileRows <= args_.rows; row += kTileRows) wide_tiles<kTileRows>(x, row, wide, first, count);
    if (row + 2 <= args_.rows) {
      wide_tiles<2>(x, row, wide, first, count);
      row += 2;
    }
    if (row < args_.rows) wide_tiles<1>(x, row, wide, first, count);
  }

  void widen_weights(const W* weights, float* wide) const {
    const auto step = [&](std::int64_t column, const W* from) __attribute__((always_inline)) {
      Vec read[kVectors];
      Step<W>::read(from, read);
      for (int v = 0; v < kVectors; ++v) store(wide + column + v * kLanes, read[v]);
    };
    std::int64_t column = 0;
    for (; column < whole_ * kColumns; column += kColumns) step(column, weights + column);
    if (whole_ < steps_) {
      W last[kColumns] = {};
      std::memcpy(last, weights + column, static_cast<std::size_t>(args_.columns - column) * sizeof(W));
      step(column, last);
    }
  }

  template <int kRows>
  void wide_tiles(const float* x, std::int64_t row, const float* wide, std::int64_t first, std::int64_t count) const {
    // While these rows pass, their share of the next panel is fetched, bit by bit.
    const std::int64_t share = kPanel * args_.columns * kRows / args_.rows;
    const bool fetches = width_ > 0 && first + 2 * kPanel <= args_.outputs;
    const W* ahead = weights_ + (fetches ? (first + kPanel) * args_.columns + share * row / kRows : 0);
    const std::int64_t step = fetches ? share * kTileOutputs / kPanel / (width_ / kLanes) : 0;
    std::int64_t output = 0;
    for (; output + kTileOutputs <= count; output += kTileOutputs) {
      wide_tile<kRows, kTileOutputs>(x + row * width_, wide + output * width_, row, first + output, ahead, step);
      ahead += step * (width_ / kLanes);
    }
    for (; output < count; ++output) {
      wide_tile<kRows, 1>(x + row * width_, wide + output * width_, row, first + output, ahead, 0);
    }
  }

  template <int kRows, int kOutputs>
  void wide_tile(const float* x, const float* wide, std::int64_t row, std::int64_t output, const W* ahead,
                 std::int64_t step) const {
    Vec sums[kRows][kOutputs];
    unroll<kRows * kOutputs>([&](auto i) __attribute__((always_inline)) {
      sums[i.value / kOutputs][i.value % kOutputs] = zero();
    });
    for (std::int64_t column = 0; column < width_; column += kLanes) {
      __builtin_prefetch(ahead);
      ahead += step;
      Vec inputs[kRows];
      unroll<kRows>([&](auto r) __attribute__((always_inline)) {
        inputs[r.value] = load(x + r.value * width_ + column);
      });
      unroll<kOutputs>([&](auto o) __attribute__((always_inline)) {
        const Vec weights = opaque(load(wide + o.value * width_ + column));
        unroll<kRows>([&](auto r) __attribute__((always_inline)) {
          sums[r.value][o.value] = fma(weights, inputs[r.value], sums[r.value][o.value]);
        });
      });
    }
    store_sums(sums, args_.y + row * args_.outputs + output, args_.outputs);
  }

  const LinearLogits& args_;
  const X* x_;
  const W* weights_;
  std::int64_t steps_, whole_;  // all steps of a row, and those without columns past its end
  std::int64_t width_;          // of a packed row of x
};

}  // namespace

void linear_logits(const LinearLogits& args) {
  if (args.x_dtype == Dtype::kBfloat16) return RowProduct<Bf16, Bf16>(args).run();
  with_type(args.weight_dtype, [&](auto weight) { RowProduct<float, typename decltype(weight)::type>(args).run(); });
}

}  // namespace peftserve::PEFTSERVE_ISA
