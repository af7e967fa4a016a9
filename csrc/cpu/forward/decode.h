// Attention of few query rows: each key is read once, as it lies in memory, for all rows and heads
// that share its KV head and their list of keys.
#pragma once

#include <span>

#include "cpu/isa/isa.h"
#include "cpu/layout/rules.h"
#include "cpu/runtime/parallel.h"
#include "params.h"

namespace sparse_attn::cpu {

// Whether a call has so few rows.
bool is_decode(const AttentionParams& params, Isa isa);

// Computes out and lse of one row, given by its place, reading the keys that it sees and no others.
void decode_row(const ForwardParams& params, const TileIndex& row, Isa isa);

// Computes out and lse of calls whose layouts have been checked. The result does not depend on the
// number of threads.
void decode(std::span<const ForwardParams> calls, Isa isa, const Parallel& parallel);

}  // namespace sparse_attn::cpu
