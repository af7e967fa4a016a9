// The tile kernel in float32 fused multiply-adds, for any vector width.
//
// The lanes of a vector are rows of the tile; keys and head dims are walked one by one, their
// elements broadcast. So K and V are read row by row as they lie in memory, and softmax works lane
// by lane. A panel is a few vectors of rows. float16 and bfloat16 keys become rows of float32 when
// they are packed.
#pragma once

#include "softmax_state.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr int64_t kFmaBlockM = 64;
inline constexpr int64_t kFmaGranules = 4;
inline constexpr int64_t kStepKeys = kFmaGranules * kGranule;

// Vectors in a panel, and the registers for sums of products.
#if SPARSE_ATTN_VECTOR_BYTES == 64
inline constexpr int kPanelVectors = 4, kSums = 24;
#else
inline constexpr int kPanelVectors = 2, kSums = 12;
#endif
inline constexpr int64_t kPanel = kPanelVectors * kLanes;

static inline int64_t padded_dim(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SPARSE_ATTN_INLINE float to_float(float x) { return x; }
SPARSE_ATTN_INLINE float to_float(BFloat16 x) {
  return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16);
}
SPARSE_ATTN_INLINE float to_float(Float16 x) {
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fff) << 13;
  const uint32_t infinite = magnitude >= 0x0f800000 ? 0x7f800000 : 0;
  const float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(value) | infinite | sign);
}

SPARSE_ATTN_INLINE void from_float(float x, float& result) { result = x; }
SPARSE_ATTN_INLINE void from_float(float x, BFloat16& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  result.bits = static_cast<uint16_t>(x != x ? 0x7fc0 : rounded);
}
SPARSE_ATTN_INLINE void from_float(float x, Float16& result) {
  const uint32_t bits = std::bit_cast<uint32_t>(x), magnitude = bits & 0x7fffffff;
  uint32_t half;
  if (magnitude > 0x7f800000) {
    half = 0x7e00;
  } else if (magnitude >= 0x477ff000) {
    half = 0x7c00;
  } else if (magnitude < 0x38800000) {  // subnormal: let an addition round at the right bit
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3f000000;
  } else {
    half = (magnitude - 0x38000000 + 0xfff + (magnitude >> 13 & 1)) >> 13;
  }
  result.bits = static_cast<uint16_t>(half | (bits >> 16 & 0x8000));
}

template <class T>
static void convert_row(const T* source, int64_t n, float* dest) {
  for (int64_t i = 0; i < n; ++i) dest[i] = to_float(source[i]);
}

// Packed K and V: 32 rows of float32.
template <class T>
static void pack(const void* const* rows, int64_t dim, void* granule) {
  float* dest = static_cast<float*>(granule);
  for (int i = 0; i < kGranule; ++i) {
    convert_row(static_cast<const T*>(rows[i]), dim, dest + i * dim);
  }
}

static int64_t granule_bytes(int64_t dim) { return dim * kGranule * 4; }

