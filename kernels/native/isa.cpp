#include "isa.h"

namespace peftserve {
namespace {

struct Variant {
  const char* name;
  const Ops* ops;
  bool supported;
};

// __builtin_cpu_supports asks the operating system too: it says no to registers that are not saved on a switch.
std::vector<Variant> variants() {
  return {
#if defined(PEFTSERVE_X86)
      {"avx512_vnni", &avx512_vnni::kOps,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni")},
      {"avx2", &avx2::kOps,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
      {"portable", &portable::kOps, true},
  };
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Variant& variant : variants()) {
    if (variant.supported) names.emplace_back(variant.name);
  }
  return names;
}

const Ops* ops_for(const std::string& isa) {
  for (const Variant& variant : variants()) {
    if (variant.supported && isa == variant.name) return variant.ops;
  }
  return nullptr;
}

}  // namespace peftserve
