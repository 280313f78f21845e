// First the maxima of chunks of all rows, each thread those of some columns: of the logits that it computed itself, which are
// nearest to it. Then one row after the other, each by one thread. A row that is not greedy never sorts the vocabulary: the
// tokens whose logit is near the largest are gathered, put in buckets by their distance to it, and bucket after bucket is
// sorted only as far as the pick goes. Only where that does not decide the pick does the row look farther down.
#include <cstring>

#include "kernels.h"
#include "math.h"
#include "parallel.h"
#include "scratch.h"

namespace peftserve::PEFTSERVE_ISA {
namespace {

constexpr std::int64_t kChunk = 128;  // logits that share a stored maximum
constexpr int kBuckets = 1024;
constexpr float kInfinity = __builtin_inff(), kLowest = -__FLT_MAX__;
constexpr int kMaxima = 2;  // which scratch memory holds them

// Probabilities looked at, relative to the largest: above e^-8, e^-16, and all that are not zero in float32.
constexpr float kDepths[] = {8.0f, 16.0f, 88.0f};

struct Candidate {
  float logit;
  std::int32_t id;
};

// Descending by logit; equals keep their order.
void sort(Candidate* items, std::int64_t count, Candidate* spare) {
  if (count <= 16) {
    for (std::int64_t i = 1; i < count; ++i) {
      const Candidate item = items[i];
      std::int64_t j = i;
      for (; j > 0 && items[j - 1].logit < item.logit; --j) items[j] = items[j - 1];
      items[j] = item;
    }
    return;
  }
  const std::int64_t half = count / 2;
  sort(items, half, spare);
  sort(items + half, count - half, spare);
  if (!(items[half - 1].logit < items[half].logit)) return;
  std::memcpy(spare, items, static_cast<std::size_t>(half) * sizeof(Candidate));
  for (std::int64_t left = 0, right = half, to = 0; left < half; ++to) {
    items[to] = right < count && spare[left].logit < items[right].logit ? items[right++] : spare[left++];
  }
}

std::int64_t chunks_of(std::int64_t vocab) { return (vocab + kChunk - 1) / kChunk; }

// Infinite if one of them is NaN.
float maximum_of(const float* logits, std::int64_t count) {
  Vec largest = broadcast(-kInfinity), zeros = zero();
  // 0 * x is a zero unless x is infinite or NaN.
  const auto look = [&](Vec x) __attribute__((always_inline)) {
    largest = max(largest, x);
    const Vec lowest = broadcast(kLowest);
    zeros = fma(select_greater(lowest, x, lowest, x), zero(), zeros);  // not so -inf: a banned token
  };
  std::int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) look(load(logits + at));
  float result = maximum(largest);
  bool any = !(sum(zeros) == 0.0f);
  for (; at < count; ++at) {
    result = logits[at] > result ? logits[at] : result;
    any = any || logits[at] != logits[at];
  }
  return any ? kInfinity : result;
}

class Row {
 public:
  // maxima: of each chunk.
  Row(const float* logits, std::int64_t vocab, const float* maxima) : logits_(logits), vocab_(vocab), maxima_(maxima) {
    largest_ = maxima_[0];
    for (std::int64_t chunk = 1; chunk < chunks_of(vocab); ++chunk) {
      if (maxima_[chunk] > largest_) largest_ = maxima_[chunk];
    }
  }

  // Whether there is a pick.
  bool any() const { return largest_ > -kInfinity && largest_ < kInfinity; }

  std::int64_t greedy() const {
    for (std::int64_t begin = 0; begin < vocab_; begin += kChunk) {
      if (!(maxima_[begin / kChunk] == largest_)) continue;
      for (std::int64_t i = begin; i < chunk_end(begin); ++i) {
        if (logits_[i] == largest_) return i;
      }
    }
    return 0;
  }

  std::int64_t draw(float temperature, std::int64_t top_k, double top_p, double min_p, double uniform) {
    const std::int64_t padded = vocab_ + kLanes;
    cumulative_ = scratch<double>(static_cast<std::size_t>(4 * padded));  // 28 bytes a logit
    gathered_ = reinterpret_cast<Candidate*>(cumulative_ + padded);
    ordered_ = gathered_ + padded;
    probability_ = reinterpret_cast<float*>(ordered_ + padded);
    temperature_ = temperature;
    mass_ = static_cast<float>(total_mass());
    if (!(mass_ > 0.0f && mass_ < kInfinity)) return 0;
    std::int64_t pick = -1;
    for (const float depth : kDepths) {
      gather(depth);
      pick = choose(top_k, top_p, min_p, uniform, depth == kDepths[2]);
      if (pick >= 0) break;
    }
    return pick;
  }

 private:
  std::int64_t chunk_end(std::int64_t begin) const { return begin + kChunk < vocab_ ? begin + kChunk : vocab_; }

  // e^((logit - largest) / temperature)
  Vec weight(Vec logits) const { return exp(div(sub(logits, broadcast(largest_)), broadcast(temperature_))); }

  double total_mass() const {
    double total = 0.0;
    for (std::int64_t begin = 0; begin < vocab_; begin += kChunk) {
      const std::int64_t end = chunk_end(begin);
      std::int64_t i = begin;
      Vec mass = zero();
      for (; i + kLanes <= end; i += kLanes) mass = add(mass, weight(load(logits_ + i)));
      if (i < end) {
        alignas(64) float rest[kLanes];
        store(rest, broadcast(-kInfinity));
        std::memcpy(rest, logits_ + i, static_cast<std::size_t>(end - i) * sizeof(float));
        mass = add(mass, weight(load(rest)));
      }
      total += static_cast<double>(sum(mass));
    }
    return total;
  }

