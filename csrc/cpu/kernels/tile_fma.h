// The tile kernel in fused multiply-adds, for any vector width.
//
// The lanes of a vector are rows of the tile; keys and head dims are walked one by one, their
// elements broadcast. So K and V are read row by row as they lie in memory, and softmax works lane
// by lane. A panel is a few vectors of rows. float16 and bfloat16 keys become rows of float32 when
// they are packed; where products of bfloat16 pairs exist, keys and head dims are walked in twos.
#pragma once

#include "cpu/kernels/by_dtype.h"
#include "cpu/kernels/key_cursor.h"
#include "cpu/kernels/tile_kernel.h"
#include "cpu/simd/denormals.h"
#include "cpu/simd/softmax_state.h"
#include "cpu/simd/words.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr int64_t kFmaBlockM = 64;
inline constexpr int64_t kFmaGranules = 4;
inline constexpr int64_t kStepKeys = kFmaGranules * kGranule;

// Vectors in a panel, and the registers for sums of products.
#if SPARSE_ATTN_VECTOR_BYTES == 64
inline constexpr int kPanelVectors = 4, kSums = 24;
#else
inline constexpr int kPanelVectors = 3, kSums = 12;
#endif
inline constexpr int64_t kPanel = kPanelVectors * kLanes;
inline constexpr int64_t kMostPanels = (kFmaBlockM + kPanel - 1) / kPanel;

