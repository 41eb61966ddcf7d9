// Attention mass on keys in few bits, for Hopper: two launches over all layers, each of which reads the records once.
//
// A *unit* is 64 tokens of one KV head of one layer and sequence (an *item*): a record of codes, or, for the newest tokens and the
// tail, keys as they are. Units of all items are laid end to end and cut into equal shares, one for each warp on the chip.
//
//     sum      for every query of an item and every warp that has a part of it: (reference, sum of 2^(logit - reference))
//     write    adds these up, computes the logits again, and writes 2^(logit - log2 of the sum), averaged over the queries or not
//
// Computing logits twice reads codes twice, which is less than writing and reading an exponential for each query.
//
// Codes c of 2 or 4 bits are not converted: a code at bit 2 p of a float16 is the subnormal number c 4^p 2^-24, which tensor cores
// multiply exactly. So one AND makes two operands of a word. What each place is too large by, and the step of each channel, goes to
// the queries; `low` adds a number per query and unit, which is the product's initial value:
//
//     logit = alpha (sum_d q_d low_d + sum_d (q_d step_d) c_d)        q scaled to at most 1 by a power of two, which is in alpha
//
// A thread adds up q_d low_d over its own dims; a product with a constant matrix adds up the threads' sums, and leaves each where
// it is the start of others.
//
// The columns of a product are the queries (t, g), spread so that a thread has all those of one head, or as many as it can.
// Built for one HEAD_DIM, number of BITS, QUERIES (T), GROUP of query heads per KV head, ELEMENT of queries and keys, or FLOAT8
// keys, for the mean over the queries or PER_QUERY, masses in bf16 or WIDE ones in fp32.
#include <type_traits>
#include "host.cuh"
#include "record.cuh"

#ifndef QUERIES
#define QUERIES 5
#define GROUP 4
#endif
#ifdef PER_QUERY
constexpr bool APART = true;
#else
constexpr bool APART = false;
#endif
#ifdef WIDE
using Mass = float;
#else
using Mass = __nv_bfloat16;
#endif

constexpr int T = QUERIES, G = GROUP;
constexpr int padded(int heads) { return heads <= 1 ? 1 : 2 * padded((heads + 1) / 2); }
constexpr int PADDED = padded(G);                            // heads, to a power of two
constexpr int SHARING = PADDED < 4 ? 4 / PADDED : 1;         // quarters of a warp that share a head's queries
constexpr int HEADS = PADDED < 4 ? 1 : PADDED / 4;           // of a thread
constexpr int STEPS_OF_HEAD = (T + SHARING - 1) / SHARING;   // a thread's queries of a head
constexpr int OWN = HEADS * STEPS_OF_HEAD, EIGHTS = (OWN + 1) / 2, COLUMNS = 8 * EIGHTS;  // a thread's queries; of a product
constexpr int WARPS = STEPS * EIGHTS <= 12 ? 16 : STEPS * EIGHTS <= 16 ? 12 : 8, THREADS = 32 * WARPS;  // by the registers of a thread
constexpr int VECTORS = RECORD / 4, FITTING = (210 << 10) / (16 * WARPS * VECTORS), STAGES = FITTING < 4 ? FITTING : 4;  // of 16 bytes; records in a queue
constexpr int SHIFT = 19;                                    // steps up to 2^10, times 2^(24 - SHIFT), are float16
constexpr float RANGE = 80, LARGEST = 0x1p80f;               // sums stay within 2^-RANGE .. 2^RANGE
constexpr int ATTEMPTS = 16, PAST = -1;
constexpr float LOG2_E = 1.4426950408889634f;

struct Layer {
  const ELEMENT* queries;  // [B, T, heads * G, D]
  const void* keys;        // [B, N, heads, D]
  const float* key_scale;  // [heads], or null
  float scale;
};

struct Arguments {
  Layer layers[MAX_LAYERS];
  const uint32_t* records;  // [count, B, heads, blocks, RECORD]
  const void* lengths;      // [B] int32 or int64
  float2* sums;             // [items + warps, COLUMNS]: warp w's part of item i at i + w, which no other pair has
  Mass* masses;             // [B, (T,) count * heads * G, N]
  long long query_stride[3], key_stride[3], record_stride[4], mass_stride[3];  // (b, t, head) (b, position, head) (layer, b, head, block) (b, t, row)
  int wide_lengths, count, B, heads, N;
};

