// The native ops: arguments as plain pointers and sizes, and one table of functions for each instruction set.
//
// Matrices are row-major and contiguous unless a stride is given (in elements). `threads` is the size of the team.
#pragma once

#include <cstdint>

#include "types.h"
#include "upcoming.h"

namespace peftserve {

class AttentionPlan;
class LowRankPlan;

// What the threads of a product do when they have computed it, before they part: an op that adds to its result.
struct Sequel {
  void (*begin)(const void* op, int thread);  // needs nothing of the result
  void (*end)(const void* op, int thread);    // after all threads have the result, and have done their part of `begin`
  const void* op;
};

struct Nf4Linear {
  const void* x;                // [rows, columns] of `dtype`
  void* y;                      // [rows, outputs] of `dtype`
  const std::uint32_t* packed;  // [ceil(outputs / 16)][columns / 8][16] words of eight nibbles
  const float* absmax;          // [ceil(outputs / 16)][columns / 64][16]
  const float* bias;            // [outputs] or null
  Dtype dtype;
  std::int64_t rows, columns, outputs;
  bool int8_inputs;  // x, bfloat16, is rounded to 8 bits: where Ops::int8_inputs
  int threads;
  const Upcoming* upcoming;  // fetched meanwhile; or null
  const Sequel* sequel;      // or null
};

struct LinearLogits {
  const void* x;       // [rows, columns] of `x_dtype`: float32, or the weight's
  const void* weight;  // [outputs, columns] of `weight_dtype`
  float* y;            // [rows, outputs]
  Dtype x_dtype, weight_dtype;
  std::int64_t rows, columns, outputs;
  int threads;
};

struct RmsNorm {
  const void* x;        // [rows, columns] of `dtype`
  const float* weight;  // [columns]
  void* y;              // [rows, columns] of `out_dtype`
  Dtype dtype, out_dtype;
  std::int64_t rows, columns;
  float eps;
  int threads;
};

struct ResidualAdd {
  const float* residual;  // [rows, columns]
  const void* hidden;     // [rows, columns] of `dtype`
  float* y;               // [rows, columns], `residual` itself perhaps
  Dtype dtype;
  std::int64_t rows, columns;
  int threads;
};

struct SiluMul {
  const void* gate_up;  // [rows, 2 columns] of `dtype`
  void* y;              // [rows, columns] of `dtype`
  Dtype dtype;
  std::int64_t rows, columns;
  int threads;
};

struct Embedding {
  const void* ids;    // [rows], int64 if `wide_ids`, else int32
  const void* table;  // [entries, columns] of `dtype`
  float* y;           // [rows, columns]
  bool wide_ids;
  Dtype dtype;
  std::int64_t rows, entries, columns;
  int threads;
};

struct RopeAndStoreKv {
  const void* qkv;            // [rows, (num_heads + 2 num_kv_heads) head_dim] of `dtype`
  const float* cos_sin;       // [rows, head_dim] or null
  void* k_cache;              // [pages, num_kv_heads, page_size, head_dim] of `cache_dtype`
  void* v_cache;              // the same
  const std::int64_t* slots;  // [rows]
  void* q;                    // [rows, num_heads, head_dim] of `dtype`
  const float* q_norm;        // [head_dim] or null
  const float* k_norm;        // [head_dim] or null
  Dtype dtype, cache_dtype;
  std::int64_t rows, num_heads, num_kv_heads, head_dim, page_size;
  float eps;
  int threads;
};

struct PagedAttention {
  const void* q;                    // [tokens, num_heads, head_dim] of `dtype`
  void* out;                        // [tokens, num_heads, head_dim] of `dtype`
  const void* k_cache;              // [pages, num_kv_heads, page_size, head_dim] of `cache_dtype`
  const void* v_cache;              // the same
  const std::int32_t* block_tables; // [sequences, max_blocks]
  const std::int32_t* query_start;  // [sequences + 1]
  const std::int32_t* context_len;  // [sequences]
  Dtype dtype, cache_dtype;
  std::int64_t tokens, sequences, max_blocks, num_heads, num_kv_heads, head_dim, page_size;
  std::int64_t window;  // 0 for none
  float scale;
  int threads;
  AttentionPlan* plan;  // made for just these arguments; or null
};

// From so many rows a thread on, an NF4 product gives each thread rows of its own, and else outputs.
constexpr std::int64_t kOwnRows = 64;

struct LoraAdd {
  static constexpr std::int64_t kMostSlices = 8;  // modules in one merged linear layer; three is the most so far
  struct Slice {
    std::int64_t target, offset, outputs;
    bool operator==(const Slice&) const = default;
  };
  void* y;                        // [tokens, y_stride] of `dtype`
  const void* x;                  // [tokens, columns] of `dtype`
  const std::int32_t* start;      // [segments + 1]
  const std::int32_t* slot;       // [segments]
  const void* arena;              // of `arena_dtype`
  const std::int32_t* rank;       // [slots, layers, targets]
  const float* scale;             // the same
  const std::int64_t* row_scale;  // the same, of [2, outputs]; negative for none
  const std::int64_t* a_page;     // [slots, layers, targets, pages]
  const std::int64_t* b_page;     // the same
  Slice slice[kMostSlices];       // the first `slices` of them
  Dtype dtype, arena_dtype;
  std::int64_t tokens, columns, y_stride, segments, slices, layer, layers, targets, pages;
  bool own_rows;  // Ops::own_rows
  int threads;
  LowRankPlan* plan;  // made for just these arguments; or null
};

struct BottleneckAdd {
  float* stream;                   // [tokens, columns]
  const void* hidden;              // [tokens, columns] of `dtype`
  const float* residual;           // [tokens, columns]
  const std::int32_t* start;       // [segments + 1]
  const std::int32_t* slot;        // [segments]
  const void* arena;               // of `arena_dtype`
  const std::int32_t* width;       // [slots, layers, 2]
  const float* scale;              // the same
  const std::int64_t* down_page;   // [slots, layers, 2, pages]
  const std::int64_t* up_page;     // the same
  const std::int64_t* down_bias;   // [slots, layers, 2]
  const std::int64_t* up_bias;     // the same
  const std::int32_t* activation;  // [slots]
  const std::int32_t* input_mode;  // [slots]
  Dtype dtype, arena_dtype;
  std::int64_t tokens, columns, segments, layer, site, layers, pages;
  bool own_rows;  // Ops::own_rows
  int threads;
  LowRankPlan* plan;  // made for just these arguments; or null
};

struct Sample {
  const float* logits;        // [rows, vocab]
  const float* temperature;   // [rows], and so are the others
  const std::int32_t* top_k;
  const float* top_p;
  const float* min_p;
  const double* uniform;
  std::int64_t* ids;
  std::int64_t rows, vocab;
  int threads;
};

struct Ops {
  void (*nf4_linear)(const Nf4Linear&);
  void (*linear_logits)(const LinearLogits&);
  void (*rms_norm)(const RmsNorm&);
  void (*residual_add)(const ResidualAdd&);
  void (*silu_mul)(const SiluMul&);
  bool (*embedding)(const Embedding&);  // false, and nothing written, for an id outside the table
  void (*rope_and_store_kv)(const RopeAndStoreKv&);
  void (*paged_attention)(const PagedAttention&);
  void (*lora_add)(const LoraAdd&);
  void (*bottleneck_add)(const BottleneckAdd&);
  void (*sample)(const Sample&);
  // Who will compute what. The inputs of the op need not be there yet, its tables must, and stay until it has run.
  void (*plan_attention)(const PagedAttention&, AttentionPlan&);
  void (*plan_lora)(const LoraAdd&, LowRankPlan&);
  void (*plan_bottleneck)(const BottleneckAdd&, LowRankPlan&);
  // What one thread does of a planned lora_add, as a Sequel.
  void (*lora_begin)(const void*, int);
  void (*lora_end)(const void*, int);
  bool int8_inputs;  // whether nf4_linear has them
  bool own_rows;     // whether nf4_linear shares out rows from kOwnRows a thread on
};

// With tiles (AMX): what is not here is avx512_vnni's.
namespace amx_bf16 {
void nf4_linear(const Nf4Linear& args);
void linear_logits(const LinearLogits& args);
}  // namespace amx_bf16
// With products of bfloat16 (AVX512_BF16); the rest likewise.
namespace avx512_bf16 {
void linear_logits(const LinearLogits& args);
void lora_add(const LoraAdd& args);
void plan_lora(const LoraAdd& args, LowRankPlan& plan);
void lora_begin(const void* args, int thread);
void lora_end(const void* args, int thread);
}  // namespace avx512_bf16
namespace avx512_vnni {
extern const Ops kOps;
}
namespace avx2 {
extern const Ops kOps;
}
namespace portable {
extern const Ops kOps;
}

}  // namespace peftserve