static inline int64_t padded_dim(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// Packed K: 32 rows of words of dims.
template <class T, class Words>
static void pack_k(const void* const* rows, int64_t dim, void* granule) {
  auto* dest = static_cast<typename Words::Word*>(granule);
  for (int i = 0; i < kGranule; ++i) {
    copy_words<T, Words>(rows[i], dim, dest + i * num_words<Words>(dim));
  }
}

// Packed V: rows of words of keys.
template <class T, class Words>
static void pack_v(const void* const* rows, int64_t dim, void* granule) {
  auto* dest = static_cast<typename Words::Word*>(granule);
  for (int i = 0; i < kGranule; i += Words::kNumbers, dest += dim) {
    join_rows<T, Words>(rows + i, dim, dest);
  }
}

template <class Words>
static int64_t k_granule_bytes(int64_t dim) {
  return kGranule * num_words<Words>(dim) * 4;
}

template <class Words>
static int64_t v_granule_bytes(int64_t dim) {
  return kGranule / Words::kNumbers * dim * 4;
}

// Rows of words of the keys [begin, end) of a granule.
template <class Words>
struct GranuleWords {
  using Word = typename Words::Word;

  const Word *k, *v;
  int64_t k_stride, v_stride;
  int begin;
  int keys, value_rows;  // keys that fill value_rows: one may not exist, and is masked

  GranuleWords() = default;
  GranuleWords(const Granule& granule, int64_t head_dim, int first, int end)
      : k_stride(Words::kNumbers == 1 ? granule.k_stride : num_words<Words>(head_dim)),
        v_stride(granule.v_stride),
        begin(first / Words::kNumbers * Words::kNumbers),
        value_rows(static_cast<int>(num_words<Words>(end - begin))) {
    keys = value_rows * Words::kNumbers;
    k = static_cast<const Word*>(granule.k) + begin * k_stride;
    v = static_cast<const Word*>(granule.v) + begin / Words::kNumbers * v_stride;
  }
};

// scores[kKeys][rows] = k[kKeys][words] q[words][rows], with kPitch rows in all
template <class Words, int kVectors, int64_t kPitch, int kKeys>
static void score_part(const typename Words::Word* k, int64_t k_stride, const float* q,
                       int64_t words, float* scores) {
  Vec sum[kKeys][kVectors] = {};
#pragma GCC unroll 8
  for (int64_t d = 0; d < words; ++d, q += kPitch) {
    Vec b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load(q + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const Vec x = Words::broadcast_word(k[i * k_stride + d]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] = Words::multiply_add(x, b[v], sum[i][v]);
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
    for (int v = 0; v < kVectors; ++v) store(scores + i * kPitch + v * kLanes, sum[i][v]);
  }
}

// acc[kDims][rows] = acc * factor + sum over the keys of v[key][kDims] weights[key][rows], where
// the sum begins at zero: short sums round less than one long one.
template <class Words, int kVectors, int kDims>
static void value_part(const GranuleWords<Words>* granules, int num_granules, int64_t first_dim,
                       const float* weights, const float* factor, float* acc) {
  Vec sum[kDims][kVectors] = {};
  for (int g = 0; g < num_granules; ++g) {
    const auto* row = granules[g].v + first_dim;
#pragma GCC unroll 4
    for (int j = 0; j < granules[g].value_rows;
         ++j, row += granules[g].v_stride, weights += kPanel) {
      Vec b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kDims; ++i) {
        const Vec x = Words::broadcast_word(row[i]);
        for (int v = 0; v < kVectors; ++v) sum[i][v] = Words::multiply_add(x, b[v], sum[i][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kDims; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* dest = acc + i * kPanel + v * kLanes;
      store(dest, load(dest) * load(factor + v * kLanes) + sum[i][v]);
    }
  }
}

template <class Words>
using ScorePart = void (*)(const typename Words::Word*, int64_t, const float*, int64_t, float*);
template <class Words>
using ValuePart = void (*)(const GranuleWords<Words>*, int, int64_t, const float*, const float*,
                           float*);

template <class Words, int kVectors, int64_t kPitch, int... kCounts>
static ScorePart<Words> score_function(int64_t keys, std::integer_sequence<int, kCounts...>) {
  static constexpr ScorePart<Words> kFunctions[] = {
      score_part<Words, kVectors, kPitch, kCounts + 1>...};
  return kFunctions[keys - 1];
}

template <class Words, int kVectors, int... kCounts>
static ValuePart<Words> value_function(int64_t dims, std::integer_sequence<int, kCounts...>) {
  static constexpr ValuePart<Words> kFunctions[] = {value_part<Words, kVectors, kCounts + 1>...};
  return kFunctions[dims - 1];
}

// Calls f(begin, count) on [0, n) cut into nearly equal parts of at most `most`.
template <class F>
SPARSE_ATTN_INLINE void for_parts(int64_t n, int64_t most, F f) {
  int64_t parts = (n + most - 1) / most;
  for (int64_t begin = 0; begin < n; --parts) {
    const int64_t count = (n - begin + parts - 1) / parts;
    f(begin, count);
    begin += count;
  }
}

// What a tile keeps for one panel of rows.
struct Panel {
  float* q;       // [words of head_dim][kPanel]
  float* scores;  // [kStepKeys][kPanel]; after the softmax weights, [words of keys][kPanel]
  float* acc;     // [head_dim_v][kPanel]
  float* m;       // [kPanel] running maximum of the scores
  float* l;       // [kPanel] running sum
  float* factor;  // [kPanel] what acc is to be multiplied with
  int64_t first_row, rows, vectors;
  int64_t head_dim_v;
};

// Scores of all keys of a granule.
template <class Words, int kVectors>
static void score_keys(const Panel& panel, int64_t first_row, const GranuleWords<Words>& granule,
                       int64_t first_key, int64_t head_dim) {
  constexpr int kMost = std::min(16, kSums / kVectors);
  for_parts(granule.keys, kMost, [&](int64_t begin, int64_t count) {
    score_function<Words, kVectors, kPanel>(count, std::make_integer_sequence<int, kMost>())(
        granule.k + begin * granule.k_stride, granule.k_stride, panel.q + first_row,
        num_words<Words>(head_dim), panel.scores + (first_key + begin) * kPanel + first_row);
  });
}

// Fetches the `part`-th of so many parts of a granule's values to the second-level cache.
template <class Words>
static void fetch_values(const GranuleWords<Words>& granule, int64_t head_dim_v, int64_t part,
                         int64_t parts) {
  const int64_t end = granule.value_rows * (part + 1) / parts;
  for (int64_t j = granule.value_rows * part / parts; j < end; ++j) {
    const auto* row = granule.v + j * granule.v_stride;
    for (int64_t d = 0; d < head_dim_v; d += 16) __builtin_prefetch(row + d, 0, 2);
  }
}

template <class Words, int kVectors>
static void add_values(const Panel& panel, int64_t first_row, const GranuleWords<Words>* granules,
                       int num_granules, int64_t first_key, const float* factor,
                       int64_t head_dim_v) {
  constexpr int kMost = std::min(16, kSums / kVectors);
  const float* weights = panel.scores + first_key / Words::kNumbers * kPanel + first_row;
  for_parts(head_dim_v, kMost, [&](int64_t begin, int64_t count) {
    value_function<Words, kVectors>(count, std::make_integer_sequence<int, kMost>())(
        granules, num_granules, begin, weights, factor + first_row,
        panel.acc + begin * kPanel + first_row);
  });
}

// scores = softcap * tanh(scores * factor)
static void cap_scores(float* scores, int64_t num_keys, float factor, float softcap) {
  for (int64_t i = 0; i < num_keys * kPanel; i += kLanes) {
    store(scores + i, tanh(load(scores + i) * factor) * softcap);
  }
}

// scores = scores * factor + the terms of a granule's keys from `first` on, for rows from the
// tile's `first_row` on.
static void add_terms(float* scores, const KeyTerms<kGranule>& terms, int first, int num_keys,
                      int64_t first_row, int64_t rows, float factor) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    Vec row;
    for (int i = 0; i < kLanes; ++i) row[i] = static_cast<float>(first_row + r + i);
    for (int j = 0; j < num_keys; ++j) {
      float* s = scores + j * kPanel + r;
      const Vec distance = absolute(row - terms.offset[first + j]);
      store(s, load(s) * factor + (terms.bias[first + j] - terms.slope * distance));
    }
  }
}

// Bit j of a row's word says whether the row sees key j: scores of the keys from `first` on that it
// does not see become -inf.
static void mask_scores(float* scores, const uint32_t* visible, int first, int num_keys,
                        int64_t rows) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    IntVec words;
    std::memcpy(&words, visible + r, sizeof(words));
    for (int j = 0; j < num_keys; ++j) {
      float* s = scores + j * kPanel + r;
      const IntVec selected = words & static_cast<int32_t>(uint32_t{1} << (first + j));
      store(s, selected != 0 ? load(s) : broadcast(kMinusInfinity));
    }
  }
}

