// From a dtype known at run time to a type known at compile time.
#pragma once

#include "types.h"

namespace peftserve::PEFTSERVE_ISA {

template <class T>
struct Type {
  using type = T;
};

// body(Type<T>) with the T that `dtype` names.
template <class Body>
inline void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32:
      return body(Type<float>{});
    case Dtype::kBfloat16:
      return body(Type<Bf16>{});
    case Dtype::kFloat16:
      return body(Type<Half>{});
  }
}

}  // namespace peftserve::PEFTSERVE_ISA
