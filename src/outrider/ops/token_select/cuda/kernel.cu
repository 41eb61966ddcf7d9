// Token selection for Hopper: one launch, one *cluster* of thread blocks per list, no sort.
//
// A token's key is the upper half of its merged fp32 score: 15 bits that order like the score. The blocks of a cluster take equal,
// contiguous parts of the row; their warps likewise. Scores are read from memory once and their keys kept in shared memory; rows too
// long for that are read again in every phase.
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
#include "host.cuh"

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif
#ifndef BLOCKS_PER_SM
#define BLOCKS_PER_SM 3
#endif
#ifndef THREADS
#define THREADS 256
#endif

namespace cg = cooperative_groups;

constexpr int WARPS = THREADS / 32, MAX_BLOCKS = 8;
constexpr int VECTOR = 8;                  // tokens a thread takes at a time
constexpr int AHEAD = 4;                   // steps whose scores a warp has under way at a time
constexpr int STEP = 32 * VECTOR;          // tokens a warp takes at a time
constexpr int BINS = 2048, FINE = 16;      // 11 + 4 bits
constexpr int FORCED = 0x7fff, OUTSIDE = -0x8000;  // in place of a key, read as signed: above and below all keys

constexpr int MAX_SHARED = 160 * 1024;

struct Arguments {
  const ELEMENT* scores;     // [B, R, S]
  const void* lengths;       // [B] int32 or int64
  const long long* sources;  // [Lt, Hs, G]
  const void* budgets;       // [B] int32 or int64 (top-k), float or double (top-p); null: the number below
  int* indices;              // [Lt, B, Hs, width]
  int* counts;               // [Lt, B, Hs]
  long long stride_b, stride_r;
  double budget;
  int wide_lengths, wide_budgets, top_p, B, S, lists, G, sinks, recent, take_max, width, exact, resident;
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
  long long stride, first_source;
  int G, length, forced_below, forced_from;
  bool take_max;

  // Where the eight scores from `start` on are their own keys: they compete for places, in one row of aligned bfloat16.
  __device__ __forceinline__ const uint4* plain(int start) const {
    const ELEMENT* source = scores + first_source + start;
    const bool competing = start >= forced_below && start + VECTOR <= forced_from;
    return is_bfloat(ELEMENT()) && G == 1 && competing && (uintptr_t)source % 16 == 0 ? (const uint4*)source : nullptr;
  }
  static __device__ __forceinline__ bool clean(const uint4& keys) {  // no negative score, no NaN
    const uint32_t highest = __vmaxu2(__vmaxu2(keys.x, keys.y), __vmaxu2(keys.z, keys.w));
    return (highest & 0xffff) <= 0x7f80 && highest <= 0x7f80ffff;
  }

  // Keys of the eight tokens from `start` on; where `marked`, FORCED and OUTSIDE where they do not compete. NaN and negative scores
  // count as 0. Apart, since it is long: a kernel whose hot path does not fit the instruction cache is slow.
  __device__ __noinline__ void merge(uint4* target, int start, bool marked) const {
    const bool whole = start + VECTOR <= length;
    float merged[VECTOR];
#pragma unroll 1
    for (int g = 0; g < G; g++) {
      const ELEMENT* source = scores + sources[g] * stride + start;
      float score[VECTOR];
      if (whole && (uintptr_t)source % 16 == 0) {
        uint4 raw[sizeof(ELEMENT) * VECTOR / 16];
#pragma unroll
        for (int i = 0; i < sizeof(raw) / 16; i++) raw[i] = __ldg((const uint4*)source + i);
#pragma unroll
        for (int i = 0; i < VECTOR; i++) score[i] = as_float(((const ELEMENT*)raw)[i]);
      } else {
#pragma unroll
        for (int i = 0; i < VECTOR; i++) score[i] = start + i < length ? as_float(source[i]) : 0;
      }
#pragma unroll
      for (int i = 0; i < VECTOR; i++) {
        const float clean = fmaxf(score[i], 0);  // 0 for NaN
        merged[i] = g == 0 ? clean : take_max ? fmaxf(merged[i], clean) : merged[i] + clean;
      }
    }
    unsigned key[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      if (G > 1 && !take_max) merged[i] = __fdiv_rn(merged[i], G);
      key[i] = __float_as_uint(merged[i]) >> 16;
      if (marked && (start + i < forced_below || start + i >= forced_from)) key[i] = FORCED;
      if (start + i >= length) key[i] = OUTSIDE & 0xffff;
    }
    *target = make_uint4(key[0] | key[1] << 16, key[2] | key[3] << 16, key[4] | key[5] << 16, key[6] | key[7] << 16);
  }
};

