// How low-rank factors lie in an arena (see peftserve_kernels/rank_pages.py).
#pragma once

namespace peftserve {

constexpr int kRankPage = 8;  // rank rows in a page

}  // namespace peftserve
