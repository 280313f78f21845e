#include "dtypes.h"
#include "kernels.h"
#include "parallel.h"
#include "rows.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

constexpr std::int64_t kAhead = 8;  // rows whose slots are fetched before their turn

// One head: normalise (with a weight), rotate (with angles), round.
template <class In, class Out>
void head(const In* x, const float* norm, float eps, const float* cos_sin, std::int64_t size, Out* y) {
  const Vec factor = broadcast(norm == nullptr ? 1.0f : inverse_rms(x, size, eps));
  const auto value = [&](std::int64_t at, int count) __attribute__((always_inline)) {
    const Vec raw = load_part(x + at, count);
    return norm == nullptr ? raw : mul(mul(raw, factor), load_part(norm + at, count));
  };
  if (cos_sin == nullptr) {
    for_vectors(size, [&](std::int64_t at, int count) __attribute__((always_inline)) {
      store_part(y + at, count, value(at, count));
    });
    return;
  }
  const std::int64_t half = size / 2;
  for_vectors(half, [&](std::int64_t at, int count) __attribute__((always_inline)) {
    const Vec a = value(at, count), b = value(half + at, count);
    const Vec cosine = load_part(cos_sin + at, count), sine = load_part(cos_sin + half + at, count);
    store_part(y + at, count, sub(mul(a, cosine), mul(b, sine)));
    store_part(y + half + at, count, add(mul(b, cosine), mul(a, sine)));
  });
}

// Where the first head of a row lies in the caches.
std::int64_t cache_offset(const RopeAndStoreKv& args, std::int64_t row) {
  const std::int64_t page = args.slots[row] / args.page_size, offset = args.slots[row] % args.page_size;
  return (page * args.num_kv_heads * args.page_size + offset) * args.head_dim;
}

// Sequences' pages lie far apart and were last touched a step ago: stores alone would wait for them one after another.
template <class Cache>
[[gnu::always_inline]] inline void prefetch_slots(const RopeAndStoreKv& args, std::int64_t row) {
  if (args.slots[row] < 0) return;
  constexpr std::int64_t kLine = 64 / sizeof(Cache);
  const std::int64_t first = cache_offset(args, row), stride = args.page_size * args.head_dim;
  for (std::int64_t at = first; at < first + args.num_kv_heads * stride; at += stride) {
    for (std::int64_t column = 0; column < args.head_dim; column += kLine) {
      __builtin_prefetch(static_cast<Cache*>(args.k_cache) + at + column, 1);
      __builtin_prefetch(static_cast<Cache*>(args.v_cache) + at + column, 1);
    }
  }
}

template <class T, class Cache>
void token(const RopeAndStoreKv& args, std::int64_t row) {
  const std::int64_t size = args.head_dim;
  const T* x = static_cast<const T*>(args.qkv) + row * (args.num_heads + 2 * args.num_kv_heads) * size;
  const float* cos_sin = args.cos_sin == nullptr ? nullptr : args.cos_sin + row * size;
  T* q = static_cast<T*>(args.q) + row * args.num_heads * size;
  for (std::int64_t h = 0; h < args.num_heads; ++h, x += size, q += size) {
    head(x, args.q_norm, args.eps, cos_sin, size, q);
  }
  if (args.slots[row] < 0) return;
  const std::int64_t first = cache_offset(args, row);
  for (std::int64_t h = 0; h < args.num_kv_heads; ++h, x += size) {
    const std::int64_t at = first + h * args.page_size * size;
    head(x, args.k_norm, args.eps, cos_sin, size, static_cast<Cache*>(args.k_cache) + at);
    head(x + args.num_kv_heads * size, nullptr, 0.0f, nullptr, size, static_cast<Cache*>(args.v_cache) + at);
  }
}

}  // namespace

void rope_and_store_kv(const RopeAndStoreKv& args) {
  // Mostly cache misses, each worth many multiply-adds.
  const std::int64_t work = 64 * args.rows * (args.num_heads + 2 * args.num_kv_heads) * args.head_dim;
  with_type(args.dtype, [&](auto in) {
    with_type(args.cache_dtype, [&](auto cache) {
      parallel_ranges(team_size(args.threads, work), args.rows, [&](std::int64_t begin, std::int64_t end) {
        using Cache = typename decltype(cache)::type;
        for (std::int64_t row = begin; row < end && row < begin + kAhead; ++row) prefetch_slots<Cache>(args, row);
        for (std::int64_t row = begin; row < end; ++row) {
          if (row + kAhead < end) prefetch_slots<Cache>(args, row + kAhead);
          token<typename decltype(in)::type, Cache>(args, row);
        }
      });
    });
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
