// Sparse attention for Hopper: one cooperative launch over a grid of one block per multiprocessor.
//
// A *problem* is a list (sequence b, list-owning head h) with up to ROWS query rows r = t * group + g. Problems get blocks in proportion
// to their tokens, the listed ones and the tail that follows them. Within a block every warp works alone, on tiles of 16 tokens:
//
//     copy     cp.async gathers the K and V rows of a tile into the warp's own ring in shared memory, STAGES - 1 tiles ahead
//     logits   K Q^T on the tensor cores: tokens down, query rows across, so that rows are padded to 8 only
//     softmax  probabilities relative to a reference near the row's maximum; only when a logit passes it by SLACK is it raised
//     output   V^T P^T on the tensor cores, the probabilities straight out of registers
//
// So no warp waits for another before the end of its share. Then the warps' results are merged in shared memory, and those of the
// blocks of a problem through global memory: each block sends every other its part of the elements, and merges the part that is its own.
// A message says by itself that it has arrived: the mailbox holds the bit pattern EMPTY until then, and again after it was read. So
// merging costs one trip through L2, without fences or counters. All sums are taken in a fixed order.
// Built for one ELEMENT, HEAD_DIM and ROW_TILES (8 query rows each); with DENSE for calls without indices, where a problem's tokens are
// those from the start of the first query's window on, or the first ones where there are counts.
#include "host.cuh"
#include "ptx.cuh"

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#define HEAD_DIM 128
#define ROW_TILES 3
#endif

#ifndef DENSE
#define DENSE 0
#endif

#ifndef WARPS
#define WARPS 8
#endif

constexpr int D = HEAD_DIM, THREADS = 32 * WARPS, ROWS = 8 * ROW_TILES;
constexpr int TILE = 16;                      // tokens
constexpr int STRIDE = D + 8;                 // elements between rows in shared memory: 16 bytes of padding, no bank conflicts
constexpr int SLOT = 2 * TILE * STRIDE;       // elements: K, then V
constexpr int O_STRIDE = D + 4;               // floats between rows of a warp's result
constexpr int CHUNKS = D / 8;                 // 16-byte pieces of a row
constexpr int ROWS_PER_PASS = 32 / CHUNKS;    // rows that a warp copies with one instruction
constexpr int PASSES = TILE / ROWS_PER_PASS;
constexpr int QUADS = ROWS * D / 4;           // of a problem's output: four floats each
constexpr int MESSAGE = 6;                    // floats: four of the output, maximum and sum of their row
constexpr int FIXED = ROWS * STRIDE * 2 + (2 * WARPS + 2) * ROWS * 4;
constexpr int FIT = (227 * 1024 - FIXED) / (WARPS * SLOT * 2);
constexpr int STAGES = FIT < 6 ? FIT : 6;
constexpr int RING = STAGES * SLOT;           // elements of one warp
constexpr int SHARED_BYTES = WARPS * RING * 2 + FIXED;
constexpr float SLACK = 8;                    // in powers of two; 2^SLACK is far from the largest float16
constexpr bool KEEP_QUERIES = ROW_TILES <= 3; // in registers
constexpr float LN_2 = 0.6931471805599453f;
constexpr unsigned EMPTY = 0xffffffff;        // a NaN that no message contains
static_assert(D <= 128 && STAGES >= 3 && ROWS * O_STRIDE * 4 <= RING * 2, "unsupported shape");

struct Arguments {
  const ELEMENT *queries, *keys, *values;
  const int* indices;      // [B, lists, width], unless DENSE
  const int* counts;       // [B, lists], or null if DENSE
  const void* lengths;     // [B] int32 or int64
  const int* page_table;   // [B, pages_per_sequence], or null
  const float* unlisted_values;  // [Hkv, D], or null: nothing stands for unlisted tokens
  const float* unlisted_shares;  // [B, Hq]
  ELEMENT* output;         // [B, T, Hq, D] contiguous
  float* logsumexp;        // [B, Hq, T], or null
  float* mailboxes;        // [virtual blocks][QUADS][MESSAGE], EMPTY before and after
  long long query_stride[3], stride[3], logsumexp_stride[3];  // elements: (b, t, h); of keys and values (sequence or page, token, head); (b, h, t)
  int wide_lengths, B, T, heads, lists, group, owners_per_kv, rows_per_problem, width, page_size, pages_per_sequence;  // heads: of lists or KV
  int window;              // tokens that a query sees, itself among them, if DENSE
  float scale;             // on the logits, times log2(e)
};

