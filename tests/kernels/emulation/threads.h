// CUDA's threads on one thread of the CPU.
//
// A CUDA thread is a context with its own stack. It runs until it must wait for others; lots, the same in every run, help to decide which
// goes on then. A kernel that forgets to wait soon reads what is not there yet: shared memory begins as NaN. One whose threads all wait
// ends with an error that says where, as does one that reaches for memory that is not there.
//
// Not emulated: the memory model (stores are seen at once and in order), caches, and time.
#pragma once
#include <csetjmp>
#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <new>
#include <string>
#include <sys/mman.h>
#include <ucontext.h>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline uint3 threadIdx, blockIdx;  // of the thread that runs
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr int LANES = 32, POISON = 0xff, PATIENCE = 1 << 22, MULTIPROCESSORS = 7;
constexpr size_t STACK = 64 << 10, STATIC_SHARED = 48 << 10, SHARED = 227 << 10, FENCE = 4 << 10;  // bytes

struct Thread;

struct Barrier {
  const int* expected;
  int arrived = 0, phase = 0;
  std::vector<Thread*> waiting = {};
  int arrive();
  void wait(int phase, const char* where);
  void complete_if_all_arrived();
};

struct Arrival {  // of a lane at an instruction that its warp executes together
  const void* instruction;
  const char* name;
  unsigned mask;
  const void* operand;
  void* result;
};
struct Warp {
  unsigned arrived = 0;
  Arrival arrivals[LANES];
  Thread* lanes[LANES] = {};
};

struct Copy {  // under way into shared memory
  char* target;
  const void* source;
  int bytes;
  uint32_t barrier;  // of a bulk copy: shared address
};

struct Cluster;
struct Block {
  uint3 index;
  int rank, alive;
  Cluster* cluster;
  char* shared;  // static, then dynamic, then a fence that must stay as it is
  Barrier barrier;
  std::map<int, std::pair<int, Barrier>> named_barriers;
  std::vector<Warp> warps;
  std::vector<Copy> copies;  // bulk ones
};
struct Cluster {
  std::vector<Block> blocks;
  int alive;
  Barrier barrier;
};

struct Thread {
  uint3 index;
  char* stack;  // its lowest byte must stay 0
  Block* block;
  Warp* warp;
  int lane, cluster_phase = 0;
  const char* waits_in = nullptr;
  std::vector<std::vector<Copy>> copies{1};  // groups, the last one still open
  std::vector<std::vector<std::function<void()>>> products{1};  // the same of wgmma
  jmp_buf context;
};

// Of the launch under way.
inline Thread* self;
inline size_t dynamic_bytes, static_bytes;  // static_bytes: of all kernels in this library
inline int alive, patience;
inline uint64_t lots;
inline std::string failure;
inline std::function<void()> kernel;
inline std::vector<Thread*> ready;
inline std::vector<Thread> threads;
inline jmp_buf host;
inline ucontext_t creator;

inline unsigned draw() {
  lots = lots * 6364136223846793005 + 1442695040888963407;
  return lots >> 33;
}

[[noreturn]] inline void fail(std::string message) {
  failure = message;
  _longjmp(host, 1);
}

[[noreturn]] inline void report_deadlock() {
  std::map<std::string, int> places;
  for (const Thread& thread : threads)
    if (thread.waits_in) places[thread.waits_in]++;
  std::string message = "all threads wait:";
  for (auto& [place, count] : places) message += " " + std::to_string(count) + " in " + place;
  fail(message);
}

// Mostly the thread that was woken last, so that warps and blocks run far ahead of each other; else one drawn by lot.
[[noreturn]] inline void run_another() {
  if (ready.empty()) report_deadlock();
  if (draw() % 64 == 0) std::swap(ready[draw() % ready.size()], ready.back());
  self = ready.back();
  ready.pop_back();
  threadIdx = self->index, blockIdx = self->block->index;
  _longjmp(self->context, 1);
}

inline __attribute__((noinline)) void wait(const char* where) {
  self->waits_in = where;
  if (_setjmp(self->context) == 0) run_another();
  self->waits_in = nullptr;
}

