// Runs CUDA kernels on a CPU, a fiber for each thread and one block after the other, and reports
// what a GPU lets pass in silence: races, reads of memory that nobody wrote, accesses out of
// bounds, copies read before they land, divergent collectives, deadlocks, blocks that depend on
// each other.
//
// Races are found by happens-before and not by luck. Every 4 bytes of shared memory remember who
// wrote and who read them last, and when. The clock of a warp advances at each barrier, and `known`
// of a thread says up to which time of every warp the accesses happen before what it does now.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <string>
#include <vector>

namespace emulator {

inline constexpr int kWarpSize = 32;
inline constexpr int kMaxWarps = 16;
inline constexpr int kGranule = 4;     // bytes that the race detector tells apart
inline constexpr int kCopyBytes = 16;  // of an asynchronous copy

enum class Op : uint8_t {
  kNone,
  kSyncBlock,
  kSyncWarp,
  kShuffle,
  kLoadMatrices,
  kMultiply,
  kCopy,
  kCommit,
  kWait,
  kLoadShared,
  kStoreShared,
  kLoad,
  kStore
};
const char* name_of(Op op);

// A call of a primitive in the source.
struct Site {
  Op op = Op::kNone;
  int line = 0;
  const char* file = "";

  bool operator==(const Site& other) const {
    return op == other.op && line == other.line &&
           (file == other.file || std::strcmp(file, other.file) == 0);
  }
  bool operator<(const Site& other) const {
    const int order = std::strcmp(file, other.file);
    return order != 0 ? order < 0 : line != other.line ? line < other.line : op < other.op;
  }
};
std::string describe(const Site& site);

// What GPUs differ in.
struct Target {
  int64_t shared_bytes = 163 << 10;  // of a block
};
inline constexpr Target kSm80{163 << 10}, kSm89{99 << 10};

struct Options {
  uint64_t seed = 1;
  bool checks_races = true;
  Target target = kSm80;
  int64_t most_steps = int64_t{1} << 28;  // of a block: accesses, and turns of threads
  // Faults that a test plants: a site that does nothing, and one whose address is wrong.
  Site skipped{}, shifted{};
  int shift = 0;  // bytes
};

struct Counters {
  int64_t products = 0;
  int64_t matrix_phases = 0, matrix_conflicts = 0;  // ldmatrix: 8 rows each; wavefronts too many
};

struct Report {
  std::string error;  // empty if all went well
  std::map<Site, int64_t> sites;
  Counters counters;
};

// Global memory that a kernel may touch. All else is out of bounds.
class Memory {
 public:
  void add(const void* data, size_t bytes, bool is_writable = false);
  void begin_launch();
  // What is wrong with an access by a block, or null.
  const char* refusal_of(const void* data, size_t bytes, bool writes, int block);

 private:
  struct Range {
    uintptr_t begin, end;
    bool is_writable;
    std::vector<int> writers;  // of 2 bytes each: block + 1
  };
  std::vector<Range> ranges_;
  size_t last_ = 0;
};

Report launch(int64_t blocks, int threads, int64_t shared_bytes, Memory& memory,
              const Options& options, const std::function<void()>& kernel);

// ---- What primitives are made of. All of it is about the thread at work. ----

struct Copy {
  uint32_t target;
  const void* source;  // null: zeros
  int group;
};

struct Thread {
  void* stack_pointer = nullptr;
  int index = 0, warp = 0, lane = 0;
  bool is_done = false;
  Site site;                 // the collective that it waits in
  void* argument = nullptr;  // of that collective, on its own stack
  uint32_t known[kMaxWarps] = {};
  std::vector<Copy> copies;
  int groups = 0;  // committed
};

struct Granule {  // of shared memory
  uint32_t write_time = 0;
  uint16_t writer = 0;      // thread + 1; 0: nobody wrote
  bool is_pending = false;  // a copy is under way
  uint8_t written = 0;      // one bit a byte
  Site site;                // of the write
};

struct Reads {        // of a granule by a warp, since the last write
  uint32_t time = 0;  // 0: none
  int lane = 0;       // kAllLanes: several
  Site site;
};
inline constexpr int kAllLanes = 255;

struct Block {
  int index = 0, num_threads = 0, num_warps = 0, alive = 0;
  int64_t steps = 0;
  std::vector<Thread> threads;
  std::vector<uint8_t> shared;
  std::vector<Granule> granules;
  std::vector<Reads> reads;  // [granules][num_warps]
  uint32_t clock[kMaxWarps];
  uint8_t ready[kMaxWarps][kWarpSize];
  int num_ready[kMaxWarps];
  uint32_t warps_ready = 0;  // one bit a warp
  int waiting_in_warp[kMaxWarps];
  int waiting_in_block = 0;
  uint64_t random = 1;
  void* main_stack_pointer = nullptr;
  Memory* memory = nullptr;
  const Options* options = nullptr;
  Report* report = nullptr;
  const std::function<void()>* kernel = nullptr;
};

extern constinit thread_local Block* block;
extern constinit thread_local Thread* current;

[[noreturn]] void fail(const std::string& what, Site site);
void step(Site site);         // fails if there were too many
void count(Site site);        // in the report
bool is_skipped(Site site);   // also counts it
int64_t shift_of(Site site);  // of its address, in bytes; also counts it

void sync_block(Site site);
// Waits for the 32 lanes of the warp. The last one calls `combine` on the arguments of all.
using Arguments = void* const (&)[kWarpSize];
void collective(Site site, void* argument, void (*combine)(Arguments arguments));
void order_warp();  // accesses of the lanes so far happen before those that follow

void* shared_access(uint32_t address, int bytes, bool writes, bool by_all_lanes, Site site);
// The address to use.
const void* global_access(const void* data, int bytes, bool writes, Site site);
void copy_async(uint32_t target, const void* source, bool valid, Site site);
void commit(Site site);
void wait(int groups_left, Site site);

}  // namespace emulator
