// Element types as they lie in tensors, and what Python calls them.
#pragma once

#include <cstdint>

namespace peftserve {

enum class Dtype : int { kFloat32 = 0, kBfloat16 = 1, kFloat16 = 2, kInt8 = 3 };

[[gnu::always_inline]] constexpr std::int64_t bytes_of(Dtype dtype) {
  return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 ? 1 : 2;
}

struct Bf16 {
  std::uint16_t bits;
};

struct Half {
  std::uint16_t bits;
};

struct Int8 {
  std::int8_t value;
};

}  // namespace peftserve
