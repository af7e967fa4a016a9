// Attention of many rows: tiles of queries over packed keys.
#pragma once

#include <span>

#include "cpu/isa/isa.h"
#include "cpu/runtime/parallel.h"
#include "params.h"

namespace sparse_attn::cpu {

// Computes out and lse of calls of the same dtype and head dimensions, whose layouts have been
// checked. The result does not depend on the number of threads.
void prefill(std::span<const ForwardParams> calls, Isa isa, const Parallel& threads);

}  // namespace sparse_attn::cpu