// A key's mass is its significand times the unit of its exponent. Infinity weighs as much as the largest finite key.
__device__ __forceinline__ unsigned significand(unsigned key) { return key >= 0x7f80 ? 255 : (key & 127) + (key > 127 ? 128 : 0); }
__device__ __forceinline__ double unit(unsigned exponent) {
  return __longlong_as_double((long long)(1023 - 134 + min(max(exponent, 1), 254)) << 52);
}

// Sum of `x` over this thread and those behind it; `all` becomes the sum over all.
__device__ __forceinline__ double sum_from_here(double x, double& all, double* scratch) {
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
#pragma unroll
  for (int w = WARPS - 1; w >= 0; w--) {
    behind = w == warp ? all : behind;
    all += scratch[w];
  }
  return x + behind;
}

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) token_select(const __grid_constant__ Arguments a) {
  __shared__ unsigned histogram[BINS + 1], forced_histogram[256];  // tokens that do not compete fall into bins without keys
  extern __shared__ __align__(16) char dynamic[];
  __shared__ double slice_weight, forced_mass, scratch[WARPS];
  __shared__ unsigned fine[FINE + 1];       // counts of the threshold's bin by key, and of all above it
  __shared__ unsigned all_fine[MAX_BLOCKS][FINE + 1];
  __shared__ double all_slices[MAX_BLOCKS], all_forced[MAX_BLOCKS], found_base;
  __shared__ int found_bin, found_threshold, found_first, found_quota, found_total, warp_kept[WARPS], warp_equal[WARPS];

  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), list = blockIdx.x / blocks;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int heads = a.lists / a.B, l = list / a.lists, b = list % a.lists / heads, h = list % heads;  // a.lists: of one layer
  const int length = min(a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b], a.S);
  const int recent_from = max(length - a.recent, 0);
  Row row{a.scores + b * a.stride_b, a.sources + ((long long)l * heads + h) * a.G, a.stride_r, 0, a.G, length, min(a.sinks, length), recent_from, (bool)a.take_max};
  row.first_source = row.sources[0] * row.stride;
  const int forced = min((long long)length, (long long)a.sinks + a.recent);

  // This warp's tokens: begin .. end - 1, in steps of STEP.
  const int steps = (length + blocks * WARPS * STEP - 1) / (blocks * WARPS * STEP);
  const int begin = min((rank * WARPS + warp) * steps * STEP, length), end = min(begin + steps * STEP, length);
  double* suffix = (double*)dynamic;  // [BINS / blocks + 1], of this block's slice of bins: weight from a bin to the slice's end
  uint4* resident = (uint4*)(suffix + BINS / blocks + 2) + warp * (a.resident ? steps : AHEAD) * 32;  // [steps or AHEAD][32] of this warp
  const int mine = (end - begin + STEP - 1) / STEP;
  auto fetch = [&](int s) {  // AHEAD steps from step s on into shared memory, from `resident` on
    uint4 keys[AHEAD];
    const uint4* source[AHEAD];
#pragma unroll
    for (int i = 0; i < AHEAD; i++) {
      source[i] = s + i < mine ? row.plain(begin + (s + i) * STEP + lane * VECTOR) : nullptr;
      if (source[i]) keys[i] = __ldg(source[i]);
    }
#pragma unroll
    for (int i = 0; i < AHEAD; i++)
      if (s + i < mine) {
        uint4* target = resident + ((a.resident ? s : 0) + i) * 32 + lane;
        if (source[i] && Row::clean(keys[i]))
          *target = keys[i];
        else
          row.merge(target, begin + (s + i) * STEP + lane * VECTOR, true);
      }
    __syncwarp();
  };
  // body(16-bit keys of AHEAD steps, number of tokens, position of the first)
  auto for_each_batch = [&](auto body) {
#pragma unroll 1
    for (int s = 0; s < mine; s += AHEAD) {
      if (!a.resident) {
        __syncwarp();
        fetch(s);
      }
      body((const short*)(resident + (a.resident ? s : 0) * 32), min(AHEAD, mine - s) * STEP, begin + s * STEP);
    }
  };

  bool by_mass = a.top_p;
  double budget = a.budget;
  if (a.budgets && a.top_p) budget = a.wide_budgets ? ((const double*)a.budgets)[b] : ((const float*)a.budgets)[b];
  if (a.budgets && !a.top_p) budget = a.wide_budgets ? (double)((const long long*)a.budgets)[b] : ((const int*)a.budgets)[b];
  if (a.top_p && budget >= 1) by_mass = false, budget = length;  // everything
  if (!by_mass) budget = min(budget, (double)a.width);

  int threshold, own_quota, first, total;  // kept: keys above the threshold, and of this block's equal to it the first `own_quota`
  if (a.resident)