inline void wake(Thread* thread) {
  ready.push_back(thread);
  patience = PATIENCE;
}

// Called wherever a thread looks whether something has happened.
inline void poll(const char* where) {
  if (--patience < 0) fail(std::string("nothing happens any more; threads poll in ") + where);
  ready.push_back(self);
  std::swap(ready[draw() % ready.size()], ready.back());
  wait(where);
}

inline void Barrier::complete_if_all_arrived() {
  if (arrived == 0 || arrived < *expected) return;
  arrived = 0;
  phase++;
  for (Thread* thread : waiting) wake(thread);
  waiting.clear();
}
inline int Barrier::arrive() {
  const int before = phase;
  arrived++;
  complete_if_all_arrived();
  return before;
}
inline void Barrier::wait(int before, const char* where) {
  if (phase != before) return;
  waiting.push_back(self);
  emulation::wait(where);
}

// The lanes of `mask` meet, and the last to come computes the results of all: compute(operands, results), pointers by lane.
template <class Result, class Operand, class Compute>
Result meet(const char* name, unsigned mask, Operand operand, Compute compute) {
  static const char instruction = 0;  // its address is this instantiation's own
  Result result;
  Warp& warp = *self->warp;
  if (!(mask >> self->lane & 1)) fail(std::string(name) + ": a lane outside of its own mask");
  warp.arrivals[self->lane] = {&instruction, name, mask, &operand, &result};
  warp.arrived |= 1u << self->lane;
  if ((warp.arrived & mask) != mask) {
    wait(name);
    return result;
  }
  const Operand* operands[LANES] = {};
  Result* results[LANES] = {};
  for (int lane = 0; lane < LANES; lane++)
    if (mask >> lane & 1) {
      const Arrival& arrival = warp.arrivals[lane];
      if (arrival.instruction != &instruction || arrival.mask != mask)
        fail(std::string("lanes of a warp meet in ") + name + " and " + arrival.name + ", or with other masks");
      operands[lane] = (const Operand*)arrival.operand;
      results[lane] = (Result*)arrival.result;
    }
  compute(operands, results);
  warp.arrived &= ~mask;
  for (int lane = 0; lane < LANES; lane++)
    if (mask >> lane & 1 && lane != self->lane) wake(warp.lanes[lane]);
  return result;
}

// Shared memory. A declaration has its place in the static part, which it takes when it is first met.
inline size_t reserve(size_t bytes) {
  const size_t place = static_bytes;
  static_bytes += (bytes + 15) / 16 * 16;
  if (static_bytes > STATIC_SHARED) fail("more than 48 KB of static shared memory");
  return place;
}
template <class T, int declaration>
T& shared() {
  static const size_t place = reserve(sizeof(T));
  return *(T*)(self->block->shared + place);
}
inline char* dynamic_shared() { return self->block->shared + STATIC_SHARED; }

inline void leave() {
  Block& block = *self->block;
  if (*self->stack) fail("a thread's stack is full");
  if (self->products.size() > 1 || !self->products[0].empty()) fail("a thread leaves before its products are done");
  patience = PATIENCE;
  block.cluster->alive--;
  if (--block.alive == 0) {
    if (!block.copies.empty()) fail("a block leaves before its bulk copies have arrived");
    const char* fence = block.shared + STATIC_SHARED + dynamic_bytes;
    for (size_t i = 0; i < FENCE; i++)
      if ((unsigned char)fence[i] != POISON) fail("a write behind the dynamic shared memory");
    memset(block.shared, POISON, STATIC_SHARED + dynamic_bytes);  // whoever still reads it sees NaN
  }
  block.barrier.complete_if_all_arrived();  // those who have left are not waited for
  block.cluster->barrier.complete_if_all_arrived();
  if (--alive == 0) _longjmp(host, 1);
  run_another();
}

inline void enter() {
  if (_setjmp(self->context) == 0) setcontext(&creator);
  kernel();
  leave();
}