// Turns scores into weights and brings (m, l, factor) up to date. `base2` makes a score a logit in
// base 2; it is positive. The maximum is subtracted first: the product of a large score rounds to
// more than what weights are made of. The number of keys is one of whole words. Scores that are no
// numbers do not count in the maximum, but in the sum.
template <class Words, int kVectors>
static void softmax(const Panel& panel, int64_t num_keys, float base2) {
  constexpr int64_t kChains = 8 / kVectors;
  Vec top[kChains][kVectors];
  for (int i = 0; i < kChains; ++i) {
    for (int v = 0; v < kVectors; ++v) top[i][v] = broadcast(kMinusInfinity);
  }
  int64_t j = 0;
  for (; j + kChains <= num_keys; j += kChains) {
    for (int i = 0; i < kChains; ++i) {
      for (int v = 0; v < kVectors; ++v) {
        top[i][v] = maximum(load(panel.scores + (j + i) * kPanel + v * kLanes), top[i][v]);
      }
    }
  }
  for (; j < num_keys; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      top[0][v] = maximum(load(panel.scores + j * kPanel + v * kLanes), top[0][v]);
    }
  }
  Vec base[kVectors], sum[kVectors] = {};
  for (int v = 0; v < kVectors; ++v) {
    const Vec m_old = load(panel.m + v * kLanes);
    for (int i = 1; i < kChains; ++i) top[0][v] = maximum(top[i][v], top[0][v]);
    const Vec m_new = maximum(top[0][v], m_old);
    base[v] = m_new == kMinusInfinity ? Vec{} : m_new;
    store(panel.m + v * kLanes, m_new);
    store(panel.factor + v * kLanes, exp2_nonpositive(m_old - base[v], base2));
  }
  float* words = panel.scores;
  for (j = 0; j < num_keys; j += Words::kNumbers, words += kPanel) {
    for (int v = 0; v < kVectors; ++v) {
      Vec p[Words::kNumbers];
      for (int i = 0; i < Words::kNumbers; ++i) {
        const Vec s = load(panel.scores + (j + i) * kPanel + v * kLanes);
        p[i] = exp2_nonpositive(s - base[v], base2);
        sum[v] += p[i];
      }
      store(words + v * kLanes, Words::join(p));
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    float* l = panel.l + v * kLanes;
    store(l, load(l) * load(panel.factor + v * kLanes) + sum[v]);
  }
}