#pragma unroll 1
    for (int s = 0; s < mine; s += AHEAD) fetch(s);

#pragma unroll 1
  while (true) {
    for (int i = thread; i < BINS; i += THREADS) histogram[i] = 0;
    for (int i = thread; i < 256; i += THREADS) forced_histogram[i] = 0;
    if (thread <= FINE) fine[thread] = 0;
    if (thread == 0) found_bin = -1;
    __syncthreads();
    for_each_batch([&](const short* keys, int tokens, int) {
      const uint32_t* pairs = (const uint32_t*)keys + lane;
      if (by_mass)
#pragma unroll 4
        for (int i = 0; i < tokens / 64; i++) {
          const unsigned low = pairs[i * 32] & 0xffff, high = pairs[i * 32] >> 16;
          atomicAdd(&histogram[min(low / FINE, BINS)], significand(low));
          atomicAdd(&histogram[min(high / FINE, BINS)], significand(high));
        }
      else
#pragma unroll 4
        for (int i = 0; i < tokens / 64; i++) {
          const unsigned low = pairs[i * 32] & 0xffff, high = pairs[i * 32] >> 16;
          atomicAdd(&histogram[min(low / FINE, BINS)], 1);
          atomicAdd(&histogram[min(high / FINE, BINS)], 1);
        }
    });
    if (by_mass)  // the mass of the forced tokens, by exponent; they were not keyed
      for (int i = rank * THREADS + thread; i < forced; i += blocks * THREADS) {
        const int position = forced == length || i < a.sinks ? i : length - a.recent + i - a.sinks;
        uint4 key_and_following;
        row.merge(&key_and_following, position, false);
        const unsigned key = key_and_following.x & 0xffff;
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
#pragma unroll
        for (int other = 0; other < MAX_BLOCKS; other++)
          if (other < blocks && rank * slice + i < FORCED / FINE) sum += cluster.map_shared_rank(histogram, other)[rank * slice + i];
        weight = by_mass ? sum * unit((rank * slice + i) / 8) : sum;
      }
      double all;
      const double from_here = sum_from_here(weight, all, scratch);
      if (i >= 0 && i < slice) suffix[i] = from_here + weight_above;
      weight_above += all;
      if (base <= 0) break;
    }
    if (by_mass) sum_from_here(thread < 256 ? forced_histogram[thread] * unit(thread) : 0.0, forced_weight, scratch);
    if (thread == 0) suffix[slice] = 0, slice_weight = weight_above, forced_mass = forced_weight;
    cluster.sync();

    if (thread < blocks) {
      all_slices[thread] = *cluster.map_shared_rank(&slice_weight, thread);
      all_forced[thread] = *cluster.map_shared_rank(&forced_mass, thread);
    }
    __syncthreads();
    double everything = 0, held = 0;
    for (int other = 0; other < blocks; other++) everything += all_slices[other], held += all_forced[other];
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
        const double weight = all_slices[owner];
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

    const int bin = found_bin;  // -1: nothing but the forced tokens
    if (bin >= 0) {
      int above = 0;
      for_each_batch([&](const short* keys, int tokens, int) {
        const int* pairs = (const int*)keys + lane;
#pragma unroll 4
        for (int i = 0; i < tokens / 64; i++) {
          const int low = (short)pairs[i * 32] - bin * FINE, high = (pairs[i * 32] >> 16) - bin * FINE;
          above += low >= FINE;  // forced ones, too
          above += high >= FINE;
          if (__any_sync(~0u, min((unsigned)low, (unsigned)high) < FINE)) {
            if ((unsigned)low < FINE) atomicAdd(&fine[low], 1);
            if ((unsigned)high < FINE) atomicAdd(&fine[high], 1);
          }
        }
      });
      above = __reduce_add_sync(~0u, above);
      if (lane == 0 && above) atomicAdd(&fine[FINE], above);
    }
    cluster.sync();
    for (int i = thread; i < blocks * (FINE + 1); i += THREADS)
      all_fine[i / (FINE + 1)][i % (FINE + 1)] = cluster.map_shared_rank(fine, i / (FINE + 1))[i % (FINE + 1)];
    __syncthreads();
    if (warp == 0) {
      // Lane j < 16: the tokens of key bin * 16 + j. The threshold is the highest key that, with all above it, is enough.
      unsigned sum = 0;
#pragma unroll
      for (int other = 0; other < MAX_BLOCKS; other++) sum += other < blocks && lane < FINE ? all_fine[other][lane] : 0;
      const unsigned key = max(bin, 0) * FINE + lane;
      const double value = by_mass ? significand(key) * unit(key / 128) : 1, weight = lane < FINE ? sum * value : 0;
      double reached = weight;  // by this key and those above it
#pragma unroll
      for (int step = 1; step < FINE; step *= 2) {
        const double above = __shfl_down_sync(~0u, reached, step);
        if (lane + step < FINE) reached += above;
      }
      reached += found_base;
      const unsigned enough = __ballot_sync(~0u, lane < FINE && (reached >= needed || lane == 0));
      const int chosen = 31 - __clz(enough);
      int quota = value > 0 ? (int)min(ceil((needed - (reached - weight)) / value), (double)sum) : 0;
      quota = __shfl_sync(~0u, quota, chosen);
      // Lane c: what block c keeps, and where it starts.
      const int span = WARPS * steps * STEP, from = min(lane * span, length), to = min(from + span, length);
      int above = 0, equal = 0;
      if (lane < blocks) {
        if (bin < 0) {
          above = forced == length ? to - from : max(min(to, a.sinks) - from, 0) + max(to - max(from, length - a.recent), 0);
        } else {
          above = all_fine[lane][FINE];
#pragma unroll
          for (int j = 1; j < FINE; j++) above += j > chosen ? all_fine[lane][j] : 0;
          equal = all_fine[lane][chosen];
        }
      }
      int equal_end = equal;
#pragma unroll
      for (int step = 1; step < MAX_BLOCKS; step *= 2) {
        const int below = __shfl_up_sync(~0u, equal_end, step);
        if (lane >= step) equal_end += below;
      }
      const int left = max(quota - (equal_end - equal), 0), kept = above + (bin >= 0 ? min(equal, left) : 0);
      int end = kept;
#pragma unroll
      for (int step = 1; step < MAX_BLOCKS; step *= 2) {
        const int below = __shfl_up_sync(~0u, end, step);
        if (lane >= step) end += below;
      }
      if (lane == rank) {
        found_threshold = bin >= 0 ? bin * FINE + chosen : FORCED - 1;  // above every key
        found_first = end - kept;
        found_quota = left;
      }
      if (lane == blocks - 1) found_total = end;
    }
    __syncthreads();
    threshold = found_threshold, first = found_first, own_quota = found_quota, total = found_total;
    if (!(by_mass && total > a.width)) break;
    by_mass = false, budget = a.width;  // too long a list: its best `width` tokens
    cluster.sync();
  }
  __syncthreads();

  // Mark the tokens above the threshold and those equal to it, a bit each, 32 to a word; count what the warps keep.
  uint2* marks = (uint2*)(suffix + BINS / blocks + 2) + (a.resident ? WARPS * steps * 64 : WARPS * AHEAD * 64) + warp * ((steps + AHEAD - 1) / AHEAD) * 32 + lane;
  int above = 0, equal = 0, batch = 0;  // marks: [batches][32] of this warp, behind all keys
  for_each_batch([&](const short* keys, int tokens, int) {
    uint2 mark = {0, 0};
#pragma unroll 4
    for (int i = 0; i < tokens / 32; i++) {
      const int key = keys[i * 32 + lane];
      const unsigned higher = __ballot_sync(~0u, key > threshold), same = __ballot_sync(~0u, key == threshold);
      if (lane == i) mark = make_uint2(higher, same);
    }
    above += __popc(mark.x), equal += __popc(mark.y);
    marks[batch++ * 32] = mark;
  });
  above = __reduce_add_sync(~0u, above);
  equal = __reduce_add_sync(~0u, equal);
  if (lane == 0) warp_kept[warp] = above, warp_equal[warp] = equal;
  __syncthreads();
  int place = first, ties = own_quota;  // where this warp starts, and how many tokens equal to the threshold it may keep