// x / d for 0 <= x < 2^20, in five instructions instead of twenty.
__device__ __forceinline__ int quotient(int x, int d) { return (int)__fdividef(x + 0.5f, (float)d); }

struct Share {  // what one block does of one problem
  int problem, part, parts;
};

__device__ __forceinline__ int length_of(const Arguments& a, int b) {
  return a.wide_lengths ? (int)((const long long*)a.lengths)[b] : ((const int*)a.lengths)[b];
}

struct Problem {
  int row_block, b, h, list;
  __device__ __forceinline__ Problem(const Arguments& a, int problem) {
    const int owners = a.B * a.heads;
    row_block = quotient(problem, owners);
    const int owner = problem - row_block * owners;
    b = quotient(owner, a.heads);
    h = owner - b * a.heads;
    list = a.lists == 1 ? b : owner;
  }
  __device__ __forceinline__ int count(const Arguments& a) const {  // tokens before the tail
    if (DENSE) return a.counts ? a.counts[list] : min(length_of(a, b), a.window - 1);
    return min(max(a.counts[list], 0), a.width);
  }
};

// Where all problems have as many tokens, each gets as many blocks.
__device__ __forceinline__ Share equal_share(int v, int virtual_blocks, int problems) {
  const int parts = min(quotient(virtual_blocks, problems), (int)gridDim.x), problem = quotient(v, parts);
  return {problem, v - problem * parts, problem < problems ? parts : 0};
}

// Problems in order of (row block, b, h). Virtual block v serves the problem whose range of blocks holds v: one block each, the others
// in proportion to the tokens. Every warp works this out alone; parts = 0 where there is nothing to do.
__device__ __forceinline__ Share share_of(const Arguments& a, int v, int virtual_blocks, int problems) {
  const int lane = threadIdx.x % 32;
  bool equal = true;  // full lists, or sequences of one length
  for (int l = lane; l < a.B * a.lists; l += 32)
    equal &= !DENSE ? a.counts[l] == a.width : a.counts ? a.counts[l] == a.counts[0] : length_of(a, l) == length_of(a, 0);
  if (__all_sync(~0u, equal)) return equal_share(v, virtual_blocks, problems);
  auto tokens_of = [&](int p) { return p < problems ? Problem(a, p).count(a) + a.T : 0; };
  long long total = 0;
  for (int p = lane; p < problems; p += 32) total += tokens_of(p);
#pragma unroll
  for (int step = 1; step < 32; step *= 2) total += __shfl_xor_sync(~0u, total, step);
  const float blocks_per_token = (virtual_blocks - problems) * 0.99999f / total;  // a little less, lest rounding hand out too many
  int start = 0;  // first virtual block of the current 32 problems
  for (int base = 0; base < problems; base += 32) {
    const int p = base + lane, blocks = p < problems ? min(1 + (int)(tokens_of(p) * blocks_per_token), (int)gridDim.x) : 0;
    int end = blocks;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int below = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += below;
    }
    const unsigned mine = __ballot_sync(~0u, v >= start + end - blocks && v < start + end);
    if (mine) {
      const int owner = __ffs(mine) - 1;
      return {base + owner, v - start - __shfl_sync(~0u, end - blocks, owner), __shfl_sync(~0u, blocks, owner)};
    }
    start += __shfl_sync(~0u, end, 31);
  }
  return {0, 0, 0};
}

struct Walk {  // the tokens of one block, in order: listed ones, then the tail
  int first, last, count, length, start;  // start: position of the first token, if DENSE
  __device__ __forceinline__ Walk(const Arguments& a, const Share& share, int count, int length)
      : count(count), length(length), start(a.counts ? 0 : length - count) {
    const int total = count + a.T, tokens = (total + share.parts - 1) / share.parts;
    first = min(share.part * tokens, total);
    last = min(first + tokens, total);
  }
  __device__ __forceinline__ int position(const int* indices, int i) const {  // slots past the end repeat the last token
    i = min(first + i, last - 1);
    if (i >= count) return length + i - count;
    return DENSE ? start + i : indices[i];
  }
};

