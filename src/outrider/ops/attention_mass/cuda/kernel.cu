// Attention mass for Hopper: one cooperative launch, one block per multiprocessor; every key is read once.
//
// The mass of a key needs the sum over all keys of its sequence and head, a *problem*. So exponentials must be kept until that sum is
// known, and they are kept on the chip: problems are taken one after the other, each cut into one *chunk* per block, small enough for
// the block's shared memory. Two groups of warps work side by side on two buffers:
//
//     score    logits K Q^T on the tensor cores, tile by tile of 16 keys; 2^(logit - reference) as bf16 into a buffer, one reference
//              per tile and row; sums per row. Keys come through per-thread queues of asynchronous copies that never run dry between
//              problems. A thread copies just the 16-byte pieces that it feeds to the tensor cores itself: the order of a dot
//              product is free, so no shuffling is needed.
//     finish   publish the chunk's sums, read those of the other blocks (a mailbox is EMPTY until its sum is there), weigh and add up the exponentials of the T queries of
//              each head, write the masses. By then the scorers are busy with the next problem.
//
// The tail of T keys enters the sums, causally, and gets no mass. Query rows are r = t * group + g.
// Built for one HEAD_DIM, number of QUERIES (T), GROUP of query heads per KV head and depth of the queues, STAGES; with SPILL the buffers lie in global memory,
// for sequences whose chunks do not fit. All sums are taken in a fixed order.
#include "host.cuh"
#include "ptx.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#define QUERIES 5
#define GROUP 4
#define STAGES 4
#endif

constexpr int D = HEAD_DIM, SCORERS = 10, FINISHERS = 6, THREADS = 32 * (SCORERS + FINISHERS), T = QUERIES, ROW_TILES = (T * GROUP + 7) / 8, ROWS = 8 * ROW_TILES;
constexpr int TILE = 16, PIECES = D / 32;         // keys; 64-byte pieces of a key
constexpr int SLOT = 2 * PIECES * 512;            // bytes of a tile: per lane two keys' worth of 16-byte pieces
constexpr int MAX_SEQUENCES = 1024;
constexpr unsigned EMPTY = 0xffffffff;            // a NaN that no sum is
constexpr float SLACK = 60;                       // powers of two by which an exponential may pass its reference

struct Arguments {
  const __nv_bfloat16 *queries, *keys;
  const void* lengths;      // [B] int32 or int64
  const int* page_table;    // [B, pages_per_sequence], or null
  void* masses;             // [B, Hq, stride_out] bf16 or fp32
  float2* mailboxes;        // [problems][blocks][ROWS]: reference and sum of a chunk; EMPTY before and after
  int* readers;             // [problems]: blocks that have read a problem's mailboxes, less one; -1 before and after
  uint32_t* spilled;        // with SPILL: [blocks][2][buffer]
  long long query_stride[3], stride[3], stride_out;  // elements: (b, t, h); (sequence or page, token, head); a row of masses
  int wide_lengths, B, heads, N, page_size, pages_per_sequence, chunk, wide_masses, take_max;  // chunk: most keys of one
  float scale;              // on the logits, times log2(e)
};

constexpr int MIN_CHUNK = 256;
// Words between rows of a buffer, a word holding two keys: 4 more than a multiple of 32, so that stores do not conflict.
__host__ __device__ constexpr int row_words(int chunk) { return (chunk / 2 + 27) / 32 * 32 + 4; }
__host__ __device__ constexpr int buffer_words(int chunk) { return ROWS * row_words(chunk) + chunk / TILE * ROWS; }

struct Item {  // one chunk of one problem
  int b, h, problem, part, parts, first, keys, length;  // keys: including those of the tail
};

