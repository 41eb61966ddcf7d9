// Token selection for Hopper: one launch, one block of threads per list, or a cluster of blocks for each of a few or long ones. No sort.
//
// A token's key is the upper half of its merged fp32 score: 15 bits that order like the score. The blocks of a cluster take equal,
// contiguous parts of the row, and so do the warps of a block. A warp walks its tokens step by step through a ring of its own in shared
// memory, filled by bulk copies where scores are their own keys.
//
//     1  downwards: a histogram of the keys in a window of 32 octaves, a bin per key; what lies above and below it is added up beside
//     2  every block adds up what the blocks of its cluster have counted, first 16 bins at a time, then one by one, and finds the
//        threshold: the highest key that, with all keys above it, is enough. A bin has one key, so counts are masses, too. Should the
//        threshold lie outside of the window, the window moves. Counts of the blocks before tell where this block's tokens go.
//     3  upwards: every warp marks what it keeps, a bit per token, and counts
//     4  downwards: it writes positions
// What is still in the ring is not read again.
//
// Forced tokens (sinks, recent ones) are counted like all others, and taken out of the histogram again, since few are forced.
// Sums are of integers, or of doubles in a fixed order.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include "host.cuh"
#include "ptx.cuh"

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif

namespace cg = cooperative_groups;

constexpr int THREADS = 512, WARPS = THREADS / 32, MAX_BLOCKS = 8;  // of a cluster
constexpr int VECTOR = 8, VECTORS = 4;               // tokens a thread reads at a time; and how often, in a step
constexpr int SPAN = 32 * VECTOR * VECTORS;          // tokens of a step
constexpr int HOMES = 5, SAVED = 8;                  // steps of a warp that its ring holds; whose marks are kept
constexpr int BINS = 4096, FINE = 16, COARSE = BINS / FINE, PER_THREAD = BINS / THREADS;  // keys of a window; bins that are first taken together
constexpr int WINDOW = 3;                            // the first one tried: scores from 2^-31 to below 2
constexpr int INFINITE = 0x7f80;                     // the largest key
constexpr int NONE = 0x7ffe;                         // a threshold above every key
constexpr unsigned ALL = ~0u;                        // lanes

struct Arguments {
  const ELEMENT* scores;     // [B, R, S]
  const void* lengths;       // [B] int32 or int64
  const long long* sources;  // [Lt, Hs, G]
  const void* budgets;       // [B] int32 or int64 (top-k), float or double (top-p); null: the number below
  int* indices;              // [Lt, B, Hs, width]
  int* counts;               // [Lt, B, Hs]
  long long stride_b, stride_r;
  double budget;
  int wide_lengths, wide_budgets, top_p, B, S, lists, G, sinks, recent, take_max, width, exact;
};

__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(float x) { return x; }
template <typename T>
__device__ constexpr bool is_bfloat(T) { return false; }
__device__ constexpr bool is_bfloat(__nv_bfloat16) { return true; }

struct Row {  // one merged row of scores
  const ELEMENT* scores;     // of the sequence
  const long long* sources;  // [G]
  long long stride;
  int G, length, forced_below, forced_from;
  bool take_max;

  __device__ __forceinline__ bool is_forced(int position) const { return position < forced_below || position >= forced_from; }