// scores[kKeys][rows] = k[kKeys][head_dim] q[head_dim][rows]
template <int kVectors, int kKeys>
static void score_part(const float* k, int64_t k_stride, const float* q, int64_t head_dim,
                       float* scores) {
  Vec sum[kKeys][kVectors] = {};
#pragma GCC unroll 2
  for (int64_t d = 0; d < head_dim; ++d, q += kPanel) {
    Vec b[kVectors];
    for (int v = 0; v < kVectors; ++v) b[v] = load(q + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < kKeys; ++i) {
      const Vec x = broadcast(k[i * k_stride + d]);
      for (int v = 0; v < kVectors; ++v) sum[i][v] += x * b[v];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < kKeys; ++i) {
    for (int v = 0; v < kVectors; ++v) store(scores + i * kPanel + v * kLanes, sum[i][v]);
  }
}

// acc[kDims][rows] = acc * factor + sum over the keys of v[key][kDims] weights[key][rows], where
// the sum begins at zero: short sums round less than one long one.
template <int kVectors, int kDims>
static void value_part(const Granule* granules, int num_granules, int64_t first_dim,
                       const float* weights, const float* factor, float* acc) {
  Vec sum[kDims][kVectors] = {};
  for (int g = 0; g < num_granules; ++g) {
    const float* row = static_cast<const float*>(granules[g].v) + first_dim;
#pragma GCC unroll 2
    for (int j = 0; j < granules[g].count; ++j, row += granules[g].v_stride, weights += kPanel) {
      Vec b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = load(weights + v * kLanes);
#pragma GCC unroll 16
      for (int i = 0; i < kDims; ++i) {
        const Vec x = broadcast(row[i]);
        for (int v = 0; v < kVectors; ++v) sum[i][v] += x * b[v];
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

using ScorePart = void (*)(const float*, int64_t, const float*, int64_t, float*);
using ValuePart = void (*)(const Granule*, int, int64_t, const float*, const float*, float*);

template <int kVectors, int... kCounts>
static ScorePart score_function(int64_t keys, std::integer_sequence<int, kCounts...>) {
  static constexpr ScorePart kFunctions[] = {score_part<kVectors, kCounts + 1>...};
  return kFunctions[keys - 1];
}

template <int kVectors, int... kCounts>
static ValuePart value_function(int64_t dims, std::integer_sequence<int, kCounts...>) {
  static constexpr ValuePart kFunctions[] = {value_part<kVectors, kCounts + 1>...};
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
  float* q;       // [head_dim][kPanel]
  float* scores;  // [kStepKeys][kPanel], weights after the softmax
  float* acc;     // [head_dim_v][kPanel]
  float* m;       // [kPanel] running maximum, base 2
  float* l;       // [kPanel] running sum
  float* factor;  // [kPanel] what acc is to be multiplied with
  int64_t first_row, rows, vectors;
  int64_t head_dim_v;
};

// Scores of all keys of a granule. Their values are fetched to the second-level cache meanwhile.
template <int kVectors>
static void score_keys(const Panel& panel, int64_t first_row, const Granule& granule,
                       int64_t first_key, int64_t head_dim) {
  const float* k = static_cast<const float*>(granule.k);
  const float* v = static_cast<const float*>(granule.v);
  constexpr int kMost = std::min(16, kSums / kVectors);
  for_parts(granule.count, kMost, [&](int64_t begin, int64_t count) {
    for (int64_t j = begin; j < begin + count; ++j) {
      const float* row = v + j * granule.v_stride;
      for (int64_t d = 0; d < panel.head_dim_v; d += 16) __builtin_prefetch(row + d, 0, 2);
    }
    score_function<kVectors>(count, std::make_integer_sequence<int, kMost>())(
        k + begin * granule.k_stride, granule.k_stride, panel.q + first_row, head_dim,
        panel.scores + (first_key + begin) * kPanel + first_row);
  });
}

template <int kVectors>
static void add_values(const Panel& panel, int64_t first_row, const Granule* granules,
                       int num_granules, int64_t first_key, const float* factor,
                       int64_t head_dim_v) {
  constexpr int kMost = std::min(16, kSums / kVectors);
  for_parts(head_dim_v, kMost, [&](int64_t begin, int64_t count) {
    value_function<kVectors>(count, std::make_integer_sequence<int, kMost>())(
        granules, num_granules, begin, panel.scores + first_key * kPanel + first_row,
        factor + first_row, panel.acc + begin * kPanel + first_row);
  });
}

// scores = softcap * tanh(scores * factor)
static void cap_scores(float* scores, int64_t num_keys, float factor, float softcap) {
  for (int64_t i = 0; i < num_keys * kPanel; i += kLanes) {
    store(scores + i, tanh(load(scores + i) * factor) * softcap);
  }
}

// Bit j of a row's word says whether the row sees key j: scores of keys it does not see become
// -inf.
static void mask_scores(float* scores, const uint32_t* visible, int num_keys, int64_t rows) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    IntVec words;
    std::memcpy(&words, visible + r, sizeof(words));
    for (int j = 0; j < num_keys; ++j) {
      float* s = scores + j * kPanel + r;
      const IntVec selected = words & static_cast<int32_t>(uint32_t{1} << j);
      store(s, selected != 0 ? load(s) : broadcast(kMinusInfinity));
    }
  }
}

// Turns scores into weights and brings (m, l, factor) up to date. `base2` makes a score a logit in
// base 2; it is positive.
template <int kVectors>
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
    const Vec m_new = maximum(top[0][v] * base2, m_old);
    base[v] = m_new == kMinusInfinity ? Vec{} : m_new;
    store(panel.m + v * kLanes, m_new);
    store(panel.factor + v * kLanes, exp2_nonpositive(m_old - base[v]));
  }
  for (j = 0; j < num_keys; ++j) {
    for (int v = 0; v < kVectors; ++v) {
      float* s = panel.scores + j * kPanel + v * kLanes;
      const Vec p = exp2_nonpositive(load(s) * base2 - base[v]);
      store(s, p);
      sum[v] += p;
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    float* l = panel.l + v * kLanes;
    store(l, load(l) * load(panel.factor + v * kLanes) + sum[v]);
  }
}

// q of one panel, transposed; lanes without a row are zero.
template <class T>
static void load_q(const QueryTile& tile, const Panel& panel, float factor) {
  const int64_t stride = padded_dim(tile.head_dim);
  float rows[kLanes * kMaxHeadDim];
  for (int64_t r0 = 0; r0 < panel.rows; r0 += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, panel.rows - r0);
    for (int64_t r = 0; r < count; ++r) {
      const T* q = static_cast<const T*>(tile.q) + (panel.first_row + r0 + r) * tile.q_row_stride;
      convert_row(q, tile.head_dim, rows + r * stride);
      std::fill(rows + r * stride + tile.head_dim, rows + (r + 1) * stride, 0.0f);
    }
    for (int64_t d = 0; d < tile.head_dim; d += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        x[i] = i < count ? load(rows + i * stride + d) * factor : Vec{};
      }
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(panel.q + (d + i) * kPanel + r0, x[i]);
    }
  }
}

