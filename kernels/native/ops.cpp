// Compiled once for each instruction set: its table.
#include "ops.h"

#include "kernels.h"

namespace peftserve::PEFTSERVE_ISA {

const Ops kOps{
    .nf4_linear = nf4_linear,
    .linear_logits = linear_logits,
    .rms_norm = rms_norm,
    .residual_add = residual_add,
    .silu_mul = silu_mul,
    .embedding = embedding,
    .rope_and_store_kv = rope_and_store_kv,
    .paged_attention = paged_attention,
    .lora_add = lora_add,
    .bottleneck_add = bottleneck_add,
    .sample = sample,
    .plan_attention = plan_attention,
    .plan_lora = plan_lora,
    .plan_bottleneck = plan_bottleneck,
    .lora_begin = lora_begin,
    .lora_end = lora_end,
#if defined(PEFTSERVE_SIMD_AVX512_VNNI)
    .int8_inputs = true,
#else
    .int8_inputs = false,
#endif
    .own_rows = true,
};

}  // namespace peftserve::PEFTSERVE_ISA