struct Items {  // in order of sequence, head, chunk
  const int *lengths, *starts;  // in shared memory; starts [B + 1]: first item of each sequence
  int heads, blocks;
  __device__ __forceinline__ int chunk_of(int tokens) const {
    return max((tokens + blocks * TILE - 1) / (blocks * TILE) * TILE, MIN_CHUNK);
  }
  __device__ __forceinline__ int parts_of(int b) const {
    const int tokens = lengths[b] + T;
    return (tokens + chunk_of(tokens) - 1) / chunk_of(tokens);
  }
  __device__ __forceinline__ Item at(int i, int b) const {
    while (i >= starts[b + 1]) b++;
    Item item;
    const int tokens = lengths[b] + T, chunk = chunk_of(tokens), within = i - starts[b];
    item.b = b;
    item.parts = parts_of(b);
    item.h = within / item.parts;
    item.part = within - item.h * item.parts;
    item.problem = b * heads + item.h;
    item.first = item.part * chunk;
    item.keys = min(chunk, tokens - item.first);
    item.length = lengths[b];
    return item;
  }
};

__device__ __forceinline__ void sync_finishers() { ptx::named_barrier<1, 32 * FINISHERS>(); }

__device__ __forceinline__ float2 merge(float2 x, float2 y) {  // (reference, sum)
  const float reference = fmaxf(x.x, y.x);
  if (reference == -INFINITY) return make_float2(reference, x.y + y.y);  // nothing visible; but a NaN counts
  return make_float2(reference, x.y * ptx::exp2(x.x - reference) + y.y * ptx::exp2(y.x - reference));
}

