#include "low_rank_plan.h"

#include <algorithm>
#include <tuple>

#include "rank_pages.h"

namespace peftserve {
namespace {

// A weight that is read takes the time of so many multiply-adds: adapters are larger than the caches.
constexpr std::int64_t kReadWork = 3;
constexpr std::int64_t kParts = 4;  // a thread, or more
constexpr std::int64_t kTablesAhead = 6, kPartsAhead = 16;  // parts, when what they read and they themselves are fetched

std::int64_t cost(const LowRankBlock& block, std::int64_t rank, std::int64_t width) {
  return (block.tokens + kReadWork) * rank * width;
}

// Costs too fit: ranks end at 1,024.
std::int32_t narrow(std::int64_t value) { return static_cast<std::int32_t>(value); }

// Whether both are of the same tables, whatever the layer.
bool same_tables(const LowRankFactors& a, const LowRankFactors& b) {
  const auto key = [](const LowRankFactors& f) {
    return std::tuple(f.start, f.slot, f.segments, f.arena, f.rank, f.a_page, f.b_page, f.arena_dtype, f.columns, f.slices,
                      f.layers, f.targets, f.pages, f.threads, f.by_rows);
  };
  return key(a) == key(b) && std::equal(a.slice, a.slice + a.slices, b.slice);
}

// Index of (slot, layer 0, the slice's target) in the tables.
std::int64_t first_table(const LowRankFactors& factors, std::int64_t slot, std::int64_t slice) {
  return slot * factors.layers * factors.targets + factors.slice[slice].target;
}

std::int64_t round_up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

LowRankPlan::LowRankPlan() = default;
LowRankPlan::~LowRankPlan() = default;

bool LowRankPlan::empty() const { return blocks_.empty(); }
const LowRankBlock& LowRankPlan::block(std::int64_t index) const { return blocks_[static_cast<std::size_t>(index)]; }
const LowRankPart* LowRankPlan::shrinks() const { return shrinks_.parts.data(); }
const LowRankPart* LowRankPlan::expands() const { return expands_.parts.data(); }
Shares& LowRankPlan::shrink_shares() { return shrinks_.shares; }
Shares& LowRankPlan::expand_shares() { return expands_.shares; }
float* LowRankPlan::inner() { return inner_.data(); }

void LowRankPlan::make(const LowRankFactors& factors, const LowRankTiles& tiles) {
  layer_table_ = factors.layer * factors.targets;
  layer_pages_ = layer_table_ * factors.pages;
  const bool is_like_last = tiles == tiles_ && same_tables(factors, factors_);
  if (is_like_last && (ranks_agree_.value_or(false) || is_cut(factors, tiles))) {
    shrinks_.shares.restart();
    expands_.shares.restart();
  } else {
    cut(factors, tiles);
  }
  if (!ranks_agree_.has_value()) ranks_agree_ = ranks_agree(factors);
  restart(team_);
}

// Whether each adapter that the step uses has the same rank in all layers.
bool LowRankPlan::ranks_agree(const LowRankFactors& factors) {
  for (std::int64_t s = 0; s < factors.segments; ++s) {
    if (factors.start[s] == factors.start[s + 1]) continue;
    for (std::int64_t slice = 0; slice < factors.slices; ++slice) {
      const std::int32_t* rank = factors.rank + first_table(factors, factors.slot[s], slice);
      for (std::int64_t layer = 1; layer < factors.layers; ++layer) {
        if (rank[layer * factors.targets] != rank[0]) return false;
      }
    }
  }
  return true;
}

// body(block) for all blocks, until it is false: whether none was.
template <class Body>
bool LowRankPlan::all_blocks(const LowRankFactors& factors, const LowRankTiles& tiles, const Body& body) {
  std::int64_t inner = 0;
  for (std::int64_t s = 0; s < factors.segments; ++s) {
    const std::int64_t first = factors.start[s], end = factors.start[s + 1], slot = factors.slot[s];
    if (first == end) continue;
    for (std::int64_t slice = 0; slice < factors.slices; ++slice) {
      const std::int64_t table = first_table(factors, slot, slice);
      const std::int64_t rank = factors.rank[table + factors.layer * factors.targets];
      if (rank == 0) continue;
      for (std::int64_t token = first; token < end; token += tiles.tokens) {
        const LowRankBlock block{token, std::min(end - token, tiles.tokens), slot, table, slice, rank, inner};
        if (!body(block)) return false;
        inner += block.tokens * rank;
      }
    }
  }
  return true;
}

bool LowRankPlan::is_cut(const LowRankFactors& factors, const LowRankTiles& tiles) const {
  std::size_t count = 0;
  return all_blocks(factors, tiles, [&](const LowRankBlock& block) {
    return count < blocks_.size() && blocks_[count++] == block;
  }) && count == blocks_.size();
}

void LowRankPlan::cut(const LowRankFactors& factors, const LowRankTiles& tiles) {
  factors_ = factors;
  std::copy_n(factors.slice, factors.slices, slices_);
  factors_.slice = slices_;
  tiles_ = tiles;
  element_ = bytes_of(factors.arena_dtype);
  blocks_.clear();
  std::int64_t inner = 0, shrinking = 0, expanding = 0;
  all_blocks(factors, tiles, [&](const LowRankBlock& block) {
    blocks_.push_back(block);
    inner = block.inner + block.tokens * block.rank;
    shrinking += cost(block, block.rank, factors.columns);
    expanding += cost(block, block.rank, factors.slice[block.slice].outputs);
    return true;
  });
  if (inner_.size() < static_cast<std::size_t>(inner)) inner_.resize(static_cast<std::size_t>(inner));
  team_ = team_size(factors.threads, shrinking + expanding);
  bytes_.assign(static_cast<std::size_t>(team_), 0);
  cut_shrinks(factors, shrinking);
  cut_expands(factors, tiles);
}

// In order of tokens. A block that costs more than `limit` is cut.
void LowRankPlan::cut_shrinks(const LowRankFactors& factors, std::int64_t total) {
  const std::int64_t limit = total / (team_ * kParts) + 1;
  shrinks_.parts.clear();
  const auto count = static_cast<std::int64_t>(blocks_.size());
  for (std::int64_t index = 0; index < count; ++index) {
    const LowRankBlock& block = this->block(index);
    const std::int64_t all = cost(block, block.rank, factors.columns);
    std::int64_t step = block.rank;
    if (team_ > 1 && all > limit) {
      const std::int64_t pieces = all / limit + 1;
      step = round_up((block.rank + pieces - 1) / pieces, kRankPage);
    }
    for (std::int64_t first = 0; first < block.rank; first += step) {
      const std::int64_t rows = std::min(block.rank - first, step);
      shrinks_.parts.push_back({factors.a_page + block.table * factors.pages, narrow(index), narrow(first),
                                narrow(first + rows), narrow(block.rank), narrow(factors.columns),
                                narrow(cost(block, rows, factors.columns))});
    }
  }
  share_out(shrinks_, [](const LowRankPart& part) { return std::int64_t{part.end - part.first} * part.width; });
}

// In order of columns, or of rows, as y was shared out. A slice is cut at the same columns in all blocks.
void LowRankPlan::cut_expands(const LowRankFactors& factors, const LowRankTiles& tiles) {
  // As many columns a piece as make kParts parts a thread, but one thread never needs all.
  const auto count = static_cast<std::int64_t>(blocks_.size());
  const std::int64_t pieces = team_ == 1 || count == 0 ? 1 : team_ * (1 + (kParts - 1) * factors.slices / count);
  expands_.parts.clear();
  const auto add = [&](std::int64_t index, std::int64_t first, std::int64_t columns) {
    const LowRankBlock& block = this->block(index);
    expands_.parts.push_back({factors.b_page + block.table * factors.pages, narrow(index), narrow(first),
                              narrow(first + columns), narrow(block.rank), narrow(factors.slice[block.slice].outputs),
                              narrow(cost(block, block.rank, columns))});
  };
  const auto for_pieces = [&](std::int64_t slice, const auto& body) {
    const std::int64_t outputs = factors.slice[slice].outputs;
    const std::int64_t step = round_up((outputs + pieces - 1) / pieces, tiles.columns);
    for (std::int64_t first = 0; first < outputs; first += step) body(first, std::min(outputs - first, step));
  };
  if (factors.by_rows) {
    for (std::int64_t index = 0; index < count; ++index) {
      for_pieces(block(index).slice, [&](std::int64_t first, std::int64_t columns) { add(index, first, columns); });
    }
  } else {
    for (std::int64_t slice = 0; slice < factors.slices; ++slice) {
      for_pieces(slice, [&](std::int64_t first, std::int64_t columns) {
        for (std::int64_t index = 0; index < count; ++index) {
          if (block(index).slice == slice) add(index, first, columns);
        }
      });
    }
  }
  share_out(expands_, [](const LowRankPart& part) { return std::int64_t{part.end - part.first} * part.rank; });
}

// weights(part): how many it reads.
template <class Weights>
void LowRankPlan::share_out(Parts& parts, const Weights& weights) {
  const LowRankPart* all = parts.parts.data();
  parts.shares.make(team_, static_cast<std::int64_t>(parts.parts.size()),
                    [all](std::int64_t index) -> std::int64_t { return all[index].cost; });
  for (int thread = 0; thread < team_; ++thread) {
    const LowRankPart* first = parts.first(thread);
    std::int64_t& bytes = bytes_[static_cast<std::size_t>(thread)];
    for (std::int64_t at = 0; at < parts.count(thread); ++at) bytes += weights(first[at]) * element_;
  }
}

std::int64_t LowRankPlan::bytes(int thread) const {
  return bytes_[static_cast<std::size_t>(thread)];
}

// The parts of a thread, those with A first; null at the end.
const LowRankPart* LowRankPlan::item(int thread, std::int64_t index) const {
  const std::int64_t shrinks = shrinks_.count(thread);
  if (index < shrinks) return shrinks_.first(thread) + index;
  index -= shrinks;
  return index < expands_.count(thread) ? expands_.first(thread) + index : nullptr;
}

// Part by part, and of each page by page.
bool LowRankPlan::next(int thread, Cursor& cursor, Span& span) const {
  const LowRankPart* part = item(thread, cursor.item);
  if (part == nullptr) return false;
  // The tables too come from memory mostly, and the parts from the core of the thread that made the plan.
  if (cursor.part == 0) {
    for (std::int64_t ahead = cursor.item == 0 ? 1 : kTablesAhead; ahead <= kTablesAhead; ++ahead) {
      if (const LowRankPart* later = item(thread, cursor.item + ahead)) __builtin_prefetch(pages(*later));
    }
    if (const LowRankPart* later = item(thread, cursor.item + kPartsAhead)) __builtin_prefetch(later);
  }
  const bool is_shrink = cursor.item < shrinks_.count(thread);
  const std::int64_t first = is_shrink ? part->first : 0, end = is_shrink ? part->end : part->rank;
  const std::int64_t column = is_shrink ? 0 : part->first, columns = is_shrink ? part->width : part->end - part->first;
  const std::int64_t row = first + cursor.part, rows = std::min<std::int64_t>(end - row, kRankPage);
  const std::int64_t header = is_shrink && factors_.arena_dtype == Dtype::kInt8 ? kScalesBytes : 0;
  span.at = static_cast<const char*>(factors_.arena) + (pages(*part)[row / kRankPage] + column) * element_;
  const bool is_whole = columns == part->width;  // rows, then, which lie one after the other
  span.bytes = header + (is_whole ? rows * columns : columns) * element_;
  span.count = is_whole ? 1 : rows;
  span.stride = part->width * element_;
  cursor.part += rows;
  if (row + rows == end) cursor = {cursor.item + 1, 0};
  return true;
}

}  // namespace peftserve