__device__ constexpr bool is_bfloat(__nv_bfloat16) { return true; }
__device__ constexpr bool is_bfloat(__half) { return false; }
__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
// Does any of the eight elements have an exponent of ones: infinity or NaN?
__device__ __forceinline__ bool not_finite(const uint4& x) {
  const uint32_t exponent = is_bfloat(ELEMENT()) ? 0x7f80 : 0x7c00;
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  bool found = false;
#pragma unroll
  for (int i = 0; i < 4; i++) found |= (words[i] & exponent) == exponent || (words[i] >> 16 & exponent) == exponent;
  return found;
}

__device__ __forceinline__ float filled(float x) { return __float_as_uint(x) == EMPTY ? __uint_as_float(0x7fffffff) : x; }
__device__ __forceinline__ bool empty(float x) { return __float_as_uint(x) == EMPTY; }

__global__ void __launch_bounds__(THREADS, 1) sparse_attention(const __grid_constant__ Arguments a, int problems, int virtual_blocks) {
  extern __shared__ __align__(128) char shared[];
  int thread = threadIdx.x;
  const int lane = thread % 32, warp = thread / 32;
  ELEMENT* ring = (ELEMENT*)shared + warp * RING;        // [STAGES][K, V][TILE][STRIDE], at the end the warp's output
  ELEMENT* queries = (ELEMENT*)shared + WARPS * RING;    // [ROWS][STRIDE]
  float* maxima = (float*)(queries + ROWS * STRIDE);     // [WARPS][ROWS]; then the weights of the warps
  float* sums = maxima + WARPS * ROWS;                   // [WARPS][ROWS]
  float* row_max = sums + WARPS * ROWS;                  // [ROWS]
  float* row_sum = row_max + ROWS;                       // [ROWS]

  for (int v = blockIdx.x; v < virtual_blocks; v += gridDim.x) {
    if (DENSE) asm volatile("" : "+r"(thread));  // what follows from it is worked out for every share: no registers are held over the loop
    // Token lane % 16 of this warp's tile 2 * pair + lane / 16: one read serves two tiles, a warp's tiles being WARPS apart.
    const int place = (warp + lane / TILE * WARPS) * TILE + lane % TILE;
    // The first read does not wait for the counts: it takes all lists to be full, as top-k leaves them, and is repeated if they are not.
    const Share guess = equal_share(v, virtual_blocks, problems);
    int next = 0;  // of a token: its position; if DENSE its page
    if (!DENSE && guess.parts) {
      const int i = Walk(a, guess, a.width, 0).first + place;
      if (i < a.width) next = a.indices[(long long)Problem(a, guess.problem).list * a.width + i];
    }
    const Share share = share_of(a, v, virtual_blocks, problems);
    if (!share.parts) break;
    const Problem problem(a, share.problem);
    const int b = problem.b, h = problem.h, list = problem.list, kv_head = quotient(h, a.owners_per_kv);
    const int first_row = problem.row_block * a.rows_per_problem, rows = min(a.T * a.group - first_row, a.rows_per_problem);
    const int* indices = a.indices + (long long)list * a.width;
    const Walk walk(a, share, problem.count(a), length_of(a, b));
    const int first = walk.first, last = walk.last, count = walk.count;
    const int tiles = (last - first + TILE - 1) / TILE;
    auto look_up = [&](int i) {
      const int position = walk.position(indices, i);
      if (!DENSE) return position;
      return a.page_table ? a.page_table[(long long)b * a.pages_per_sequence + position / a.page_size] : 0;
    };
    if (DENSE || share.problem != guess.problem || share.part != guess.part || share.parts != guess.parts || count != a.width ||
        first + place >= min(count, last))
      next = look_up(place);
    const ELEMENT* keys = a.keys + kv_head * a.stride[2] + lane % CHUNKS * 8;
    const ELEMENT* values = a.values + kv_head * a.stride[2] + lane % CHUNKS * 8;
    unsigned row = 0;
    int step_ahead = 0, slot_ahead = 0;  // the next tile to copy is warp + step_ahead * WARPS
    auto copy = [&] {
      if (warp + step_ahead * WARPS < tiles) {
        if (step_ahead % 2 == 0) {  // take over what was read, and read for the two tiles after these
          const int position = DENSE ? walk.position(indices, step_ahead * WARPS * TILE + place) : next;
          long long outer = b, inner = position;
          if (a.page_table) {
            outer = DENSE ? next : a.page_table[(long long)b * a.pages_per_sequence + position / a.page_size];
            inner = position % a.page_size;
          }
          row = (unsigned)((outer * a.stride[0] + inner * a.stride[1]) / 8);  // in units of 16 bytes: reaches 64 GiB
          next = look_up((step_ahead + 2) * WARPS * TILE + place);
        }
        const uint32_t target = ptx::shared_address(ring + slot_ahead * SLOT + lane / CHUNKS * STRIDE + lane % CHUNKS * 8);
#pragma unroll
        for (int i = 0; i < PASSES; i++) {
          const unsigned from = __shfl_sync(~0u, row, step_ahead % 2 * TILE + i * ROWS_PER_PASS + lane / CHUNKS);
          ptx::copy16(target + i * ROWS_PER_PASS * STRIDE * 2, ptx::offset16(keys, from));
          ptx::copy16(target + (TILE + i * ROWS_PER_PASS) * STRIDE * 2, ptx::offset16(values, from));
        }
      }
      ptx::commit();
      step_ahead++;
      slot_ahead = slot_ahead + 1 == STAGES ? 0 : slot_ahead + 1;
    };

    for (int i = thread; i < ROWS * CHUNKS; i += THREADS) {  // rows past the end repeat the last one
      const int r = first_row + min(i / CHUNKS, rows - 1), t = quotient(r, a.group), g = r - t * a.group;
      const ELEMENT* source = a.queries + b * a.query_stride[0] + t * a.query_stride[1] + (h * a.group + g) * a.query_stride[2];
      ptx::copy16(ptx::shared_address(queries + i / CHUNKS * STRIDE + i % CHUNKS * 8), source + i % CHUNKS * 8);
    }
#pragma unroll 1  // cold code is slow code: keep it short
    for (int stage = 0; stage < STAGES - 1; stage++) copy();
    ptx::wait_group<STAGES - 2>();  // the queries came with the first tile
    __syncthreads();

    // Queries as the right operand; the rows (columns of the products) of this thread are n * 8 + lane % 4 * 2 and the next one.
    uint32_t q[ROW_TILES][D / 32][4];
    auto load_queries = [&](int n, int k) {
      ptx::load_matrices(q[n][k], ptx::shared_address(queries + (n * 8 + lane % 8) * STRIDE + k * 32 + lane / 8 * 8));
    };
    int step[ROW_TILES][2];  // the rows' query tokens
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) {
      step[n][0] = quotient(first_row + n * 8 + lane % 4 * 2, a.group);
      step[n][1] = quotient(first_row + n * 8 + lane % 4 * 2 + 1, a.group);
#pragma unroll
      for (int k = 0; k < D / 32; k++)
        if (KEEP_QUERIES) load_queries(n, k);
    }

    float out[D / 16][ROW_TILES][4] = {};                    // [dims][rows]
    float reference[ROW_TILES][2], sum[ROW_TILES][2] = {};  // of this thread's rows; `sum` over its own tokens
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++) reference[n][0] = reference[n][1] = -INFINITY;

    int slot = 0;
