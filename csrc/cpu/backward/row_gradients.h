// The gradients of one row after the other, each over the keys that it sees and no others.
//
// The kernels of tiles give what a row does not see a weight of 0, and take p from a rounded
// exp(s - lse). Neither will do where a number is not finite, as 0 * inf is NaN, or where lse is so
// large that its last place is more than a logit should be off by.
#pragma once

#include "cpu/backward/bias_gradients.h"
#include "cpu/isa/isa.h"
#include "params.h"

namespace sparse_attn::cpu {

// Computes dq, dk and dv of the query heads that share a KV head, which is counted over the whole
// batch, and their parts of dsink_logits and of the gradients of biases.
void gradients_by_rows(const BackwardParams& params, Isa isa, int64_t kv_head, double* dsink_logits,
                       BiasGradients& bias_gradients);

}  // namespace sparse_attn::cpu
