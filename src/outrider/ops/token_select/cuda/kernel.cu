// Token selection for Hopper: one launch, one *cluster* of thread blocks per list, no sort.
//
// A token's key is the upper half of its merged fp32 score: 15 bits that order like the score. The blocks of a cluster take equal,
// contiguous parts of the row; their warps likewise. Scores are read from memory once and their keys kept in registers (rows of up to
// 32768 RESIDENT tokens; longer rows are read again for every phase).
//
//     1  histogram of the keys' upper 11 bits; the blocks add theirs up, a slice of bins each, and find the bin of the threshold
//     2  histogram of the lower 4 bits within that bin: the threshold, the quota of tokens equal to it, the blocks' first places
//     3  every warp counts what it keeps, then writes positions in order
//
// A histogram holds counts (top-k) or integer significands (top-p): with the exponent, which a bin fixes, these are exact masses that
// do not depend on the order of additions.
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#define RESIDENT 4
#endif

namespace cg = cooperative_groups;

constexpr int THREADS = 512, WARPS = THREADS / 32;
constexpr int VECTOR = 8;                  // tokens a thread takes at a time
constexpr int STEP = 32 * VECTOR;          // tokens a warp takes at a time
constexpr int BINS = 2048, FINE = 16;      // 11 + 4 bits
constexpr unsigned OUTSIDE = 0xffff, FORCED = 0xfffe;  // in place of a key

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

// Keys of eight neighbouring tokens.
struct Keys {
  uint32_t pair[VECTOR / 2];
  __device__ __forceinline__ unsigned operator[](int i) const { return i % 2 ? pair[i / 2] >> 16 : pair[i / 2] & 0xffff; }
};

__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(float x) { return x; }

struct Row {  // one merged row of scores
  const Arguments& a;
  const ELEMENT* scores;     // of the sequence
  const long long* sources;  // [G]
  int length, forced_below, forced_from;

  __device__ __forceinline__ Keys keys(int start) const {
    float merged[VECTOR];
    const bool whole = start + VECTOR <= length;
#pragma unroll 1
    for (int g = 0; g < a.G; g++) {
      const ELEMENT* source = scores + sources[g] * a.stride_r + start;
      ELEMENT raw[VECTOR];
      if (whole && (uintptr_t)source % 16 == 0) {
#pragma unroll
        for (int i = 0; i < (int)sizeof(raw) / 16; i++) ((uint4*)raw)[i] = __ldg((const uint4*)source + i);
      } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) raw[i] = start + i < length ? source[i] : ELEMENT(0);
      }
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float x = as_float(raw[i]), clean = x > 0 ? x : 0;  // NaN and negative scores count as 0
        merged[i] = g == 0 ? clean : a.take_max ? fmaxf(merged[i], clean) : merged[i] + clean;
      }
    }
    Keys result;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      if (a.G > 1 && !a.take_max) merged[i] = __fdiv_rn(merged[i], a.G);
      const int position = start + i;
      unsigned key = __float_as_uint(merged[i]) >> 16;
      if (position < forced_below || position >= forced_from) key = FORCED;
      if (position >= length) key = OUTSIDE;
      result.pair[i / 2] = i % 2 ? result.pair[i / 2] | key << 16 : key;
    }
    return result;
  }
};

// A key's mass is its significand times the unit of its exponent. Infinity weighs as much as the largest finite key.
__device__ __forceinline__ unsigned significand(unsigned key) { return key >= 0x7f80 ? 255 : (key & 127) + (key > 127 ? 128 : 0); }
__device__ __forceinline__ double unit(unsigned exponent) {
  return __longlong_as_double((long long)(1023 - 134 + min(max(exponent, 1), 254)) << 52);
}

// Sum of `x` over this thread and those behind it (threads 0 .. n - 1 count); `all` becomes the sum over all.
__device__ double sum_from_here(double x, double& all, double* scratch) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const double above = __shfl_down_sync(~0u, x, step);
    if (lane + step < 32) x += above;
  }
  __syncthreads();
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  all = 0;
  double behind = 0;
