// One pass over pairs of a key tile and a query tile, KV head by KV head. The task of a key tile
// owns dk and dv; dq is added to by the key tiles in ascending order, each query tile telling whose
// turn it is.
#include "cpu/backward/backward.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <deque>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/backward/bias_gradients.h"
#include "cpu/backward/row_gradients.h"
#include "cpu/backward/tile_map.h"
#include "cpu/isa/kernels.h"
#include "cpu/layout/layout_check.h"
#include "cpu/runtime/head_queue.h"
#include "cpu/runtime/waiting_room.h"
#include "cpu/runtime/zero_row.h"
#include "integers.h"

namespace sparse_attn::cpu {

namespace {

constexpr int64_t kMinRows = 32;  // in a query tile

// exp(s - lse) is off by the rounding of lse, which is this times 2^-24 at most.
constexpr float kMostExactLse = 8192;

template <class Word>
bool all_finite(const void* numbers, int64_t n, Word exponent) {
  const Word* words = static_cast<const Word*>(numbers);
  Word found = 0;
  for (int64_t i = 0; i < n; ++i) found |= static_cast<Word>((words[i] & exponent) == exponent);
  return found == 0;
}

bool all_finite(const void* numbers, int64_t n, DType dtype) {
  if (dtype == DType::kFloat32) return all_finite<uint32_t>(numbers, n, 0x7f800000);
  return all_finite<uint16_t>(numbers, n, dtype == DType::kBFloat16 ? 0x7f80 : 0x7c00);
}

// Rows [row, ...) of one head of a tensor.
class Rows {
 public:
  Rows(const void* base, const Strides& strides, DType dtype, int64_t batch, int64_t head)
      : base_(static_cast<const std::byte*>(base) +
              (batch * strides.batch + head * strides.head) * element_size(dtype)),
        stride_(strides.row * element_size(dtype)) {}
  const void* operator[](int64_t row) const { return base_ + row * stride_; }

 private:
  const std::byte* base_;
  int64_t stride_;
};

class Backward {
 public:
  Backward(const BackwardParams& params, const BackwardKernel& kernel, Isa isa)
      : params_(params),
        kernel_(kernel),
        isa_(isa),
        shape_(make_shape(params, kernel)),
        group_size_(params.num_heads / params.num_kv_heads),
        query_tiles_(ceil_div(params.seqlen_q, shape_.rows)),
        key_tiles_(ceil_div(params.seqlen_kv, kKeyTile)),
        num_query_tiles_(params.batch * params.num_heads * query_tiles_),
        tile_bytes_(kernel.query_tile_bytes(shape_)),
        map_(num_query_tiles_, key_tiles_),
        turn_(num_query_tiles_),
        needs_rows_(params.batch * params.num_kv_heads),
        dsink_logits_(params.dsink_logits != nullptr ? num_query_tiles_ : 0),
        bias_gradients_(params, key_tiles_) {}

  void run(const Parallel& parallel) {
    const bool by_tiles = params_.has_ordinary_scale();
    std::fill(needs_rows_.begin(), needs_rows_.end(), !by_tiles);
    if (by_tiles) run_tiles(parallel);
    run_rows(parallel);
    sum_dsink_logits();
    bias_gradients_.write(parallel);
  }

 private:
  void run_tiles(const Parallel& parallel) {
    parallel.run(num_query_tiles_, [&](int64_t i) {
      mark_key_tiles(params_, tile_index(i), map_.row(i));
      turn_[i] = static_cast<int32_t>(map_.next(i, 0));
    });
    std::deque<HeadWork> heads;
    for (const auto& [pairs, kv_head] : sorted_kv_heads())
      heads.emplace_back(*this, kv_head, pairs);
    const int64_t allowed = num_query_tiles_ * tile_bytes_;
    HeadQueue<HeadWork>(heads, allowed, kernel_.enter, kernel_.leave).run(parallel);
  }

  // Anew, row by row, the KV heads whose tiles met what tiles do not take.
  void run_rows(const Parallel& parallel) {
    std::vector<int64_t> heads;
    for (size_t i = 0; i < needs_rows_.size(); ++i) {
      if (needs_rows_[i]) heads.push_back(static_cast<int64_t>(i));
    }
    if (heads.empty()) return;
    parallel.run(static_cast<int64_t>(heads.size()), [&](int64_t i) {
      std::vector<double> dsink_logits(group_size_);
      gradients_by_rows(params_, isa_, heads[i], dsink_logits.data(), bias_gradients_);
      if (params_.dsink_logits == nullptr) return;
      const auto begin = dsink_logits_.begin() + heads[i] * group_size_ * query_tiles_;
      std::fill(begin, begin + group_size_ * query_tiles_, 0.0);
      for (int64_t h = 0; h < group_size_; ++h) begin[h * query_tiles_] = dsink_logits[h];
    });
  }

