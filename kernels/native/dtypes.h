// From a dtype known at run time to a type known at compile time.
#pragma once

#include "types.h"

namespace peftserve::PEFTSERVE_ISA {

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>) with the T that `dtype` names: one that activations may have, so not int8.
template <class Body>
inline void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(Type<float>{});
    case Dtype::kBfloat16:
      return body(Type<Bf16>{});
    case Dtype::kFloat16:
      return body(Type<Half>{});
    case Dtype::kInt8:  // none that activations have
      return;
  }
}

// The same for the weights of adapters.
template <class Body>
inline void with_weight_type(Dtype dtype, const Body& body) {
  if (dtype == Dtype::kInt8) return body(Type<Int8>{});
  with_type(dtype, body);
}

}  // namespace peftserve::PEFTSERVE_ISA