#pragma unroll 1
  for (int w = WARPS - 1; w >= 0; w--) {
    if (w == warp) behind = all;
    all += scratch[w];
  }
  return x + behind;
}

__global__ void __launch_bounds__(THREADS, RESIDENT > 4 ? 1 : 2) token_select(const __grid_constant__ Arguments a) {
  __shared__ unsigned histogram[BINS], forced_histogram[256];
  __shared__ double suffix[BINS + 1];       // of this block's slice of bins: weight from a bin to the slice's end
  __shared__ double slice_weight, forced_mass, scratch[WARPS];
  __shared__ unsigned fine[FINE + 1];       // counts of the threshold's bin, and of all bins above it
  __shared__ double found_base;
  __shared__ int found_bin, warp_kept[WARPS], warp_equal[WARPS];

  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), list = blockIdx.x / blocks;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int heads = a.lists / a.B, l = list / a.lists, b = list % a.lists / heads, h = list % heads;  // a.lists: of one layer
  const int length = min(a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b], a.S);
  const Row row{a, a.scores + b * a.stride_b, a.sources + ((long long)l * heads + h) * a.G, length, min(a.sinks, length), max(length - a.recent, 0)};
  const int forced = min((long long)length, (long long)a.sinks + a.recent);

  // This warp's tokens: begin .. end - 1, in steps of STEP; the block's start at block_begin.
  const int steps = (length + blocks * WARPS * STEP - 1) / (blocks * WARPS * STEP);
  const int begin = min((rank * WARPS + warp) * steps * STEP, length), end = min(begin + steps * STEP, length);
  Keys kept[RESIDENT ? RESIDENT : 1];
  if (RESIDENT)
#pragma unroll
    for (int s = 0; s < RESIDENT; s++)
      if (s < steps) kept[s] = row.keys(begin + s * STEP + lane * VECTOR);
  auto for_each_step = [&](auto body) {  // body(keys of this lane's tokens, position of their first)
    if (RESIDENT) {
#pragma unroll
      for (int s = 0; s < RESIDENT; s++)
        if (begin + s * STEP < end) body(kept[s], begin + s * STEP + lane * VECTOR);
    } else {
#pragma unroll 2
      for (int start = begin; start < end; start += STEP) body(row.keys(start + lane * VECTOR), start + lane * VECTOR);
    }
  };

  bool by_mass = a.top_p;
  double budget = a.budget;
  if (a.budgets && a.top_p) budget = a.wide_budgets ? ((const double*)a.budgets)[b] : ((const float*)a.budgets)[b];
  if (a.budgets && !a.top_p) budget = a.wide_budgets ? (double)((const long long*)a.budgets)[b] : ((const int*)a.budgets)[b];
  if (a.top_p && budget >= 1) by_mass = false, budget = length;  // everything
  if (!by_mass) budget = min(budget, (double)a.width);

  int threshold, own_quota, first, total;  // kept: keys above the threshold, and of this block's equal to it the first `own_quota`