  // The query tiles and the key tiles of a KV head, for HeadQueue: threads prepare the query tiles
  // together, then take key tiles.
  class HeadWork {
   public:
    HeadWork(Backward& call, int64_t kv_head, int64_t pairs)
        : call_(call),
          kv_head_(kv_head),
          pairs_(pairs),
          num_query_tiles_(call.group_size_ * call.query_tiles_) {}

    void list() {}
    int64_t num_multiplications() const {
      const TileShape& shape = call_.shape_;
      return pairs_ * shape.rows * kKeyTile * (3 * shape.head_dim + 2 * shape.head_dim_v);
    }
    int64_t packed_bytes() const { return num_query_tiles_ * call_.tile_bytes_; }
    int64_t scratch_bytes() const { return call_.kernel_.scratch_bytes(call_.shape_); }

    void open(std::byte* memory) {
      memory_ = memory;
      phases_.open(num_query_tiles_, call_.key_tiles_);
    }

    bool help(std::byte* scratch) {
      const auto prepare = [&](int64_t i) {
        call_.prepare_query_tile(kv_head_ * num_query_tiles_ + i, memory_ + i * call_.tile_bytes_);
      };
      const auto run = [&](int64_t i) { call_.run_key_tile(kv_head_, i, memory_, scratch); };
      return phases_.help(prepare, run);
    }

    bool is_taken() const { return phases_.is_taken(); }
    bool is_done() const { return phases_.is_done(); }

   private:
    Backward& call_;
    int64_t kv_head_, pairs_, num_query_tiles_;
    std::byte* memory_ = nullptr;
    TwoPhases phases_;  // query tiles, key tiles
  };

  static TileShape make_shape(const BackwardParams& params, const BackwardKernel& kernel) {
    TileShape shape;
    // A tile that spans several lists works on the union of their keys.
    shape.rows = kMinRows;
    const int64_t rows = list_rows(params);
    while (shape.rows < kernel.max_rows && shape.rows * 2 <= rows) shape.rows *= 2;
    shape.head_dim = params.head_dim;
    shape.head_dim_v = params.head_dim_v;
    shape.score_as(params);
    return shape;
  }

  TileIndex tile_index(int64_t i) const {
    const int64_t row = i % query_tiles_ * shape_.rows, head = i / query_tiles_;
    return {head / params_.num_heads, head % params_.num_heads, row,
            std::min(shape_.rows, params_.seqlen_q - row)};
  }

  int64_t kv_head_of(const TileIndex& tile) const {
    return tile.batch * params_.num_kv_heads + tile.head / group_size_;
  }

  void* dq_rows(const TileIndex& tile) const {
    const int64_t row = (tile.batch * params_.num_heads + tile.head) * params_.seqlen_q + tile.row;
    return static_cast<std::byte*>(params_.dq) +
           row * params_.head_dim * element_size(params_.dtype);
  }

  void prepare_query_tile(int64_t i, std::byte* memory) {
    const TileIndex tile = tile_index(i);
    if (turn_[i] == key_tiles_) {
      std::memset(dq_rows(tile), 0, tile.rows * params_.head_dim * element_size(params_.dtype));
    }

    const Rows q(params_.q, params_.q_stride, params_.dtype, tile.batch, tile.head);
    const Rows dout(params_.dout, params_.dout_stride, params_.dtype, tile.batch, tile.head);
    const Rows out(params_.out, params_.out_stride, params_.dtype, tile.batch, tile.head);
    const void *q_rows[kMaxRows], *dout_rows[kMaxRows], *out_rows[kMaxRows];
    bool busy[kMaxRows] = {};
    find_busy_rows(params_, tile, busy);
    for (int64_t r = 0; r < shape_.rows; ++r) {
      q_rows[r] = busy[r] ? q[tile.row + r] : kZeroRow;
      dout_rows[r] = busy[r] ? dout[tile.row + r] : kZeroRow;
      out_rows[r] = busy[r] ? out[tile.row + r] : kZeroRow;
    }
    kernel_.pack_queries(shape_, q_rows, dout_rows, out_rows, memory);

    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    const QueryTileHead head(memory, shape_.rows);
    const int64_t first =
        (tile.batch * params_.num_heads + tile.head) * params_.seqlen_q + tile.row;
    double dsink = 0;
    for (int64_t r = 0; r < shape_.rows; ++r) {
      head.lse[r] = kInfinity;
      if (r >= tile.rows) continue;
      const float lse = params_.lse[first + r];
      head.delta[r] -= params_.dlse[first + r];
      if (params_.sink_logits != nullptr && params_.sink_logits[tile.head] > -kInfinity) {
        dsink -= std::exp(double{params_.sink_logits[tile.head]} - lse) * head.delta[r];
      }
      if (busy[r]) {
        head.lse[r] = lse;
        if (!(std::abs(lse) <= kMostExactLse)) needs_rows_[kv_head_of(tile)] = true;
      } else {
        head.delta[r] = 0;
      }
    }
    if (params_.dsink_logits != nullptr) dsink_logits_[i] = dsink;
  }