template <class T>
static void write_rows(const QueryTile& tile, const Panel& panel) {
  const int64_t stride = padded_dim(tile.head_dim_v);
  float rows[kLanes * kMaxHeadDim];
  for (int64_t r0 = 0; r0 < panel.rows; r0 += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, panel.rows - r0);
    for (int64_t d = 0; d < tile.head_dim_v; d += kLanes) {
      Vec x[kLanes];
      for (int i = 0; i < kLanes; ++i) x[i] = load(panel.acc + (d + i) * kPanel + r0);
      transpose(x);
      for (int i = 0; i < kLanes; ++i) store(rows + i * stride + d, x[i]);
    }
    for (int64_t r = 0; r < count; ++r) {
      const int64_t row = panel.first_row + r0 + r;
      const RowEnd end = finish_row(panel.m[r0 + r], panel.l[r0 + r], tile.sink_logit);
      T* out = static_cast<T*>(tile.out) + row * tile.out_row_stride;
      const float* acc = rows + r * stride;
      if constexpr (std::is_same_v<T, float>) {
        if (tile.streams_out) {
          for (int64_t d = 0; d < tile.head_dim_v; d += kLanes) {
            stream(out + d, load(acc + d) * end.factor);
          }
          tile.lse[row] = end.lse;
          continue;
        }
      }
      for (int64_t d = 0; d < tile.head_dim_v; ++d) from_float(acc[d] * end.factor, out[d]);
      tile.lse[row] = end.lse;
    }
  }
}

static int64_t panel_floats(int64_t head_dim, int64_t head_dim_v) {
  return kPanel * (padded_dim(head_dim) + kStepKeys + padded_dim(head_dim_v) + 3);
}