// A row of q as words and zeros up to whole vectors: where it lies, if it is so, or in `memory`.
// Words of two numbers have the factor in them.
template <class T, class Words>
SPARSE_ATTN_INLINE const float* words_of_q(const T* q, int64_t dim, float factor, float* memory) {
  const int64_t words = num_words<Words>(dim);
  if constexpr (std::is_same_v<T, float>) {
    if (dim % kLanes == 0) return q;
  }
  if constexpr (Words::kNumbers == 1) {
    convert_row(q, dim, memory);
  } else {
    auto* numbers = reinterpret_cast<typename Words::Number*>(memory);
    if (dim % 2 != 0) numbers[dim] = {};
    for (int64_t d = 0; d < dim; ++d) from_float(to_float(q[d]) * factor, numbers[d]);
  }
  std::fill(memory + words, memory + padded_dim(words), 0.0f);
  return memory;
}

// q of one panel times a factor, transposed; lanes without a row are zero.
template <class T, class Words>
static void load_q(const QueryTile& tile, const Panel& panel, float factor) {
  const int64_t words = num_words<Words>(tile.head_dim), stride = padded_dim(words);
  alignas(64) float memory[kLanes * kMaxHeadDim];
  for (int64_t r0 = 0; r0 < panel.rows; r0 += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, panel.rows - r0);
    const float* rows[kLanes];
    for (int64_t r = 0; r < count; ++r) {
      const T* q = static_cast<const T*>(tile.q) + (panel.first_row + r0 + r) * tile.q_row_stride;
      rows[r] = words_of_q<T, Words>(q, tile.head_dim, factor, memory + r * stride);
    }
    for (int64_t d = 0; d < words; d += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = i < count ? load(rows[i] + d) : Vec{};
        if constexpr (Words::kNumbers == 1) x[i] *= factor;
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(panel.q + (d + i) * kPanel + r0, x[i]);
    }
  }
}

// Returns the rows of the tile that must be repeated, see TileKernel. `logit_scale` makes a score a
// logit.
template <class T>
static uint64_t write_rows(const QueryTile& tile, const Panel& panel, double logit_scale) {
  const int64_t stride = padded_dim(tile.head_dim_v);
  uint64_t repeated = 0;
  float rows[kLanes * kMaxHeadDim];
  for (int64_t r0 = 0; r0 < panel.rows; r0 += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, panel.rows - r0);
    Vec zeros = {};  // NaN for rows with what is not finite
    for (int64_t d = 0; d < tile.head_dim_v; d += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = load(panel.acc + (d + i) * kPanel + r0);
        zeros += x[i] * 0.0f;
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(rows + i * stride + d, x[i]);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = panel.first_row + r0 + r;
      const float m = panel.m[r0 + r];
      const RowEnd end = finish_row(m * logit_scale, panel.l[r0 + r], tile.sink_logit);
      T* out = static_cast<T*>(tile.out) + row * tile.out_row_stride;
      const float* acc = rows + r * stride;
      if (m == kMinusInfinity || zeros[r] != 0.0f) repeated |= uint64_t{1} << row;
      if constexpr (std::is_same_v<T, float>) {
        if (tile.streams_out) {
          for (int64_t d = 0; d < tile.head_dim_v; d += kLanes) {
            stream(out + d, load(acc + d) * end.factor);
          }
          tile.lse[row] = end.lse;
          continue;
        }
      }
      round_row(acc, end.factor, tile.head_dim_v, out);
      tile.lse[row] = end.lse;
    }
  }
  return repeated;
}

// As if words were of one number.
static int64_t panel_floats(int64_t head_dim, int64_t head_dim_v) {
  return kPanel * (padded_dim(head_dim) + kStepKeys + padded_dim(head_dim_v) + 3);
}

