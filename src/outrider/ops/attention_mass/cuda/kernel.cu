// Attention mass for Hopper: one cooperative launch, one block per multiprocessor; every key is read once.
//
// The mass of a key needs the sum over all keys of its sequence and head, a *problem*. So exponentials must be kept until that sum is
// known, and they are kept on the chip: a problem is cut into *chunks* of equal size, one block takes one chunk at a time, and as many
// problems are under way together as the blocks' shared memory holds. Two groups of warps work side by side:
//
//     score    logits K Q^T on the tensor cores, tile by tile of 32 keys; 2^(logit - reference) as bf16 into a ring of segments in
//              shared memory; sums per row. A warp has its own tiles, its own queue of keys on their way and its own reference per
//              row, a power of two near the largest logit of its first tile. The order of a dot product is free, so 16-byte pieces of
//              keys go to the tensor cores as they lie in memory.
//     finish   publish the chunk's sums, read those of the problem's other chunks (a mailbox is EMPTY until its sum is there), weigh
//              and add up the exponentials of the T queries of each head, write the masses, hand the segments back. By then the
//              scorers are busy with the next chunk.
//
// The tail of T keys enters the sums, causally, and gets no mass. Query rows are r = t * GROUP + g.
// Built for one HEAD_DIM, number of QUERIES (T), GROUP of query heads per KV head, with or without PAGED caches,
// for the mean over the queries or REDUCE_MAX. All sums are taken in a fixed order.
#include "host.cuh"
#include "ptx.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#define QUERIES 5
#define GROUP 4
#endif
#ifdef REDUCE_MAX
constexpr bool TAKE_MAX = true;  // over the queries; else their mean
#else
constexpr bool TAKE_MAX = false;
#endif

constexpr int D = HEAD_DIM, T = QUERIES, ROWS = T * GROUP;
constexpr int EIGHTS = (ROWS + 7) / 8, PADDED_ROWS = 8 * EIGHTS, ROW_TILES = (EIGHTS + 1) / 2;  // rows by eights, tiles by 16
constexpr int SCORERS = 8, FINISHERS = 8, THREADS = 32 * (SCORERS + FINISHERS);  // warps
constexpr int SCORER_REGISTERS = 152, FINISHER_REGISTERS = 104;  // of the 128 a thread begins with
constexpr int STAGES = HEAD_DIM == 64 ? 3 : 2;      // tiles in a queue
constexpr int TILE = 32, SUBTILES = TILE / 8, PIECES = D / 32;  // keys; 64-byte pieces of a key
constexpr int KEY_BYTES = 2 * D, LINES = KEY_BYTES / 128, SLOT = TILE * KEY_BYTES;  // bytes; of a tile
constexpr int QUEUES = SCORERS * STAGES * SLOT;     // bytes
constexpr int SEGMENT = 64 * FINISHERS, SEGMENT_TILES = SEGMENT / TILE;  // keys
constexpr int ROW_WORDS = SEGMENT / 2 + 4;          // a word holds two keys; + 4, so that stores do not conflict
constexpr int SEGMENT_WORDS = ROWS * ROW_WORDS;
constexpr int DYNAMIC = 206 * 1024;                 // bytes for queues and ring; the rest of 227 KB is declared below
constexpr int RING = (DYNAMIC - QUEUES) / (4 * SEGMENT_WORDS);  // segments
constexpr int MAX_CHUNK = RING * SEGMENT;           // keys
static_assert(SEGMENT_TILES % SCORERS == 0, "a thread's keys of all segments belong to one scoring warp");
constexpr int ITEMS = 4;                            // that the scorers may be ahead
constexpr int MAX_SEQUENCES = 256;
constexpr int READERS = 32 * FINISHERS / PADDED_ROWS;           // threads that share the reading of a row's sums
constexpr unsigned EMPTY = 0xffffffff;              // a NaN that no sum is
constexpr float HIGHEST = 1e27f;                    // an exponential above this raises the reference; 2^90 or so

