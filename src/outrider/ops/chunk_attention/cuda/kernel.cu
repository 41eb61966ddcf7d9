// Chunk attention for Hopper, in the frame of FlashAttention-3 (arXiv 2407.08608), with rows of the cache gathered from lists.
//
//     grid     B x blocks x heads that own a list x row tiles x splits. The rows of a tile are queries of one block, each with its query heads of
//              one KV head side by side. What they may see is one run of slots: those of the list, then the block's own tokens. Query
//              `step` of the block sees the slots up to count + step. Without lists the chunk is one block and a slot is a position.
//     ring     rows of keys and values in shared memory, TILE slots each, in the order they are needed: K0, K1, V0, K2, V1, ...
//     copy     one warpgroup looks slots up and gathers their rows with cp.async; it has few registers, the others the rest.
//     attend   the others have 64 rows each. Q K^T of the next tile and P V of this one are under way together; when the logits are there,
//              their softmax is taken while P V still runs. At D = 64, where the softmax takes as long as the products, the warpgroups
//              take turns at the tensor cores, so that the softmax of one falls into the products of another.
//
// Where there are fewer row tiles than multiprocessors, the slots of each are split among several programs, and a second kernel merges
// what they found. How they are split depends on the shapes of one sequence alone, so a row's result does not know its neighbours.
// Programs are ordered by their work, the last block first, and in it the last queries. Row tiles that walk the same list run side by side,
// so that one of them brings a row into the L2 cache for all. Slots behind the causal edge load nothing: their rows are zeros.
// Built for one ELEMENT, HEAD_DIM and WARPGROUPS that attend.
#include "host.cuh"
#include "ptx.cuh"
#include "wgmma.cuh"

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#define HEAD_DIM 128
#endif

#ifndef WARPGROUPS
#define WARPGROUPS 2
#endif

constexpr int D = HEAD_DIM, TILE = 128;            // slots
constexpr int ROWS = 64 * WARPGROUPS, ATTENDING = 128 * WARPGROUPS, THREADS = ATTENDING + 128;
constexpr int PIECES = D / 8;                      // of 16 bytes in a row
constexpr int TILE_BYTES = TILE * D * 2, QUERY_BYTES = 64 * D * 2;  // of a slot of the ring; of a warpgroup
constexpr int FIT = (226 * 1024 - WARPGROUPS * QUERY_BYTES) / TILE_BYTES;
constexpr int STAGES = FIT < 8 ? FIT : 8;
constexpr int SHARED_BYTES = WARPGROUPS * QUERY_BYTES + STAGES * TILE_BYTES + 2 * STAGES * 8;
constexpr int COPY_REGISTERS = WARPGROUPS == 2 ? 56 : 32, ATTEND_REGISTERS = WARPGROUPS == 2 ? 224 : 160;
constexpr bool ORDERED = D == 64;                  // measured: at 128 they do better left alone
constexpr float LN_2 = 0.6931471805599453f;
constexpr float LOWEST = -1e30f;                   // below every logit, and finite: of rows that see nothing no inf - inf comes
static_assert(D == 64 || D == 128, "unsupported shape");

struct Arguments {
  const ELEMENT *queries, *keys, *values;
  const int* indices;      // [B, blocks, lists, width], with counts
  const int* counts;       // [B, blocks, lists], or null: everything is read
  const void* lengths;     // [B] int32 or int64
  ELEMENT* output;         // [B, T, Hq, D] contiguous
  float* logsumexp;        // [B, Hq, T], or null
  float* partial_outputs;  // [splits, B, T, Hq, D], if splits > 1
  float* partial_logsumexp;  // [splits, B, T, Hq], in powers of two
  long long query_stride[3], stride[3], index_stride[3], count_stride[3], logsumexp_stride[3];  // elements; stride: of keys and values
  int wide_lengths, B, T, block, group, heads, heads_per_kv, row_tiles, splits;  // heads: of lists or KV
  float scale;             // on the logits, times log2(e)
};