#pragma unroll
  for (int w = 0; w < WARPS; w++)
    if (w < warp) {
      const int taken = min(warp_equal[w], ties);
      place += warp_kept[w] + taken;
      ties -= taken;
    }
  auto up_to_here = [&](int x) {  // sum over the lanes up to this one
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0u, x, step);
      if (lane >= step) x += below;
    }
    return x;
  };
  int* indices = a.indices + (long long)list * a.width;
#pragma unroll 1
  for (int i = 0; i < batch; i++) {
    uint2 mark = marks[i * 32];
    if (ties && __any_sync(~0u, mark.y)) {
      const int here = __popc(mark.y), end = up_to_here(here);
      for (int left = ties - (end - here); mark.y && left > 0; mark.y &= mark.y - 1, left--) mark.x |= mark.y & -mark.y;
      ties -= min(ties, __shfl_sync(~0u, end, 31));
    }
    const int here = __popc(mark.x), end = place + up_to_here(here);
    const int position = begin + (i * 32 + lane) * 32;
    for (int at = end - here; mark.x; mark.x &= mark.x - 1, at++)
      if (at < a.width) indices[at] = position + __ffs(mark.x) - 1;
    place = __shfl_sync(~0u, end, 31);
  }
  total = min(total, a.width);
  if (rank == 0 && thread == 0) a.counts[list] = total;
  for (int i = total + rank * THREADS + thread; i < a.width; i += blocks * THREADS) indices[i] = -1;
  cluster.sync();  // no block leaves while another reads its shared memory
}

extern "C" int launch(const Arguments* arguments, int lists, int blocks, int shared_bytes, void* stream) {
  static const cudaError_t prepared = cudaFuncSetAttribute(token_select, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX_SHARED);
  if (prepared != cudaSuccess) return (int)prepared;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(lists * blocks);
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = (cudaStream_t)stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = blocks, attribute.val.clusterDim.y = 1, attribute.val.clusterDim.z = 1;
  config.attrs = &attribute, config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, token_select, *arguments);
}
