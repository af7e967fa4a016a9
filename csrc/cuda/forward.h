// The forward pass for sm_80 and up: a block of 4 warps computes 64 rows of one head. Keys and
// values come by cp.async, one tile ahead; a warp multiplies 16 rows by mma.sync.
#pragma once

#include "cuda/keys.h"
#include "cuda/softmax.h"

namespace sparse_attn::cuda {

template <class Element_, int kHeadDim>
struct Forward {
  using Element = Element_;
  using Arguments = ForwardArguments<Element>;
  using Layout = SharedLayout<kHeadDim>;
  using Rows = typename Layout::Rows;
  static constexpr int kThreads = Layout::kThreads;
  static constexpr uint32_t kSharedBytes = Layout::kBytes;
  static constexpr int kSteps = kHeadDim / 16, kKeyTiles = kTileKeys / 8, kDimTiles = kHeadDim / 8;

  // Where the block is in the call.
  struct Place {
    int batch, head, first_row, end_row;  // rows of q
    int thread, lane, warp;

    DEVICE int lane_row() const { return first_row + warp * 16 + lane / 4; }
  };

  DEVICE static Place place_of(const Arguments& arguments) {
    Place place;
    const int block = block_index(), head = block / arguments.row_tiles;
    place.batch = head / arguments.num_heads;
    place.head = head % arguments.num_heads;
    // The last rows have the longest walks in causal calls, and so start first.
    const int tile = arguments.row_tiles - 1 - block % arguments.row_tiles;
    const int row_block = tile / arguments.tiles_each * arguments.row_block;
    place.first_row = row_block + tile % arguments.tiles_each * Layout::kRows;
    place.end_row = least(least(row_block + arguments.row_block, arguments.seqlen_q),
                          place.first_row + Layout::kRows);
    place.thread = thread_index();
    place.lane = place.thread % 32;
    place.warp = place.thread / 32;
    return place;
  }

  DEVICE static void run(const Arguments& arguments) {
    const Place place = place_of(arguments);
    if (place.first_row >= place.end_row) return;
    const int shift = arguments.seqlen_kv - arguments.seqlen_q;
    RowSpan rows{place.first_row + shift, place.end_row - 1 + shift, arguments.seqlen_kv};
    if (arguments.is_causal) rows.key_end = most(least(rows.last + 1, arguments.seqlen_kv), 0);
    const Walk walk = walk_of(arguments, place.batch, place.head, place.first_row, rows);
    const Scores scores = scores_of(arguments.scores, place.batch, place.head);
    const int kv_head = place.head / arguments.kv_group;
    const KeySource<Element> source{
        arguments.k + (place.batch * arguments.k_stride.batch + kv_head * arguments.k_stride.head),
        arguments.v + (place.batch * arguments.v_stride.batch + kv_head * arguments.v_stride.head),
        arguments.k_stride.row,
        arguments.v_stride.row,
        arguments.chunks,
        arguments.chunks_v};
    float out[kDimTiles][4] = {};
    SoftmaxState state;
    sum_over_keys(out, state, arguments, place, walk, scores, source);
    store_results(out, state, arguments, place);
  }

  DEVICE static void sum_over_keys(float (&out)[kDimTiles][4], SoftmaxState& state,
                                   const Arguments& arguments, const Place& place, const Walk& walk,
                                   const Scores& scores, const KeySource<Element>& source) {
    const int tiles = walk.num_tiles(), lane = place.lane;
    fetch_queries<Layout>(
        arguments.q +
            (place.batch * arguments.q_stride.batch + place.head * arguments.q_stride.head),
        arguments.q_stride.row, arguments.chunks, place.first_row, place.end_row, place.thread);
    find_keys<Layout>(walk, 0, place.thread);
    find_keys<Layout>(walk, 1, place.thread);
    sync_block();
    if (tiles > 0) fetch_keys<Layout>(source, 0, place.thread);
    copy_commit();
    copy_wait<0>();
    sync_block();
    const int p = place.lane_row() + arguments.seqlen_kv - arguments.seqlen_q;

    NO_UNROLL
    for (int tile = 0; tile < tiles; ++tile) {
      if (tile + 1 < tiles) fetch_keys<Layout>(source, tile + 1, place.thread);
      copy_commit();
      find_keys<Layout>(walk, tile + 2, place.thread);
      float s[kKeyTiles][4] = {};
      multiply_keys(s, Layout::keys(tile), place);
      score_tile(s, scores, walk, tile, Layout::positions(tile), p, lane);
      exponentiate(s, out, state, arguments.scores.factor);
      multiply_values(out, s, Layout::values(tile), lane);
      copy_wait<0>();
      sync_block();  // the next tile has landed, and all have read this one
    }
  }