struct Ring {
  uint32_t tiles;           // shared address
  uint64_t *full, *empty;   // [STAGES]
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ uint32_t tile() const { return tiles + stage * TILE_BYTES; }
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// A program's row tile, and the tiles of slots that it reads, begin .. stop - 1.
struct Part {
  int b, here, head, split, first, tokens, count, listed, own, end, begin, stop;
  __device__ __forceinline__ Part(const Arguments& a) {
    int rest = gridDim.x - 1 - blockIdx.x;
    auto digit = [&](int values) {
      const int value = rest % values;
      rest /= values;
      return value;
    };
    split = digit(a.splits);
    first = digit(a.row_tiles) * ROWS;                    // row
    head = digit(a.heads);
    b = digit(a.B);
    here = rest;
    tokens = min(a.T - here * a.block, a.block);          // of this block; a ragged one has fewer row tiles
    const int length = a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b];
    own = length + here * a.block;                        // position of the block's first token
    count = a.counts ? a.counts[b * a.count_stride[0] + here * a.count_stride[1] + head * a.count_stride[2]] : own;
    listed = a.counts ? count : 0;
    end = count + min((first + ROWS - 1) / a.group, tokens - 1) + 1;  // no row sees what is behind
    const int tiles = (end + TILE - 1) / TILE, each = (tiles + a.splits - 1) / a.splits;
    begin = split * each;
    stop = min(begin + each, tiles);
  }
  // Of a partial result: number of the row, or -1 where there is none.
  __device__ __forceinline__ long long partial_row(const Arguments& a, int row) const {
    const int step = row / a.group;
    const long long token = ((long long)split * a.B + b) * a.T + here * (long long)a.block + step;
    return step < tokens ? (token * a.heads + head) * a.group + row % a.group : -1;
  }
};

// Gathers the rows of all tiles into the ring. A warp has 32 slots of a tile; each lane looks one up and tells the others.
__device__ __forceinline__ void copy(const Arguments& a, const Part& at, Ring ring) {
  constexpr int ROWS_PER_PASS = 32 / PIECES, PASSES = 32 / ROWS_PER_PASS, BATCH = WARPGROUPS == 2 ? 8 : 4;  // lookups ahead of their copies
  const int warp = threadIdx.x % 128 / 32, lane = threadIdx.x % 32, in_pass = lane / PIECES, piece = lane % PIECES;
  const long long column = at.b * a.stride[0] + at.head / a.heads_per_kv * a.stride[2] + piece * 8;
  const ELEMENT *keys = a.keys + column, *values = a.values + column;
  const int* list = a.indices + at.b * a.index_stride[0] + at.here * a.index_stride[1] + at.head * a.index_stride[2];
  const uint32_t row_pieces = (uint32_t)(a.stride[1] / 8), shared = ring.tiles + piece / 8 * (TILE * 128) + (warp * 32 + in_pass) * 128;
  auto look_up = [&](int tile) {  // the position of this lane's slot
    const int slot = tile * TILE + warp * 32 + lane;
    if (slot >= at.end) return 0;
    return slot < at.listed ? list[slot] : at.own + slot - at.count;
  };
  auto load = [&](const ELEMENT* rows, int position, int tile) {
    const uint32_t mine = position * row_pieces;
    ptx::barrier_wait(ring.empty + ring.stage, ring.phase ^ 1);
    const uint32_t to = shared + ring.stage * TILE_BYTES;
    const int real = at.end - tile * TILE - warp * 32 - in_pass;  // rows that are
#pragma unroll
    for (int first = 0; first < PASSES; first += BATCH) {
      uint32_t from[BATCH];
#pragma unroll
      for (int i = 0; i < BATCH; i++) from[i] = __shfl_sync(~0u, mine, (first + i) * ROWS_PER_PASS + in_pass);
#pragma unroll
      for (int i = 0; i < BATCH; i++) {
        const int row = (first + i) * ROWS_PER_PASS;
        ptx::copy16(to + row * 128 + ((piece % 8 ^ in_pass ^ row % 8) << 4), ptx::offset16(rows, from[i]), row < real ? 16 : 0);
      }
    }
    ptx::barrier_arrive_after_copies(ring.full + ring.stage);
    ring.next();
  };
  int ahead = look_up(at.begin), before = 0;
  for (int tile = at.begin; tile < at.stop; tile++) {
    const int mine = ahead;
    ahead = look_up(tile + 1);
    load(keys, mine, tile);
    if (tile > at.begin) load(values, before, tile - 1);
    before = mine;
  }
  load(values, before, at.stop - 1);
}