  // NaN and negative scores count as 0.
  __device__ __forceinline__ float add(float merged, float score) const {
    return take_max ? fmaxf(merged, score) : merged + fmaxf(score, 0);
  }
  __device__ __forceinline__ unsigned key(float merged) const {
    if (!take_max && G > 1) merged = (G & G - 1) ? __fdiv_rn(merged, G) : merged * (1.0f / G);  // both exact to the last bit
    return __float_as_uint(merged) >> 16;
  }
  __device__ __noinline__ unsigned key_at(int position) const {
    float merged = 0;
#pragma unroll 1
    for (int g = 0; g < G; g++) merged = add(merged, as_float(scores[sources[g] * stride + position]));
    return key(merged);
  }
  // Keys of the eight tokens from `start` on, 0 past the end.
  __device__ __noinline__ uint4 keys_at(int start) const {
    float merged[VECTOR] = {};
#pragma unroll 1
    for (int g = 0; g < G; g++) {
      const ELEMENT* source = scores + sources[g] * stride + start;
#pragma unroll
      for (int i = 0; i < VECTOR; i++)
        if (start + i < length) merged[i] = add(merged[i], as_float(source[i]));
    }
    return keys_of(merged);
  }
  __device__ __forceinline__ uint4 keys_of(const float (&merged)[VECTOR]) const {
    unsigned keys[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) keys[i] = key(merged[i]);
    return make_uint4(keys[0] | keys[1] << 16, keys[2] | keys[3] << 16, keys[4] | keys[5] << 16, keys[6] | keys[7] << 16);
  }
  // Keys of a step, whose first token is `first`, if its scores are all there and aligned; false if not. Many reads are under way at once.
  __device__ __noinline__ bool merge_step(uint4* home, int first, int last) const {
    constexpr int WORDS = sizeof(ELEMENT) * VECTOR / 16, ROWS = 2 / WORDS;  // of a vector; rows at a time
    const int lane = threadIdx.x % 32;
    if (first + SPAN > last || (uintptr_t)(scores + first) % 16 || stride * sizeof(ELEMENT) % 16) return false;
    float merged[VECTORS][VECTOR] = {};
#pragma unroll 1
    for (int g = 0; g < G; g += ROWS) {
      uint4 raw[ROWS][VECTORS][WORDS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const ELEMENT* source = scores + sources[min(g + r, G - 1)] * stride + first + lane * VECTOR;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
#pragma unroll
          for (int w = 0; w < WORDS; w++) raw[r][i][w] = __ldg((const uint4*)(source + i * 32 * VECTOR) + w);
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (g + r < G)
#pragma unroll
          for (int i = 0; i < VECTORS; i++)
#pragma unroll
            for (int k = 0; k < VECTOR; k++) merged[i][k] = add(merged[i][k], as_float(((const ELEMENT*)raw[r][i])[k]));
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) home[i * 32 + lane] = keys_of(merged[i]);
    return true;
  }
};

// A key's mass. Infinity weighs as much as the largest finite key.
__device__ __forceinline__ double mass_of(unsigned key) { return __uint_as_float(min(key, INFINITE - 1) << 16); }
template <typename Weight>
__device__ __forceinline__ Weight weight_of(unsigned key);
template <>
__device__ __forceinline__ int weight_of<int>(unsigned) { return 1; }
template <>
__device__ __forceinline__ double weight_of<double>(unsigned key) { return mass_of(key); }

__device__ __forceinline__ bool clean(const uint4& keys) {  // no negative score, no NaN
  const uint32_t highest = __vmaxu2(__vmaxu2(keys.x, keys.y), __vmaxu2(keys.z, keys.w));
  return (highest & 0xffff) <= INFINITE && highest <= (INFINITE << 16 | 0xffff);
}

// One bit a token: is its key at least `key` (0 .. 0x8000)? Adding 0x8000 - key sets a key's top bit exactly then; the product
// collects the top bits of four bytes.
__device__ __forceinline__ unsigned at_least(const uint4& keys, unsigned key) {
  const uint32_t lift = (0x8000 - key) * 0x10001;
  const uint32_t low = __byte_perm(keys.x + lift, keys.y + lift, 0x7531), high = __byte_perm(keys.z + lift, keys.w + lift, 0x7531);
  return ((low & 0x80808080) * 0x00204081 >> 28) | ((high & 0x80808080) * 0x00204081 >> 28 << 4);
}

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
__device__ __noinline__ void add_up(Shared& shared, const Outside& outside, int window, bool by_mass) {
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
  if (thread == 0) shared.outside = outside;
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
  } else if (thread < COARSE + blocks) {
    shared.others[thread - COARSE] = *cluster.map_shared_rank(&shared.outside, thread - COARSE);
  }
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

// Of the lane's 32 neighbours in a step: those above the threshold or forced, and those equal to it.
__device__ __noinline__ uint2 mark(const uint4* keys, int threshold, int start, int end, int forced_below, int forced_from) {
  const int lane = threadIdx.x % 32;
  unsigned higher = 0, reaching = 0;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    const int vector = (i + lane / 2) % VECTORS;  // turned, against bank conflicts
    const uint4 eight = keys[lane * VECTORS + vector];
    higher |= at_least(eight, threshold + 1) << 8 * vector;
    reaching |= at_least(eight, threshold) << 8 * vector;
  }
  unsigned same = reaching & ~higher;
  if (start < forced_below || start + SPAN > min(forced_from, end)) {
    auto first = [&](int to) {  // those up to there
      const int count = to - start - lane * 32;
      return count >= 32 ? ALL : count > 0 ? (1u << count) - 1 : 0;
    };
    const unsigned inside = first(end);
    higher = (higher | first(forced_below) | ~first(forced_from)) & inside;
    same &= ~higher & inside;
  }
  return make_uint2(higher, same);
}