__device__ void score(const Arguments& a, const Items& items, int total, char* queue, uint32_t* const (&buffers)[2], float2* const (&sums)[2],
                      int* scored, uint64_t* full, uint64_t* empty) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, token = lane / 4 * 2, piece = lane % 4;
  char* mine = queue + warp * STAGES * SLOT + lane * 16;
  const uint32_t mine_address = ptx::shared_address(mine);

  // The copying side of the queue runs STAGES - 1 tiles ahead, across items.
  int copied_item = blockIdx.x, copied_tile = warp, copied_slot = 0;
  Item source = copied_item < total ? items.at(copied_item, 0) : Item{};
  auto skip_to_tile = [&] {
    while (copied_item < total && copied_tile * TILE >= source.keys) {
      copied_item += gridDim.x;
      copied_tile = warp;
      if (copied_item < total) source = items.at(copied_item, source.b);
    }
  };
  auto copy = [&] {
    if (copied_item < total) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int position = source.first + min(copied_tile * TILE + token + i, source.keys - 1);  // past the end: the last again
        long long outer = source.b, inner = position;
        if (a.page_table) {
          outer = a.page_table[(long long)source.b * a.pages_per_sequence + position / a.page_size];
          inner = position % a.page_size;
        }
        const __nv_bfloat16* key = a.keys + outer * a.stride[0] + inner * a.stride[1] + source.h * a.stride[2] + piece * 8;
#pragma unroll
        for (int p = 0; p < PIECES; p++) ptx::copy16(mine_address + copied_slot * SLOT + (2 * p + i) * 512, key + p * 32);
      }
      copied_tile += SCORERS;
      skip_to_tile();
    }
    ptx::commit();
    copied_slot = copied_slot + 1 == STAGES ? 0 : copied_slot + 1;
  };
  skip_to_tile();
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; s++) copy();

  int slot = 0, b = 0, round = 0;
  for (int i = blockIdx.x; i < total; i += gridDim.x, round++) {
    const Item item = items.at(i, b);
    b = item.b;
    uint32_t q[ROW_TILES][PIECES][4];
    int last_seen[ROW_TILES][2];  // the last position that this thread's rows see
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
      const int row = n * 8 + lane / 4, t = row / GROUP, g = row - t * GROUP;
      const __nv_bfloat16* query = a.queries + b * a.query_stride[0] + t * a.query_stride[1] + (item.h * GROUP + g) * a.query_stride[2] + piece * 8;
#pragma unroll
      for (int p = 0; p < PIECES; p++)
        *(uint4*)q[n][p] = t < T ? *(const uint4*)(query + p * 32) : make_uint4(0, 0, 0, 0);
#pragma unroll
      for (int k = 0; k < 2; k++) last_seen[n][k] = item.length + (n * 8 + piece * 2 + k) / GROUP;
    }
    uint32_t* buffer = buffers[round % 2];
    float* references = (float*)(buffer + ROWS * row_words(a.chunk));  // [tiles][ROWS]
    if (round >= 2) ptx::barrier_wait(empty + round % 2, (round / 2 - 1) % 2);

    float reference[ROW_TILES][2], sum[ROW_TILES][2];
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) reference[n][0] = reference[n][1] = -INFINITY, sum[n][0] = sum[n][1] = 0;
#pragma unroll 1
    for (int tile = warp; tile * TILE < item.keys; tile += SCORERS) {
      ptx::wait_group<STAGES - 2>();  // a thread reads only what it has copied itself
      float logits[ROW_TILES][4] = {};
#pragma unroll
      for (int p = 0; p < PIECES; p++) {
        const uint4 even = *(const uint4*)(mine + slot * SLOT + 2 * p * 512), odd = *(const uint4*)(mine + slot * SLOT + (2 * p + 1) * 512);
        const uint32_t left[2][4] = {{even.x, odd.x, even.y, odd.y}, {even.z, odd.z, even.w, odd.w}};
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
          ptx::multiply_add<__nv_bfloat16>(logits[n], left[0], q[n][p][0], q[n][p][1]);
          ptx::multiply_add<__nv_bfloat16>(logits[n], left[1], q[n][p][2], q[n][p][3]);
        }
      }
      copy();  // into the slot that was read in the round before
      slot = slot + 1 == STAGES ? 0 : slot + 1;
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int k = 0; k < 4; k++) logits[n][k] *= a.scale;
      const int position = item.first + tile * TILE + token;  // of the thread's two keys
      if (item.first + tile * TILE + TILE > item.length) {
        asm volatile("");  // a branch, not predicates: it is rare
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int k = 0; k < 4; k++)
            if (position + k / 2 > last_seen[n][k % 2] || position + k / 2 >= item.first + item.keys) logits[n][k] = -INFINITY;
      }
      bool passed = false;
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int k = 0; k < 2; k++) passed |= fmaxf(logits[n][k], logits[n][k + 2]) > reference[n][k] + SLACK;
      if (__any_sync(~0u, passed)) {
        asm volatile("");
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int k = 0; k < 2; k++) {
            float highest = fmaxf(reference[n][k], fmaxf(logits[n][k], logits[n][k + 2]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 4));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 8));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 16));
            if (highest > reference[n][k]) sum[n][k] *= ptx::exp2(reference[n][k] - highest);
            reference[n][k] = highest;
          }
      }
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const float base = reference[n][k] == -INFINITY ? 0 : reference[n][k];  // nothing visible yet
          const float x = ptx::exp2(logits[n][k] - base), y = ptx::exp2(logits[n][k + 2] - base);
          sum[n][k] += x + y;
          const int row = n * 8 + piece * 2 + k;
          buffer[row * row_words(a.chunk) + tile * 8 + lane / 4] = ptx::pack<__nv_bfloat16>(x, y);
          if (lane < 4) references[tile * ROWS + row] = base;
        }
    }
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int k = 0; k < 2; k++) {
        sum[n][k] += __shfl_xor_sync(~0u, sum[n][k], 4);
        sum[n][k] += __shfl_xor_sync(~0u, sum[n][k], 8);
        sum[n][k] += __shfl_xor_sync(~0u, sum[n][k], 16);
        if (lane < 4) sums[round % 2][warp * ROWS + n * 8 + piece * 2 + k] = make_float2(reference[n][k], sum[n][k]);
      }
    __threadfence_block();
    __syncwarp();
    int before = lane == 0 ? atomicAdd(scored + round % 2, 1) : 0;
    if (__shfl_sync(~0u, before, 0) == SCORERS - 1) {  // the last warp publishes the chunk's sums
      __threadfence_block();
      if (lane == 0) scored[round % 2] = 0;
      if (lane < ROWS) {
        float2 own = {-INFINITY, 0};
#pragma unroll
        for (int w = 0; w < SCORERS; w++) own = merge(own, sums[round % 2][w * ROWS + lane]);
        if (__float_as_uint(own.y) == EMPTY) own.y = __uint_as_float(0x7fffffff);
        __stcg(a.mailboxes + ((long long)item.problem * gridDim.x + item.part) * ROWS + lane, own);
      }
      __syncwarp();
    }
    if (lane == 0) ptx::barrier_arrive(full + round % 2);
  }
}

