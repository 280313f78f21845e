// Who computes what of an update by products with two low-rank factors, A [rank, columns] and B [outputs, rank]: of a
// LoraAdd or a BottleneckAdd.
//
// All of the products with A are done before any of those with B begins. Adapters differ in rank, so both are cut to parts,
// by the rows of A and by the columns of B, which changes no value, and the threads share them out by their cost: those with
// A in order of tokens, those with B in order of columns. So y is for the most part where the linear layer left it.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "ops.h"
#include "shares.h"
#include "upcoming.h"

namespace peftserve {

// What is to be multiplied; the fields are those of LoraAdd.
struct LowRankFactors {
  const std::int32_t* start;
  const std::int32_t* slot;
  const void* arena;
  const std::int32_t* rank;
  const std::int64_t* a_page;
  const std::int64_t* b_page;
  const LoraAdd::Slice* slice;  // [slices]; read only when the plan is made
  Dtype arena_dtype;
  std::int64_t columns, segments, slices, layer, layers, targets, pages;
  int threads;
  bool by_rows;  // whether the threads computed rows of y, not columns
};

// Some tokens of one segment in one slice.
struct LowRankBlock {
  std::int64_t token, tokens;
  std::int64_t slot;
  std::int64_t table;  // index of (slot, layer 0, target) in the tables
  std::int64_t slice;
  std::int64_t rank;
  std::int64_t inner;  // where its products with A begin, [tokens][rank]

  bool operator==(const LowRankBlock&) const = default;
};

// All that says what it reads, in half a cache line: the threads go through them one after the other, and most of them find
// them in another core's cache.
struct LowRankPart {
  const std::int64_t* pages;  // of the factor in layer 0
  std::int32_t block;
  std::int32_t first, end;  // rows of A, or columns of B
  std::int32_t rank, width;  // of the factor
  std::int32_t cost;
};

// What an instruction set makes of it at a time.
struct LowRankTiles {
  std::int64_t tokens, columns;
  bool operator==(const LowRankTiles&) const = default;
};

class LowRankPlan final : public Plan {
 public:
  LowRankPlan();
  ~LowRankPlan() override;

  // The inputs of the op need not be there yet, its tables must, and stay until it has run. Parts that are those of the last
  // time but for the layer, as they mostly are while streams decode, are kept: in the caches of the threads too.
  void make(const LowRankFactors& factors, const LowRankTiles& tiles);
  // The tables may be others now. Until then those of one layer say what all layers have, where all ranks agree.
  void next_step() { ranks_agree_.reset(); }

  bool empty() const;
  const LowRankBlock& block(std::int64_t index) const;
  // Index of (slot, layer, target) in the tables.
  [[gnu::always_inline]] std::int64_t table(const LowRankBlock& block) const { return block.table + layer_table_; }
  // Of the factor of a part.
  [[gnu::always_inline]] const std::int64_t* pages(const LowRankPart& part) const { return part.pages + layer_pages_; }
  const LowRankPart* shrinks() const;
  const LowRankPart* expands() const;
  // The parts as indexes, to be taken once.
  Shares& shrink_shares();
  Shares& expand_shares();
  float* inner();  // the products with A

 private:
  std::int64_t bytes(int thread) const override;
  bool next(int thread, Cursor& cursor, Span& span) const override;

  struct Parts {
    std::vector<LowRankPart> parts;
    Shares shares;
    std::int64_t count(int thread) const { return shares.end(thread) - shares.begin(thread); }
    const LowRankPart* first(int thread) const { return parts.data() + shares.begin(thread); }
  };

  template <class Body>
  static bool all_blocks(const LowRankFactors& factors, const LowRankTiles& tiles, const Body& body);
  bool is_cut(const LowRankFactors& factors, const LowRankTiles& tiles) const;
  static bool ranks_agree(const LowRankFactors& factors);
  void cut(const LowRankFactors& factors, const LowRankTiles& tiles);
  void cut_shrinks(const LowRankFactors& factors, std::int64_t total);
  void cut_expands(const LowRankFactors& factors, const LowRankTiles& tiles);
  template <class Weights>
  void share_out(Parts& parts, const Weights& weights);

  const LowRankPart* item(int thread, std::int64_t index) const;

  // What it was cut for; what belongs to the step or the layer is not read again.
  LowRankFactors factors_{};
  LoraAdd::Slice slices_[LoraAdd::kMostSlices];
  LowRankTiles tiles_{};
  std::optional<bool> ranks_agree_;  // in all layers of this step, once its first layer is planned
  std::int64_t layer_table_ = 0, layer_pages_ = 0;  // how far the layer's entries lie from those of layer 0
  std::int64_t element_ = 0;  // bytes of one weight
  std::vector<LowRankBlock> blocks_;
  std::vector<float> inner_;
  int team_ = 1;
  Parts shrinks_, expands_;
  std::vector<std::int64_t> bytes_;  // of each thread
};

}  // namespace peftserve