static int64_t fma_scratch_bytes(int64_t head_dim, int64_t head_dim_v) {
  return kFmaBlockM / kPanel * panel_floats(head_dim, head_dim_v) * 4;
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
struct PanelSteps {
  void (*score_keys)(const Panel&, int64_t, const Granule&, int64_t, int64_t);
  void (*softmax)(const Panel&, int64_t, float);
  void (*add_values)(const Panel&, int64_t, const Granule*, int, int64_t, const float*, int64_t);
};

template <int... kVectors>
static constexpr std::array<PanelSteps, kPanelVectors> panel_steps(
    std::integer_sequence<int, kVectors...>) {
  return {{{score_keys<kVectors + 1>, softmax<kVectors + 1>, add_values<kVectors + 1>}...}};
}

static constexpr auto kSteps = panel_steps(std::make_integer_sequence<int, kPanelVectors>());

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
static void add_step(const Panel& panel, const Granule* granules, int num_granules,
                     int64_t head_dim_v) {
  static const std::array<float, kPanel> kOnes = [] {
    std::array<float, kPanel> ones;
    ones.fill(1.0f);
    return ones;
  }();
  int common = num_granules;
  while (common > 1 && VectorRange(panel, granules[common - 1].rows).count < panel.vectors)
    --common;
  kSteps[panel.vectors - 1].add_values(panel, 0, granules, common, 0, panel.factor, head_dim_v);
  int64_t first_key = 0;
  for (int g = 0; g < num_granules; first_key += granules[g].count, ++g) {
    const VectorRange seen(panel, granules[g].rows);
    if (g < common || seen.count == 0) continue;
    kSteps[seen.count - 1].add_values(panel, seen.begin * kLanes, granules + g, 1, first_key,
                                      kOnes.data(), head_dim_v);
  }
}

// Attention of one query tile over all keys that the cursor hands out.
template <class T>
static void run_tile(const QueryTile& tile, KeyCursor& keys, std::byte* memory) {
  const ScoreScale scaling = split_scale(tile.scale);
  const double logit_scale = tile.softcap > 0 ? 1.0 : scaling.scale;
  const float base2 = static_cast<float>(logit_scale * kLog2e);
  Panel panels[kFmaBlockM / kPanel];
  const int64_t num_panels = (tile.rows + kPanel - 1) / kPanel;
  for (int64_t i = 0; i < num_panels; ++i) {
    panels[i] = make_panel(tile, i, memory);
    load_q<T>(tile, panels[i], scaling.q_factor);
  }
  Granule granules[kFmaGranules];
  while (const int n = keys.next(granules)) {
    int64_t num_keys = 0;
    for (int g = 0; g < n; num_keys += granules[g].count, ++g) {
      for (int64_t i = 0; i < num_panels; ++i) {
        const VectorRange seen(panels[i], granules[g].rows);
        if (seen.count == 0) continue;
        kSteps[seen.count - 1].score_keys(panels[i], seen.begin * kLanes, granules[g], num_keys,
                                          tile.head_dim);
      }
    }
    for (int64_t i = 0; i < num_panels; ++i) {
      const Panel& panel = panels[i];
      if (tile.softcap > 0) {
        cap_scores(panel.scores, num_keys, scaling.scale / tile.softcap, tile.softcap);
      }
      int64_t first_key = 0;
      for (int g = 0; g < n; first_key += granules[g].count, ++g) {
        if (granules[g].visible == nullptr) continue;
        mask_scores(panel.scores + first_key * kPanel, granules[g].visible + panel.first_row,
                    granules[g].count, panel.rows);
      }
      kSteps[panel.vectors - 1].softmax(panel, num_keys, base2);
      add_step(panel, granules, n, tile.head_dim_v);
    }
  }
  for (int64_t i = 0; i < num_panels; ++i) write_rows<T>(tile, panels[i]);
}

// Flushes denormal results to zero while a kernel runs.
static uint32_t enter_kernel() {
#if defined(__x86_64__)
  const uint32_t saved = _mm_getcsr();
  _mm_setcsr(saved | 0x8000);
  return saved;
#else
  return 0;
#endif
}

static void leave_kernel(uint32_t saved) {
#if defined(__x86_64__)
  _mm_setcsr(saved);
#else
  (void)saved;
#endif
}

template <class T>
static const TileKernel& fma_kernel() {
  static constexpr TileKernel kKernel = {kFmaBlockM,
                                         kFmaGranules,
                                         std::is_same_v<T, float>,
                                         granule_bytes,
                                         granule_bytes,
                                         0,
                                         0,
                                         false,
                                         0,
                                         pack<T>,
                                         pack<T>,
                                         fma_scratch_bytes,
                                         run_tile<T>,
                                         enter_kernel,
                                         leave_kernel};
  return kKernel;
}

static inline const TileKernel& fma_kernel(DType dtype) {
  if (dtype == DType::kBFloat16) return fma_kernel<BFloat16>();
  if (dtype == DType::kFloat16) return fma_kernel<Float16>();
  return fma_kernel<float>();
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