// Online softmax over the 64 rows of a warpgroup; a thread has two of them, and of these every fourth pair of columns.
struct Softmax {
  float best[2] = {LOWEST, LOWEST}, total[2] = {0, 0}, fade[2];

  // Turns logits into weights 2 ** (scale * (logit - best)), and sets by which factor older ones count from now on.
  __device__ __forceinline__ void add(float (&s)[64], float scale) {
    float offset[2];
#pragma unroll
    for (int r = 0; r < 2; r++) {
      float higher = best[r];
#pragma unroll
      for (int i = 2 * r; i < 64; i += 4) higher = fmaxf(higher, fmaxf(s[i], s[i + 1]));
      higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 1));
      higher = fmaxf(higher, __shfl_xor_sync(~0u, higher, 2));
      fade[r] = ptx::exp2((best[r] - higher) * scale);
      best[r] = higher;
      offset[r] = higher * scale;
      total[r] *= fade[r];
    }
#pragma unroll
    for (int i = 0; i < 64; i++) {
      const int r = i / 2 % 2;
      s[i] = ptx::exp2(fmaf(s[i], scale, -offset[r]));
      total[r] += s[i];
    }
  }
};

__device__ __forceinline__ void attend(const Arguments& a, const Part& at, Ring ring, char* shared) {
  const int warpgroup = threadIdx.x / 128, thread = threadIdx.x % 128, lane = thread % 32;
  const int row = at.first + warpgroup * 64;  // the warpgroup's first
  for (int i = thread; i < 64 * PIECES; i += 128) {
    const int piece = i % PIECES, step = (row + i / PIECES) / a.group, head = at.head * a.group + (row + i / PIECES) % a.group;
    uint4 x = make_uint4(0, 0, 0, 0);
    if (step < at.tokens)
      x = *(const uint4*)(a.queries + at.b * a.query_stride[0] + (at.here * (long long)a.block + step) * a.query_stride[1] +
                          head * a.query_stride[2] + piece * 8);
    *(uint4*)(shared + piece / 8 * (64 * 128) + wgmma::swizzled(i / PIECES, piece % 8)) = x;
  }
  ptx::fence_async();
  ptx::named_barrier(1 + WARPGROUPS + warpgroup, 128);

  const uint64_t queries = wgmma::descriptor(ptx::shared_address(shared));
  const int mine[2] = {row + thread / 32 * 16 + lane / 4, row + thread / 32 * 16 + lane / 4 + 8};
  const int last[2] = {at.count + mine[0] / a.group, at.count + mine[1] / a.group};  // slots that the rows see
  float s[64], o[D / 2];
  uint32_t p[32];
  Softmax softmax;
#pragma unroll
  for (int i = 0; i < D / 2; i++) o[i] = 0;

  auto arrived = [&]() {
    ptx::barrier_wait(ring.full + ring.stage, ring.phase);
    ptx::fence_async();  // cp.async wrote, the tensor cores read
  };
  auto release = [&](uint64_t* empty) {
    if (lane == 0) ptx::barrier_arrive(empty);
  };
  auto multiply_keys = [&]() {  // S = Q K^T
    const uint64_t keys = wgmma::descriptor(ring.tile());
#pragma unroll
    for (int k = 0; k < D / 16; k++)
      wgmma::multiply_transposed<ELEMENT>(s, queries + (k / 4 * (64 * 128) + k % 4 * 32 >> 4), keys + (k / 4 * (TILE * 128) + k % 4 * 32 >> 4), k > 0);
    wgmma::commit();
  };
  auto multiply_values = [&]() {  // O += P V
    const uint64_t values = wgmma::descriptor(ring.tile(), TILE * 128);
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) wgmma::multiply_add<ELEMENT>(o, p + 4 * k, values + (k * 16 * 128 >> 4));
    wgmma::commit();
  };
  auto weigh = [&](int tile) {  // S -> weights
    const int start = tile * TILE + lane % 4 * 2;
    if (tile * TILE + TILE > at.count + at.first / a.group + 1) {
#pragma unroll
      for (int i = 0; i < 64; i++)
        if (start + i / 4 * 8 + i % 2 > last[i / 2 % 2]) s[i] = -INFINITY;
    }
    softmax.add(s, a.scale);
  };
  auto pack = [&]() {
#pragma unroll
    for (int i = 0; i < 32; i++) p[i] = ptx::pack<ELEMENT>(s[2 * i], s[2 * i + 1]);
  };

  arrived();
  wgmma::begin();
  multiply_keys();
  wgmma::wait<0>();
  wgmma::settle(s);
  release(ring.empty + ring.stage);
  ring.next();
  weigh(at.begin);
  pack();
  if (ORDERED && warpgroup == WARPGROUPS - 1 && at.stop - at.begin > 1) ptx::named_barrier_arrive(1, 256);  // the first one's turn
  for (int tile = at.begin + 1; tile < at.stop; tile++) {
    arrived();
    if (ORDERED) ptx::named_barrier(1 + warpgroup, 256);
    wgmma::begin();
    multiply_keys();
    uint64_t* const keys_read = ring.empty + ring.stage;
    ring.next();
    arrived();
    wgmma::begin();
    multiply_values();
    uint64_t* const values_read = ring.empty + ring.stage;
    ring.next();
    if (ORDERED && (warpgroup < WARPGROUPS - 1 || tile < at.stop - 1)) ptx::named_barrier_arrive(1 + (warpgroup + 1) % WARPGROUPS, 256);
    wgmma::wait<1>();
    wgmma::settle(s);
    release(keys_read);
    weigh(tile);
    wgmma::wait<0>();
    wgmma::settle(o);
    release(values_read);
    pack();
#pragma unroll
    for (int i = 0; i < D / 2; i++) o[i] *= softmax.fade[i / 2 % 2];
  }
  arrived();
  wgmma::begin();
  multiply_values();
  wgmma::wait<0>();
  wgmma::settle(o);