  // All tokens whose weight is at least about e^-depth, into buckets from the largest logit down.
  void gather(float depth) {
    const float lowest = largest_ - depth * temperature_;
    std::int64_t count = 0;
    for (std::int64_t begin = 0; begin < vocab_; begin += kChunk) {
      if (!(maxima_[begin / kChunk] >= lowest)) continue;
      for (std::int64_t i = begin; i < chunk_end(begin); ++i) {
        gathered_[count] = {logits_[i], static_cast<std::int32_t>(i)};
        count += logits_[i] >= lowest;
      }
    }
    float smallest = largest_;
    for (std::int64_t i = 0; i < count; ++i) {
      smallest = gathered_[i].logit < smallest ? gathered_[i].logit : smallest;
    }
    const float scale = largest_ > smallest ? static_cast<float>(kBuckets) / (largest_ - smallest) : 0.0f;
    const auto bucket = [&](const Candidate& candidate) {
      const float at = (largest_ - candidate.logit) * scale;
      return at < static_cast<float>(kBuckets - 1) ? static_cast<int>(at) : kBuckets - 1;
    };
    std::memset(bucket_end_, 0, sizeof bucket_end_);
    for (std::int64_t i = 0; i < count; ++i) ++bucket_end_[bucket(gathered_[i])];
    std::int64_t start = 0;
    for (std::int64_t& end : bucket_end_) {
      const std::int64_t size = end;
      end = start;
      start += size;
    }
    for (std::int64_t i = 0; i < count; ++i) ordered_[bucket_end_[bucket(gathered_[i])]++] = gathered_[i];
    count_ = count;
    sorted_ = 0;
    next_bucket_ = 0;
  }

  // Probability of the `index`-th most probable token; sorts as far as that.
  double probability(std::int64_t index) {
    while (index >= sorted_) {
      const std::int64_t begin = sorted_, end = bucket_end_[next_bucket_++];
      sort(ordered_ + begin, end - begin, gathered_);
      for (std::int64_t i = begin; i < end; i += kLanes) {
        alignas(64) float logits[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) logits[lane] = i + lane < end ? ordered_[i + lane].logit : largest_;
        store(probability_ + i, div(weight(load(logits)), broadcast(mass_)));
      }
      sorted_ = end;
    }
    return static_cast<double>(probability_[index]);
  }

  // The pick, or -1 where the gathered tokens do not decide it. `is_all`: no other token has a probability.
  std::int64_t choose(std::int64_t top_k, double top_p, double min_p, double uniform, bool is_all) {
    const bool limited = top_k > 0 && top_k < vocab_;
    const bool filtered = limited || top_p < 1.0 || min_p > 0.0;
    const std::int64_t limit = limited ? top_k : vocab_;
    if (limited && count_ < limit && !is_all) return -1;
    double whole = 1.0;
    if (limited && top_p < 1.0) {
      whole = 0.0;
      for (std::int64_t i = 0; i < limit && i < count_; ++i) whole += probability(i);
    }
    const double smallest = min_p * probability(0);
    double running = 0.0;
    std::int64_t kept = 0;
    bool complete = false;
    while (!complete && kept < limit && kept < count_) {
      const double p = probability(kept);
      if (kept > 0 && (!(p > 0.0) || p < smallest)) {
        complete = true;
        break;
      }
      running += p;
      cumulative_[kept++] = running;
      complete = filtered ? top_p < 1.0 && running >= top_p * whole : running > uniform;
    }
    if (!complete && kept < limit && !is_all) return -1;
    const double target = filtered ? uniform * running : uniform;
    std::int64_t pick = 0;
    while (pick < kept - 1 && !(cumulative_[pick] > target)) ++pick;
    return ordered_[pick].id;
  }

  const float* logits_;
  std::int64_t vocab_;
  const float* maxima_;
  float largest_ = 0.0f, temperature_ = 1.0f, mass_ = 1.0f;
  double* cumulative_;
  Candidate* gathered_;
  Candidate* ordered_;  // buckets one after the other, sorted up to `sorted_`
  float* probability_;
  std::int64_t count_ = 0, sorted_ = 0;
  int next_bucket_ = 0;
  std::int64_t bucket_end_[kBuckets];
};

}  // namespace

void sample(const Sample& args) {
  const std::int64_t chunks = chunks_of(args.vocab);
  auto* maxima = scratch<float, kMaxima>(static_cast<std::size_t>(args.rows * chunks));
  const int team = team_size(args.threads, args.rows * args.vocab);
  parallel_ranges(team, chunks, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t row = 0; row < args.rows; ++row) {
      const float* logits = args.logits + row * args.vocab;
      for (std::int64_t chunk = begin; chunk < end; ++chunk) {
        const std::int64_t at = chunk * kChunk, left = args.vocab - at;
        maxima[row * chunks + chunk] = maximum_of(logits + at, left < kChunk ? left : kChunk);
      }
    }
  });
  bool any_drawn = false;
  for (std::int64_t row = 0; row < args.rows; ++row) any_drawn = any_drawn || args.temperature[row] != 0.0f;
  parallel_tasks(any_drawn ? team : 1, args.rows, [&](std::int64_t index) {
    Row row(args.logits + index * args.vocab, args.vocab, maxima + index * chunks);
    const float temperature = args.temperature[index];
    if (!row.any()) {
      args.ids[index] = -1;
    } else if (temperature == 0.0f) {
      args.ids[index] = row.greedy();
    } else {
      const auto top_p = static_cast<double>(args.top_p[index]), min_p = static_cast<double>(args.min_p[index]);
      args.ids[index] = row.draw(temperature, args.top_k[index], top_p, min_p, args.uniform[index]);
    }
  });
}

}  // namespace peftserve::PEFTSERVE_ISA
