// Token selection for Hopper: one launch, one block of threads per list, or a cluster of blocks for each of a few or long ones. No sort.
//
// A token's key is the upper half of its merged fp32 score: 15 bits that order like the score. The blocks of a cluster take equal,
// contiguous parts of the row, and so do the warps of a block. A warp walks its tokens step by step through a ring of its own in shared
// memory, filled by bulk copies.
//
//     1  downwards: a histogram of the keys in a window of 32 octaves, a bin per key; what lies above and below it is added up beside
//     2  every block adds up what the blocks of its cluster have counted, first 16 bins at a time, then one by one, and finds the
//        threshold: the highest key that, with all keys above it, is enough. A bin has one key, so counts are masses, too. Should the
//        threshold lie outside of the window, the window moves. Counts of the blocks before tell where this block's tokens go.
//     3  upwards: every warp marks what it keeps, a bit per token, and counts
//     4  downwards: it writes positions
// What is still in the ring is not read again.
//
// Scores of one row of aligned bfloat16 are their own keys. Others are MERGED, one row too: in pass 1 the ring brings a step of one row
// after the other, registers add them up, and the keys wait in global memory, for passes 3 and 4 to read them as if they were scores.
// Those of a warp's first KEPT steps stay in the ring.
//
// Forced tokens (sinks, recent ones) are counted like all others, and taken out of the histogram again, since few are forced.
// Sums are of integers, or of doubles in a fixed order.
#include "host.cuh"
#include "ptx.cuh"
#include "threshold.cuh"

constexpr int SAVED = BLOCKS_PER_SM == 2 ? 16 : 8;  // steps of a warp whose marks are kept
constexpr int WINDOW = 3;  // of 32 octaves, the first one tried: scores from 2^-31 to below 2

struct Arguments {
  const ELEMENT* scores;     // [B, R, S]
  uint16_t* keys;            // [lists, pitch], for merged ones, in the order of the blocks; or null
  const void* lengths;       // [B] int32 or int64
  const long long* sources;  // [Lt, Hs, G]
  const void* budgets;       // [B] or [Lt, B, Hs] int32 or int64 (top-k), float or double (top-p); null: the number below
  int* indices;              // [Lt, B, Hs, width]
  int* counts;               // [Lt, B, Hs]
  long long stride_b, stride_r, pitch;
  double budget;
  int wide_lengths, wide_budgets, budget_by_list, top_p, B, S, layers, heads, G, sinks, recent, take_max, width, exact, aligned;
};

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

