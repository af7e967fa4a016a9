// Fibers, their order, and barriers.
#include "emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <sstream>

namespace emulator {

constinit thread_local Block* block = nullptr;
constinit thread_local Thread* current = nullptr;

const char* name_of(Op op) {
  static const char* const names[] = {
      "none",         "sync_block", "sync_warp",   "shuffle",   "load_matrices",
      "multiply_add", "copy_async", "copy_commit", "copy_wait", "load_shared",
      "store_shared", "load",       "store"};
  return names[static_cast<int>(op)];
}

std::string describe(const Site& site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(name_of(site.op)) + " at " + (slash != nullptr ? slash + 1 : site.file) + ":" +
         std::to_string(site.line);
}

// Saves the registers that a function must keep, swaps stacks, and restores the other's.
extern "C" void emulator_switch(void** save, void* load);
#if defined(__x86_64__)
asm(R"(
.text
.globl emulator_switch
.type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size emulator_switch, .-emulator_switch
)");
#else
#error "the emulator switches stacks on x86-64 alone"
#endif

namespace {

constexpr size_t kStack = 64 << 10;
constexpr size_t kGuard = 4 << 10;

// A stack for each thread, kept for the life of the process.
uint8_t* stacks() {
  static uint8_t* const memory = [] {
    constexpr int kThreads = kMaxWarps * kWarpSize;
    void* mapped = mmap(nullptr, kThreads * kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    auto* bytes = static_cast<uint8_t*>(mapped);
    for (int i = 0; i < kThreads; ++i) mprotect(bytes + i * kStack, kGuard, PROT_NONE);
    return bytes;
  }();
  return memory;
}

uint32_t random() {
  uint64_t& x = block->random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return static_cast<uint32_t>(x >> 16);
}

void make_ready(const Thread& thread) {
  const int warp = thread.warp;
  block->ready[warp][block->num_ready[warp]++] = static_cast<uint8_t>(thread.lane);
  block->warps_ready |= 1u << warp;
}

// A warp mostly runs on until it must wait, so that warps get far ahead of each other. Its lanes
// take turns at random.
Thread* choose(int warp) {
  if (block->warps_ready == 0) return nullptr;
  if ((block->warps_ready >> warp & 1) == 0 || (random() & 63) == 0) {
    int nth = static_cast<int>(random() % __builtin_popcount(block->warps_ready));
    uint32_t warps = block->warps_ready;
    while (nth-- > 0) warps &= warps - 1;
    warp = __builtin_ctz(warps);
  }
  uint8_t* lanes = block->ready[warp];
  const uint32_t chosen = random() % block->num_ready[warp];
  const int lane = lanes[chosen];
  lanes[chosen] = lanes[--block->num_ready[warp]];
  if (block->num_ready[warp] == 0) block->warps_ready &= ~(1u << warp);
  return &block->threads[warp * kWarpSize + lane];
}

std::string deadlock() {
  std::map<Site, int> sites;
  for (const Thread& thread : block->threads) {
    if (!thread.is_done) ++sites[thread.site];
  }
  std::ostringstream text;
  text << "deadlock:";
  for (const auto& [site, threads] : sites)
    text << " " << threads << " in " << describe(site) << ";";
  return text.str();
}

void resume(Thread* next, void** save) {
  current = next;
  emulator_switch(save, next->stack_pointer);
}

void yield() {
  Thread* self = current;
  step(self->site);
  Thread* next = choose(self->warp);
  if (next == nullptr) fail(deadlock(), self->site);
  if (next != self) resume(next, &self->stack_pointer);
}

void release_block() {
  block->waiting_in_block = 0;
  for (int warp = 0; warp < block->num_warps; ++warp) ++block->clock[warp];
  for (Thread& thread : block->threads) {
    std::copy_n(block->clock, block->num_warps, thread.known);
    if (!thread.is_done) make_ready(thread);
  }
}

void finish() {
  if (!current->copies.empty()) fail("a copy is still under way at the end", {});
  current->is_done = true;
  --block->alive;
  if (block->alive > 0 && block->waiting_in_block == block->alive) release_block();
  void* unused;
  if (block->alive == 0) emulator_switch(&unused, block->main_stack_pointer);
  Thread* next = choose(current->warp);
  if (next == nullptr) fail(deadlock(), {});
  resume(next, &unused);
}

void enter() {
  (*block->kernel)();
  finish();
}

void prepare_stack(Thread& thread) {
  // Stacks begin in different cache sets, because the lanes of a warp work by turns.
  const size_t colour = thread.index * 13 % 256 * 64;
  uint8_t* stack = stacks() + thread.index * kStack;
  auto* top = reinterpret_cast<uintptr_t*>(stack + kStack - 64 - colour);
  *--top = 0;  // where a call would have left its return address: keeps the stack aligned
  *--top = reinterpret_cast<uintptr_t>(&enter);
  for (int i = 0; i < 6; ++i) *--top = 0;
  thread.stack_pointer = top;
}

void start(Block& state, int index, int64_t shared_bytes) {
  state.index = index;
  state.alive = state.num_threads;
  state.steps = 0;
  state.shared.assign(shared_bytes, 0xFF);  // NaN in every float format
  state.granules.assign(shared_bytes / kGranule, {});
  state.reads.assign(shared_bytes / kGranule * state.num_warps, {});
  state.threads.assign(state.num_threads, {});
  state.waiting_in_block = 0;
  std::fill_n(state.waiting_in_warp, kMaxWarps, 0);
  std::fill_n(state.num_ready, kMaxWarps, 0);
  std::fill_n(state.clock, kMaxWarps, 1);
  state.warps_ready = 0;
  for (int i = 0; i < state.num_threads; ++i) {
    Thread& thread = state.threads[i];
    thread.index = i;
    thread.warp = i / kWarpSize;
    thread.lane = i % kWarpSize;
    prepare_stack(thread);
    make_ready(thread);
  }
}

const char* refusal_of(int64_t blocks, int threads, int64_t shared_bytes, const Target& target) {
  if (blocks < 1 || blocks > 0x7FFFFFFF) return "the grid has no such size";
  if (threads < kWarpSize || threads % kWarpSize != 0) return "a block is made of whole warps";
  if (threads > kMaxWarps * kWarpSize) return "too many threads for a block";
  if (shared_bytes > target.shared_bytes) return "too much shared memory for the target";
  if (shared_bytes % kGranule != 0) return "shared memory ends within a word";
  return nullptr;
}

}  // namespace

void fail(const std::string& what, Site site) {
  std::ostringstream text;
  text << what;
  if (site.op != Op::kNone) text << " (" << describe(site) << ")";
  text << " in block " << block->index << ", thread " << current->index;
  block->report->error = text.str();
  void* unused;
  emulator_switch(&unused, block->main_stack_pointer);
  __builtin_unreachable();
}

void step(Site site) {
  if (++block->steps > block->options->most_steps) fail("runs on without end", site);
}

void count(Site site) {
  if (current->lane == 0) ++block->report->sites[site];
}

bool is_skipped(Site site) {
  count(site);
  return site == block->options->skipped;
}

int64_t shift_of(Site site) {
  count(site);
  return site == block->options->shifted ? block->options->shift : 0;
}

void sync_block(Site site) {
  if (is_skipped(site)) return;
  current->site = site;
  if (++block->waiting_in_block == block->alive) release_block();
  yield();
  current->site = {};
}

void order_warp() {
  const int warp = current->warp;
  ++block->clock[warp];
  Thread* lanes = &block->threads[warp * kWarpSize];
  uint32_t known[kMaxWarps] = {};
  for (int lane = 0; lane < kWarpSize; ++lane) {
    for (int other = 0; other < block->num_warps; ++other) {
      known[other] = std::max(known[other], lanes[lane].known[other]);
    }
  }
  known[warp] = block->clock[warp];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    std::copy_n(known, block->num_warps, lanes[lane].known);
  }
}

void collective(Site site, void* argument, void (*combine)(Arguments arguments)) {
  const int warp = current->warp;
  current->site = site;
  current->argument = argument;
  if (++block->waiting_in_warp[warp] < kWarpSize) {
    yield();
    current->site = {};
    return;
  }
  block->waiting_in_warp[warp] = 0;
  void* arguments[kWarpSize];
  const Thread* lanes = &block->threads[warp * kWarpSize];
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (!(lanes[lane].site == site)) {
      fail("diverged: lane " + std::to_string(lane) + " is in " + describe(lanes[lane].site), site);
    }
    arguments[lane] = lanes[lane].argument;
  }
  combine(arguments);
  for (int lane = 0; lane < kWarpSize; ++lane) {
    if (lane != current->lane) make_ready(lanes[lane]);
  }
  current->site = {};
}

Report launch(int64_t blocks, int threads, int64_t shared_bytes, Memory& memory,
              const Options& options, const std::function<void()>& kernel) {
  Report report;
  if (const char* refusal = refusal_of(blocks, threads, shared_bytes, options.target)) {
    report.error = refusal;
    return report;
  }
  Block state;
  block = &state;
  state.num_threads = threads;
  state.num_warps = threads / kWarpSize;
  state.memory = &memory;
  state.options = &options;
  state.report = &report;
  state.kernel = &kernel;
  state.random = options.seed * 0x9E3779B97F4A7C15u + 1;
  memory.begin_launch();
  for (int64_t index = 0; index < blocks && report.error.empty(); ++index) {
    start(state, static_cast<int>(index), shared_bytes);
    resume(choose(0), &state.main_stack_pointer);
  }
  return report;
}

}  // namespace emulator