struct Arguments {
  const __nv_bfloat16 *queries, *keys;
  const void* lengths;      // [B] int32 or int64
  const int* page_table;    // [B, pages_per_sequence], or null
  void* masses;             // [B, Hq, N] bf16 or fp32; rows start at even places
  float2* mailboxes;        // [problems][blocks][PADDED_ROWS]: reference and sum of a chunk; EMPTY before and after
  int* readers;             // [problems]: blocks that have read a problem's mailboxes, less one; -1 before and after
  long long query_stride[3], stride[3], stride_out[2];  // elements: (b, t, h); (sequence or page, token, head); (b, h)
  int wide_lengths, B, heads, N, page_size, pages_per_sequence, wide_masses;
  float scale;              // on the logits, times log2(e)
};

struct Item {  // one chunk of one problem; without keys: nothing to do
  int b, h, part, parts, first, keys, length;  // keys: including those of the tail
};

// Where a sequence's problems go. Slot s is the block s % blocks in round s / blocks. A problem's chunks lie side by side in one round.
struct Place {
  int length, chunk, parts, start, early, per_round;  // start: slot of the first chunk; early: problems in the round of the start
};

struct Plan {
  const Place* places;  // [B + 1], in shared memory; the last one's start is the number of slots
  int heads, blocks;
  __device__ __forceinline__ Item at(int slot, int b) const {  // the item at a slot of sequence b or later
    while (slot >= places[b + 1].start) b++;
    const Place place = places[b];
    Item item = {b, 0, 0, place.parts, 0, 0, place.length};
    int within = slot - place.start, problem;
    if (within < place.early * place.parts) {
      problem = within / place.parts;
      within -= problem * place.parts;
    } else {
      within = slot - (place.start / blocks + 1) * blocks;
      if (within < 0) return item;
      const int round = within / blocks;
      within -= round * blocks;
      problem = within / place.parts;
      if (problem >= place.per_round) return item;
      within -= problem * place.parts;
      problem += place.early + round * place.per_round;
    }
    if (problem >= heads) return item;
    item.h = problem, item.part = within;
    item.first = within * place.chunk;
    item.keys = min(place.chunk, place.length + T - item.first);
    return item;
  }
};

__device__ void lay_out(Place* places, int B, int heads, int blocks) {  // by one warp; lengths are there already
  const int lane = threadIdx.x % 32;
  int longest = 0;
  for (int b = lane; b < B; b += 32) longest = max(longest, places[b].length + T);
  longest = __reduce_max_sync(~0u, longest);
  // A lane tries a number of problems per round: rounds times the time of a chunk, for sequences as long as the longest.
  int chunk = (longest + max(blocks / (lane + 1), 1) - 1) / max(blocks / (lane + 1), 1);
  chunk = max((chunk + TILE - 1) / TILE * TILE, SEGMENT);
  float rounds = 0;
  for (int b = 0; b < B; b++) {
    const int parts = (places[b].length + T + chunk - 1) / chunk;
    rounds += (float)heads / (blocks / min(parts, blocks));
  }
  constexpr int OVERHEAD = 128;  // keys that could be read while a chunk begins and ends
  const unsigned cost = chunk > MAX_CHUNK ? ~0u : (unsigned)ceilf(rounds - 1e-3f) * (chunk + OVERHEAD);
  const unsigned least = __reduce_min_sync(~0u, cost);
  chunk = __shfl_sync(~0u, chunk, __ffs(__ballot_sync(~0u, cost == least)) - 1);
  if (lane == 0) {
    int start = 0;
    for (int b = 0; b < B; b++) {
      Place& place = places[b];
      const int tokens = place.length + T;
      place.parts = (tokens + chunk - 1) / chunk;
      place.chunk = ((tokens + place.parts - 1) / place.parts + TILE - 1) / TILE * TILE;
      place.parts = (tokens + place.chunk - 1) / place.chunk;
      place.per_round = blocks / place.parts;
      place.early = min(heads, (blocks - start % blocks) / place.parts);
      if (place.early == 0) start = (start / blocks + 1) * blocks, place.early = min(heads, place.per_round);
      place.start = start;
      const int late = heads - place.early;
      start = late ? (start / blocks + 1 + (late - 1) / place.per_round) * blocks + ((late - 1) % place.per_round + 1) * place.parts
                   : start + place.early * place.parts;
    }
    places[B].start = start;
  }
}

