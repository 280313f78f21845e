// Who computes what of a LoraAdd.
//
// All of the products with A are done before any of those with B begins. Adapters differ in rank, so both are cut to parts,
// by the rows of A and by the columns of B, which changes no value, and the threads share them out by their cost: those with
// A in order of tokens, those with B in order of columns. So y is for the most part where the linear layer left it.
#pragma once

#include <cstdint>
#include <vector>

#include "ops.h"
#include "upcoming.h"

namespace peftserve {

// Some tokens of one segment in one slice.
struct LoraBlock {
  std::int64_t token, tokens;
  std::int64_t table;  // index of (slot, layer, target) in the tables
  std::int64_t slice;
  std::int64_t rank;
  std::int64_t inner;  // where its products with A begin, [tokens][rank]
};

// All that says what it reads, in half a cache line: the threads go through them one after the other, and most of them find
// them in another core's cache.
struct LoraPart {
  const std::int64_t* pages;  // of the factor
  std::int32_t block;
  std::int32_t first, end;  // rows of A, or columns of B
  std::int32_t rank, width;  // of the factor
  std::int32_t cost;
};

// Thread t has the parts from bounds[t] up to bounds[t + 1].
struct LoraShares {
  const LoraPart* parts;
  const std::int64_t* bounds;
};

// What an instruction set makes of it at a time.
struct LoraTiles {
  std::int64_t tokens, columns;
};

class LoraPlan final : public Plan {
 public:
  LoraPlan();
  ~LoraPlan() override;

  // The inputs of the op need not be there yet, its tables must, and stay until it has run.
  void make(const LoraAdd& args, const LoraTiles& tiles);

  int team() const;
  const LoraBlock& block(std::int64_t index) const;
  std::int64_t inner() const;  // how many products with A there are
  LoraShares shrinks() const;
  LoraShares expands() const;

  std::int64_t bytes(int thread) const override;
  bool next(int thread, Cursor& cursor, Span& span) const override;

 private:
  struct Share {
    std::vector<LoraPart> parts;
    std::vector<std::int64_t> bounds;
    std::int64_t count(std::size_t thread) const { return bounds[thread + 1] - bounds[thread]; }
    const LoraPart* first(std::size_t thread) const { return parts.data() + bounds[thread]; }
  };

  void cut_shrinks(std::int64_t total);
  void cut_expands(const LoraTiles& tiles);
  template <class Weights>
  void share_out(Share& share, const Weights& weights);

  const LoraPart* item(std::size_t thread, std::int64_t index) const;

  LoraAdd args_{};
  std::int64_t element_ = 0;  // bytes of one weight
  std::vector<LoraBlock> blocks_;
  std::int64_t inner_ = 0;
  int team_ = 1;
  Share shrinks_, expands_;
  std::vector<std::int64_t> bytes_;  // of each thread
};

}  // namespace peftserve