#pragma unroll 1
    for (int tile = warp; tile < tiles; tile += WARPS) {
      ptx::wait_group<STAGES - 2>();
      __syncwarp();  // all lanes' copies have arrived, and all lanes are done with the slot that is filled next
      copy();
      ELEMENT* k_tile = ring + slot * SLOT;
      slot = slot + 1 == STAGES ? 0 : slot + 1;

      float logits[ROW_TILES][4] = {};  // [tokens lane / 4 and lane / 4 + 8][rows]
      const uint32_t k_address = ptx::shared_address(k_tile + lane % 16 * STRIDE + lane / 16 * 8);
#pragma unroll
      for (int k = 0; k < D / 16; k++) {
        uint32_t left[4];
        ptx::load_matrices(left, k_address + k * 32);
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
          if (!KEEP_QUERIES && k % 2 == 0) load_queries(n, k / 2);
          ptx::multiply_add<ELEMENT>(logits[n], left, q[n][k / 2][k % 2 * 2], q[n][k / 2][k % 2 * 2 + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) logits[n][i] *= a.scale;

      const int walked = first + tile * TILE;
      bool masked = walked + TILE > min(count, last);        // the tile has tail tokens or repeated ones,
      if (DENSE) masked |= walked < count + a.T - a.window;  // or some that are behind the window of a later query
      if (masked) {
        asm volatile("");  // a branch, not predicates: it is rare
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int token = walked + i / 2 * 8 + lane / 4;
            if (token >= last || token - count > step[n][i % 2] || (DENSE && token - count <= step[n][i % 2] - a.window))
              logits[n][i] = -INFINITY;
          }
      }

      bool grew = false;
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
        for (int i = 0; i < 2; i++) grew |= fmaxf(logits[n][i], logits[n][i + 2]) > reference[n][i] + SLACK;
      if (__any_sync(~0u, grew)) {
        asm volatile("");
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float highest = fmaxf(reference[n][i], fmaxf(logits[n][i], logits[n][i + 2]));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 4));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 8));
            highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 16));
            const float rescale = highest > reference[n][i] ? ptx::exp2(reference[n][i] - highest) : 1;
            reference[n][i] = highest;
            sum[n][i] *= rescale;