struct Shared {
  uint64_t full[ITEMS], taken[ITEMS], empty[RING];      // barriers: an item is scored; it is finished; a segment may be written again
  float2 sums[ITEMS][SCORERS][PADDED_ROWS];         // of an item's warps: reference and sum
  float2 shares[READERS][PADDED_ROWS];          // of a problem
  __align__(16) float weights[SCORERS][PADDED_ROWS];          // what turns a warp's exponentials into masses
  Place places[MAX_SEQUENCES + 1];
  int last_reader;
};

__device__ __forceinline__ void sync_finishers() { ptx::named_barrier<1, 32 * FINISHERS>(); }

struct Ring {  // position in the ring of segments
  int first = 0, pass = 0;  // of the item's first segment
  __device__ __forceinline__ void advance(int keys) {
    first += (keys + SEGMENT - 1) / SEGMENT;
    if (first >= RING) first -= RING, pass++;
  }
};

using Logits = float[EIGHTS][SUBTILES][2];  // of a thread's rows j * 8 + lane / 4, its keys i * 8 + lane % 4 * 2 + k of a tile: [j][i][k]

// For each of the thread's rows, its largest logit in a tile.
template <typename Body>
__device__ __forceinline__ void over_keys(const Logits& x, Body body) {
#pragma unroll
  for (int j = 0; j < EIGHTS; j++) {
    float highest = -INFINITY;
#pragma unroll
    for (int i = 0; i < SUBTILES; i++) highest = fmaxf(highest, fmaxf(x[j][i][0], x[j][i][1]));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    body(j, fmaxf(highest, __shfl_xor_sync(~0u, highest, 2)));
  }
}

// Multiplies what a warp has written of one row, in the tiles from its first to before `end`, with a power of two.
__device__ __forceinline__ void lower(uint32_t* row, int first_segment, int first, int end, float factor) {
  for (int tile = first; tile < end; tile += SCORERS) {
    int place = first_segment + tile / SEGMENT_TILES;
    if (place >= RING) place -= RING;
    for (int i = 0; i < SUBTILES; i++) {
      uint32_t* word = row + place * SEGMENT_WORDS + tile % SEGMENT_TILES * (TILE / 2) + i * 4;
      *word = ptx::pack<__nv_bfloat16>(factor * __uint_as_float(*word << 16), factor * __uint_as_float(*word & 0xffff0000));
    }
  }
}