// Where a thread's query k belongs, in quarter `quarter` of the warp.
__device__ __forceinline__ int head_of(int quarter, int k) { return PADDED < 4 ? quarter % PADDED : quarter * HEADS + k / STEPS_OF_HEAD; }
__device__ __forceinline__ int step_of(int quarter, int k) { return PADDED < 4 ? quarter / PADDED * STEPS_OF_HEAD + k : k % STEPS_OF_HEAD; }
__device__ __forceinline__ bool is_query(int quarter, int k) { return k < OWN && head_of(quarter, k) < G && step_of(quarter, k) < T; }

// A unit, and how to get to others.
struct Place {
  int b, layer, head, unit, length, coded, units;  // units of the item, of which the first are coded

  __device__ __forceinline__ void enter(const Arguments& a, int sequence) {
    b = sequence;
    if (b == a.B) return;
    length = load_length(a.lengths, a.wide_lengths, b);
    coded = coded_blocks(length);
    units = coded + (length + T - coded * BLOCK + BLOCK - 1) / BLOCK;
  }
  __device__ __forceinline__ void find(const Arguments& a, int index) {
    for (enter(a, 0); index >= units * a.count * a.heads; enter(a, b + 1)) index -= units * a.count * a.heads;
    unit = index % units, index /= units;
    head = index % a.heads, layer = index / a.heads;
  }
  __device__ __forceinline__ void next_item(const Arguments& a) {
    unit = 0;
    if (++head < a.heads) return;
    head = 0;
    if (++layer < a.count) return;
    layer = 0;
    enter(a, b + 1);
  }
  __device__ __forceinline__ int item(const Arguments& a) const { return (b * a.count + layer) * a.heads + head; }
};

__device__ __forceinline__ float2 nothing() { return make_float2(-1e30f, 0); }  // a sum below all others

__device__ __forceinline__ float2 merge(float2 x, float2 y) {
  const float reference = fmaxf(x.x, y.x);
  return make_float2(reference, x.y * ptx::exp2(x.x - reference) + y.y * ptx::exp2(y.x - reference));
}

// The queries of an item, as the right operand of products.
struct Queries {
  uint32_t halves[STEPS][2][EIGHTS];
  float alpha[2 * EIGHTS];  // of the thread's own queries, for products 2^SHIFT times too small; 0 where there is none
  float key_scale;

  __device__ __forceinline__ void load(const Arguments& a, const Place& at, int lane) {
    const Layer& layer = a.layers[at.layer];
    const int eighth = lane / 4, quarter = lane % 4;
    float alphas[EIGHTS];
#pragma unroll
    for (int j = 0; j < EIGHTS; j++) {
      const int k = 2 * j + eighth % 2, g = head_of(eighth / 2, k), t = step_of(eighth / 2, k);  // of column 8 j + eighth
      const bool there = is_query(eighth / 2, k);
      uint32_t words[PAIRS] = {};
      if (there) {
        const ELEMENT* query = layer.queries + at.b * a.query_stride[0] + t * a.query_stride[1] + (at.head * G + g) * a.query_stride[2];
#pragma unroll
        for (int i = 0; i < PAIRS / 4; i++) *(uint4*)(words + 4 * i) = *((const uint4*)(query + D / 4 * quarter) + i);
      }
      float largest = 0;
#pragma unroll
      for (int i = 0; i < PAIRS; i++) largest = fmaxf(largest, fmaxf(fabsf(low_float(words[i], ELEMENT())), fabsf(high_float(words[i], ELEMENT()))));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 1));
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, 2));
      const int exponent = min(max((__float_as_int(largest) >> 23) - 126, -100), 100);  // largest < 2^exponent
      const float factor = __int_as_float((127 - exponent) << 23);
#pragma unroll
      for (int i = 0; i < PAIRS; i++)
        halves[i / 2][i % 2][j] = ptx::pack<__half>(low_float(words[i], ELEMENT()) * factor, high_float(words[i], ELEMENT()) * factor);
      alphas[j] = there ? layer.scale * LOG2_E * __int_as_float((127 + exponent) << 23) : 0;
    }
