// The threshold of a list: the highest key that, with all keys above it, is enough.
//
// The blocks of a cluster have each a histogram of their tokens' keys, a bin per key, over a window of 32 octaves. Every block adds up
// what all have counted, first 16 bins at a time, then one by one. A bin has one key, so counts are masses, too.
#pragma once
#include <cooperative_groups.h>
#include "keys.cuh"

namespace cg = cooperative_groups;

#ifndef THREADS  // of a block; 256, of which two run on a multiprocessor, where there are many lists
#define THREADS 512
#endif
constexpr int BLOCKS_PER_SM = THREADS == 256 ? 2 : 1;
constexpr int WARPS = THREADS / 32, MAX_BLOCKS = 8;  // of a block; of a cluster
constexpr int BINS = 4096, FINE = 16, COARSE = BINS / FINE, PER_THREAD = BINS / THREADS;  // keys of a window; bins first taken together
#ifdef MERGE  // several rows to one, or scores that are no keys
constexpr bool MERGED = true;
#else
constexpr bool MERGED = false;
#endif
constexpr int HOMES = BLOCKS_PER_SM == 2 ? 3 : 5;    // steps that a warp's ring of keys holds
constexpr int KEPT = !MERGED ? HOMES : BLOCKS_PER_SM == 2 ? 0 : sizeof(ELEMENT) == 2 ? 2 : 1;  // of these, those whose keys are there after pass 1
constexpr int PIECE = SPAN * sizeof(ELEMENT) / 16, PIECES = (HOMES - KEPT) * SPAN * 2 / 16 / PIECE;  // of 16 bytes; pieces in the ring
static_assert(!MERGED || PIECES > 0);
constexpr unsigned ALL = ~0u;                        // lanes