__device__ void score(const Arguments& a, const Plan& plan, int slots, char* queues, uint32_t* ring, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, eighth = lane / 4, quarter = lane % 4;
  // Eight lanes copy a line of 128 bytes of a key: with half a line each time, the memory delivers a quarter less. They swap the halves
  // of odd keys, so that two neighbouring keys' quarters of a half meet no bank conflict.
  const int eight = lane / 8, swapped = (eight & 1) * 64;
  char* queue = queues + warp * STAGES * SLOT;
  const uint32_t queue_address = ptx::shared_address(queue) + eight * KEY_BYTES + (lane % 8 * 16 ^ swapped);
  queue += eighth * KEY_BYTES + (quarter * 16 ^ (eighth & 1) * 64);
  const int half = eighth & 1 ? -64 : 64;  // from a piece to the one 64 bytes behind it in memory

  // The copying side of the queue runs STAGES - 1 tiles ahead, across items.
  int copied_slot = blockIdx.x - gridDim.x, copied_tile = 0, copied_stage = 0;
  Item source = {};
  const char* source_keys = nullptr;
  const int key_bytes = 2 * (int)a.stride[1];
  auto copy = [&] {
    while (copied_tile * TILE >= source.keys && copied_slot < slots) {  // the next item
      copied_slot += gridDim.x;
      copied_tile = warp;
      source = copied_slot < slots ? plan.at(copied_slot, source.b) : Item{};
      source_keys = (const char*)(a.keys + source.h * a.stride[2] + lane % 8 * 8);
#ifndef PAGED
      source_keys += 2 * (source.b * a.stride[0] + source.first * a.stride[1]);
#endif
    }
    if (copied_slot < slots) {
#pragma unroll
      for (int i = 0; i < TILE / 4; i++) {
        const int position = min(copied_tile * TILE + i * 4 + eight, source.keys - 1);  // past the end: the last again
#ifdef PAGED
        const int page = (source.first + position) / a.page_size, slot = source.first + position - page * a.page_size;
        const char* key = source_keys + 2 * (a.page_table[(long long)source.b * a.pages_per_sequence + page] * a.stride[0]) + (long long)slot * key_bytes;
#else
        const char* key = source_keys + (long long)position * key_bytes;
#endif
#pragma unroll
        for (int line = 0; line < LINES; line++) ptx::copy16(queue_address + copied_stage * SLOT + i * 4 * KEY_BYTES + line * 128, key + line * 128);
      }
      copied_tile += SCORERS;
    }
    ptx::commit();
    copied_stage = copied_stage + 1 == STAGES ? 0 : copied_stage + 1;
  };
#pragma unroll 1
  for (int s = 0; s < STAGES - 1; s++) copy();

  Ring position;
  int stage = 0, b = 0, items = 0;
#pragma unroll 1
  for (int slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    const Item item = plan.at(slot, b);
    if (!item.keys) continue;
    b = item.b;
    uint32_t q[ROW_TILES][PIECES][2][4];
#pragma unroll
    for (int j = 0; j < 2 * ROW_TILES; j++) {
      const int row = min(j * 8 + eighth, ROWS - 1), t = row / GROUP, g = row - t * GROUP;  // what is past the last row is not used
      const __nv_bfloat16* query = a.queries + b * a.query_stride[0] + t * a.query_stride[1] + (item.h * GROUP + g) * a.query_stride[2] + quarter * 8;
#pragma unroll
      for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int k = 0; k < 4; k++)  // one word at a time: words that come together would have to be moved apart before every use
asm("ld.global.nc.u32 %0, [%1];" : "=r"(q[j / 2][p][k / 2][j % 2 + k % 2 * 2]) : "l"((const uint32_t*)(query + p * 32) + k));
    }
    if (items >= ITEMS) ptx::barrier_wait(shared.taken + items % ITEMS, (items / ITEMS - 1) % 2);

    float reference[EIGHTS] = {}, sum[EIGHTS] = {};  // of the thread's rows, over its keys
    const int plain_tiles = (item.length - item.first) / TILE;  // of those before, every query sees every key
    int owned = -1;  // segment that this warp has waited for
#pragma unroll 1
    for (int tile = warp; tile * TILE < item.keys; tile += SCORERS) {
      ptx::wait_group<STAGES - 2>();
      __syncwarp();
      float product[SUBTILES][ROW_TILES][4] = {};
#pragma unroll
      for (int i = 0; i < SUBTILES; i++)
#pragma unroll
        for (int p = 0; p < PIECES; p++) {
          const uint4 keys = *(const uint4*)(queue + stage * SLOT + i * 8 * KEY_BYTES + p / 2 * 128 + (p % 2 ? half : 0));
#pragma unroll
          for (int n = 0; n < ROW_TILES; n++) {
            ptx::multiply_add<__nv_bfloat16>(product[i][n], q[n][p][0], keys.x, keys.y);
            ptx::multiply_add<__nv_bfloat16>(product[i][n], q[n][p][1], keys.z, keys.w);
          }
        }
      copy();  // into the slot that was read in the round before
      stage = stage + 1 == STAGES ? 0 : stage + 1;

      const int segment = tile / SEGMENT_TILES;
      int place = position.first + segment, pass = position.pass;
      if (place >= RING) place -= RING, pass++;
      if (segment != owned) {
        if (pass) ptx::barrier_wait(shared.empty + place, (pass - 1) % 2);
        owned = segment;
      }
      uint32_t* words = ring + place * SEGMENT_WORDS + eighth * ROW_WORDS + tile % SEGMENT_TILES * (TILE / 2) + quarter;

      Logits x;
      auto each = [&](auto body) {
#pragma unroll
        for (int j = 0; j < EIGHTS; j++)
#pragma unroll
          for (int i = 0; i < SUBTILES; i++)
#pragma unroll
            for (int k = 0; k < 2; k++) body(j, i, k);
      };
      if (tile == warp || tile >= plain_tiles) {
        asm volatile("");  // a branch, not predicates: it is rare
        each([&](int j, int i, int k) {
          const int last_seen = min(item.length - item.first + (j * 8 + eighth) / GROUP, item.keys - 1);
          x[j][i][k] = tile * TILE + i * 8 + quarter * 2 + k <= last_seen ? product[i][j / 2][j % 2 * 2 + k] * a.scale : -INFINITY;
        });
        if (tile == warp)
          over_keys(x, [&](int j, float highest) { reference[j] = highest == -INFINITY ? 0 : ceilf(highest); });  // seeing nothing here is seeing nothing further on
        each([&](int j, int i, int k) { x[j][i][k] -= reference[j]; });
      } else {
        each([&](int j, int i, int k) { x[j][i][k] = fmaf(product[i][j / 2][j % 2 * 2 + k], a.scale, -reference[j]); });
      }

      float total[EIGHTS], most = 0;  // over the thread's keys
      uint32_t packed[EIGHTS][SUBTILES];
      auto exponentiate = [&] {
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
          total[j] = 0;
#pragma unroll
          for (int i = 0; i < SUBTILES; i++) {
            const float even = ptx::exp2(x[j][i][0]), odd = ptx::exp2(x[j][i][1]);
            total[j] += even + odd;
            packed[j][i] = ptx::pack<__nv_bfloat16>(even, odd);
          }
          most = fmaxf(most, total[j]);
        }
      };
      exponentiate();
      if (__any_sync(~0u, most > HIGHEST)) {  // raise the references, and lower what is written by as many powers of two
        asm volatile("");
        over_keys(x, [&](int j, float highest) {
          const float by = ceilf(fmaxf(highest, 0)), factor = ptx::exp2(-by);
#pragma unroll
          for (int i = 0; i < SUBTILES; i++) x[j][i][0] -= by, x[j][i][1] -= by;
          reference[j] += by;
          sum[j] *= factor;
          const int row = j * 8 + eighth;
          if (row < ROWS && by > 0) lower(ring + row * ROW_WORDS + quarter, position.first, warp, tile, factor);
        });
        exponentiate();
      }
#pragma unroll
      for (int j = 0; j < EIGHTS; j++) {
        sum[j] += total[j];
        if (j * 8 + 8 <= ROWS || j * 8 + eighth < ROWS)
#pragma unroll
          for (int i = 0; i < SUBTILES; i++) words[j * 8 * ROW_WORDS + i * 4] = packed[j][i];
      }
    }
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
      sum[j] += __shfl_xor_sync(~0u, sum[j], 1);
      sum[j] += __shfl_xor_sync(~0u, sum[j], 2);
      if (quarter == 0) shared.sums[items % ITEMS][warp][j * 8 + eighth] = make_float2(sum[j] == 0 ? -INFINITY : reference[j], sum[j]);
    }
    ptx::barrier_arrive(shared.full + items % ITEMS);  // every lane, for what it has written itself
    position.advance(item.keys);
    items++;
  }
}