#pragma unroll
    for (int k = 0; k < 2 * EIGHTS; k++) alpha[k] = __shfl_sync(~0u, alphas[k / 2], 4 * (2 * quarter + k % 2)) * (1 << SHIFT);
    key_scale = IN_FLOAT8 ? layer.key_scale[at.head] : 1;
  }
};

// Products of a unit's 64 tokens with the queries, 16 tokens at a time: body(i, products, visible) has those of tokens
// 8 eighth + 2 i and the one behind it; visible(r, k) tells whether query k, or PAST, the end of the past, sees token r. products[k / 2][2 r + k % 2] are of
// token r and query k, 2^SHIFT times too small.
template <typename Body>
__device__ __forceinline__ void coded_products(const uint4* record, const Queries& q, int lane, Body body) {
  const uint4* ranges = (const uint4*)((const uint32_t*)record + CODES + lane % 4 * (D / 8));
  uint32_t scaled[STEPS][2][EIGHTS], partial[2][EIGHTS] = {};
#pragma unroll
  for (int s = 0; s < STEPS; s += 2) {
    const uint4 low = ranges[s / 2], step = ranges[D / 8 + s / 2];
    const uint32_t lows[2][2] = {{low.x, low.y}, {low.z, low.w}}, steps[2][2] = {{step.x, step.y}, {step.z, step.w}};
#pragma unroll
    for (int n = 0; n < 2; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int j = 0; j < EIGHTS; j++) {
          scaled[s + n][h][j] = ptx::multiply_halves(q.halves[s + n][h][j], steps[n][h]);
          partial[h][j] = ptx::multiply_add_halves(q.halves[s + n][h][j], lows[n][h], partial[h][j]);
        }
  }
  constexpr uint32_t UNIT = 1 << (24 - SHIFT), UNITS = UNIT | UNIT << 16;  // 2^-SHIFT as a float16
  const uint32_t left[4] = {UNITS, UNITS, UNITS, UNITS};
  float base[EIGHTS][4] = {};
#pragma unroll
  for (int j = 0; j < EIGHTS; j++) ptx::multiply_add<__half>(base[j], left, partial[0][j], partial[1][j]);
  const uint4* codes = record + lane;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    uint32_t words[2 * WORDS];
    if (WORDS == 1) {
      const uint2 two = *((const uint2*)(codes + i / 2 * 32) + i % 2);
      words[0] = two.x, words[1] = two.y;
    } else {
#pragma unroll
      for (int v = 0; v < 2 * WORDS / 4; v++) *(uint4*)(words + 4 * v) = codes[(i * WORDS / 2 + v) * 32];
    }
    float products[EIGHTS][4];
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      uint32_t left[4];
#pragma unroll
      for (int h = 0; h < 2; h++)
#pragma unroll
        for (int r = 0; r < 2; r++) {
          const int pair = 2 * s + h, bit = pair % PLACES * BITS, half_mask = ((1 << BITS) - 1) << bit % 8;
          left[2 * h + r] = words[r * WORDS + pair / PLACES] >> bit / 8 * 8 & (half_mask | half_mask << 16);
        }
#pragma unroll
      for (int j = 0; j < EIGHTS; j++) ptx::multiply_add<__half>(products[j], left, scaled[s][0][j], scaled[s][1][j], s ? products[j] : base[j]);
    }
    body(i, products, [](int, int) { return true; });
  }
}

