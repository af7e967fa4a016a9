// Scores of HiP's candidates with sampled rows in the lanes of vectors, 16 of them in a group; keys
// and their words are walked one by one. For more than kFewHipRows rows.
#pragma once

#include "cpu/kernels/hip_fma.h"
#include "cpu/kernels/tile_fma.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr int kRowGroup = 16;
inline constexpr int kGroupVectors = kRowGroup / kLanes;

// Prepared rows: groups of [words of dims][16 rows], then all origins. The last row is repeated,
// which no maximum notices.
template <class Words>
struct HipRows {
  int64_t words, groups;
  float *rows, *origins;

  HipRows(const std::byte* queries, int64_t num_rows, int64_t head_dim)
      : words(num_words<Words>(head_dim)), groups((num_rows + kRowGroup - 1) / kRowGroup) {
    rows = reinterpret_cast<float*>(const_cast<std::byte*>(queries));
    origins = rows + groups * words * kRowGroup;
  }
  static int64_t bytes(int64_t num_rows, int64_t head_dim) {
    const int64_t padded = (num_rows + kRowGroup - 1) / kRowGroup * kRowGroup;
    return padded * (num_words<Words>(head_dim) + 1) * 4;
  }
  const float* group(int64_t g) const { return rows + g * words * kRowGroup; }
  Vec origin(int64_t g, int v) const { return load(origins + g * kRowGroup + v * kLanes); }
};

template <class T, class Words>
static void prepare_hip_rows(const void* const* rows, int64_t num_rows, int64_t head_dim,
                             std::byte* queries) {
  const HipRows<Words> prepared(queries, num_rows, head_dim);
  typename Words::Word row[kMaxHeadDim];
  for (int64_t r = 0; r < prepared.groups * kRowGroup; ++r) {
    copy_words<T, Words>(rows[std::min(r, num_rows - 1)], head_dim, row);
    float* dest = prepared.rows + r / kRowGroup * prepared.words * kRowGroup + r % kRowGroup;
    for (int64_t d = 0; d < prepared.words; ++d) std::memcpy(dest + d * kRowGroup, row + d, 4);
  }
  std::fill_n(prepared.origins, prepared.groups * kRowGroup, 0.0f);
}

// 16 keys as rows of words: where they lie if they can be read there, or in `copy`.
template <class T, class Words>
struct HipKeys {
  using Word = typename Words::Word;
  static constexpr bool kInPlace = sizeof(T) == sizeof(typename Words::Number);

  const Word* first;
  int64_t stride;

  // Keys that lie row_bytes apart.
  HipKeys(const std::byte* run, int64_t row_bytes, int64_t head_dim, Word* copy)
      : first(reinterpret_cast<const Word*>(run)),
        stride(row_bytes / static_cast<int64_t>(sizeof(Word))) {
    const bool aligned = (reinterpret_cast<uintptr_t>(run) | row_bytes) % sizeof(Word) == 0;
    if (kInPlace && head_dim % Words::kNumbers == 0 && aligned) return;
    first = copy;
    stride = padded_dim(head_dim);
    for (int i = 0; i < kHipRun; ++i) fill(run + i * row_bytes, head_dim, copy + i * stride);
  }

  HipKeys(const void* const* keys, int64_t head_dim, Word* copy)
      : first(copy), stride(padded_dim(head_dim)) {
    for (int i = 0; i < kHipRun; ++i) fill(keys[i], head_dim, copy + i * stride);
  }

  static void fill(const void* key, int64_t head_dim, Word* dest) {
    if constexpr (kInPlace) {
      copy_words<T, Words>(key, head_dim, dest);
    } else {
      const T* source = static_cast<const T*>(key);
      int64_t d = 0;
      for (; d + kLanes <= head_dim; d += kLanes) store(dest + d, load_floats(source + d));
      if (d < head_dim) store(dest + d, load_floats(source + d, head_dim - d));
    }
  }
};

// scores[16 keys][16 rows]
template <class T, class Words>
static void score_group(const HipKeys<T, Words>& keys, const float* rows, int64_t words,
                        float* scores) {
  constexpr int kMost = std::min(16, kSums / kGroupVectors);
  for_parts(kHipRun, kMost, [&](int64_t begin, int64_t count) {
    score_function<Words, kGroupVectors, kRowGroup>(count,
                                                    std::make_integer_sequence<int, kMost>())(
        keys.first + begin * keys.stride, keys.stride, rows, words, scores + begin * kRowGroup);
  });
}

// The greatest lane of each of kLanes vectors.
SPARSE_ATTN_INLINE Vec max_across(Vec* x) {
  transpose(x);
  Vec top = x[0];
  for (int i = 1; i < kLanes; ++i) top = maximum(x[i], top);
  return top;
}

// top[v] is the greatest score of each row of a group.
SPARSE_ATTN_INLINE void max_of_keys(const float* scores, Vec* top) {
  for (int v = 0; v < kGroupVectors; ++v) {
    Vec chain[4];
    for (Vec& x : chain) x = broadcast(kMinusInfinity);
    for (int i = 0; i < kHipRun; ++i) {
      chain[i % 4] = maximum(load(scores + i * kRowGroup + v * kLanes), chain[i % 4]);
    }
    top[v] = maximum(maximum(chain[0], chain[1]), maximum(chain[2], chain[3]));
  }
}

static inline void prefetch_key(const void* key, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) {
    __builtin_prefetch(static_cast<const std::byte*>(key) + i);
  }
}

