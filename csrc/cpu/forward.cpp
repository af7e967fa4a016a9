#include "forward.h"

#include "decode.h"
#include "layout_check.h"
#include "prefill.h"

namespace sparse_attn::cpu {

void forward(const ForwardParams& given, Isa isa, const Parallel& parallel) {
  ForwardParams params = given;
  const CheckedLayout layout(params, parallel);
  const bool is_short = is_decode(params, isa) && !params.for_gradients;
  if (is_short || !has_ordinary_scale(params)) return decode({&params, 1}, isa, parallel);
  prefill({&params, 1}, isa, parallel);
}

}  // namespace sparse_attn::cpu
