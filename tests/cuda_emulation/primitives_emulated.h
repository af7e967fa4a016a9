// The primitives for the emulator. `from` is where a kernel calls them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <source_location>

#include "cuda/primitives.h"
#include "emulator.h"

namespace sparse_attn::cuda {

using Where = std::source_location;

inline emulator::Site site_of(emulator::Op op, const Where& where) {
  return {op, static_cast<int>(where.line()), where.file_name()};
}

inline int thread_index() { return emulator::current->index; }
inline int block_index() { return emulator::block->index; }

inline void sync_block(Where from = Where::current()) {
  emulator::sync_block(site_of(emulator::Op::kSyncBlock, from));
}

inline void sync_warp(Where from = Where::current()) {
  const emulator::Site site = site_of(emulator::Op::kSyncWarp, from);
  if (emulator::is_skipped(site)) return;
  emulator::collective(site, nullptr, [](emulator::Arguments) { emulator::order_warp(); });
}

inline float shuffle_xor(float x, int mask, Where from = Where::current()) {
  struct Argument {
    float x;
    int mask;
    float result;
  } argument{x, mask, 0};
  emulator::collective(site_of(emulator::Op::kShuffle, from), &argument,
                       [](emulator::Arguments lanes) {
                         for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
                           auto* to = static_cast<Argument*>(lanes[lane]);
                           to->result = static_cast<Argument*>(lanes[lane ^ to->mask])->x;
                         }
                       });
  return argument.result;
}

inline float exp2_approx(float x) { return std::exp2(x); }
inline float log2_approx(float x) { return std::log2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

template <class To, class From>
To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &x, sizeof(To));
  return result;
}

inline float to_float(BFloat16 x) { return bits_as<float>(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) { return static_cast<float>(bits_as<_Float16>(x.bits)); }

template <class Element>
Element from_float(float x);
template <>
inline BFloat16 from_float<BFloat16>(float x) {  // to the nearest, ties to even
  if (std::isnan(x)) return {0x7FFF};
  const auto bits = bits_as<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
template <>
inline Float16 from_float<Float16>(float x) {
  return {bits_as<uint16_t>(static_cast<_Float16>(x))};
}

template <class Element>
uint32_t pack(float low, float high) {
  const uint32_t bits = from_float<Element>(high).bits;
  return from_float<Element>(low).bits | bits << 16;
}

inline uint32_t shared_memory() { return 0; }

template <class T>
T load_shared(uint32_t address, Where from = Where::current()) {
  T value;
  const emulator::Site site = site_of(emulator::Op::kLoadShared, from);
  std::memcpy(&value, emulator::shared_access(address, sizeof(T), false, false, site), sizeof(T));
  return value;
}
template <class T>
void store_shared(uint32_t address, T value, Where from = Where::current()) {
  const emulator::Site site = site_of(emulator::Op::kStoreShared, from);
  std::memcpy(emulator::shared_access(address, sizeof(T), true, false, site), &value, sizeof(T));
}

template <class T>
T load(Global<const T> source, Where from = Where::current()) {
  const emulator::Site site = site_of(emulator::Op::kLoad, from);
  T value;
  std::memcpy(&value, emulator::global_access(RawPointer::of(source), sizeof(T), false, site),
              sizeof(T));
  return value;
}

template <class Value>
void store_bytes(void* target, const Value& value, const Where& from) {
  const emulator::Site site = site_of(emulator::Op::kStore, from);
  const void* data = emulator::global_access(target, sizeof(Value), true, site);
  std::memcpy(const_cast<void*>(data), &value, sizeof(Value));
}
template <class T>
void store(Global<T> target, T value, Where from = Where::current()) {
  store_bytes(RawPointer::of(target), value, from);
}
template <class T>
void store_chunk(Global<T> target, Int4 value, Where from = Where::current()) {
  store_bytes(RawPointer::of(target), value, from);
}

struct MatrixRow {
  uint32_t* result;
  uint32_t address;
  const uint16_t* row;
};

template <bool kTransposed>
void exchange_matrices(emulator::Arguments lanes) {
  emulator::Counters& counters = emulator::block->report->counters;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const uint16_t* rows[8];
    int used[8] = {}, most = 0;  // of the 8 groups of 4 banks
    for (int i = 0; i < 8; ++i) {
      const auto* from = static_cast<MatrixRow*>(lanes[matrix * 8 + i]);
      rows[i] = from->row;
      most = std::max(most, ++used[from->address / 16 % 8]);
    }
    ++counters.matrix_phases;
    counters.matrix_conflicts += most - 1;
    for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
      const int r = lane / 4, c = lane % 4 * 2;
      const uint32_t low = kTransposed ? rows[c][r] : rows[r][c];
      const uint32_t high = kTransposed ? rows[c + 1][r] : rows[r][c + 1];
      static_cast<MatrixRow*>(lanes[lane])->result[matrix] = low | high << 16;
    }
  }
}