__global__ void __launch_bounds__(THREADS, 1) token_select(const __grid_constant__ Arguments a) {
  __shared__ __align__(16) Shared shared;
  extern __shared__ __align__(128) uint4 dynamic[];  // rings [WARPS][HOMES][SPAN / VECTOR] of keys, then [WARPS][SAVED][32] marks

  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), list = blockIdx.x / blocks;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int heads = a.lists / a.B, l = list / a.lists, b = list % a.lists / heads, h = list % heads;  // a.lists: of one layer
  const int length = min(a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b], a.S);
  const ELEMENT* scores = a.scores + b * a.stride_b;
  const long long* sources = a.sources + ((long long)l * heads + h) * a.G;
  const int forced_below = min(a.sinks, length), forced_from = max(length - a.recent, forced_below), forced = forced_below + length - forced_from;
  if (thread == 0) shared.row = {scores, sources, a.stride_r, a.G, length, forced_below, forced_from, (bool)a.take_max};

  // This block's tokens: begin .. end - 1, a multiple of SPAN; this warp's: first .. last - 1, in steps of SPAN.
  const int part = (length + blocks * SPAN - 1) / (blocks * SPAN) * SPAN, begin = min(rank * part, length), end = min(begin + part, length);
  const int range = (end - begin + WARPS * SPAN - 1) / (WARPS * SPAN) * SPAN, first = min(begin + warp * range, end), last = min(first + range, end);
  const int steps = (last - first + SPAN - 1) / SPAN;
  const int homes = min(range / SPAN, HOMES), saved = min(range / SPAN, SAVED);
  uint4* const ring = dynamic + warp * homes * (SPAN / VECTOR);
  uint2* const saved_marks = (uint2*)(dynamic + WARPS * homes * (SPAN / VECTOR)) + warp * saved * 32 + lane;
  // Scores that are their own keys, if they are clean: of one row of aligned bfloat16.
  const ELEMENT* source = scores + sources[0] * a.stride_r;
  const bool direct = is_bfloat(ELEMENT()) && a.G == 1 && (uintptr_t)source % 16 == 0;
  uint64_t* const full = shared.full[warp];
  unsigned phases = 0;  // of its barriers, a bit each
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < HOMES; i++) ptx::barrier_init(full + i, 1);
    ptx::fence_barrier_init();
  }
  __syncwarp();
  auto home = [&](int s) { return ring + s % HOMES * (SPAN / VECTOR); };
  auto whole_bytes = [&](int s) { return direct && s >= 0 && s < steps ? min(SPAN, last - first - s * SPAN) / VECTOR * 16 : 0; };
  auto copy = [&](int s) {
    const int bytes = whole_bytes(s);
    if (bytes && lane == 0) ptx::copy_bulk(home(s), source + first + s * SPAN, bytes, full + s % HOMES);
  };
  auto wait = [&](int s) {
    if (!whole_bytes(s)) return;
    ptx::barrier_wait(full + s % HOMES, phases >> s % HOMES & 1);
    phases ^= 1 << s % HOMES;
  };
  auto copy_again = [&](int s) {
    ptx::fence_async();  // keys may have been put there
    __syncwarp();
    copy(s);
  };
#pragma unroll 1
  for (int s = steps - 1; s >= steps - HOMES; s--) copy(s);

  // The forced tokens' scores are asked for early, where they are keys.
  auto forced_position = [&](int i) { return i < forced_below ? i : forced_from + i - forced_below; };
  ELEMENT early = ELEMENT();
  if (direct && thread < forced) early = source[forced_position(thread)];
  if (thread == 0) {
    List list = {(bool)a.top_p, (bool)a.exact, a.budget, 0, length, a.width, forced, min(begin, forced_below) + max(begin - forced_from, 0)};
    if (a.budgets && a.top_p) list.budget = a.wide_budgets ? ((const double*)a.budgets)[b] : ((const float*)a.budgets)[b];
    if (a.budgets && !a.top_p) list.budget = a.wide_budgets ? (double)((const long long*)a.budgets)[b] : ((const int*)a.budgets)[b];
    if (a.top_p && list.budget >= 1) list.by_mass = false, list.budget = length;  // everything
    if (!list.by_mass) list.budget = min(list.budget, (double)a.width);
    shared.list = list;
  }

  int window = WINDOW;
  bool settled = false, went_down = false;