__global__ void __launch_bounds__(THREADS, BLOCKS_PER_SM) token_select(const __grid_constant__ Arguments a) {
  __shared__ __align__(16) Shared shared;
  extern __shared__ __align__(128) uint4 dynamic[];  // rings [WARPS][HOMES][SPAN / VECTOR] of keys, then [WARPS][SAVED][32] marks

  cg::cluster_group cluster = cg::this_cluster();
  const int blocks = cluster.num_blocks(), rank = cluster.block_rank(), order = blockIdx.x / blocks;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  // Sequence after sequence, so that lists that share rows meet in the L2 cache.
  const int b = order / (a.layers * a.heads), of_sequence = order % (a.layers * a.heads), l = of_sequence / a.heads, h = of_sequence % a.heads;
  const int list = (l * a.B + b) * a.heads + h;
  const int length = min(a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b], a.S);
  const ELEMENT* scores = a.scores + b * a.stride_b;
  const long long* sources = a.sources + ((long long)l * a.heads + h) * a.G;
  const int forced_below = min(a.sinks, length), forced_from = max(length - a.recent, forced_below), forced = forced_below + length - forced_from;
  if (thread == 0) shared.row = {scores, sources, a.stride_r, a.G, length, forced_below, forced_from, (bool)a.take_max, a.take_max ? 1 : a.G & a.G - 1 ? 0 : 1.0f / a.G};

  // This block's tokens: begin .. end - 1, a multiple of SPAN; this warp's: first .. last - 1, in steps of SPAN.
  const int part = (length + blocks * SPAN - 1) / (blocks * SPAN) * SPAN, begin = min(rank * part, length), end = min(begin + part, length);
  const int range = (end - begin + WARPS * SPAN - 1) / (WARPS * SPAN) * SPAN, first = min(begin + warp * range, end), last = min(first + range, end);
  const int steps = (last - first + SPAN - 1) / SPAN;
  const int homes = MERGED ? HOMES : min(range / SPAN, HOMES), saved = min(range / SPAN, SAVED);
  uint4* const ring = dynamic + warp * homes * (SPAN / VECTOR);
  uint2* const saved_marks = (uint2*)(dynamic + WARPS * homes * (SPAN / VECTOR)) + warp * saved * 32 + lane;
  // What is copied to the ring: scores that are their own keys, if they are clean; or keys, once they have been merged.
  const uint16_t* source = MERGED ? a.keys + order * a.pitch : (const uint16_t*)(scores + sources[0] * a.stride_r);
  uint64_t* const full = shared.full[warp];
  unsigned phases = 0;  // of its barriers, a bit each
  if (lane == 0) {
#pragma unroll
    for (int i = 0; i < HOMES; i++) ptx::barrier_init(full + i, 1);
    ptx::fence_barrier_init();
  }
  __syncwarp();
  auto home = [&](int s) { return ring + s % HOMES * (SPAN / VECTOR); };
  auto bytes = [&](int s) { return s < 0 || s >= steps ? 0 : MERGED ? SPAN * 2 : min(SPAN, last - first - s * SPAN) / VECTOR * 16; };
  auto copy = [&](int s) {
    if (bytes(s) && lane == 0) ptx::copy_bulk(home(s), source + first + s * SPAN, bytes(s), full + s % HOMES);
  };
  auto wait_for = [&](int barrier) {
    ptx::barrier_wait(full + barrier, phases >> barrier & 1);
    phases ^= 1 << barrier;
  };
  auto wait = [&](int s) {
    if (bytes(s)) wait_for(s % HOMES);
  };
  auto copy_again = [&](int s) {
    ptx::fence_async();  // keys may have been put there
    __syncwarp();
    copy(s);
  };
  // A piece is a whole step of one row to merge. They come downwards, row by row in each step, to the ring behind the keys that stay.
  uint4* const pieces = ring + KEPT * (SPAN / VECTOR);
  int next_step = a.aligned ? (last - first) / SPAN - 1 : -1, next_row = 0, next_piece = 0, piece = 0;
  long long next_source = MERGED ? sources[0] : 0;  // asked for early
  auto copy_piece = [&] {
    if (next_step < 0) return;
    if (lane == 0) ptx::copy_bulk(pieces + next_piece * PIECE, scores + next_source * a.stride_r + first + next_step * SPAN, PIECE * 16, full + next_piece);
    if (++next_row == a.G) next_row = 0, next_step--;
    if (++next_piece == PIECES) next_piece = 0;
    next_source = sources[next_row];
  };
  auto stored = [&](int s, int i) {  // where pass 1 has the lane's i-th eight keys of a step
    return (!MERGED || s < KEPT ? home(s) : (uint4*)(a.keys + order * a.pitch + first + s * SPAN)) + i * 32 + lane;
  };