#pragma unroll
            for (int m = 0; m < D / 16; m++) out[m][n][i] *= rescale, out[m][n][i + 2] *= rescale;
          }
      }
      uint32_t p[ROW_TILES][2];  // probabilities as the right operand
#pragma unroll
      for (int n = 0; n < ROW_TILES; n++) {
        float(&x)[4] = logits[n];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float base = reference[n][i % 2] == -INFINITY ? 0 : reference[n][i % 2];  // nothing visible yet: probability 0
          x[i] = ptx::exp2(x[i] - base);
        }
        sum[n][0] += x[0] + x[2];
        sum[n][1] += x[1] + x[3];
        p[n][0] = ptx::transpose(ptx::pack<ELEMENT>(x[0], x[1]));
        p[n][1] = ptx::transpose(ptx::pack<ELEMENT>(x[2], x[3]));
      }
      if (masked) {  // a NaN in a value row of the tail must not reach queries before it through 0 * NaN
        asm volatile("");
        const int tail = max(count - walked, 0);
        ELEMENT* v_rows = k_tile + (TILE + tail) * STRIDE;
        bool wild = false;
        for (int i = lane; i < (TILE - tail) * CHUNKS; i += 32)
          wild |= not_finite(*(const uint4*)(v_rows + i / CHUNKS * STRIDE + i % CHUNKS * 8));
        if (__any_sync(~0u, wild)) {  // then what is not finite goes apart, and as zeros into the product
          auto if_wild = [](float x) { return fabsf(x) < INFINITY ? 0 : x; };
#pragma unroll 1
          for (int j = tail; j < TILE; j++) {
            const ELEMENT* v = k_tile + (TILE + j) * STRIDE + lane / 4;
#pragma unroll
            for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
              for (int i = 0; i < 2; i++) {
                const float x = __shfl_sync(~0u, j < 8 ? logits[n][i] : logits[n][i + 2], j % 8 * 4 + lane % 4);
                if (x > 0)
#pragma unroll
                  for (int m = 0; m < D / 16; m++) {
                    out[m][n][i] += x * if_wild(as_float(v[m * 16]));
                    out[m][n][i + 2] += x * if_wild(as_float(v[m * 16 + 8]));
                  }
              }
          }
          __syncwarp();
          for (int i = lane; i < (TILE - tail) * D; i += 32) {
            ELEMENT* v = v_rows + i / D * STRIDE + i % D;
            if (if_wild(as_float(*v)) != 0) *(uint16_t*)v = 0;
          }
          __syncwarp();
        }
      }
      const uint32_t v_address = ptx::shared_address(k_tile + (TILE + lane / 16 * 8 + lane % 8) * STRIDE + lane / 8 % 2 * 8);
