// Which table of ops runs: the best one that the processor has, or one that is asked for.
#pragma once

#include <string>
#include <vector>

#include "ops.h"

namespace peftserve {

// The names of the variants that were compiled and that this processor can run, best first.
std::vector<std::string> supported_isas();

// The table of one of them; null for any other name.
const Ops* ops_for(const std::string& isa);

}  // namespace peftserve