static int64_t fma_scratch_bytes(int64_t head_dim, int64_t head_dim_v) {
  return kMostPanels * panel_floats(head_dim, head_dim_v) * 4;
}

static Panel make_panel(const QueryTile& tile, int64_t index, std::byte* memory) {
  Panel panel;
  panel.q = reinterpret_cast<float*>(memory) + index * panel_floats(tile.head_dim, tile.head_dim_v);
  panel.scores = panel.q + padded_dim(tile.head_dim) * kPanel;
  panel.acc = panel.scores + kStepKeys * kPanel;
  panel.m = panel.acc + padded_dim(tile.head_dim_v) * kPanel;
  panel.l = panel.m + kPanel;
  panel.factor = panel.l + kPanel;
  panel.first_row = index * kPanel;
  panel.rows = std::min(kPanel, tile.rows - panel.first_row);
  panel.vectors = (panel.rows + kLanes - 1) / kLanes;
  panel.head_dim_v = tile.head_dim_v;
  std::fill(panel.acc, panel.m, 0.0f);
  std::fill(panel.m, panel.l, kMinusInfinity);
  std::fill(panel.l, panel.factor, 0.0f);
  return panel;
}

// The work on some vectors of a panel, for each number of them.
template <class Words>
struct PanelSteps {
  void (*score_keys)(const Panel&, int64_t, const GranuleWords<Words>&, int64_t, int64_t);
  void (*softmax)(const Panel&, int64_t, float);
  void (*add_values)(const Panel&, int64_t, const GranuleWords<Words>*, int, int64_t, const float*,
                     int64_t);
};

template <class Words, int... kVectors>
static constexpr std::array<PanelSteps<Words>, kPanelVectors> panel_steps(
    std::integer_sequence<int, kVectors...>) {
  return {{{score_keys<Words, kVectors + 1>, softmax<Words, kVectors + 1>,
            add_values<Words, kVectors + 1>}...}};
}

template <class Words>
static constexpr auto kSteps = panel_steps<Words>(std::make_integer_sequence<int, kPanelVectors>());

// The vectors of a panel that hold rows which see any key of a granule.
struct VectorRange {
  int64_t begin, count;

  VectorRange(const Panel& panel, const RowRange& rows) {
    const int64_t first = std::max<int64_t>(0, rows.begin - panel.first_row);
    const int64_t last = std::min<int64_t>(panel.rows, rows.end - panel.first_row);
    begin = first / kLanes;
    count = std::max<int64_t>(0, (last + kLanes - 1) / kLanes - begin);
  }
  bool operator==(const VectorRange&) const = default;
};

// acc = acc * factor + weights v for all keys of a step. The last granules may be seen by some of
// the vectors only, and are added to these.
template <class Words>
static void add_step(const Panel& panel, const Granule* granules, const GranuleWords<Words>* words,
                     int num_granules, int64_t head_dim_v) {
  static const std::array<float, kPanel> kOnes = [] {
    std::array<float, kPanel> ones;
    ones.fill(1.0f);
    return ones;
  }();
  int common = num_granules;
  while (common > 1 && VectorRange(panel, granules[common - 1].rows).count < panel.vectors)
    --common;
  kSteps<Words>[panel.vectors - 1].add_values(panel, 0, words, common, 0, panel.factor, head_dim_v);
  int64_t first_key = 0;
  for (int g = 0; g < num_granules; first_key += words[g].keys, ++g) {
    const VectorRange seen(panel, granules[g].rows);
    if (g < common || seen.count == 0) continue;
    kSteps<Words>[seen.count - 1].add_values(panel, seen.begin * kLanes, words + g, 1, first_key,
                                             kOnes.data(), head_dim_v);
  }
}

// The keys of a granule from the first to the last that some row of a panel sees.
template <class Words>
static GranuleWords<Words> seen_words(const Panel& panel, const Granule& granule,
                                      int64_t head_dim) {
  if (granule.visible == nullptr) return {granule, head_dim, 0, granule.count};
  uint32_t seen = 0;
  for (int64_t r = 0; r < panel.rows; ++r) seen |= granule.visible[panel.first_row + r];
  return {granule, head_dim, std::countr_zero(seen) % kGranule, kGranule - std::countl_zero(seen)};
}