template <typename Body>
__device__ __forceinline__ void exact_products(const Arguments& a, const Place& at, const Queries& q, int lane, Body body) {
  constexpr int BYTES = IN_FLOAT8 ? 1 : 2, OF_KEY = D / 4 * BYTES / 16, PAIRS_OF_VECTOR = 8 / BYTES;
  const int eighth = lane / 4, quarter = lane % 4;
  const char* keys = (const char*)a.layers[at.layer].keys + BYTES * (at.b * a.key_stride[0] + at.head * a.key_stride[2] + D / 4 * quarter);
#pragma unroll 1
  for (int i = 0; i < 4; i++) {
    const int first = at.unit * BLOCK + 8 * eighth + 2 * i;
    uint32_t key[2][PAIRS] = {};
#pragma unroll
    for (int r = 0; r < 2; r++)
      if (first + r < at.length + T)
#pragma unroll
        for (int v = 0; v < OF_KEY; v++) {
          const uint4 x = *((const uint4*)(keys + BYTES * ((first + r) * a.key_stride[1])) + v);
          const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
          for (int p = 0; p < PAIRS_OF_VECTOR; p++)
            key[r][v * PAIRS_OF_VECTOR + p] = as_halves(IN_FLOAT8 ? words[p / 2] >> 16 * (p % 2) : words[p]);
        }
    float products[EIGHTS][4] = {};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
      const uint32_t left[4] = {key[0][2 * s], key[1][2 * s], key[0][2 * s + 1], key[1][2 * s + 1]};
#pragma unroll
      for (int j = 0; j < EIGHTS; j++) ptx::multiply_add<__half>(products[j], left, q.halves[s][0][j], q.halves[s][1][j]);
    }
#pragma unroll
    for (int j = 0; j < EIGHTS; j++)
#pragma unroll
      for (int n = 0; n < 4; n++) products[j][n] *= q.key_scale * (1.0f / (1 << SHIFT));  // as those of codes
    body(i, products, [&](int r, int k) { return first + r <= (k == PAST ? at.length - 1 : at.length + step_of(quarter, k)); });
  }
}

// A warp of the chip and its share of the units.
struct Share {
  const Arguments& a;
  uint4* queue;    // of records on their way
  uint64_t* arrived;
  unsigned taken = 0;  // records from the queue
  int lane, warp;  // of the warp, of the chip
  int size, end, left;  // units of a full share; the one behind this share, of all; those that it still has
  Place here;

  __device__ __forceinline__ Share(const Arguments& arguments, uint4* shared) : a(arguments), lane(threadIdx.x % 32) {
    queue = shared + threadIdx.x / 32 * STAGES * VECTORS;
    arrived = (uint64_t*)(shared + WARPS * STAGES * VECTORS) + threadIdx.x / 32 * STAGES;
    if (lane == 0) {
      for (int s = 0; s < STAGES; s++) ptx::barrier_init(arrived + s, 1);
      ptx::fence_barrier_init();
    }
    __syncwarp();
    warp = blockIdx.x * WARPS + threadIdx.x / 32;
    int total = 0;
    for (int b = 0; b < a.B; b++) here.enter(a, b), total += here.units * a.count * a.heads;
    const int warps = gridDim.x * WARPS;
    size = (total + warps - 1) / warps;
    end = min((warp + 1) * size, total);
    left = end - warp * size;
    if (left > 0) here.find(a, warp * size);
  }

  // For each item begin(), then for its units in this share body(visit) with visit(each) = coded_products or exact_products, then
  // end(first unit), which tells whether that was it; else the item comes once more.
  template <typename Begin, typename Body, typename End>
  __device__ __forceinline__ void for_each_item(Queries& q, Begin begin, Body body, End end) {
#pragma unroll 1
    while (left > 0) {
      const int first = here.unit, stop = min(here.units, first + left);
      q.load(a, here, lane);
      begin();
      do {
        here.unit = first;
        coded(min(here.coded, stop), q, body);
#pragma unroll 1
        for (; here.unit < stop; here.unit++) body([&](auto each) { exact_products(a, here, q, lane, each); });
      } while (!end(first));
      left -= stop - first;
      if (stop == here.units) here.next_item(a);
    }
  }
  template <typename Body>
  __device__ __forceinline__ void coded(int stop, const Queries& q, Body body) {
    const uint32_t* source = a.records + here.layer * a.record_stride[0] + here.b * a.record_stride[1] + here.head * a.record_stride[2] + here.unit * a.record_stride[3];
    int ahead = stop - here.unit;  // records that no copy was begun of
    auto copy = [&](unsigned to) {
      if (lane == 0 && ahead > 0) ptx::copy_bulk(queue + to * VECTORS, source, 4 * RECORD, arrived + to);
      source += a.record_stride[3];
      ahead--;
    };
#pragma unroll
    for (unsigned s = 0; s < STAGES - 1; s++) copy((taken + s) % STAGES);
#pragma unroll 1
    for (; here.unit < stop; here.unit++) {
      const unsigned place = taken % STAGES;
      ptx::barrier_wait(arrived + place, taken / STAGES % 2);
      __syncwarp();  // nobody needs the record before any longer
      copy((taken + STAGES - 1) % STAGES);
      taken++;
      body([&](auto each) { coded_products(queue + place * VECTORS, q, lane, each); });
    }
    __syncwarp();
  }
};

