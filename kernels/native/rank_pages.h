// How low-rank factors lie in an arena (see peftserve_kernels/rank_pages.py).
#pragma once

namespace peftserve {

constexpr int kRankPage = 8;  // rank rows in a page
// With int8, a page of the first factor begins with the scales of its rows, and those of the same rows of the second.
constexpr int kScalesBytes = 2 * kRankPage * static_cast<int>(sizeof(float));

}  // namespace peftserve