#pragma unroll
  for (int r = 0; r < 2; r++) {
    float total = softmax.total[r];
    total += __shfl_xor_sync(~0u, total, 1);
    total += __shfl_xor_sync(~0u, total, 2);
    const int step = mine[r] / a.group, head = at.head * a.group + mine[r] % a.group;
    const long long token = at.here * (long long)a.block + step;
    if (step >= at.tokens) continue;
    if (a.splits > 1) {
      const long long to = at.partial_row(a, mine[r]);
      const float share = total > 0 ? 1 / total : 0;  // a row may see nothing of these slots
      if (lane % 4 == 0) a.partial_logsumexp[to] = total > 0 ? softmax.best[r] * a.scale + log2f(total) : -INFINITY;
      float2* const output = (float2*)(a.partial_outputs + to * D) + lane % 4;
#pragma unroll
      for (int i = 0; i < D / 8; i++) output[4 * i] = make_float2(o[4 * i + 2 * r] * share, o[4 * i + 2 * r + 1] * share);
      continue;
    }
    if (a.logsumexp && lane % 4 == 0)
      a.logsumexp[at.b * a.logsumexp_stride[0] + head * a.logsumexp_stride[1] + token * a.logsumexp_stride[2]] =
          (softmax.best[r] * a.scale + log2f(total)) * LN_2;
    uint32_t* const to = (uint32_t*)(a.output + ((at.b * (long long)a.T + token) * a.heads * a.group + head) * D) + lane % 4;
    const float share = 1 / total;
#pragma unroll
    for (int i = 0; i < D / 8; i++) to[4 * i] = ptx::pack<ELEMENT>(o[4 * i + 2 * r] * share, o[4 * i + 2 * r + 1] * share);
  }
}