struct Pages {  // memory for `count` pieces of `bytes`, given back in the end
  size_t count, bytes;
  char* memory;
  Pages(size_t count, size_t bytes) : count(count), bytes(bytes) {
    memory = (char*)mmap(nullptr, count * bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
  }
  ~Pages() { munmap(memory, count * bytes); }
  char* operator[](size_t i) const { return memory + i * bytes; }
};

// Runs blocks first .. first + blocks - 1 of the grid, all at once.
inline void run_blocks(unsigned first, unsigned blocks, unsigned cluster_size) {
  const int size = blockDim.x;
  const Pages stacks(blocks * size, STACK), shared(blocks, STATIC_SHARED + SHARED + FENCE);
  std::vector<Cluster> clusters(blocks / cluster_size);
  threads = std::vector<Thread>(blocks * size);
  ready.clear();
  alive = blocks * size;
  patience = PATIENCE;
  for (unsigned i = 0; i < blocks; i++) {
    Cluster& cluster = clusters[i / cluster_size];
    if (i % cluster_size == 0) {
      cluster.blocks.resize(cluster_size);
      cluster.alive = cluster_size * size;
      cluster.barrier.expected = &cluster.alive;
    }
    Block& block = cluster.blocks[i % cluster_size];
    block.index = {first + i, 0, 0};
    block.rank = i % cluster_size;
    block.alive = size;
    block.cluster = &cluster;
    block.shared = shared[i];
    memset(block.shared, POISON, STATIC_SHARED + dynamic_bytes + FENCE);
    block.barrier.expected = &block.alive;
    block.warps.resize((size + LANES - 1) / LANES);
    for (int t = 0; t < size; t++) {
      Thread& thread = threads[i * size + t];
      thread.index = {(unsigned)t, 0, 0};
      thread.block = &block;
      thread.warp = &block.warps[t / LANES];
      thread.lane = t % LANES;
      thread.warp->lanes[thread.lane] = &thread;
      ucontext_t context;
      getcontext(&context);
      thread.stack = stacks[i * size + t];
      context.uc_stack.ss_sp = thread.stack;
      context.uc_stack.ss_size = STACK;
      makecontext(&context, enter, 0);
      self = &thread;
      swapcontext(&creator, &context);
      ready.push_back(&thread);
    }
  }
  if (_setjmp(host) == 0) run_another();
}

inline void fault(int) {
  fail("an access to memory that is not there, by thread " + std::to_string(threadIdx.x) + " of block " + std::to_string(blockIdx.x));
}

// Runs a launch to its end; false after a failure. Blocks of a grid that is not cooperative must not count on each other, so one cluster
// runs after the other.
inline bool launch(dim3 grid, dim3 block, unsigned cluster_size, size_t dynamic, bool cooperative, std::function<void()> body) {
  gridDim = grid, blockDim = block, dynamic_bytes = dynamic, kernel = std::move(body);
  lots = 1;
  failure.clear();
  if (grid.y * grid.z * block.y * block.z != 1) failure = "only grids and blocks of one dimension are emulated";
  if (grid.x % cluster_size || block.x > 1024) failure = "grid or block of an impossible size";
  if (dynamic > SHARED) failure = "more than 227 KB of dynamic shared memory";
  static char signal_stack[32 << 10];  // a fault may come from a stack that is full
  const stack_t stack = {signal_stack, 0, sizeof(signal_stack)};
  struct sigaction on_fault = {}, before;
  on_fault.sa_handler = fault;
  on_fault.sa_flags = SA_ONSTACK | SA_NODEFER;
  stack_t stack_before;
  sigaltstack(&stack, &stack_before);
  sigaction(SIGSEGV, &on_fault, &before);
  const unsigned together = cooperative ? grid.x : cluster_size;
  for (unsigned first = 0; first < grid.x && failure.empty(); first += together) run_blocks(first, together, cluster_size);
  sigaction(SIGSEGV, &before, nullptr);
  sigaltstack(&stack_before, nullptr);
  if (failure.empty() && static_bytes + dynamic > SHARED) failure = "more than 227 KB of shared memory";
  return failure.empty();
}

}  // namespace emulation
