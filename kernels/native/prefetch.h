// Where data is fetched to ahead of its use.
#pragma once

namespace peftserve::PEFTSERVE_ISA {

// The locality of __builtin_prefetch. What comes from memory goes to the second level: it is near enough, the first is
// small, and a core may have more lines on their way there (measured on Zen 4, one row of NF4: 31 instead of 24 GB/s;
// attention of 32 streams: 20 instead of 14). To the first goes what a product is about to read over and over.
constexpr int kFirstLevel = 3, kSecondLevel = 2;

}  // namespace peftserve::PEFTSERVE_ISA