#pragma unroll
      for (int m = 0; m < D / 16; m++) {
        uint32_t left[4];
        ptx::load_matrices_transposed(left, v_address + m * 32);
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) ptx::multiply_add<ELEMENT>(out[m][n], left, p[n][0], p[n][1]);
      }
    }

    // Merge the warps: every warp leaves its output in its own ring, then all threads add up.
    ptx::wait_group<0>();
    __syncwarp();
    float* mine = (float*)ring;  // [rows][O_STRIDE]
#pragma unroll
    for (int n = 0; n < ROW_TILES; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        sum[n][i] += __shfl_xor_sync(~0u, sum[n][i], 4);
        sum[n][i] += __shfl_xor_sync(~0u, sum[n][i], 8);
        sum[n][i] += __shfl_xor_sync(~0u, sum[n][i], 16);
        const int r = n * 8 + lane % 4 * 2 + i;
        if (lane / 4 == 0) maxima[warp * ROWS + r] = reference[n][i], sums[warp * ROWS + r] = sum[n][i];
#pragma unroll
        for (int m = 0; m < D / 16; m++) {
          mine[r * O_STRIDE + m * 16 + lane / 4] = out[m][n][i];
          mine[r * O_STRIDE + m * 16 + lane / 4 + 8] = out[m][n][i + 2];
        }
      }
    __syncthreads();
    if (thread < ROWS) {
      float highest = -INFINITY, all = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) highest = fmaxf(highest, maxima[w * ROWS + thread]);
      const float base = highest == -INFINITY ? 0 : highest;
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float weight = ptx::exp2(maxima[w * ROWS + thread] - base);
        maxima[w * ROWS + thread] = weight;
        all += weight * sums[w * ROWS + thread];
      }
      row_max[thread] = highest, row_sum[thread] = all;
    }
    __syncthreads();
    const int quads = rows * D / 4, quads_per_part = quotient(quads + share.parts - 1, share.parts);
    auto store = [&](int quad, float4 x, float highest, float weight) {
      const int r = quad / (D / 4), t = quotient(first_row + r, a.group), g = first_row + r - t * a.group;
      const float inverse = __fdividef(1, weight);
      const int head = h * a.group + g, query_heads = a.heads * a.group;
      x.x *= inverse, x.y *= inverse, x.z *= inverse, x.w *= inverse;
      if (!DENSE && a.unlisted_values) {
        const float share = a.unlisted_shares[b * query_heads + head], rest = 1 - share;
        const float* value = a.unlisted_values + kv_head * D + quad % (D / 4) * 4;
        x.x = rest * x.x + share * value[0], x.y = rest * x.y + share * value[1];
        x.z = rest * x.z + share * value[2], x.w = rest * x.w + share * value[3];
      }
      if (a.logsumexp && quad % (D / 4) == 0)
        a.logsumexp[b * a.logsumexp_stride[0] + head * a.logsumexp_stride[1] + t * a.logsumexp_stride[2]] = (highest + log2f(weight)) * LN_2;
      const long long row = ((long long)b * a.T + t) * query_heads + head;
      *(uint2*)(a.output + row * D + quad % (D / 4) * 4) =
          make_uint2(ptx::pack<ELEMENT>(x.x, x.y), ptx::pack<ELEMENT>(x.z, x.w));
    };