#pragma unroll 1
  while (true) {
#pragma unroll
    for (int j = 0; j < PER_THREAD; j += 4) ((uint4*)shared.histogram)[(thread * PER_THREAD + j) / 4] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    const bool by_mass = shared.list.by_mass;
    Outside outside = {};
    double held = 0;
#pragma unroll 1
    for (int i = thread; i < forced; i += THREADS) {
      const int position = forced_position(i);
      const unsigned key = direct && i == thread ? __float_as_uint(fmaxf(as_float(early), 0)) >> 16 : shared.row.key_at(position);
      held += mass_of(key);
      if (position >= begin && position < end && key >> 12 == window) atomicSub(&shared.histogram[key & 0xfff], 1);
    }
#pragma unroll 1
    for (int s = steps - 1; s >= 0; s--) {
      const int start = first + s * SPAN + lane * VECTOR;
      const bool whole = first + (s + 1) * SPAN <= last;
      bool in_place = settled || direct;
      if (!in_place) in_place = shared.row.merge_step(home(s), first + s * SPAN, last);
      if (!settled) wait(s);
#pragma unroll 2
      for (int i = 0; i < VECTORS; i++) {
        uint4* place = home(s) + i * 32 + lane;
        if (in_place && whole && count_usual(shared, *place, window)) continue;
        const int here = start + i * 32 * VECTOR;
        const Outside more = count_strange(shared, place, here, last, in_place && (settled || here + VECTOR <= last), window);
        outside.below += more.below, outside.above += more.above, outside.count += more.count;
      }
      if (s >= HOMES) copy_again(s - HOMES);
    }
    __syncwarp();
    settled = range <= HOMES * SPAN;
    if (by_mass) {
      held = sum_of_all(held, shared.scratch);
      if (thread == 0) shared.list.held = held;
      outside.below = sum_of_all(outside.below, shared.scratch);
      outside.above = sum_of_all(outside.above, shared.scratch);
    }
    outside.count = sum_of_all(outside.count, (int*)shared.scratch);
    add_up(shared, outside, window, by_mass);
    if (blocks > 1)
      cluster.sync();
    else
      __syncthreads();
    bool by_count = !by_mass;
    if (by_mass) {
      find<double>(shared, window, went_down);
      by_count = !shared.found.move && shared.found.total > a.width;  // too long a list: its best `width` tokens
      __syncthreads();
      if (by_count) {
        went_down = false;
        if (thread == 0) shared.list.by_mass = false, shared.list.budget = a.width;
        __syncthreads();
      }
    }
    if (by_count) find<int>(shared, window, went_down);
    const int move = shared.found.move;
    if (!move) break;
    window += move;
    went_down |= move < 0;
    if (blocks > 1)
      cluster.sync();  // nobody reads this histogram any more
    else
      __syncthreads();
    if (!settled)
#pragma unroll 1
      for (int s = steps - 1; s >= steps - HOMES; s--) copy_again(s);
  }
  if (blocks > 1) asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");  // this block has read what it needs

  const int threshold = shared.found.threshold, quota = shared.found.quota, place = shared.found.place, total = min(shared.found.total, a.width);
  // A step whose keys have been overwritten comes again.
  auto settle = [&](int s) {
    wait(s);
    if (!direct && shared.row.merge_step(home(s), first + s * SPAN, last)) return __syncwarp();
#pragma unroll 1
    for (int i = 0; i < VECTORS; i++) {
      uint4* place = home(s) + i * 32 + lane;
      const int start = first + s * SPAN + (i * 32 + lane) * VECTOR;
      if (start < last && !(direct && start + VECTOR <= last && clean(*place))) *place = shared.row.keys_at(start);
    }
    __syncwarp();
  };
  auto marks = [&](int s) { return mark(home(s), threshold, first + s * SPAN, last, forced_below, forced_from); };
  int higher = 0, same = 0;  // of this warp