__global__ void __launch_bounds__(THREADS, 1) chunk_attention(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(1024) char shared[];
  const Part at(a);
  if (at.first / a.group >= at.tokens) return;
  if (at.begin >= at.stop) {  // fewer tiles than splits
    for (int row = at.first + threadIdx.x; row < at.first + ROWS; row += THREADS)
      if (const long long to = at.partial_row(a, row); to >= 0) a.partial_logsumexp[to] = -INFINITY;
    return;
  }
  char* const tiles = shared + WARPGROUPS * QUERY_BYTES;
  uint64_t* const barriers = (uint64_t*)(tiles + STAGES * TILE_BYTES);
  const Ring ring{ptx::shared_address(tiles), barriers, barriers + STAGES};
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) {
      ptx::barrier_init(ring.full + i, 128);
      ptx::barrier_init(ring.empty + i, ATTENDING / 32);
    }
    ptx::fence_barrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= ATTENDING) {
    ptx::fewer_registers<COPY_REGISTERS>();
    copy(a, at, ring);
  } else {
    ptx::more_registers<ATTEND_REGISTERS>();
    attend(a, at, ring, shared + threadIdx.x / 128 * QUERY_BYTES);
  }
}

// A warp has one row of the result; a lane D / 32 of its columns, and the sum of one split.
constexpr int MERGING = 128;
__global__ void __launch_bounds__(MERGING) merge(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x % 32, Hq = a.heads * a.group;
  const long long rows = (long long)a.B * a.T * Hq, row = (blockIdx.x * (long long)MERGING + threadIdx.x) / 32;
  if (row >= rows) return;
  const float mine = lane < a.splits ? a.partial_logsumexp[lane * rows + row] : -INFINITY;
  float highest = mine;
#pragma unroll
  for (int other = 16; other > 0; other /= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, other));
  const float weight = ptx::exp2(mine - highest);
  float total = weight, x[D / 32] = {};
#pragma unroll
  for (int other = 16; other > 0; other /= 2) total += __shfl_xor_sync(~0u, total, other);
  for (int split = 0; split < a.splits; split++) {
    const float share = __shfl_sync(~0u, weight, split);
    if (share == 0) continue;  // nothing was written there
    const float2* const part = (const float2*)(a.partial_outputs + (split * rows + row) * D) + lane * (D / 64);
#pragma unroll
    for (int i = 0; i < D / 64; i++) x[2 * i] += share * part[i].x, x[2 * i + 1] += share * part[i].y;
  }
  uint32_t* const output = (uint32_t*)(a.output + row * D) + lane * (D / 64);
#pragma unroll
  for (int i = 0; i < D / 64; i++) output[i] = ptx::pack<ELEMENT>(x[2 * i] / total, x[2 * i + 1] / total);
  if (a.logsumexp && lane == 0) {
    const long long token = row / Hq, b = token / a.T;
    a.logsumexp[b * a.logsumexp_stride[0] + row % Hq * a.logsumexp_stride[1] + token % a.T * a.logsumexp_stride[2]] =
        (highest + log2f(total)) * LN_2;
  }
}

extern "C" int launch(const Arguments* arguments, int programs, void* stream) {
  static const cudaError_t prepared =
      cudaFuncSetAttribute(chunk_attention, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (prepared != cudaSuccess) return (int)prepared;
  cudaLaunchConfig_t configuration = {};
  configuration.gridDim = dim3(programs);
  configuration.blockDim = dim3(THREADS);
  configuration.dynamicSmemBytes = SHARED_BYTES;
  configuration.stream = (cudaStream_t)stream;
  const cudaError_t error = cudaLaunchKernelEx(&configuration, chunk_attention, *arguments);
  if (error != cudaSuccess || arguments->splits == 1) return (int)error;
  const long long rows = (long long)arguments->B * arguments->T * arguments->heads * arguments->group;
  configuration.gridDim = dim3((unsigned)((rows * 32 + MERGING - 1) / MERGING));
  configuration.blockDim = dim3(MERGING);
  configuration.dynamicSmemBytes = 0;
  return (int)cudaLaunchKernelEx(&configuration, merge, *arguments);
}
