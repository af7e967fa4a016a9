#include "cpu/forward/forward.h"

#include "cpu/forward/decode.h"
#include "cpu/forward/prefill.h"
#include "cpu/layout/layout_check.h"

namespace sparse_attn::cpu {

void forward(const ForwardParams& given, Isa isa, const Parallel& parallel) {
  ForwardParams params = given;
  const CheckedLayout layout(params, parallel);
  const bool is_short = is_decode(params, isa) && !params.for_gradients;
  if (is_short || !params.has_ordinary_scale()) return decode({&params, 1}, isa, parallel);
  prefill({&params, 1}, isa, parallel);
}

}  // namespace sparse_attn::cpu