  DEVICE static void multiply_keys(float (&s)[kKeyTiles][4], uint32_t keys, const Place& place) {
    UNROLL_BY_4  // all 8 steps of 128 dims would take too many registers
        for (int step = 0; step < kSteps; ++step) {
      uint32_t a[4];
      Rows::load_a(a, Layout::queries(), place.warp * 16, step, place.lane);
      UNROLL
      for (int n = 0; n < kKeyTiles; n += 2) {
        uint32_t b[4];
        Rows::load_b(b, keys, n * 8, step, place.lane);
        multiply_add<Element>(s[n], a, b[0], b[1]);
        multiply_add<Element>(s[n + 1], a, b[2], b[3]);
      }
    }
  }

  // Weights as they lie in the accumulators of one product are the left side of the next one.
  DEVICE static void multiply_values(float (&out)[kDimTiles][4],
                                     const float (&weights)[kKeyTiles][4], uint32_t values,
                                     int lane) {
    UNROLL
    for (int step = 0; step < kTileKeys / 16; ++step) {
      uint32_t a[4];
      UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* pair = &weights[step * 2 + i / 2][i % 2 * 2];
        a[i] = pack<Element>(pair[0], pair[1]);
      }
      UNROLL
      for (int n = 0; n < kDimTiles; n += 2) {
        uint32_t b[4];
        Rows::load_b_transposed(b, values, step * 16, n, lane);
        multiply_add<Element>(out[n], a, b[0], b[1]);
        multiply_add<Element>(out[n + 1], a, b[2], b[3]);
      }
    }
  }

  // Results go through the shared memory of the warp's own queries, to leave in whole rows. All
  // lanes have read these: a barrier follows each tile of keys.
  DEVICE static void store_results(float (&out)[kDimTiles][4], const SoftmaxState& state,
                                   const Arguments& arguments, const Place& place) {
    const ScoreArguments& scores = arguments.scores;
    const float sink_logit =
        scores.sink_logits.is_null() ? -kInfinity : load(scores.sink_logits + place.head);
    const int64_t head = static_cast<int64_t>(place.batch) * arguments.num_heads + place.head;
    UNROLL
    for (int half = 0; half < 2; ++half) {
      const RowResult result = finish_row(state, half, scores.factor, sink_logit);
      const int row = place.warp * 16 + half * 8 + place.lane / 4;
      UNROLL
      for (int n = 0; n < kDimTiles; ++n) {
        const uint32_t pair =
            pack<Element>(out[n][half * 2] * result.weight, out[n][half * 2 + 1] * result.weight);
        store_shared<uint32_t>(Layout::queries() + Rows::offset(row, n) + place.lane % 4 * 4, pair);
      }
      if (place.lane % 4 == 0 && place.first_row + row < place.end_row) {
        store<float>(arguments.lse + (head * arguments.lse_stride + place.first_row + row),
                     result.lse);
      }
    }
    sync_warp();
    const Global<Element> target = arguments.out + (place.batch * arguments.out_stride.batch +
                                                    place.head * arguments.out_stride.head);
    constexpr int kRowsAtOnce = 32 / Rows::kChunks;
    const int chunk = place.lane % Rows::kChunks;
    UNROLL
    for (int i = 0; i < 16 / kRowsAtOnce; ++i) {
      const int row = place.warp * 16 + i * kRowsAtOnce + place.lane / Rows::kChunks;
      if (place.first_row + row >= place.end_row || chunk >= arguments.chunks_v) continue;
      const Int4 value = load_shared<Int4>(Layout::queries() + Rows::offset(row, chunk));
      store_chunk(target + ((place.first_row + row) * arguments.out_stride.row + chunk * 8), value);
    }
  }
};

}  // namespace sparse_attn::cuda