#pragma unroll 1
  for (int i = 1; i <= (MERGED ? PIECES : HOMES); i++) MERGED ? copy_piece() : copy(steps - i);

  // The forced tokens' scores are asked for early, where they are keys.
  auto forced_position = [&](int i) { return i < forced_below ? i : forced_from + i - forced_below; };
  ELEMENT early = ELEMENT();
  if (!MERGED && thread < forced) early = ((const ELEMENT*)source)[forced_position(thread)];
  if (thread == 0) {
    const int own = a.budget_by_list ? list : b;
    List list = {(bool)a.top_p, (bool)a.exact, a.budget, 0, length, a.width, forced, min(begin, forced_below) + max(begin - forced_from, 0)};
    if (a.budgets && a.top_p) list.budget = a.wide_budgets ? ((const double*)a.budgets)[own] : ((const float*)a.budgets)[own];
    if (a.budgets && !a.top_p) list.budget = a.wide_budgets ? (double)((const long long*)a.budgets)[own] : ((const int*)a.budgets)[own];
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
      const unsigned key = !MERGED && i == thread ? __float_as_uint(fmaxf(as_float(early), 0)) >> 16 : shared.row.key_at(position);
      held += mass_of(key);
      if (position >= begin && position < end && key >> 12 == window) atomicSub(&shared.histogram[key & 0xfff], 1);
    }
    auto count_singly = [&](int s, int i, bool in_place) {
      const int here = first + s * SPAN + (i * 32 + lane) * VECTOR;
      const Outside more = count_strange(shared, stored(s, i), here, last, in_place && (settled || here + VECTOR <= last), window);
      outside.below += more.below, outside.above += more.above, outside.count += more.count;
    };
#pragma unroll 1
    for (int s = steps - 1; s >= 0; s--) {
      const bool whole = first + (s + 1) * SPAN <= last;
      if (MERGED && !settled && whole && a.aligned) {
        float merged[VECTORS][VECTOR] = {};
#pragma unroll 1
        for (int g = 0; g < a.G; g++) {
          wait_for(piece);
          if (a.take_max)
            merge<true>(merged, pieces + piece * PIECE);
          else
            merge<false>(merged, pieces + piece * PIECE);
          if (++piece == PIECES) piece = 0;
          __syncwarp();
          copy_piece();
        }
        unsigned strange = 0;
#pragma unroll
        for (int i = 0; i < VECTORS; i++) {
          const uint4 keys = shared.row.keys_of(merged[i]);
          *stored(s, i) = keys;
          if (!count_usual(shared, keys, window)) strange |= 1 << i;
        }
#pragma unroll 1
        for (; strange; strange &= strange - 1) count_singly(s, __ffs(strange) - 1, true);
        continue;
      }
      const bool in_place = settled || !MERGED;
      if (!settled && !MERGED) wait(s);
#pragma unroll 2
      for (int i = 0; i < VECTORS; i++)
        if (!(in_place && whole && count_usual(shared, *stored(s, i), window))) count_singly(s, i, in_place);
      if (!MERGED && s >= HOMES) copy_again(s - HOMES);
    }
    if (MERGED && !settled) {  // the first keys that do not stay in the ring come while the threshold is looked for
      ptx::fence_async_global();
      __syncwarp();
#pragma unroll 1
      for (int s = KEPT; s < HOMES; s++) copy(s);
    }
    __syncwarp();
    settled = MERGED || range <= HOMES * SPAN;
    if (by_mass) {
      held = sum_of_all(held, shared.scratch);
      if (thread == 0) shared.list.held = held;
      outside.below = sum_of_all(outside.below, shared.scratch);
      outside.above = sum_of_all(outside.above, shared.scratch);
    }
    outside.count = sum_of_all(outside.count, (int*)shared.scratch);
    if (thread == 0) shared.outside = outside;
    add_up(shared, window, by_mass);
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
    if constexpr (!MERGED) {
#pragma unroll 1
      for (int i = 0; i < VECTORS; i++) {
        uint4* place = home(s) + i * 32 + lane;
        const int start = first + s * SPAN + (i * 32 + lane) * VECTOR;
        if (start < last && !(start + VECTOR <= last && clean(*place))) *place = shared.row.keys_at(start);
      }
      __syncwarp();
    }
  };
  auto marks = [&](int s) { return mark(home(s), threshold, first + s * SPAN, last, forced_below, forced_from); };
  int higher = 0, same = 0;  // of this warp
#pragma unroll 1
  for (int s = 0; s < steps; s++) {
    if (s >= KEPT) settle(s);
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
  config.dynamicSmemBytes = (MERGED ? HOMES : min(steps, HOMES)) * STEP_BYTES + min(steps, SAVED) * MARK_BYTES;
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
