#include "forward.h"

#include "decode.h"
#include "layout_check.h"
#include "prefill.h"

namespace sparse_attn::cpu {

void forward(const AttentionParams& given, Isa isa, const Parallel& parallel) {
  AttentionParams params = given;
  const CheckedLayout layout(params, parallel);
  if (is_decode(params, isa) && !params.for_gradients) return decode({&params, 1}, isa, parallel);
  prefill({&params, 1}, isa, parallel);
}

}  // namespace sparse_attn::cpu