__device__ void finish(const Arguments& a, const Items& items, int total, uint32_t* const (&buffers)[2], float2* parts,
                       int* to_empty, uint64_t* full, uint64_t* empty) {
  const int thread = threadIdx.x - 32 * SCORERS, lane = thread % 32, warp = thread / 32;
  // No mass at and past the length: zeros up to N.
  for (int row = blockIdx.x; row < a.B * a.heads * GROUP; row += gridDim.x)
    for (int i = items.lengths[row / (a.heads * GROUP)] + thread; i < a.N; i += 32 * FINISHERS) {
      if (a.wide_masses)
        ((float*)a.masses)[row * a.stride_out + i] = 0;
      else
        ((__nv_bfloat16*)a.masses)[row * a.stride_out + i] = __float2bfloat16_rn(0);
    }

  int b = 0, round = 0;
  for (int i = blockIdx.x; i < total; i += gridDim.x, round++) {
    const Item item = items.at(i, b);
    b = item.b;
    const uint32_t* buffer = buffers[round % 2];
    float* weights = (float*)(buffers[round % 2] + ROWS * row_words(a.chunk));  // [tiles][ROWS]: references at first
    ptx::barrier_wait(full + round % 2, round / 2 % 2);

    // Sums of the rows over the whole problem.
    float2* mailboxes = a.mailboxes + (long long)item.problem * gridDim.x * ROWS;
    float2 mine = {-INFINITY, 0};
    for (int base = warp; base < item.parts; base += 12 * FINISHERS) {
      float2 read[12];
      bool waiting = true;
      while (waiting) {
        waiting = false;
#pragma unroll
        for (int k = 0; k < 12; k++) {
          read[k] = make_float2(-INFINITY, 0);
          if (base + k * FINISHERS < item.parts && lane < ROWS)
            asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];"
                         : "=f"(read[k].x), "=f"(read[k].y) : "l"(mailboxes + (base + k * FINISHERS) * ROWS + lane) : "memory");
        }
#pragma unroll
        for (int k = 0; k < 12; k++) waiting |= __float_as_uint(read[k].x) == EMPTY || __float_as_uint(read[k].y) == EMPTY;
      }
#pragma unroll
      for (int k = 0; k < 12; k++) mine = merge(mine, read[k]);
    }
    if (lane < ROWS) parts[warp * ROWS + lane] = mine;
    sync_finishers();
    if (thread == 0) {  // the last of the problem's readers empties the mailboxes
      *to_empty = atomicAdd(a.readers + item.problem, 1) == item.parts - 2;
      if (*to_empty) atomicExch(a.readers + item.problem, -1);
    }
    const int tiles = (item.keys + TILE - 1) / TILE;
    if (lane < ROWS) {
      float2 all = {-INFINITY, 0};
#pragma unroll
      for (int w = 0; w < FINISHERS; w++) all = merge(all, parts[w * ROWS + lane]);
      const float factor = 1 / (all.y * (a.take_max ? 1 : T));
      for (int tile = warp; tile < tiles; tile += FINISHERS) weights[tile * ROWS + lane] = ptx::exp2(weights[tile * ROWS + lane] - all.x) * factor;
    }
    sync_finishers();
    if (*to_empty)
      for (int k = thread; k < item.parts * ROWS; k += 32 * FINISHERS) __stcg((uint2*)mailboxes + k, make_uint2(EMPTY, EMPTY));

    // Two neighbouring keys a thread.
    const int words = (min(item.keys, item.length - item.first) + 1) / 2, stride = row_words(a.chunk);
    for (int word = thread; word < words; word += 32 * FINISHERS) {
      const float4* weight = (const float4*)(weights + word / 8 * ROWS);
      float w[ROWS];
      uint32_t two[T * GROUP];
#pragma unroll
      for (int r = 0; r < ROWS / 4; r++) *(float4*)(w + 4 * r) = weight[r];
#pragma unroll
      for (int r = 0; r < T * GROUP; r++) two[r] = buffer[r * stride + word];
      const bool last = item.first + 2 * word + 1 >= item.length;  // the second key is the first of the tail
#pragma unroll
      for (int g = 0; g < GROUP; g++) {
        float x = 0, y = 0;
#pragma unroll
        for (int t = 0; t < T; t++) {
          const int r = t * GROUP + g;
          const float low = w[r] * __uint_as_float(two[r] << 16), high = w[r] * __uint_as_float(two[r] & 0xffff0000);
          x = a.take_max ? fmaxf(x, low) : x + low;
          y = a.take_max ? fmaxf(y, high) : y + high;
        }
        if (last) y = 0;
        const long long at = ((long long)(item.b * a.heads + item.h) * GROUP + g) * a.stride_out + item.first + 2 * word;
        if (a.wide_masses)
          *(float2*)((float*)a.masses + at) = make_float2(x, y);
        else
          *(uint32_t*)((__nv_bfloat16*)a.masses + at) = ptx::pack<__nv_bfloat16>(x, y);
      }
    }
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(empty + round % 2);
  }
}

