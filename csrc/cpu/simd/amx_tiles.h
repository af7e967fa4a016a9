// Tiles of AMX and vectors of bfloat16: configuration, rearranging, rounding.
//
// A matrix is cut into tiles of 1 KiB: [16][32] bfloat16 as the left factor of a product, [16
// pairs][16][2] as the right one (consecutive rows paired), [16][16] float32 as the result.
#pragma once

#include "cpu/simd/vector_math.h"

namespace sparse_attn::cpu::SPARSE_ATTN_ISA {

inline constexpr int64_t kTile = 512;       // bfloat16 elements in one tile
inline constexpr int64_t kFloatTile = 256;  // float32 elements in one tile

static inline int64_t padded_dim(int64_t n) { return (n + 31) / 32 * 32; }

// Orders ordinary memory accesses against tile loads and stores.
static inline void fence_compiler() { asm volatile("" ::: "memory"); }

struct TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static inline void configure_tiles() {
  static constexpr TileConfig kConfig;
  _tile_loadconfig(&kConfig);
}

static inline uint32_t enter_kernel() {
  constexpr uint32_t kFlushResults = 0x8000, kFlushInputs = 0x40;  // of denormal numbers
  const uint32_t saved = _mm_getcsr();
  _mm_setcsr((saved & ~kFlushInputs) | kFlushResults);
  configure_tiles();
  return saved;
}

static inline void leave_kernel(uint32_t saved) {
  _tile_release();
  _mm_setcsr(saved);
}

static inline void zero_sums() {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
}

// Sums of products in tiles 0 to 3, two by two, one block of four after the other. The sums of a
// block are stored with the first product of the next one, each tile while the products before it
// are made: all stored at once would hold up the loads that follow.
class TileSums {
 public:
  // Where the sums of a block are, in floats: from a row of a tile to the next, from a tile to the
  // one on its right, and to the one below.
  struct Place {
    float* p = nullptr;
    int64_t row_stride = 0, right = 0, below = 0;

    float* tile(int i) const { return p + (i & 1) * right + (i >> 1) * below; }
  };

  // From now on products are added to those at `place`, or to 0.
  void start(const Place& place, bool from_zero) {
    next_ = place;
    from_zero_ = from_zero;
    begun_ = false;
  }

  // Adds the product of tiles 4 and 5, one below the other, and 6 and 7, side by side.
  void add() {
    if (begun_) {
      multiply();
      return;
    }
    if (held_.p == nullptr) {
      from_zero_ ? zero_sums() : load(next_);
      multiply();
    } else if (from_zero_) {
      _tile_stored(0, held_.tile(0), held_.row_stride * 4);
      _tile_zero(0);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stored(1, held_.tile(1), held_.row_stride * 4);
      _tile_zero(1);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stored(2, held_.tile(2), held_.row_stride * 4);
      _tile_zero(2);
      _tile_dpbf16ps(2, 5, 6);
      _tile_stored(3, held_.tile(3), held_.row_stride * 4);
      _tile_zero(3);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_stored(0, held_.tile(0), held_.row_stride * 4);
      _tile_loadd(0, next_.tile(0), next_.row_stride * 4);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stored(1, held_.tile(1), held_.row_stride * 4);
      _tile_loadd(1, next_.tile(1), next_.row_stride * 4);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stored(2, held_.tile(2), held_.row_stride * 4);
      _tile_loadd(2, next_.tile(2), next_.row_stride * 4);
      _tile_dpbf16ps(2, 5, 6);
      _tile_stored(3, held_.tile(3), held_.row_stride * 4);
      _tile_loadd(3, next_.tile(3), next_.row_stride * 4);
      _tile_dpbf16ps(3, 5, 7);
    }
    mark_begun();
  }

  // Ends a block that may have had no product.
  void finish() {
    if (begun_ || !from_zero_) return;
    store();
    zero_sums();
    mark_begun();
  }

  // After the last block.
  void store() {
    if (held_.p == nullptr) return;
    _tile_stored(0, held_.tile(0), held_.row_stride * 4);
    _tile_stored(1, held_.tile(1), held_.row_stride * 4);
    _tile_stored(2, held_.tile(2), held_.row_stride * 4);
    _tile_stored(3, held_.tile(3), held_.row_stride * 4);
    held_.p = nullptr;
  }

 private:
  static void multiply() {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }

  static void load(const Place& place) {
    _tile_loadd(0, place.tile(0), place.row_stride * 4);
    _tile_loadd(1, place.tile(1), place.row_stride * 4);
    _tile_loadd(2, place.tile(2), place.row_stride * 4);
    _tile_loadd(3, place.tile(3), place.row_stride * 4);
  }

  void mark_begun() {
    held_ = next_;
    begun_ = true;
  }

  Place held_, next_;
  bool from_zero_ = false, begun_ = false;
};

// Lanes of the 32 elements from `d` on that lie inside a row of n.
static inline __mmask32 lanes_within(int64_t d, int64_t n) {
  if (n <= d) return 0;
  return n - d >= 32 ? ~__mmask32{0} : (__mmask32{1} << (n - d)) - 1;
}

static inline void transpose_16x16(__m512i* x) {
  __m512i y[16];
  for (int i = 0; i < 16; i += 2) {
    y[i] = _mm512_unpacklo_epi32(x[i], x[i + 1]);
    y[i + 1] = _mm512_unpackhi_epi32(x[i], x[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    x[i] = _mm512_unpacklo_epi64(y[i], y[i + 2]);
    x[i + 1] = _mm512_unpackhi_epi64(y[i], y[i + 2]);
    x[i + 2] = _mm512_unpacklo_epi64(y[i + 1], y[i + 3]);
    x[i + 3] = _mm512_unpackhi_epi64(y[i + 1], y[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    y[i] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0x88);
    y[i + 4] = _mm512_shuffle_i32x4(x[i], x[i + 4], 0xdd);
    y[i + 8] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0x88);
    y[i + 12] = _mm512_shuffle_i32x4(x[i + 8], x[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    x[i] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0x88);
    x[i + 8] = _mm512_shuffle_i32x4(y[i], y[i + 8], 0xdd);
  }
}

// The 16 elements from `d` of two rows of n, element by element side by side.
static inline __m512i load_pair(const void* even, const void* odd, int64_t d, int64_t n) {
  const __mmask16 mask = static_cast<__mmask16>(lanes_within(d, n));
  const __m256i a = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(even) + d);
  const __m256i b = _mm256_maskz_loadu_epi16(mask, static_cast<const uint16_t*>(odd) + d);
  return _mm512_or_si512(_mm512_cvtepu16_epi32(a), _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}

// 16 rows, elements [d, d + 32) of n, as a left factor.
static inline void pack_left(const void* const* rows, int64_t d, int64_t n, uint16_t* tile) {
  const __mmask32 mask = lanes_within(d, n);
  for (int i = 0; i < 16; ++i) {
    const uint16_t* row = static_cast<const uint16_t*>(rows[i]);
    _mm512_store_si512(tile + i * 32, _mm512_maskz_loadu_epi16(mask, row + d));
  }
}

// The same 16 rows and elements transposed, as a right factor: its columns are the rows.
static inline void pack_right_transposed(const void* const* rows, int64_t d, int64_t n,
                                         uint16_t* tile) {
  const __mmask32 mask = lanes_within(d, n);
  __m512i x[16];
  for (int i = 0; i < 16; ++i) {
    const uint16_t* row = static_cast<const uint16_t*>(rows[i]);
    x[i] = _mm512_maskz_loadu_epi16(mask, row + d);
  }
  transpose_16x16(x);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, x[i]);
}

// 32 rows, elements [d, d + 16) of n, as a right factor.
static inline void pack_right(const void* const* rows, int64_t d, int64_t n, uint16_t* tile) {
  for (int i = 0; i < 16; ++i) {
    _mm512_store_si512(tile + i * 32, load_pair(rows[2 * i], rows[2 * i + 1], d, n));
  }
}

// The same 32 rows and elements transposed, as a left factor: its columns are the rows.
static inline void pack_left_transposed(const void* const* rows, int64_t d, int64_t n,
                                        uint16_t* tile) {
  __m512i x[16];
  for (int i = 0; i < 16; ++i) x[i] = load_pair(rows[2 * i], rows[2 * i + 1], d, n);
  transpose_16x16(x);
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, x[i]);
}

// 2^x to 4e-6 in the visible lanes, 0 in the others; exactly 0 for -inf.
static inline __m512 exp2_bf16(__m512 x, __mmask16 visible = 0xffff) {
  const __m512 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 p = _mm512_set1_ps(1.3534166722e-2f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.2011462904e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4144275554e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9300383472e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0000025934f));
  return _mm512_maskz_scalef_ps(visible, p, x);
}

}  // namespace sparse_attn::cpu::SPARSE_ATTN_ISA