template <bool kTransposed>
void load_matrices_as(uint32_t (&r)[4], uint32_t address, const Where& from) {
  const emulator::Site site = site_of(emulator::Op::kLoadMatrices, from);
  const void* row = emulator::shared_access(address, 16, false, true, site);
  MatrixRow argument{r, address, static_cast<const uint16_t*>(row)};
  emulator::collective(site, &argument, exchange_matrices<kTransposed>);
}
inline void load_matrices(uint32_t (&r)[4], uint32_t row, Where from = Where::current()) {
  load_matrices_as<false>(r, row, from);
}
inline void load_matrices_transposed(uint32_t (&r)[4], uint32_t row,
                                     Where from = Where::current()) {
  load_matrices_as<true>(r, row, from);
}

struct Fragments {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
};

template <class Element>
void multiply_fragments(emulator::Arguments lanes) {
  ++emulator::block->report->counters.products;
  float a[16][16], b[16][8], d[16][8];
  const auto low = [](uint32_t x) { return to_float(Element{static_cast<uint16_t>(x)}); };
  const auto high = [](uint32_t x) { return to_float(Element{static_cast<uint16_t>(x >> 16)}); };
  for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
    const auto* from = static_cast<Fragments*>(lanes[lane]);
    const int r = lane / 4, c = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      a[r + i % 2 * 8][c + i / 2 * 8] = low(from->a[i]);
      a[r + i % 2 * 8][c + i / 2 * 8 + 1] = high(from->a[i]);
      d[r + i / 2 * 8][c + i % 2] = from->d[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[c + i * 8][r] = low(from->b[i]);
      b[c + i * 8 + 1][r] = high(from->b[i]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    using Row __attribute__((vector_size(32))) = float;
    Row sum;
    std::memcpy(&sum, d[m], sizeof(sum));
    for (int k = 0; k < 16; ++k) {
      Row row;
      std::memcpy(&row, b[k], sizeof(row));
      sum += a[m][k] * row;
    }
    std::memcpy(d[m], &sum, sizeof(sum));
  }
  for (int lane = 0; lane < emulator::kWarpSize; ++lane) {
    const auto* to = static_cast<Fragments*>(lanes[lane]);
    for (int i = 0; i < 4; ++i) to->d[i] = d[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  }
}

template <class Element>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                  Where from = Where::current()) {
  Fragments argument{d, a, {b0, b1}};
  emulator::collective(site_of(emulator::Op::kMultiply, from), &argument,
                       multiply_fragments<Element>);
}

template <class T>
void copy_async(uint32_t target, Global<const T> source, bool valid,
                Where from = Where::current()) {
  emulator::copy_async(target, RawPointer::of(source), valid, site_of(emulator::Op::kCopy, from));
}
inline void copy_commit(Where from = Where::current()) {
  emulator::commit(site_of(emulator::Op::kCommit, from));
}
template <int kGroupsLeft>
void copy_wait(Where from = Where::current()) {
  emulator::wait(kGroupsLeft, site_of(emulator::Op::kWait, from));
}

// Where launches go: what they may touch, how they run, and what came of the last one.
struct Emulation {
  emulator::Memory memory;
  emulator::Options options;
  emulator::Report report;
};
using Stream = Emulation*;

template <class Kernel>
const char* launch(int blocks, const typename Kernel::Arguments& arguments, Stream stream) {
  static_assert(sizeof(arguments) <= 4096, "what a launch may carry");
  stream->report = emulator::launch(blocks, Kernel::kThreads, Kernel::kSharedBytes, stream->memory,
                                    stream->options, [&] { Kernel::run(arguments); });
  return stream->report.error.empty() ? nullptr : stream->report.error.c_str();
}

}  // namespace sparse_attn::cuda