#pragma unroll 1
  while (true) {
    for (int i = thread; i < BINS; i += THREADS) histogram[i] = 0;
    for (int i = thread; i < 256; i += THREADS) forced_histogram[i] = 0;
    if (thread <= FINE) fine[thread] = 0;
    if (thread == 0) found_bin = -1;
    __syncthreads();
    for_each_step([&](const Keys& keys, int) {
#pragma unroll
      for (int i = 0; i < VECTOR; i++)
        if (keys[i] < FORCED) atomicAdd(&histogram[keys[i] / FINE], by_mass ? significand(keys[i]) : 1);
    });
    if (by_mass)  // the mass of the forced tokens, by exponent; they were not keyed
      for (int i = rank * THREADS + thread; i < forced; i += blocks * THREADS) {
        const int position = forced == length || i < a.sinks ? i : length - a.recent + i - a.sinks;
        Row plain = row;
        plain.forced_below = 0, plain.forced_from = length;
        const unsigned key = plain.keys(position)[0];
        atomicAdd(&forced_histogram[key / 128], significand(key));
      }
    cluster.sync();

    // Weights of the bins, from the top: each block adds up its slice.
    const int slice = BINS / blocks;
    double weight_above = 0, forced_weight = 0;
#pragma unroll 1
    for (int base = slice - THREADS;; base -= THREADS) {  // of this slice: bins base .. base + THREADS - 1
      const int i = base + thread;
      double weight = 0;
      if (i >= 0 && i < slice) {
        unsigned sum = 0;
#pragma unroll 1
        for (int other = 0; other < blocks; other++) sum += cluster.map_shared_rank(histogram, other)[rank * slice + i];
        weight = by_mass ? sum * unit((rank * slice + i) / 8) : sum;
      }
      double all;
      const double from_here = sum_from_here(weight, all, scratch);
      if (i >= 0 && i < slice) suffix[i] = from_here + weight_above;
      weight_above += all;
      if (base <= 0) break;
    }
    sum_from_here(thread < 256 ? forced_histogram[thread] * unit(thread) : 0.0, forced_weight, scratch);
    if (thread == 0) suffix[slice] = 0, slice_weight = weight_above, forced_mass = forced_weight;
    cluster.sync();

    double everything = 0, held = 0;
#pragma unroll 1
    for (int other = 0; other < blocks; other++) {
      everything += *cluster.map_shared_rank(&slice_weight, other);
      held += *cluster.map_shared_rank(&forced_mass, other);
    }
    double needed;  // weight of the tokens to choose besides the forced ones
    if (by_mass) {
      const double slack = 1 + 1.0 / 128;  // keys may understate what is dropped by as much, where they are not exact
      needed = a.exact ? budget * (everything + held) - held
                       : (budget * slack * everything - (1 - budget) * held) / (1 - budget + budget * slack);
    } else {
      needed = min(max(budget, (double)forced), (double)length) - forced;
    }
    if (needed > 0) {
      double above = 0;
      int owner = blocks - 1;  // of the threshold's bin; the lowest slice takes what rounding may leave over
#pragma unroll 1
      for (; owner > 0; owner--) {
        const double weight = *cluster.map_shared_rank(&slice_weight, owner);
        if (above + weight >= needed) break;
        above += weight;
      }
      const double* theirs = cluster.map_shared_rank(suffix, owner);
      for (int i = thread; i < slice; i += THREADS) {
        const bool last = owner == 0 && i == 0 && above + theirs[0] < needed;
        if ((above + theirs[i] >= needed && above + theirs[i + 1] < needed) || last) {
          found_bin = owner * slice + i;
          found_base = above + theirs[i + 1];
        }
      }
    }
    __syncthreads();

    const int bin = found_bin;
    threshold = OUTSIDE;  // nothing but the forced tokens
    int quota = 0;        // of the tokens equal to the threshold in the whole row
    first = total = own_quota = 0;
    unsigned chosen_fine = FINE;
    if (bin >= 0) {
      int above = 0;
      for_each_step([&](const Keys& keys, int) {
#pragma unroll
        for (int i = 0; i < VECTOR; i++)
          if (keys[i] < FORCED) {
            const int of = keys[i] / FINE;
            above += of > bin;
            if (of == bin) atomicAdd(&fine[keys[i] % FINE], 1);
          }
      });
      above = __reduce_add_sync(~0u, above);
      if (lane == 0 && above) atomicAdd(&fine[FINE], above);
      cluster.sync();
      double reached = found_base, value = 0;
      int j = FINE - 1;
#pragma unroll 1
      for (; j >= 0; j--) {
        unsigned sum = 0;
#pragma unroll 1
        for (int other = 0; other < blocks; other++) sum += cluster.map_shared_rank(fine, other)[j];
        const unsigned key = bin * FINE + j;
        value = by_mass ? significand(key) * unit(key / 128) : 1;
        if (reached + sum * value >= needed || j == 0) {
          quota = value > 0 ? (int)min(ceil((needed - reached) / value), (double)sum) : 0;
          break;
        }
        reached += sum * value;
      }
      chosen_fine = j;
      threshold = bin * FINE + j;
    }
    // What the blocks keep, and where this one starts.
    const int span = WARPS * steps * STEP;
#pragma unroll 1
    for (int other = 0; other < blocks; other++) {
      const int from = min(other * span, length), to = min(from + span, length);
      int above = forced == length ? to - from : max(min(to, a.sinks) - from, 0) + max(to - max(from, length - a.recent), 0);
      int equal = 0;
      if (bin >= 0) {
        const unsigned* theirs = cluster.map_shared_rank(fine, other);
#pragma unroll 1
        for (int j = chosen_fine + 1; j <= FINE; j++) above += theirs[j];
        equal = theirs[chosen_fine];
      }
      if (other == rank) first = total, own_quota = quota;
      const int taken = min(equal, quota);
      quota -= taken;
      total += above + taken;
    }
    if (!(by_mass && total > a.width)) break;
    by_mass = false, budget = a.width;  // too long a list: its best `width` tokens
    cluster.sync();
  }
  __syncthreads();

  // Count, then write.
  int above = 0, equal = 0;
  for_each_step([&](const Keys& keys, int) {
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      above += keys[i] == FORCED || (keys[i] < FORCED && (int)keys[i] > threshold);
      equal += (int)keys[i] == threshold && keys[i] < FORCED;
    }
  });
  above = __reduce_add_sync(~0u, above);
  equal = __reduce_add_sync(~0u, equal);
  if (lane == 0) warp_kept[warp] = above, warp_equal[warp] = equal;
  __syncthreads();
  int kept_before = first, equal_before = 0;