// Attention of one query tile over all keys that the cursor hands out.
template <class T, class Words>
static uint64_t run_tile(const QueryTile& tile, KeyCursor& keys, std::byte* memory) {
  const ScoreScale scaling = split_scale(tile.scale);
  const bool is_biased = keys.is_biased();
  const double logit_scale = tile.softcap > 0 || is_biased ? 1.0 : scaling.scale;
  const float base2 = static_cast<float>(logit_scale * kLog2e);
  constexpr int64_t kPanels = kMostPanels;
  Panel panels[kPanels];
  const int64_t num_panels = (tile.rows + kPanel - 1) / kPanel;
  for (int64_t i = 0; i < num_panels; ++i) {
    panels[i] = make_panel(tile, i, memory);
    load_q<T, Words>(tile, panels[i], scaling.q_factor);
  }
  Granule granules[kFmaGranules];
  GranuleWords<Words> words[kPanels][kFmaGranules];
  while (const int n = keys.next(granules)) {
    int64_t num_keys[kPanels] = {};
    for (int g = 0; g < n; ++g) {
      const GranuleWords<Words> all(granules[g], tile.head_dim, 0, granules[g].count);
      for (int64_t i = 0; i < num_panels; ++i) {
        fetch_values(all, tile.head_dim_v, i, num_panels);
        words[i][g] = seen_words<Words>(panels[i], granules[g], tile.head_dim);
        const VectorRange seen(panels[i], granules[g].rows);
        if (words[i][g].keys == 0) continue;
        kSteps<Words>[seen.count - 1].score_keys(panels[i], seen.begin * kLanes, words[i][g],
                                                 num_keys[i], tile.head_dim);
        num_keys[i] += words[i][g].keys;
      }
    }
    for (int64_t i = 0; i < num_panels; ++i) {
      const Panel& panel = panels[i];
      if (num_keys[i] == 0) continue;
      if (tile.softcap > 0) {
        cap_scores(panel.scores, num_keys[i], scaling.scale / tile.softcap, tile.softcap);
      }
      int64_t first_key = 0;
      for (int g = 0; is_biased && g < n; first_key += words[i][g].keys, ++g) {
        add_terms(panel.scores + first_key * kPanel, *granules[g].terms, words[i][g].begin,
                  words[i][g].keys, panel.first_row, panel.rows,
                  tile.softcap > 0 ? 1.0f : scaling.scale);
      }
      first_key = 0;
      for (int g = 0; g < n; first_key += words[i][g].keys, ++g) {
        if (granules[g].visible == nullptr) continue;
        mask_scores(panel.scores + first_key * kPanel, granules[g].visible + panel.first_row,
                    words[i][g].begin, words[i][g].keys, panel.rows);
      }
      kSteps<Words>[panel.vectors - 1].softmax(panel, num_keys[i], base2);
      add_step(panel, granules, words[i], n, tile.head_dim_v);
    }
  }
  uint64_t repeated = 0;
  for (int64_t i = 0; i < num_panels; ++i) repeated |= write_rows<T>(tile, panels[i], logit_scale);
  return repeated;
}

template <class T, class Words = FloatWords>
static constexpr TileKernel kFmaTile = {
    .block_m = kFmaBlockM,
    .granules_per_step = kFmaGranules,
    .in_place = std::is_same_v<T, float>,
    .k_granule_bytes = k_granule_bytes<Words>,
    .v_granule_bytes = v_granule_bytes<Words>,
    .pack_k = pack_k<T, Words>,
    .pack_v = pack_v<T, Words>,
    .scratch_bytes = fma_scratch_bytes,
    .run_tile = run_tile<T, Words>,
    .enter = enter_kernel,
    .leave = leave_kernel,
};

static constexpr ByDType<TileKernel> kFmaTiles = {
    .float32 = &kFmaTile<float>,
    .bfloat16 = &kFmaTile<BFloat16>,
    .float16 = &kFmaTile<Float16>,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