  // How many pairs of tiles see each other, and the KV head; most pairs first.
  std::vector<std::pair<int64_t, int64_t>> sorted_kv_heads() const {
    std::vector<std::pair<int64_t, int64_t>> heads(params_.batch * params_.num_kv_heads);
    for (size_t i = 0; i < heads.size(); ++i) heads[i].second = static_cast<int64_t>(i);
    for (int64_t i = 0; i < num_query_tiles_; ++i) {
      heads[i / (query_tiles_ * group_size_)].first += map_.count(i);
    }
    std::stable_sort(heads.begin(), heads.end(),
                     [](const auto& a, const auto& b) { return a.first > b.first; });
    return heads;
  }

  // The first query tile of [begin, end) that sees the key tile; `end` if none.
  int64_t next_seeing(int64_t begin, int64_t end, int64_t key_tile) const {
    while (begin < end && !map_.sees(begin, key_tile)) ++begin;
    return begin;
  }

  // `tiles` holds the head's query tiles.
  void run_key_tile(int64_t kv_head, int64_t key_tile, std::byte* tiles, std::byte* scratch) {
    const int64_t first_key = key_tile * kKeyTile;
    const int64_t keys = std::min(kKeyTile, params_.seqlen_kv - first_key);
    const int64_t first = kv_head * group_size_ * query_tiles_;
    const int64_t last = first + group_size_ * query_tiles_;
    const auto tile_memory = [&](int64_t i) { return tiles + (i - first) * tile_bytes_; };
    Visibility visibility;
    KeyTileBias bias;
    KeyTileBias* const biased = params_.is_biased() ? &bias : nullptr;
    pack_keys(kv_head, first_key, first, last, scratch, visibility);
    int64_t following = next_seeing(first, last, key_tile);
    for (int64_t i = following; i < last; i = following) {
      following = next_seeing(i + 1, last, key_tile);
      const std::byte* next_tile = following < last ? tile_memory(following) : nullptr;
      const TileIndex tile = tile_index(i);
      find_visibility(params_, tile, first_key, visibility);
      if (biased != nullptr) describe_bias(tile, first_key, keys, bias);
      waiting_.wait_until([&] { return turn_[i] == key_tile; });
      const bool is_first = map_.next(i, 0) == key_tile;
      const int64_t next = map_.next(i, key_tile + 1);
      kernel_.add_pair(shape_, visibility, is_first, tile_memory(i), next_tile, biased, scratch);
      if (next == key_tiles_) {
        kernel_.write_queries(shape_, tile_memory(i), tile.rows, dq_rows(tile));
        check_result(kv_head, dq_rows(tile), tile.rows * params_.head_dim);
      }
      turn_[i] = static_cast<int32_t>(next);
      waiting_.announce();
      if (biased != nullptr &&
          (following == last || following / query_tiles_ != i / query_tiles_)) {
        bias_gradients_.set(i / query_tiles_, first_key, keys, bias.dbias, bias.dslope);
        bias.clear();
      }
    }
    const int64_t row = kv_head * params_.seqlen_kv + first_key, size = element_size(params_.dtype);
    std::byte* dk = static_cast<std::byte*>(params_.dk) + row * params_.head_dim * size;
    std::byte* dv = static_cast<std::byte*>(params_.dv) + row * params_.head_dim_v * size;
    kernel_.write_keys(shape_, scratch, keys, dk, dv);
    check_result(kv_head, dk, keys * params_.head_dim);
    check_result(kv_head, dv, keys * params_.head_dim_v);
  }