__device__ __forceinline__ float max_or_nan(float x, float y) {
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
}

// (reference, sum) of several: the largest reference, and the sum in terms of it.
template <int count>
__device__ __forceinline__ float2 merge(const float2 (&parts)[count]) {
  float reference = parts[0].x, sum = 0;
#pragma unroll
  for (int i = 1; i < count; i++) reference = fmaxf(reference, parts[i].x);
  const float base = reference == -INFINITY ? 0 : reference;  // nothing visible; but a NaN counts
#pragma unroll
  for (int i = 0; i < count; i++) sum += parts[i].y * ptx::exp2(parts[i].x - base);
  return make_float2(reference, sum);
}

__device__ void finish(const Arguments& a, const Plan& plan, int slots, const uint32_t* ring, Shared& shared) {
  const int thread = threadIdx.x - 32 * SCORERS, lane = thread % 32;
  const int row = thread % PADDED_ROWS, reader = thread / PADDED_ROWS;  // for sums
  // No mass at and past the length: zeros up to N.
  for (int r = blockIdx.x; r < a.B * a.heads * GROUP; r += gridDim.x) {
    const int b = r / (a.heads * GROUP);
    const long long row = b * a.stride_out[0] + (r - b * a.heads * GROUP) * a.stride_out[1];
    for (int i = plan.places[b].length + thread; i < a.N; i += 32 * FINISHERS) {
      if (a.wide_masses)
        ((float*)a.masses)[row + i] = 0;
      else
        ((__nv_bfloat16*)a.masses)[row + i] = __float2bfloat16_rn(0);
    }
  }

  Ring position;
  int b = 0, items = 0;
#pragma unroll 1
  for (int slot = blockIdx.x; slot < slots; slot += gridDim.x) {
    const Item item = plan.at(slot, b);
    if (!item.keys) continue;
    b = item.b;
    const int problem = b * a.heads + item.h;
    float2* mailboxes = a.mailboxes + (long long)problem * gridDim.x * PADDED_ROWS;
    ptx::barrier_wait(shared.full + items % ITEMS, items / ITEMS % 2);
    if (reader == 0) {
      float2 warps[SCORERS];
#pragma unroll
      for (int w = 0; w < SCORERS; w++) warps[w] = shared.sums[items % ITEMS][w][row];
      float2 own = merge(warps);
      if (__float_as_uint(own.y) == EMPTY) own.y = __uint_as_float(0x7fffffff);
      __stcg(mailboxes + item.part * PADDED_ROWS + row, own);
    }
    auto take = [&](int segment, uint32_t(&pairs)[ROWS]) {  // two neighbouring keys a thread
      int place = position.first + segment;
      if (place >= RING) place -= RING;
#pragma unroll
      for (int r = 0; r < ROWS; r++) pairs[r] = ring[place * SEGMENT_WORDS + r * ROW_WORDS + thread];
      __syncwarp();
      if (lane == 0) ptx::barrier_arrive(shared.empty + place);
    };
    uint32_t pairs[ROWS];
    take(0, pairs);  // already, so that the scorers have one segment more while the sums are awaited

    // Sums of the rows over the whole problem.
    if (reader < READERS) {
      constexpr int BATCH = 8;
      float2 share[2] = {{-INFINITY, 0}};
#pragma unroll 1
      for (int base = reader; base < item.parts; base += BATCH * READERS) {
        float2 read[BATCH];
        bool waiting = true;
        while (waiting) {
          waiting = false;
#pragma unroll
          for (int k = 0; k < BATCH; k++) {
            read[k] = make_float2(-INFINITY, 0);
            if (base + k * READERS < item.parts)
              asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];"
                           : "=f"(read[k].x), "=f"(read[k].y) : "l"(mailboxes + (base + k * READERS) * PADDED_ROWS + row) : "memory");
          }
#pragma unroll
          for (int k = 0; k < BATCH; k++) waiting |= __float_as_uint(read[k].x) == EMPTY || __float_as_uint(read[k].y) == EMPTY;
        }
        share[1] = merge(read);
        share[0] = merge(share);
      }
      shared.shares[reader][row] = share[0];
    }
    sync_finishers();
    if (reader < READERS) {
      float2 shares[READERS];
#pragma unroll
      for (int i = 0; i < READERS; i++) shares[i] = shared.shares[i][row];
      const float2 all = merge(shares);
      const float factor = 1 / (all.y * (TAKE_MAX ? 1 : T));
#pragma unroll
      for (int w = 0; w < SCORERS; w++)
        if (w % READERS == reader) shared.weights[w][row] = ptx::exp2(shared.sums[items % ITEMS][w][row].x - all.x) * factor;
    }
    int readers_before = 0;
    if (thread == 0) readers_before = atomicAdd(a.readers + problem, 1);  // used last, so that nobody waits for it
    sync_finishers();

    const int keys = min(item.keys, item.length - item.first), segments = (item.keys + SEGMENT - 1) / SEGMENT;
    float w[PADDED_ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r += 4) *(float4*)(w + r) = *(const float4*)(shared.weights[2 * thread / TILE % SCORERS] + r);