#pragma unroll 1
  for (int w = 0; w < warp; w++) kept_before += warp_kept[w], equal_before += warp_equal[w];
  int* indices = a.indices + (long long)list * a.width;
  for_each_step([&](const Keys& keys, int position) {
    unsigned mine = 0;  // kept above the threshold (lower half) and equal to it (upper half)
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      if (keys[i] == FORCED || (keys[i] < FORCED && (int)keys[i] > threshold)) mine += 1;
      if ((int)keys[i] == threshold && keys[i] < FORCED) mine += 1 << 16;
    }
    unsigned before = mine;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const unsigned below = __shfl_up_sync(~0u, before, step);
      if (lane >= step) before += below;
    }
    const unsigned all = __shfl_sync(~0u, before, 31);
    before -= mine;
    int kept_rank = kept_before + (before & 0xffff), equal_rank = equal_before + (before >> 16);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      const bool is_equal = (int)keys[i] == threshold && keys[i] < FORCED;
      const bool is_above = keys[i] == FORCED || (keys[i] < FORCED && (int)keys[i] > threshold);
      const int place = kept_rank + min(equal_rank, own_quota);
      if ((is_above || (is_equal && equal_rank < own_quota)) && place < a.width) indices[place] = position + i;
      kept_rank += is_above;
      equal_rank += is_equal;
    }
    kept_before += all & 0xffff;
    equal_before += all >> 16;
  });
  total = min(total, a.width);
  if (rank == 0 && thread == 0) a.counts[list] = total;
  for (int i = total + rank * THREADS + thread; i < a.width; i += blocks * THREADS) indices[i] = -1;
  cluster.sync();  // no block leaves while another reads its shared memory
}

extern "C" int launch(const Arguments* arguments, int lists, int blocks, void* stream) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(lists * blocks);
  config.blockDim = dim3(THREADS);
  config.stream = (cudaStream_t)stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.attrs = &attribute, config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, token_select, *arguments);
}

extern "C" const char* describe(int error) { return cudaGetErrorString((cudaError_t)error); }
