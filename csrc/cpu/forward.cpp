#include "forward.h"

#include <vector>

#include "decode.h"
#include "layout_check.h"
#include "prefill.h"

namespace sparse_attn::cpu {

void forward(const AttentionParams& params, Isa isa, const Parallel& parallel) {
  check_layout(params, parallel);
  if (is_decode(params, isa) && !params.for_gradients) return decode({&params, 1}, isa, parallel);
  prefill({&params, 1}, isa, parallel);
}

void forward_varlen(const AttentionParams& greatest, std::span<const AttentionParams> sequences,
                    Isa isa, const Parallel& parallel) {
  check_layout(greatest, parallel);
  std::vector<AttentionParams> short_ones, long_ones;
  for (const AttentionParams& params : sequences) {
    (is_decode(params, isa) ? short_ones : long_ones).push_back(params);
  }
  prefill(long_ones, isa, parallel);
  decode(short_ones, isa, parallel);
}

}  // namespace sparse_attn::cpu
