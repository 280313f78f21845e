#include "isa.h"

#if defined(PEFTSERVE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace peftserve {
namespace {

struct Variant {
  const char* name;
  const Ops* ops;
  bool supported;
};

#if defined(PEFTSERVE_X86)
bool has_avx512_vnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni");
}

const Ops& avx512_bf16_ops() {
  static const Ops ops = [] {
    Ops all = avx512_vnni::kOps;
    all.linear_logits = avx512_bf16::linear_logits;
    all.lora_add = avx512_bf16::lora_add;
    all.plan_lora = avx512_bf16::plan_lora;
    all.lora_begin = avx512_bf16::lora_begin;
    all.lora_end = avx512_bf16::lora_end;
    return all;
  }();
  return ops;
}
#endif

#if defined(PEFTSERVE_AMX)
// Linux gives a process the tile registers when it asks for them (Documentation/arch/x86/xstate.rst); threads and forked
// children have them too.
bool can_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool granted = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

const Ops& amx_ops() {
  static const Ops ops = [] {
    Ops all = avx512_vnni::kOps;
    all.nf4_linear = amx_bf16::nf4_linear;
    all.linear_logits = amx_bf16::linear_logits;
    all.own_rows = false;
    return all;
  }();
  return ops;
}
#endif

// Best first. __builtin_cpu_supports asks the operating system too: it says no to registers that are not saved on a switch.
std::vector<Variant> variants() {
  std::vector<Variant> all;
#if defined(PEFTSERVE_AMX)
  all.push_back({"amx_bf16", &amx_ops(), has_avx512_vnni() && can_use_tiles()});
#endif
#if defined(PEFTSERVE_X86)
  const Variant integers{"avx512_vnni", &avx512_vnni::kOps, has_avx512_vnni()};
  const Variant pairs{"avx512_bf16", &avx512_bf16_ops(), has_avx512_vnni() && __builtin_cpu_supports("avx512bf16")};
  // AMD's cores start a product of pairs of bfloat16 as often as one of floats, Intel's a quarter as often (Emerald
  // Rapids).
  const bool has_fast_pairs = __builtin_cpu_is("amd");
  all.push_back(has_fast_pairs ? pairs : integers);
  all.push_back(has_fast_pairs ? integers : pairs);
  all.push_back({"avx2", &avx2::kOps,
                 __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")});
#endif
  all.push_back({"portable", &portable::kOps, true});
  return all;
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