__device__ __forceinline__ int column_of(int quarter, int k) { return 8 * (k / 2) + 2 * quarter + k % 2; }

// The sum of powers of two of each query's logits.
__global__ void __launch_bounds__(THREADS, 1) sum_powers(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) uint4 queues[];
  Share share(a, queues);
  Queries q;
  float2 sums[2 * EIGHTS];  // (reference, sum) of the thread's queries over its tokens
  int attempts;
  auto begin = [&] {
    attempts = 0;
#pragma unroll
    for (int k = 0; k < 2 * EIGHTS; k++) sums[k] = make_float2(0, 0);
  };
  auto add = [&](auto visit) {
    visit([&](int, const float(&product)[EIGHTS][4], auto visible) {
#pragma unroll
      for (int k = 0; k < 2 * EIGHTS; k++)
#pragma unroll
        for (int r = 0; r < 2; r++)
          sums[k].y += visible(r, k) ? ptx::exp2(fmaf(product[k / 2][2 * r + k % 2], q.alpha[k], -sums[k].x)) : 0;
    });
  };
  auto end = [&](int first) {
    const int part = share.here.item(a) + share.warp, quarter = share.lane % 4;
    float2 all[2 * EIGHTS];
    bool far = false;  // from the reference are the logits: next time from a nearer one
#pragma unroll
    for (int k = 0; k < 2 * EIGHTS; k++) {
      all[k] = sums[k];
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) all[k].y += __shfl_xor_sync(~0u, all[k].y, lanes);
      if (first * BLOCK > share.here.length + step_of(quarter, k)) {  // it sees none of these tokens
        all[k] = nothing();
        continue;
      }
      const int move = all[k].y > LARGEST ? 1 : all[k].y < 1 / LARGEST ? -1 : 0;
      sums[k] = make_float2(sums[k].x + move * RANGE, 0);
      far |= move != 0;
    }
    if (__any_sync(~0u, far) && attempts++ < ATTEMPTS) return false;
#pragma unroll
    for (int k = 0; k < 2 * EIGHTS; k++)
      if (share.lane < 4) a.sums[(long long)part * COLUMNS + column_of(share.lane, k)] = all[k];
    return true;
  };
  share.for_each_item(q, begin, add, end);
}

// Whether the thread, and no other one, has the masses of query k, or of the head whose first query that is.
__device__ __forceinline__ bool writes(int quarter, int k) { return is_query(quarter, k) && (APART || quarter / PADDED == 0); }

// No mass behind the units: zeros up to N.
__device__ __forceinline__ void clear_rest(const Arguments& a) {
  const int rows = a.count * a.heads * G, steps = APART ? T : 1;
  Place place;
  for (int i = blockIdx.x; i < a.B * steps * rows; i += gridDim.x) {
    const int b = i / (steps * rows), t = i / rows % steps, row = i % rows;
    place.enter(a, b);
    const long long at = b * a.mass_stride[0] + t * a.mass_stride[1] + row * a.mass_stride[2];
    for (int n = place.units * BLOCK + 8 * threadIdx.x; n < a.N; n += 8 * THREADS) {
#pragma unroll
      for (int v = 0; v < (int)sizeof(Mass) / 2; v++) ((uint4*)(a.masses + at + n))[v] = uint4();
    }
  }
}

// log2 of each query's sum, from those of all warps that have a part of the item; log2 of T more where masses are averaged.
__device__ __forceinline__ void load_sums(float (&logs)[2 * EIGHTS], const Share& share) {
  const Arguments& a = share.a;
  const int item = share.here.item(a), eighth = share.lane / 4, quarter = share.lane % 4;
  const int start = share.end - share.left - share.here.unit, end = start + share.here.units;  // among the units of all items
  float2 sums[2 * EIGHTS];
#pragma unroll
  for (int k = 0; k < 2 * EIGHTS; k++) sums[k] = nothing();
  for (int warp = start / share.size + eighth; warp * share.size < end; warp += 8)
#pragma unroll
    for (int k = 0; k < 2 * EIGHTS; k++) sums[k] = merge(sums[k], a.sums[(long long)(item + warp) * COLUMNS + column_of(quarter, k)]);
#pragma unroll
  for (int k = 0; k < 2 * EIGHTS; k++) {
#pragma unroll
    for (int lanes = 4; lanes < 32; lanes *= 2)
      sums[k] = merge(sums[k], make_float2(__shfl_xor_sync(~0u, sums[k].x, lanes), __shfl_xor_sync(~0u, sums[k].y, lanes)));
    logs[k] = is_query(quarter, k) ? sums[k].x + log2f(sums[k].y * (APART ? 1 : T)) : INFINITY;
  }
}