  void describe_bias(const TileIndex& tile, int64_t first_key, int64_t keys,
                     KeyTileBias& bias) const {
    const int64_t origin = tile.row + params_.seqlen_kv - params_.seqlen_q;
    const HeadBias head(params_, tile.batch, tile.head, origin);
    head.describe(static_cast<int>(keys), [&](int j) { return first_key + j; }, bias.terms);
  }

  void check_result(int64_t kv_head, const void* numbers, int64_t n) {
    if (!all_finite(numbers, n, params_.dtype)) needs_rows_[kv_head] = true;
  }

  // Keys that no row sees are replaced by zeros: what they hold must not matter.
  void pack_keys(int64_t kv_head, int64_t first_key, int64_t first, int64_t last,
                 std::byte* scratch, Visibility& visibility) const {
    const int64_t batch = kv_head / params_.num_kv_heads, head = kv_head % params_.num_kv_heads;
    const Rows k(params_.k, params_.k_stride, params_.dtype, batch, head);
    const Rows v(params_.v, params_.v_stride, params_.dtype, batch, head);
    uint32_t seen[kKeyTileGranules] = {};
    int64_t num_seen = 0;
    const int64_t num_keys = std::min(kKeyTile, params_.seqlen_kv - first_key);
    for (int64_t i = last; i-- > first && num_seen < num_keys;) {
      if (!map_.sees(i, first_key / kKeyTile)) continue;
      find_visibility(params_, tile_index(i), first_key, visibility);
      for (int n = 0; n < visibility.count; ++n) {
        const auto [g, visible, rows] = visibility.parts[n];
        if (visible == nullptr)
          seen[g] = ~uint32_t{0};
        else
          for (int r = rows.begin; r < rows.end; ++r) seen[g] |= visible[r];
      }
      num_seen = std::accumulate(seen, seen + kKeyTileGranules, int64_t{0},
                                 [](int64_t n, uint32_t w) { return n + std::popcount(w); });
    }
    const void *k_rows[kKeyTile], *v_rows[kKeyTile];
    for (int64_t j = 0; j < kKeyTile; ++j) {
      const bool is_seen = seen[j / kGranule] >> j % kGranule & 1;
      k_rows[j] = is_seen ? k[first_key + j] : kZeroRow;
      v_rows[j] = is_seen ? v[first_key + j] : kZeroRow;
    }
    kernel_.pack_keys(shape_, k_rows, v_rows, scratch);
  }

  void sum_dsink_logits() const {
    if (params_.dsink_logits == nullptr) return;
    for (int64_t h = 0; h < params_.num_heads; ++h) {
      double sum = 0;
      for (int64_t b = 0; b < params_.batch; ++b) {
        const auto begin = dsink_logits_.begin() + (b * params_.num_heads + h) * query_tiles_;
        sum = std::accumulate(begin, begin + query_tiles_, sum);
      }
      params_.dsink_logits[h] = static_cast<float>(sum);
    }
  }

  const BackwardParams& params_;
  const BackwardKernel& kernel_;
  const Isa isa_;
  const TileShape shape_;
  const int64_t group_size_;       // query heads that share a KV head
  const int64_t query_tiles_;      // in one query head
  const int64_t key_tiles_;        // in one KV head
  const int64_t num_query_tiles_;  // in the whole batch
  const int64_t tile_bytes_;
  TileMap map_;
  std::vector<std::atomic<int32_t>> turn_;  // the key tile that may add to dq next
  WaitingRoom waiting_;                     // for turns
  std::vector<std::atomic<bool>>
      needs_rows_;  // by KV head: whether its results are to be made anew
  std::vector<double> dsink_logits_;
  BiasGradients bias_gradients_;
};

// The gradients of what the batch shares, for a batch without entries.
void write_sums_of_nothing(const BackwardParams& params) {
  const auto fill = [](float* sums, int64_t n) {
    if (sums != nullptr) std::fill_n(sums, n, 0.0f);
  };
  fill(params.dsink_logits, params.num_heads);
  fill(params.dalibi_slopes, params.num_heads);
  if (params.key_bias.is_shared) fill(params.dkey_bias, params.key_bias.heads * params.seqlen_kv);
}

}  // namespace

void backward(const BackwardParams& given, Isa isa, const Parallel& parallel) {
  BackwardParams params = given;
  const CheckedLayout layout(params, parallel);
  if (params.num_heads == 0) return;
  if (params.batch == 0) return write_sums_of_nothing(params);
  Backward(params, find_kernel(isa, &Kernels::backward, params.dtype), isa).run(parallel);
}

}  // namespace sparse_attn::cpu