#pragma unroll
    for (int i = 0; i < (QUADS + THREADS - 1) / THREADS; i++) {
      const int quad = i * THREADS + thread, r = quad / (D / 4);
      if (quad >= quads) break;
      float4 x = {0, 0, 0, 0};
#pragma unroll
      for (int w = 0; w < WARPS; w++) {
        const float weight = maxima[w * ROWS + r];
        const float4 value = *(const float4*)((float*)((ELEMENT*)shared + w * RING) + r * O_STRIDE + quad % (D / 4) * 4);
        x.x += weight * value.x, x.y += weight * value.y, x.z += weight * value.z, x.w += weight * value.w;
      }
      if (share.parts == 1) {
        store(quad, x, row_max[r], row_sum[r]);
      } else {  // from this block's own mailbox the part that owns the quad will fetch it
        float* message = a.mailboxes + ((long long)v * QUADS + quad) * MESSAGE;
        __stcg((float2*)message, make_float2(filled(x.x), filled(x.y)));
        __stcg((float2*)message + 1, make_float2(filled(x.z), filled(x.w)));
        __stcg((float2*)message + 2, make_float2(filled(row_max[r]), filled(row_sum[r])));
      }
    }

    // Merge the blocks: four neighbouring lanes share a quad, each fetching the messages of every fourth block.
    if (share.parts > 1) {
      const int own = min(quads_per_part, quads - share.part * quads_per_part), helper = lane % 4;
      for (int i = thread / 4; i < (own + 7) / 8 * 8; i += THREADS / 4) {
        const int quad = share.part * quads_per_part + i;
        float4 x = {0, 0, 0, 0};
        float highest = -INFINITY, weight = 0;
        auto merge = [&](float2 low, float2 high, float2 statistic) {
          if (statistic.x == -INFINITY && statistic.y == 0) return;  // nothing visible there; but a NaN counts
          const float higher = fmaxf(highest, statistic.x), old = ptx::exp2(highest - higher), added = ptx::exp2(statistic.x - higher);
          x = make_float4(x.x * old + low.x * added, x.y * old + low.y * added, x.z * old + high.x * added, x.w * old + high.y * added);
          weight = weight * old + statistic.y * added;
          highest = higher;
        };
        for (int base = helper; base < share.parts && i < own; base += 16) {
          float2 got[4][3];
          float2* message[4];
#pragma unroll
          for (int j = 0; j < 4; j++)
            message[j] = (float2*)(a.mailboxes + ((long long)(v - share.part + min(base + 4 * j, share.parts - 1)) * QUADS + quad) * MESSAGE);
          bool waiting = true;
          while (waiting) {
            waiting = false;
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
              for (int k = 0; k < 3; k++)
                asm volatile("ld.relaxed.gpu.global.v2.f32 {%0, %1}, [%2];" : "=f"(got[j][k].x), "=f"(got[j][k].y) : "l"(message[j] + k) : "memory");
#pragma unroll
            for (int j = 0; j < 4; j++)
#pragma unroll
              for (int k = 0; k < 3; k++) waiting |= base + 4 * j < share.parts && (empty(got[j][k].x) || empty(got[j][k].y));
          }
#pragma unroll
          for (int j = 0; j < 4; j++)
            if (base + 4 * j < share.parts) {
#pragma unroll
              for (int k = 0; k < 3; k++) __stcg((uint2*)message[j] + k, make_uint2(EMPTY, EMPTY));
              merge(got[j][0], got[j][1], got[j][2]);
            }
        }
#pragma unroll
        for (int other = 1; other < 4; other *= 2) {
          const float2 low = make_float2(__shfl_xor_sync(~0u, x.x, other), __shfl_xor_sync(~0u, x.y, other));
          const float2 high = make_float2(__shfl_xor_sync(~0u, x.z, other), __shfl_xor_sync(~0u, x.w, other));
          const float2 statistic = make_float2(__shfl_xor_sync(~0u, highest, other), __shfl_xor_sync(~0u, weight, other));
          merge(low, high, statistic);
        }
        if (helper == 0 && i < own) store(quad, x, highest, weight);
      }
    }
    __syncthreads();
  }
}

// Floats of a mailbox; `problems` and mailboxes are counted by the caller.
extern "C" int mailbox_floats() { return QUADS * MESSAGE; }

// `blocks`: of the grid, at most one per multiprocessor; `virtual_blocks`: a multiple of it, at least the number of problems.
extern "C" int launch(const Arguments* arguments, int problems, int blocks, int virtual_blocks, void* stream) {
  static const cudaError_t prepared =
      cudaFuncSetAttribute(sparse_attention, cudaFuncAttributeMaxDynamicSharedMemorySize, SHARED_BYTES);
  if (prepared != cudaSuccess) return (int)prepared;
  void* parameters[] = {(void*)arguments, &problems, &virtual_blocks};
  return (int)cudaLaunchCooperativeKernel((void*)sparse_attention, dim3(blocks), dim3(THREADS), parameters, SHARED_BYTES, (cudaStream_t)stream);
}