template <class T, class Words>
static void score_hip_rows(const std::byte* queries, int64_t num_rows, int64_t head_dim,
                           const void* const* keys, int64_t count, float* best) {
  const HipRows<Words> rows(queries, num_rows, head_dim);
  alignas(64) typename Words::Word copy[kHipRun * kMaxHeadDim];
  alignas(64) float scores[kHipRun * kRowGroup];
  for (int64_t j = 0; j < count; j += kHipRun) {
    if (j + kHipRun < count) {
      for (int i = 0; i < kHipRun; ++i) prefetch_key(keys[j + kHipRun + i], head_dim * sizeof(T));
    }
    const HipKeys<T, Words> run(keys + j, head_dim, copy);
    Vec top[kHipRun];
    for (Vec& x : top) x = broadcast(kMinusInfinity);
    for (int64_t g = 0; g < rows.groups; ++g) {
      score_group(run, rows.group(g), rows.words, scores);
      for (int i = 0; i < kHipRun; ++i) {
        for (int v = 0; v < kGroupVectors; ++v) {
          const Vec score = load(scores + i * kRowGroup + v * kLanes);
          top[i] = maximum(score - rows.origin(g, v), top[i]);
        }
      }
    }
    for (int i = 0; i < kHipRun; i += kLanes) store(best + j + i, max_across(top + i));
  }
}

template <class T, class Words>
static void set_origins_of_rows(std::byte* queries, int64_t num_rows, int64_t head_dim,
                                const void* const* keys, int64_t count) {
  const HipRows<Words> rows(queries, num_rows, head_dim);
  alignas(64) typename Words::Word copy[kHipRun * kMaxHeadDim];
  alignas(64) float scores[kHipRun * kRowGroup];
  const int64_t num_origins = rows.groups * kRowGroup;
  std::fill_n(rows.origins, num_origins, kMinusInfinity);
  for (int64_t j = 0; j < count; j += kHipRun) {
    const HipKeys<T, Words> run(keys + j, head_dim, copy);
    for (int64_t g = 0; g < rows.groups; ++g) {
      score_group(run, rows.group(g), rows.words, scores);
      Vec top[kGroupVectors];
      max_of_keys(scores, top);
      for (int v = 0; v < kGroupVectors; ++v) {
        store(rows.origins + g * kRowGroup + v * kLanes, maximum(top[v], rows.origin(g, v)));
      }
    }
  }
  for (int64_t r = 0; r < num_origins; ++r) {
    if (!(std::abs(rows.origins[r]) < -kMinusInfinity)) rows.origins[r] = 0.0f;
  }
}

// Sixteen runs at a time, each by the rows of all searches; the next run is fetched meanwhile.
template <class T, class Words>
static void score_runs_of_rows(const std::byte* const* queries, int64_t num_searches,
                               int64_t num_rows, int64_t head_dim, const std::byte* const* runs,
                               int64_t count, int64_t row_bytes, float* const* best) {
  constexpr int64_t kRuns = 16, kMostTogether = 8;
  alignas(64) typename Words::Word copy[kHipRun * kMaxHeadDim];
  alignas(64) float scores[kHipRun * kRowGroup];
  Vec tops[kMostTogether][kRuns];
  for (int64_t first = 0; first < num_searches; first += kMostTogether) {
    const int64_t together = std::min(kMostTogether, num_searches - first);
    for (int64_t j = 0; j < count; j += kRuns) {
      const int64_t num_runs = std::min(kRuns, count - j);
      for (int64_t r = 0; r < num_runs; ++r) {
        for (int i = 0; j + r + 1 < count && i < kHipRun; ++i) {
          prefetch_key(runs[j + r + 1] + i * row_bytes, head_dim * sizeof(T));
        }
        const HipKeys<T, Words> run(runs[j + r], row_bytes, head_dim, copy);
        for (int64_t t = 0; t < together; ++t) {
          const HipRows<Words> rows(queries[first + t], num_rows, head_dim);
          tops[t][r] = broadcast(kMinusInfinity);
          for (int64_t g = 0; g < rows.groups; ++g) {
            score_group(run, rows.group(g), rows.words, scores);
            Vec top[kGroupVectors];
            max_of_keys(scores, top);
            for (int v = 0; v < kGroupVectors; ++v) {
              tops[t][r] = maximum(top[v] - rows.origin(g, v), tops[t][r]);
            }
          }
        }
      }
      for (int64_t t = 0; t < together; ++t) {
        std::fill(tops[t] + num_runs, tops[t] + kRuns, broadcast(kMinusInfinity));
        float greatest[kRuns];
        for (int64_t r = 0; r < kRuns; r += kLanes) store(greatest + r, max_across(tops[t] + r));
        std::copy_n(greatest, num_runs, best[first + t] + j);
      }
    }
  }
}

template <class T, class Words = FloatWords>
static constexpr HipKernel kFmaHipOfRows = {
    .query_bytes = HipRows<Words>::bytes,
    .prepare_queries = prepare_hip_rows<T, Words>,
    .set_origins = set_origins_of_rows<T, Words>,
    .score = score_hip_rows<T, Words>,
    .score_runs = score_runs_of_rows<T, Words>,
    .enter = enter_kernel,
    .leave = leave_kernel,
};

static constexpr ByDType<HipKernel> kFmaHipsOfRows = {
    .float32 = &kFmaHipOfRows<float>,
    .bfloat16 = &kFmaHipOfRows<BFloat16>,
    .float16 = &kFmaHipOfRows<Float16>,
};

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