#pragma unroll 1
    for (int segment = 0; segment < segments; segment++) {
      if (segment) take(segment, pairs);
      const int key = segment * SEGMENT + 2 * thread;
      float x[GROUP] = {}, y[GROUP] = {};
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const float low = __uint_as_float(pairs[r] << 16), high = __uint_as_float(pairs[r] & 0xffff0000);
        x[r % GROUP] = TAKE_MAX ? max_or_nan(x[r % GROUP], w[r] * low) : fmaf(w[r], low, x[r % GROUP]);
        y[r % GROUP] = TAKE_MAX ? max_or_nan(y[r % GROUP], w[r] * high) : fmaf(w[r], high, y[r % GROUP]);
      }
      if (key < keys)
#pragma unroll
        for (int g = 0; g < GROUP; g++) {
          if (key + 1 >= keys) y[g] = 0;  // the first of the tail
          const long long at = b * a.stride_out[0] + (item.h * GROUP + g) * a.stride_out[1] + item.first + key;
          if (a.wide_masses)
            *(float2*)((float*)a.masses + at) = make_float2(x[g], y[g]);
          else
            *(uint32_t*)((__nv_bfloat16*)a.masses + at) = ptx::pack<__nv_bfloat16>(x[g], y[g]);
        }
    }
    if (thread == 0) {
      shared.last_reader = readers_before == item.parts - 2;
      if (shared.last_reader) atomicExch(a.readers + problem, -1);
    }
    sync_finishers();
    if (shared.last_reader)  // it empties the mailboxes
      for (int k = thread; k < item.parts * PADDED_ROWS; k += 32 * FINISHERS) __stcg((uint2*)mailboxes + k, make_uint2(EMPTY, EMPTY));
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(shared.taken + items % ITEMS);
    position.advance(item.keys);
    items++;
  }
}

