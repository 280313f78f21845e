#include "lora_plan.h"

#include <algorithm>

#include "rank_pages.h"
#include "shares.h"

namespace peftserve {
namespace {

// A weight that is read takes the time of so many multiply-adds: adapters are larger than the caches.
constexpr std::int64_t kReadWork = 3;
constexpr std::int64_t kParts = 4;  // a thread, or more
constexpr std::int64_t kTablesAhead = 6, kPartsAhead = 16;  // parts, when what they read and they themselves are fetched

std::int64_t cost(const LoraBlock& block, std::int64_t rank, std::int64_t width) {
  return (block.tokens + kReadWork) * rank * width;
}

// Costs too fit: ranks end at 1,024.
std::int32_t narrow(std::int64_t value) { return static_cast<std::int32_t>(value); }

std::int64_t round_up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace

LoraPlan::LoraPlan() = default;
LoraPlan::~LoraPlan() = default;

int LoraPlan::team() const { return team_; }
const LoraBlock& LoraPlan::block(std::int64_t index) const { return blocks_[static_cast<std::size_t>(index)]; }
std::int64_t LoraPlan::inner() const { return inner_; }
LoraShares LoraPlan::shrinks() const { return {shrinks_.parts.data(), shrinks_.bounds.data()}; }
LoraShares LoraPlan::expands() const { return {expands_.parts.data(), expands_.bounds.data()}; }

void LoraPlan::make(const LoraAdd& args, const LoraTiles& tiles) {
  args_ = args;
  element_ = bytes_of(args.arena_dtype);
  blocks_.clear();
  inner_ = 0;
  std::int64_t shrinking = 0, expanding = 0;
  for (std::int64_t s = 0; s < args.segments; ++s) {
    const std::int64_t first = args.start[s], end = args.start[s + 1];
    if (first == end) continue;
    for (std::int64_t slice = 0; slice < args.slices; ++slice) {
      const std::int64_t table = (args.slot[s] * args.layers + args.layer) * args.targets + args.slice[slice].target;
      const std::int64_t rank = args.rank[table];
      if (rank == 0) continue;
      for (std::int64_t token = first; token < end; token += tiles.tokens) {
        const LoraBlock block{token, std::min(end - token, tiles.tokens), table, slice, rank, inner_};
        blocks_.push_back(block);
        inner_ += block.tokens * rank;
        shrinking += cost(block, rank, args.columns);
        expanding += cost(block, rank, args.slice[slice].outputs);
      }
    }
  }
  team_ = team_size(args.threads, shrinking + expanding);
  bytes_.assign(static_cast<std::size_t>(team_), 0);
  cut_shrinks(shrinking);
  cut_expands(tiles);
}

// In order of tokens. A block that costs more than `limit` is cut.
void LoraPlan::cut_shrinks(std::int64_t total) {
  const std::int64_t limit = total / (team_ * kParts) + 1;
  shrinks_.parts.clear();
  const auto count = static_cast<std::int64_t>(blocks_.size());
  for (std::int64_t index = 0; index < count; ++index) {
    const LoraBlock& block = this->block(index);
    const std::int64_t all = cost(block, block.rank, args_.columns);
    std::int64_t step = block.rank;
    if (team_ > 1 && all > limit) {
      const std::int64_t pieces = all / limit + 1;
      step = round_up((block.rank + pieces - 1) / pieces, kRankPage);
    }
    for (std::int64_t first = 0; first < block.rank; first += step) {
      const std::int64_t rows = std::min(block.rank - first, step);
      shrinks_.parts.push_back({args_.a_page + block.table * args_.pages, narrow(index), narrow(first),
                                narrow(first + rows), narrow(block.rank), narrow(args_.columns),
                                narrow(cost(block, rows, args_.columns))});
    }
  }
  share_out(shrinks_, [](const LoraPart& part) { return std::int64_t{part.end - part.first} * part.width; });
}

// In order of columns: a slice is cut at the same ones in all blocks.
void LoraPlan::cut_expands(const LoraTiles& tiles) {
  // As many columns a piece as make kParts parts a thread, but one thread never needs all.
  const auto count = static_cast<std::int64_t>(blocks_.size());
  const std::int64_t pieces = team_ == 1 || count == 0 ? 1 : team_ * (1 + (kParts - 1) * args_.slices / count);
  expands_.parts.clear();
  for (std::int64_t slice = 0; slice < args_.slices; ++slice) {
    const std::int64_t outputs = args_.slice[slice].outputs;
    const std::int64_t step = round_up((outputs + pieces - 1) / pieces, tiles.columns);
    for (std::int64_t first = 0; first < outputs; first += step) {
      const std::int64_t columns = std::min(outputs - first, step);
      for (std::int64_t index = 0; index < count; ++index) {
        const LoraBlock& block = this->block(index);
        if (block.slice != slice) continue;
        expands_.parts.push_back({args_.b_page + block.table * args_.pages, narrow(index), narrow(first),
                                  narrow(first + columns), narrow(block.rank), narrow(outputs),
                                  narrow(cost(block, block.rank, columns))});
      }
    }
  }
  share_out(expands_, [](const LoraPart& part) { return std::int64_t{part.end - part.first} * part.rank; });
}

// weights(part): how many it reads.
template <class Weights>
void LoraPlan::share_out(Share& share, const Weights& weights) {
  share.bounds.resize(static_cast<std::size_t>(team_) + 1);
  const LoraPart* parts = share.parts.data();
  peftserve::share(team_, static_cast<std::int64_t>(share.parts.size()),
                   [parts](std::int64_t index) -> std::int64_t { return parts[index].cost; }, share.bounds.data());
  for (std::size_t thread = 0; thread < bytes_.size(); ++thread) {
    const LoraPart* first = share.first(thread);
    for (std::int64_t at = 0; at < share.count(thread); ++at) bytes_[thread] += weights(first[at]) * element_;
  }
}

std::int64_t LoraPlan::bytes(int thread) const { return thread < team_ ? bytes_[static_cast<std::size_t>(thread)] : 0; }

// The parts of a thread, those with A first; null at the end.
const LoraPart* LoraPlan::item(std::size_t thread, std::int64_t index) const {
  const std::int64_t shrinks = shrinks_.count(thread);
  if (index < shrinks) return shrinks_.first(thread) + index;
  index -= shrinks;
  return index < expands_.count(thread) ? expands_.first(thread) + index : nullptr;
}

// Part by part, and of each page by page.
bool LoraPlan::next(int thread, Cursor& cursor, Span& span) const {
  if (thread >= team_) return false;
  const auto at = static_cast<std::size_t>(thread);
  const LoraPart* part = item(at, cursor.item);
  if (part == nullptr) return false;
  // The tables too come from memory mostly, and the parts from the core of the thread that made the plan.
  if (cursor.part == 0) {
    for (std::int64_t ahead = cursor.item == 0 ? 1 : kTablesAhead; ahead <= kTablesAhead; ++ahead) {
      if (const LoraPart* later = item(at, cursor.item + ahead)) __builtin_prefetch(later->pages);
    }
    if (const LoraPart* later = item(at, cursor.item + kPartsAhead)) __builtin_prefetch(later);
  }
  const bool is_shrink = cursor.item < shrinks_.count(at);
  const std::int64_t first = is_shrink ? part->first : 0, end = is_shrink ? part->end : part->rank;
  const std::int64_t column = is_shrink ? 0 : part->first, columns = is_shrink ? part->width : part->end - part->first;
  const std::int64_t row = first + cursor.part, rows = std::min<std::int64_t>(end - row, kRankPage);
  span.at = static_cast<const char*>(args_.arena) + (part->pages[row / kRankPage] + column) * element_;
  const bool is_whole = columns == part->width;  // rows, then, which lie one after the other
  span.bytes = (is_whole ? rows * columns : columns) * element_;
  span.count = is_whole ? 1 : rows;
  span.stride = part->width * element_;
  cursor.part += rows;
  if (row + rows == end) cursor = {cursor.item + 1, 0};
  return true;
}

}  // namespace peftserve