__global__ void __launch_bounds__(THREADS, 1) write_masses(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(128) uint4 queues[];
  constexpr int ROWS = APART ? OWN : HEADS, OF_ROW = APART ? 1 : STEPS_OF_HEAD;  // rows of the result; queries of each
  constexpr int VECTORS_OF_ROW = sizeof(Mass) / 2;  // of 16 bytes, for 8 tokens
  Share share(a, queues);
  clear_rest(a);
  const int eighth = share.lane / 4, quarter = share.lane % 4;
  const Place& here = share.here;
  Queries q;
  float logs[2 * EIGHTS];
  Mass* rows[ROWS];  // from the thread's first token of the item on
  auto begin = [&] {
    load_sums(logs, share);
#pragma unroll
    for (int m = 0; m < ROWS; m++) {
      const int row = (here.layer * a.heads + here.head) * G + head_of(quarter, m * OF_ROW);
      rows[m] = a.masses + here.b * a.mass_stride[0] + (APART ? step_of(quarter, m) * a.mass_stride[1] : 0) + row * a.mass_stride[2] + 8 * eighth;
    }
  };
  auto write = [&](auto visit) {
    const int first = here.unit * BLOCK + 8 * eighth;
    uint32_t words[ROWS][4 * VECTORS_OF_ROW];
    visit([&](int i, const float(&product)[EIGHTS][4], auto visible) {
      float mass[ROWS][2] = {};
#pragma unroll
      for (int k = 0; k < OWN; k++)
#pragma unroll
        for (int r = 0; r < 2; r++) mass[k / OF_ROW][r] += ptx::exp2(fmaf(product[k / 2][2 * r + k % 2], q.alpha[k], -logs[k]));
#pragma unroll
      for (int m = 0; m < ROWS; m++) {
#pragma unroll
        for (int r = 0; r < 2; r++) {
          if (!APART)
#pragma unroll
            for (int lanes = PADDED; lanes < 4; lanes *= 2) mass[m][r] += __shfl_xor_sync(~0u, mass[m][r], lanes);
          if (!visible(r, PAST)) mass[m][r] = 0;
        }
        if (std::is_same<Mass, float>::value)
          words[m][2 * i] = __float_as_uint(mass[m][0]), words[m][2 * i + 1] = __float_as_uint(mass[m][1]);
        else
          words[m][i] = ptx::pack<__nv_bfloat16>(mass[m][0], mass[m][1]);
      }
    });
    if (first >= a.N) return;
#pragma unroll
    for (int m = 0; m < ROWS; m++)
      if (writes(quarter, m * OF_ROW))
#pragma unroll
        for (int v = 0; v < VECTORS_OF_ROW; v++)
          ((uint4*)(rows[m] + here.unit * BLOCK))[v] = make_uint4(words[m][4 * v], words[m][4 * v + 1], words[m][4 * v + 2], words[m][4 * v + 3]);
  };
  share.for_each_item(q, begin, write, [](int) { return true; });
}

extern "C" int columns() { return COLUMNS; }
extern "C" int warps() { return WARPS; }

extern "C" int launch(const Arguments* a, int multiprocessors, void* stream) {
  const int bytes = WARPS * STAGES * (VECTORS * 16 + 8);
  for (auto kernel : {sum_powers, write_masses}) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return (int)error;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(multiprocessors);
    config.blockDim = dim3(THREADS);
    config.dynamicSmemBytes = bytes;
    config.stream = (cudaStream_t)stream;
    error = cudaLaunchKernelEx(&config, kernel, *a);
    if (error != cudaSuccess) return (int)error;
  }
  return (int)cudaSuccess;
}
