// The kernels of the instruction set that this file is compiled for.
#pragma once

#include "ops.h"

namespace peftserve::PEFTSERVE_ISA {

void nf4_linear(const Nf4Linear& args);
void linear_logits(const LinearLogits& args);
void rms_norm(const RmsNorm& args);
void residual_add(const ResidualAdd& args);
void silu_mul(const SiluMul& args);
bool embedding(const Embedding& args);
void rope_and_store_kv(const RopeAndStoreKv& args);
void paged_attention(const PagedAttention& args);
void lora_add(const LoraAdd& args);
void bottleneck_add(const BottleneckAdd& args);
void sample(const Sample& args);
void plan_attention(const PagedAttention& args, AttentionPlan& plan);
void plan_lora(const LoraAdd& args, LowRankPlan& plan);
void plan_bottleneck(const BottleneckAdd& args, LowRankPlan& plan);
void lora_begin(const void* args, int thread);
void lora_end(const void* args, int thread);

}  // namespace peftserve::PEFTSERVE_ISA
