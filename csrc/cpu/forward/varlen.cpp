#include "cpu/forward/varlen.h"

#include <vector>

#include "cpu/forward/decode.h"
#include "cpu/forward/prefill.h"
#include "cpu/layout/layout_check.h"
#include "integers.h"
#include "require.h"

namespace sparse_attn::cpu {

namespace {

// A copy of untrusted values, to be checked and used.
std::vector<int32_t> copy_of(const int32_t* values, int64_t n) { return {values, values + n}; }

// Values that ascend from 0, of which the last is at most (or exactly) `total`.
std::vector<int32_t> cumulated(const int32_t* given, const char* name, int64_t batch, int64_t total,
                               bool exactly, const char* what) {
  std::vector<int32_t> values = copy_of(given, batch + 1);
  require(values[0] == 0, name, "[0] = ", values[0], " is not 0");
  for (int64_t b = 0; b < batch; ++b) {
    require(values[b + 1] >= values[b], name, "[", b + 1, "] = ", values[b + 1], " follows ",
            values[b], ": it must be ascending");
  }
  require(values[batch] <= total && (!exactly || values[batch] == total), name, "[", batch,
          "] = ", values[batch], ", but ", what, " has ", total, " rows");
  return values;
}

// Checked copies of where the sequences lie.
class Sequences {
 public:
  Sequences(const ForwardParams& greatest, const Packing& packing)
      : greatest_(greatest),
        begin_q_(cumulated(packing.cu_seqlens_q, "cu_seqlens_q", greatest.batch, packing.total_q,
                           true, "q")) {
    const int64_t batch = greatest.batch;
    if (packing.is_paged()) {
      seqlens_kv_ = copy_of(packing.seqlens_kv, batch);
    } else {
      begin_kv_ =
          cumulated(packing.cu_seqlens_kv, "cu_seqlens_kv", batch, packing.total_kv, false, "k");
      for (int64_t b = 0; b < batch; ++b) seqlens_kv_.push_back(begin_kv_[b + 1] - begin_kv_[b]);
    }
    const char* name_kv = packing.is_paged() ? "seqlens_kv" : "cu_seqlens_kv";
    for (int64_t b = 0; b < batch; ++b) {
      require(seqlen_q(b) <= greatest.seqlen_q, "cu_seqlens_q: sequence ", b, " has ", seqlen_q(b),
              " queries, but the layout is for at most ", greatest.seqlen_q);
      require(seqlens_kv_[b] >= 0 && seqlens_kv_[b] <= greatest.seqlen_kv, name_kv, ": sequence ",
              b, " has ", seqlens_kv_[b], " keys, but the layout is for at most ",
              greatest.seqlen_kv);
    }
    if (packing.is_paged()) take_pages(packing);
  }

  // One of them as a batch of one.
  ForwardParams operator[](int64_t b) const {
    ForwardParams params = greatest_;
    params.batch = 1;
    params.seqlen_q = seqlen_q(b);
    params.seqlen_kv = seqlens_kv_[b];
    params.q = rows(params.q, begin_q_[b] * params.q_stride.row);
    params.out = rows(params.out, begin_q_[b] * params.out_stride.row);
    params.lse += begin_q_[b];
    if (params.key_bias.data != nullptr) params.key_bias.data += b * params.key_bias.stride.batch;
    if (begin_kv_.empty()) {
      params.pages = pages_.data() + begin_pages_[b];
    } else {
      params.k = rows(params.k, begin_kv_[b] * params.k_stride.row);
      params.v = rows(params.v, begin_kv_[b] * params.v_stride.row);
    }
    for (IndexLists* lists : {&params.blocks, &params.columns}) {
      if (!lists->present() || lists->batch == 1) continue;
      lists->batch = 1;
      lists->counts += b * lists->heads * lists->rows;
      lists->indices += b * lists->heads * lists->rows * lists->width;
    }
    return params;
  }

 private:
  int64_t seqlen_q(int64_t b) const { return begin_q_[b + 1] - begin_q_[b]; }

  template <class T>
  T* rows(T* base, int64_t elements) const {
    using Byte = std::conditional_t<std::is_const_v<T>, const std::byte, std::byte>;
    return static_cast<Byte*>(base) + elements * element_size(greatest_.dtype);
  }

  // Copies the pages that are in use.
  void take_pages(const Packing& packing) {
    const int64_t size = greatest_.page_size;
    for (int64_t b = 0; b < greatest_.batch; ++b) {
      const int64_t used = ceil_div(seqlens_kv_[b], size);
      require(used <= packing.max_pages, "seqlens_kv[", b, "] = ", seqlens_kv_[b],
              ", but block_table has ", packing.max_pages, " pages of ", size,
              " keys for a sequence");
      const int64_t begin = static_cast<int64_t>(pages_.size());
      const int32_t* given = packing.block_table + b * packing.max_pages;
      pages_.insert(pages_.end(), given, given + used);
      begin_pages_.push_back(begin);
      for (int64_t i = 0; i < used; ++i) {
        const int32_t page = pages_[begin + i];
        require(page >= 0 && page < packing.total_kv, "block_table[", b, ", ", i, "] = ", page,
                " is out of range: k has ", packing.total_kv, " pages");
      }
    }
  }

  const ForwardParams& greatest_;
  std::vector<int32_t> begin_q_, begin_kv_, seqlens_kv_;
  std::vector<int32_t> pages_;
  std::vector<int64_t> begin_pages_;
};

}  // namespace

void forward_varlen(const ForwardParams& given, const Packing& packing, Isa isa,
                    const Parallel& parallel) {
  ForwardParams greatest = given;
  const CheckedLayout layout(greatest, parallel);
  const Sequences sequences(greatest, packing);
  std::vector<ForwardParams> short_ones, long_ones;
  for (int64_t b = 0; b < greatest.batch; ++b) {
    const ForwardParams params = sequences[b];
    if (params.seqlen_q == 0) continue;
    const bool by_rows = is_decode(params, isa) || !params.has_ordinary_scale();
    (by_rows ? short_ones : long_ones).push_back(params);
  }
  prefill(long_ones, isa, parallel);
  decode(short_ones, isa, parallel);
}

}  // namespace sparse_attn::cpu