__global__ void __launch_bounds__(THREADS, 1) attention_mass(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char shared[];
  __shared__ __align__(8) uint64_t full[2], empty[2];
  __shared__ int lengths[MAX_SEQUENCES], starts[MAX_SEQUENCES + 1], scored[2], to_empty;
  __shared__ float2 all_sums[2][SCORERS * ROWS], parts[FINISHERS * ROWS];
  uint32_t* space = (uint32_t*)(shared + SCORERS * STAGES * SLOT);
#ifdef SPILL
  space = a.spilled + (long long)blockIdx.x * 2 * buffer_words(a.chunk);
#endif
  uint32_t* const buffers[2] = {space, space + buffer_words(a.chunk)};
  float2* const sums[2] = {all_sums[0], all_sums[1]};

  for (int b = threadIdx.x; b < a.B; b += THREADS)
    lengths[b] = a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b];
  if (threadIdx.x < 2) {
    scored[threadIdx.x] = 0;
    ptx::barrier_init(full + threadIdx.x, SCORERS);
    ptx::barrier_init(empty + threadIdx.x, FINISHERS);
  }
  __syncthreads();
  const Items items{lengths, starts, a.heads, (int)gridDim.x};
  if (threadIdx.x == 0) {
    int start = 0;
    for (int b = 0; b < a.B; b++) starts[b] = start, start += a.heads * items.parts_of(b);
    starts[a.B] = start;
  }
  __syncthreads();
  const int total = starts[a.B];
  if (threadIdx.x < 32 * SCORERS)
    score(a, items, total, shared, buffers, sums, scored, full, empty);
  else
    finish(a, items, total, buffers, parts, &to_empty, full, empty);
}

// Bytes of dynamic shared memory; without SPILL for chunks of up to `chunk` keys.
extern "C" int shared_bytes(int chunk) {
#ifdef SPILL
  return SCORERS * STAGES * SLOT;
#else
  return SCORERS * STAGES * SLOT + 2 * buffer_words(chunk) * 4;
#endif
}
extern "C" int spilled_words(int chunk) { return 2 * buffer_words(chunk); }  // of one block

extern "C" int launch(const Arguments* arguments, int blocks, void* stream) {
  const int bytes = shared_bytes(arguments->chunk);
  const cudaError_t error = cudaFuncSetAttribute(attention_mass, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  void* parameters[] = {(void*)arguments};
  return (int)cudaLaunchCooperativeKernel((void*)attention_mass, dim3(blocks), dim3(THREADS), parameters, bytes, (cudaStream_t)stream);
}
