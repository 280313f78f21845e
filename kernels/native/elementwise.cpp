// Ops that treat rows, or elements, alone: rms_norm, residual_add, silu_mul, embedding.
#include "dtypes.h"
#include "kernels.h"
#include "math.h"
#include "parallel.h"
#include "rows.h"
#include "widen.h"

namespace peftserve::PEFTSERVE_ISA {

void rms_norm(const RmsNorm& args) {
  const std::int64_t size = args.columns;
  with_type(args.dtype, [&](auto in) {
    with_type(args.out_dtype, [&](auto out) {
      const auto* x = static_cast<const typename decltype(in)::type*>(args.x);
      auto* y = static_cast<typename decltype(out)::type*>(args.y);
      parallel_ranges(team_size(args.threads, 4 * args.rows * size), args.rows, [&](std::int64_t begin, std::int64_t end) {
        for (std::int64_t row = begin; row < end; ++row) {
          const Vec factor = broadcast(inverse_rms(x + row * size, size, args.eps));
          for_vectors(size, [&](std::int64_t at, int count) __attribute__((always_inline)) {
            const Vec scaled = mul(load_part(x + row * size + at, count), factor);
            store_part(y + row * size + at, count, mul(scaled, load_part(args.weight + at, count)));
          });
        }
      });
    });
  });
}

void residual_add(const ResidualAdd& args) {
  const std::int64_t size = args.rows * args.columns;
  with_type(args.dtype, [&](auto type) {
    const auto* hidden = static_cast<const typename decltype(type)::type*>(args.hidden);
    parallel_ranges(team_size(args.threads, size), size, [&](std::int64_t begin, std::int64_t end) {
      for_vectors(end - begin, [&](std::int64_t at, int count) __attribute__((always_inline)) {
        const std::int64_t i = begin + at;
        store_part(args.y + i, count, add(load_part(args.residual + i, count), load_part(hidden + i, count)));
      });
    });
  });
}

void silu_mul(const SiluMul& args) {
  const std::int64_t size = args.columns;
  with_type(args.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    parallel_ranges(team_size(args.threads, 16 * args.rows * size), args.rows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const T* gate = static_cast<const T*>(args.gate_up) + row * 2 * size;
        T* y = static_cast<T*>(args.y) + row * size;
        for_vectors_as<Pairs<T>::kSplit>(size, [&](std::int64_t at, auto n, int count) __attribute__((always_inline)) {
          Vec g[n.value], up[n.value];
          read_as(gate + at, count, g);
          read_as(gate + size + at, count, up);
          unroll<n.value>([&](auto v) __attribute__((always_inline)) {
            const Vec silu = div(g[v.value], add(broadcast(1.0f), exp(sub(zero(), g[v.value]))));
            up[v.value] = mul(silu, up[v.value]);
          });
          store_as(y + at, count, up);
        });
      }
    });
  });
}

bool embedding(const Embedding& args) {
  const auto id = [&](std::int64_t row) {
    return args.wide_ids ? static_cast<const std::int64_t*>(args.ids)[row]
                         : std::int64_t{static_cast<const std::int32_t*>(args.ids)[row]};
  };
  for (std::int64_t row = 0; row < args.rows; ++row) {
    if (id(row) < 0 || id(row) >= args.entries) return false;
  }
  with_type(args.dtype, [&](auto type) {
    const auto* table = static_cast<const typename decltype(type)::type*>(args.table);
    parallel_ranges(team_size(args.threads, args.rows * args.columns), args.rows, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t row = begin; row < end; ++row) {
        const auto* entry = table + id(row) * args.columns;
        for_vectors(args.columns, [&](std::int64_t at, int count) __attribute__((always_inline)) {
          store_part(args.y + row * args.columns + at, count, load_part(entry + at, count));
        });
      }
    });
  });
  return true;
}

}  // namespace peftserve::PEFTSERVE_ISA
