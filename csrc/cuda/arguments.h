// What a kernel is given: a call of params.h in the numbers that its threads need.
#pragma once

#include "cuda/primitives.h"
#include "params.h"

namespace sparse_attn::cuda {

// Divides numbers below 2^31 by multiplying.
struct Divisor {
  int value = 1;
  uint32_t factor = 0;  // ceil(2^shift / value)
  int shift = 0;        // 31 + ceil(log2(value))

  Divisor() = default;
  explicit Divisor(int divisor) : value(divisor), shift(31) {
    while (1ll << (shift - 31) < divisor) ++shift;
    const uint64_t power = 1ull << shift;
    factor = static_cast<uint32_t>((power + divisor - 1) / divisor);
  }
  DEVICE int divide(int x) const {
    return static_cast<int>(static_cast<uint64_t>(x) * factor >> shift);
  }
};

struct HeadValues {
  Global<const int32_t> data;
  int group = 1;  // query heads for each value
};

struct Lists {
  Global<const int32_t> counts, indices;
  int group = 1;  // query heads for each list
  int heads = 1, rows = 0, width = 0;
  int rows_each = 1;       // rows of q for each list
  bool is_shared = false;  // by the whole batch
};

struct ScoreArguments {
  float scale = 1.0f, softcap = 0.0f;
  float factor = 0.0f;   // from what softmax is given to powers of 2
  bool is_plain = true;  // softmax is given the products as they are
  Global<const float> key_bias, alibi_slopes, sink_logits;
  Strides bias_stride;
  int bias_group = 1;
  int64_t slope_stride = 1;
};

template <class Element>
struct ForwardArguments {
  Global<const Element> q, k, v;
  Global<Element> out;
  Global<float> lse;
  Strides q_stride, k_stride, v_stride, out_stride;
  int64_t lse_stride = 0;
  int num_heads = 0, kv_group = 1;  // query heads, and those for each KV head
  int seqlen_q = 0, seqlen_kv = 0;
  int chunks = 0, chunks_v = 0;  // of 8 elements, in a row of q and of v
  HeadValues sink, window;
  Lists blocks, columns;
  Divisor block_kv;
  // Row blocks are the rows that share their lists; each has some tiles of rows.
  int row_block = 1, tiles_each = 1, row_tiles = 0;
  ScoreArguments scores;
  bool is_causal = false;
};

}  // namespace sparse_attn::cuda