__global__ void __launch_bounds__(THREADS, 1) attention_mass(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) char dynamic[];
  __shared__ __align__(16) Shared shared;
  uint32_t* ring = (uint32_t*)(dynamic + QUEUES);

  for (int b = threadIdx.x; b < a.B; b += THREADS)
    shared.places[b].length = a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b];
  if (threadIdx.x < ITEMS) ptx::barrier_init(shared.full + threadIdx.x, 32 * SCORERS), ptx::barrier_init(shared.taken + threadIdx.x, FINISHERS);
  if (threadIdx.x < RING) ptx::barrier_init(shared.empty + threadIdx.x, FINISHERS);
  __syncthreads();
  if (threadIdx.x < 32) lay_out(shared.places, a.B, a.heads, gridDim.x);
  __syncthreads();
  const Plan plan{shared.places, a.heads, (int)gridDim.x};
  const int slots = shared.places[a.B].start;
  if (threadIdx.x < 32 * SCORERS) {
    ptx::more_registers<SCORER_REGISTERS>();
    score(a, plan, slots, dynamic, ring, shared);
  } else {
    ptx::fewer_registers<FINISHER_REGISTERS>();
    finish(a, plan, slots, ring, shared);
  }
}

extern "C" int max_chunk() { return MAX_CHUNK; }  // keys

extern "C" int launch(const Arguments* arguments, int blocks, void* stream) {
  const int bytes = QUEUES + RING * SEGMENT_WORDS * 4;
  const cudaError_t error = cudaFuncSetAttribute(attention_mass, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return (int)error;
  void* parameters[] = {(void*)arguments};
  return (int)cudaLaunchCooperativeKernel((void*)attention_mass, dim3(blocks), dim3(THREADS), parameters, bytes, (cudaStream_t)stream);
}