#pragma unroll 1
  for (int s = 0; s < steps; s++) {
    if (s >= HOMES) settle(s);
    const uint2 marked = marks(s);
    if (s < SAVED) saved_marks[s * 32] = marked;
    higher += __popc(marked.x), same += __popc(marked.y);
    if (s + HOMES < steps) copy_again(s + HOMES);
  }
  __syncwarp();
  higher = __reduce_add_sync(ALL, higher), same = __reduce_add_sync(ALL, same);
  if (lane == 0) shared.warps_higher[warp] = higher, shared.warps_same[warp] = same;
  __syncthreads();
  higher = __reduce_add_sync(ALL, lane <= warp ? shared.warps_higher[lane] : 0);  // of this block, up to this warp's last
  same = __reduce_add_sync(ALL, lane <= warp ? shared.warps_same[lane] : 0);

  int* const indices = a.indices + (long long)list * a.width;
#pragma unroll 1
  for (int s = steps - 1; s >= 0; s--) {
    if (s >= SAVED && s < steps - HOMES) settle(s);
    const uint2 marked = s < SAVED ? saved_marks[s * 32] : marks(s);
    // Both counts in one number, 16 bits each.
    const unsigned here = __popc(marked.x) | __popc(marked.y) << 16;
    unsigned up_to_here = here;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned less = __shfl_up_sync(ALL, up_to_here, step);
      if (lane >= step) up_to_here += less;
    }
    const unsigned of_step = __shfl_sync(ALL, up_to_here, 31), before = up_to_here - here;
    higher -= of_step & 0xffff, same -= of_step >> 16;  // up to this step's first
    // The first kept token of the step has place `to` of the list; the lane's first is the `own`th of the step.
    const int to = place + higher + min(same, quota), equal = same + (before >> 16);
    unsigned kept = marked.x;
    for (unsigned left = max(quota - equal, 0), more = marked.y; more && left; more &= more - 1, left--) kept |= more & -more;
    int own = (before & 0xffff) + min(equal, quota) - min(same, quota);
    const int count = __shfl_sync(ALL, own + __popc(kept), 31);
    // Through the step's keys, which have been read, so that neighbours are written side by side.
    uint16_t* staged = (uint16_t*)home(s);
    __syncwarp();
#pragma unroll 1
    for (; kept; kept &= kept - 1, own++) staged[own] = lane * 32 + __ffs(kept) - 1;
    __syncwarp();
#pragma unroll 1
    for (int i = lane; i < min(count, a.width - to); i += 32) indices[to + i] = first + s * SPAN + staged[i];
    if (s - HOMES >= SAVED) copy_again(s - HOMES);
  }
  if (rank == 0 && thread == 0) a.counts[list] = total;
#pragma unroll 1
  for (int i = total + rank * THREADS + thread; i < a.width; i += blocks * THREADS) indices[i] = -1;
  if (blocks > 1) asm volatile("barrier.cluster.wait.aligned;" ::: "memory");  // no block leaves while another reads its shared memory
}

constexpr int STEP_BYTES = WARPS * SPAN * 2, MARK_BYTES = WARPS * 32 * 8;  // of a step of all warps

static cudaLaunchConfig_t configuration(int lists, int blocks, int steps, cudaLaunchAttribute* cluster) {  // steps: of a warp, at most
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(lists * blocks);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = min(steps, HOMES) * STEP_BYTES + min(steps, SAVED) * MARK_BYTES;
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim.x = blocks, cluster->val.clusterDim.y = 1, cluster->val.clusterDim.z = 1;
  config.attrs = cluster, config.numAttrs = 1;
  return config;
}
static cudaError_t prepare() {
  static const cudaError_t prepared = cudaFuncSetAttribute(token_select, cudaFuncAttributeMaxDynamicSharedMemorySize, HOMES * STEP_BYTES + SAVED * MARK_BYTES);
  return prepared;
}

// Clusters of so many blocks that the device runs at a time; a CUDA error, negated, if it cannot be told.
extern "C" int clusters(int blocks, int steps) {
  cudaLaunchAttribute cluster = {};
  const cudaLaunchConfig_t config = configuration(1, blocks, steps, &cluster);
  int count = 0;
  const cudaError_t error = prepare() != cudaSuccess ? prepare() : cudaOccupancyMaxActiveClusters(&count, token_select, &config);
  return error == cudaSuccess ? count : -(int)error;
}

extern "C" int launch(const Arguments* arguments, int lists, int blocks, int steps, void* stream) {
  if (prepare() != cudaSuccess) return (int)prepare();
  cudaLaunchAttribute cluster = {};
  cudaLaunchConfig_t config = configuration(lists, blocks, steps, &cluster);
  config.stream = (cudaStream_t)stream;
  return (int)cudaLaunchKernelEx(&config, token_select, *arguments);
}