// Sum of `x` over this thread and those behind it; `all` becomes the sum over all.
template <typename Number>
__device__ __forceinline__ Number sum_from_here(Number x, Number& all, Number* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const Number above = __shfl_down_sync(ALL, x, step);
    if (lane + step < 32) x += above;
  }
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  Number behind = lane < WARPS ? scratch[lane] : 0;
#pragma unroll
  for (int step = 1; step < WARPS; step *= 2) {
    const Number above = __shfl_down_sync(ALL, behind, step);
    if (lane + step < 32) behind += above;
  }
  all = __shfl_sync(ALL, behind, 0);
  const Number next = __shfl_sync(ALL, behind, (warp + 1) % 32);
  __syncthreads();
  return warp + 1 < WARPS ? x + next : x;
}
__device__ __noinline__ double sum_of_all(double x, double* scratch) {
  double all;
  sum_from_here(x, all, scratch);
  return all;
}
__device__ __forceinline__ int sum_of_all(int x, int* scratch) {
  x = __reduce_add_sync(ALL, x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = __reduce_add_sync(ALL, threadIdx.x % 32 < WARPS ? scratch[threadIdx.x % 32] : 0);
  __syncthreads();
  return x;
}

struct Outside {  // tokens outside of the window
  double below, above;  // their mass
  int count;            // of those above
};
struct List {  // what is looked for: so many tokens, or such a share of the mass
  bool by_mass, exact;
  double budget, held;                       // held: mass of the forced tokens
  int length, width, forced, forced_before;  // tokens: in all; before this block's
};
struct Found {  // kept are keys above the threshold and the first `quota` of this block equal to it
  int threshold, quota, place, total;  // place: of this block's first kept token
  int move;                            // 1, -1: the threshold lies above, below the window
};

struct Shared {
  Row row;
  List list;
  Found found;
  __align__(16) unsigned histogram[BINS];  // of this block's tokens
  int coarse_counts[COARSE];
  double coarse_masses[COARSE];
  Outside outside, others[MAX_BLOCKS];  // this block's; those of the cluster
  int fine[MAX_BLOCKS][FINE];           // bins of the threshold's coarse one, by block
  double scratch[WARPS];
  int warps_higher[WARPS], warps_same[WARPS];  // tokens that they keep: above the threshold and forced; equal to it
  uint64_t full[WARPS][HOMES];          // barriers: a step has come
  double found_reached;  // what the keys above the threshold's coarse bin weigh
  int found_coarse, found_fine, found_quota, found_before, found_higher, found_higher_before;
};

// Counts eight keys if all of them are in the window.
__device__ __forceinline__ bool count_usual(Shared& shared, const uint4& keys, int window) {
  const uint32_t words[4] = {keys.x, keys.y, keys.z, keys.w}, pattern = window * 0x10001000u;
  const uint32_t strange = ((words[0] ^ pattern) | (words[1] ^ pattern) | (words[2] ^ pattern) | (words[3] ^ pattern)) & 0xf000f000;
  if (strange) return false;
  char* histogram = (char*)shared.histogram;
#pragma unroll
  for (int j = 0; j < 4; j++) {
    atomicAdd((unsigned*)(histogram + (words[j] << 2 & 0x3ffc)), 1);
    atomicAdd((unsigned*)(histogram + (words[j] >> 14 & 0x3ffc)), 1);
  }
  return true;
}
// Counts eight keys that may lie outside of the window, behind the end, or not yet where they belong. What is forced and outside of
// the window does not count: to take it out of a sum again would not be exact.
__device__ __noinline__ Outside count_strange(Shared& shared, uint4* place, int start, int end, bool in_place, int window) {
  Outside outside = {};
  if (start >= end) return outside;
  uint4 keys = *place;
  if (!in_place || !clean(keys)) *place = keys = shared.row.keys_at(start);
  if (start + VECTOR <= end && count_usual(shared, keys, window)) return outside;
#pragma unroll 1
  for (int j = start; j < min(start + VECTOR, end); j++) {
    const unsigned key = keys.x & 0xffff;
    const int side = (int)(key >> 12) - window;
    if (side == 0) atomicAdd(&shared.histogram[key & 0xfff], 1);
    if (side < 0 && !shared.row.is_forced(j)) outside.below += mass_of(key);
    if (side > 0 && !shared.row.is_forced(j)) outside.count++, outside.above += mass_of(key);
    keys.x = keys.x >> 16 | keys.y << 16, keys.y = keys.y >> 16 | keys.z << 16, keys.z = keys.z >> 16 | keys.w << 16, keys.w >>= 16;
  }
  return outside;
}

// Sums of FINE bins each, for the others of the cluster.
__device__ __noinline__ void add_up(Shared& shared, int window, bool by_mass) {
  const int thread = threadIdx.x;
  constexpr int SHARING = FINE / PER_THREAD;  // threads that share a coarse bin
  int count = 0;
  double mass = 0;
#pragma unroll
  for (int j = 0; j < PER_THREAD; j++) {
    const int bin = thread * PER_THREAD + j, tokens = shared.histogram[bin];
    count += tokens;
    if (by_mass) mass += tokens * mass_of(window * BINS + bin);
  }
#pragma unroll
  for (int step = 1; step < SHARING; step *= 2) count += __shfl_xor_sync(ALL, count, step), mass += __shfl_xor_sync(ALL, mass, step);
  if (thread % SHARING == 0) shared.coarse_counts[thread / SHARING] = count, shared.coarse_masses[thread / SHARING] = mass;
}

// Weights are counts (int) or masses (double).
template <typename Weight>
__device__ __forceinline__ Found search(Shared& shared, int window, bool went_down) {
  constexpr bool BY_MASS = sizeof(Weight) > sizeof(int);
  const List& list = shared.list;
  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), thread = threadIdx.x;
  // A coarse bin a thread.
  int count = 0, count_before = 0;  // in the blocks before this one
  Weight weight = 0;
  if (thread < COARSE) {
    int counts[MAX_BLOCKS];
    double masses[MAX_BLOCKS];
#pragma unroll
    for (int other = 0; other < MAX_BLOCKS; other++) {
      counts[other] = other < blocks ? cluster.map_shared_rank(shared.coarse_counts, other)[thread] : 0;
      masses[other] = BY_MASS && other < blocks ? cluster.map_shared_rank(shared.coarse_masses, other)[thread] : 0;
    }
#pragma unroll
    for (int other = 0; other < MAX_BLOCKS; other++) {
      count += counts[other], count_before += other < rank ? counts[other] : 0;
      weight += BY_MASS ? (Weight)masses[other] : (Weight)counts[other];
    }
  }
  if (thread >= THREADS - blocks) shared.others[THREADS - 1 - thread] = *cluster.map_shared_rank(&shared.outside, THREADS - 1 - thread);
  Weight all, reached = sum_from_here(weight, all, (Weight*)shared.scratch) - weight;  // by the keys above this thread's
  Outside outside = {};
  int above_before = 0;
#pragma unroll 1
  for (int other = 0; other < blocks; other++) {
    const Outside more = shared.others[other];
    outside.below += more.below, outside.above += more.above, outside.count += more.count;
    above_before += other < rank ? more.count : 0;
  }
  const Weight top = BY_MASS ? (Weight)outside.above : (Weight)outside.count;
  reached += top;
  Weight needed;  // of the tokens to choose besides the forced ones
  if (BY_MASS) {
    const double slack = 1 + 1.0 / 128, everything = top + all + outside.below;  // keys may understate what is dropped by as much
    needed = list.exact ? list.budget * (everything + list.held) - list.held
                        : (list.budget * slack * everything - (1 - list.budget) * list.held) / (1 - list.budget + list.budget * slack);
  } else {
    needed = (int)min(max(list.budget, (double)list.forced), (double)list.length) - list.forced;
  }
  Found found = {NONE, 0, list.forced_before, list.forced, 0};
  if (needed <= 0) return found;
  if (top >= needed && !went_down) return found.move = 1, found;
  if (thread == 0) shared.found_coarse = -1;
  __syncthreads();
  if (thread < COARSE && reached < needed && reached + weight >= needed) shared.found_coarse = thread, shared.found_reached = reached;
  __syncthreads();
  int coarse = shared.found_coarse;
  if (coarse < 0 && top < needed && window > 0) return found.move = -1, found;
  if (coarse < 0) {
    // By mass alone: of what has none, nothing is needed; or rounding has moved the window down and up. Key 0, or the key below
    // those above the window, and none of it.
    coarse = top < needed ? -1 : COARSE;
    found.threshold = top < needed ? 0 : (window + 1) * BINS - 1;
  } else {
    if (thread < FINE * blocks) shared.fine[thread / FINE][thread % FINE] = cluster.map_shared_rank(shared.histogram, thread / FINE)[coarse * FINE + thread % FINE];
    __syncthreads();
    if (thread < 32) {  // a bin a lane
      const bool bin = thread < FINE;
      const unsigned key = window * BINS + coarse * FINE + thread;
      const Weight one = weight_of<Weight>(key);
      int tokens = 0, tokens_before = 0;
#pragma unroll 1
      for (int other = 0; other < blocks; other++) {
        const int more = bin ? shared.fine[other][thread] : 0;
        tokens += more, tokens_before += other < rank ? more : 0;
      }
      const double own = (double)(tokens * one);
      double from_here = own;  // exact: of one octave
#pragma unroll
      for (int step = 1; step < FINE; step *= 2) {
        const double above = __shfl_down_sync(ALL, from_here, step);
        if (thread + step < 32) from_here += above;
      }
      const double above = shared.found_reached + from_here - own;
      // The lowest bin with a token takes what roundings leave over.
      const unsigned enough = __ballot_sync(ALL, tokens && above + own >= needed), some = __ballot_sync(ALL, tokens);
      const int chosen = enough ? 31 - __clz(enough) : __ffs(some) - 1;
      if (thread == chosen) {
        shared.found_fine = chosen, shared.found_before = tokens_before;
        shared.found_quota = (int)min(ceil((needed - above) / one), (double)tokens);
      }
      const int higher = __reduce_add_sync(ALL, thread > chosen ? tokens : 0), higher_before = __reduce_add_sync(ALL, thread > chosen ? tokens_before : 0);
      if (thread == 0) shared.found_higher = higher, shared.found_higher_before = higher_before;
    }
    __syncthreads();
    const int equal_before = min(shared.found_before, shared.found_quota);
    found.threshold = window * BINS + coarse * FINE + shared.found_fine;
    found.total += shared.found_higher + shared.found_quota;
    found.place += shared.found_higher_before + equal_before;
    found.quota = shared.found_quota - equal_before;
  }
  const bool above = thread < COARSE && thread > coarse;
  found.total += outside.count + sum_of_all(above ? count : 0, (int*)shared.scratch);
  if (blocks > 1) found.place += above_before + sum_of_all(above ? count_before : 0, (int*)shared.scratch);
  return found;
}

template <typename Weight>
__device__ __noinline__ void find(Shared& shared, int window, bool went_down) {
  const Found found = search<Weight>(shared, window, went_down);
  if (threadIdx.x == 0) shared.found = found;
  __syncthreads();
}
