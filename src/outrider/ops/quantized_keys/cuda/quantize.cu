// Keys in few bits for Hopper: a warp codes one block of 64 tokens of a KV head.
//
// Lane 4 g + q holds tokens 8 g .. 8 g + 7 and a quarter of the dims, eight dims at a time: their smallest and largest values over
// all tokens take three exchanges among the lanes, and the codes of eight dims make whole words or parts of them.
// Built for one HEAD_DIM, number of BITS, ELEMENT of the cache, or FLOAT8.
#include <type_traits>
#include "host.cuh"
#include "record.cuh"

constexpr int WARPS = 4, CHUNK = 8;  // dims at a time
constexpr float LARGEST_STEP = 1024, LARGEST_HALF = 65504;

struct Arguments {
  const void* keys[MAX_LAYERS];          // [B, N, heads, D]
  const float* key_scales[MAX_LAYERS];   // [heads], or null
  const void* lengths;                   // [B] int32 or int64
  uint32_t* records;                     // [layers, B, heads, blocks, RECORD]
  long long key_stride[3], record_stride[4];  // elements: (b, position, head); words: (layer, b, head, block)
  int wide_lengths, layers, B, heads;
  int blocks;                            // to look at in every sequence: as many as there may be, or 1 for the last one
  int last;
};

// Dims d .. d + 7 of a key, as floats.
__device__ __forceinline__ void load(float (&x)[CHUNK], const void* keys, long long at, float scale) {
  if (IN_FLOAT8) {
    const uint2 bytes = *(const uint2*)((const uint8_t*)keys + at);
    const uint32_t pairs[4] = {bytes.x, bytes.x >> 16, bytes.y, bytes.y >> 16};
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const uint32_t halves = ptx::unpack_e4m3(pairs[i]);
      x[2 * i] = __fmul_rn(ptx::half_to_float(halves), scale), x[2 * i + 1] = __fmul_rn(ptx::half_to_float(halves >> 16), scale);
    }
    return;
  }
  const uint4 words = *(const uint4*)((const ELEMENT*)keys + at);
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; i++) x[2 * i] = low_float(pairs[i], ELEMENT()), x[2 * i + 1] = high_float(pairs[i], ELEMENT());
}

__device__ void encode(const void* keys, long long at, long long stride, float scale, uint32_t* record, int lane) {
  const int eighth = lane / 4, quarter = lane % 4;
  uint32_t words[8 * WORDS] = {};
#pragma unroll
  for (int chunk = 0; chunk < D / 4 / CHUNK; chunk++) {
    const int d = D / 4 * quarter + CHUNK * chunk;
    float x[8][CHUNK], low[CHUNK], high[CHUNK];
#pragma unroll
    for (int n = 0; n < 8; n++) {
      load(x[n], keys, at + (8 * eighth + n) * stride + d, scale);
#pragma unroll
      for (int i = 0; i < CHUNK; i++) low[i] = n ? fminf(low[i], x[n][i]) : x[n][i], high[i] = n ? fmaxf(high[i], x[n][i]) : x[n][i];
    }
    uint32_t lows[CHUNK / 2], steps[CHUNK / 2];
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) {
        low[i] = fminf(low[i], __shfl_xor_sync(~0u, low[i], lanes));
        high[i] = fmaxf(high[i], __shfl_xor_sync(~0u, high[i], lanes));
      }
      low[i] += 0.0f, high[i] += 0.0f;  // no -0
    }
    auto limited = [](float x) { return fminf(fmaxf(x, -LARGEST_HALF), LARGEST_HALF); };
    auto factor = [&](int i) { return (float)(1 << 7) / (1 << (chunk * CHUNK / 2 + i / 2) * BITS % 8) / 4; };  // 2^(5 - bit)
    auto step_of = [&](int i) { return fminf(__fdiv_rn(high[i] - low[i], (float)((1 << BITS) - 1)), LARGEST_STEP) * factor(i); };
#pragma unroll
    for (int i = 0; i < CHUNK; i += 2) {
      lows[i / 2] = ptx::pack<__half>(limited(low[i]), limited(low[i + 1]));
      steps[i / 2] = ptx::pack<__half>(step_of(i), step_of(i + 1));
    }
#pragma unroll
    for (int i = 0; i < CHUNK; i++) {
      const float from = ptx::half_to_float(lows[i / 2] >> 16 * (i % 2)), step = ptx::half_to_float(steps[i / 2] >> 16 * (i % 2));
      const float inverse = step > 0 ? __fdiv_rn(factor(i), step) : 0;
      const int pair = chunk * CHUNK / 2 + i / 2, place = pair % PLACES, word = pair / PLACES;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const float code = fminf(fmaxf(rintf((x[n][i] - from) * inverse), 0), (float)((1 << BITS) - 1));
        words[n * WORDS + word] |= (uint32_t)code << (16 * (i % 2) + BITS * place);
      }
    }
    if (eighth == 0) {
      *(uint4*)(record + CODES + d / 2) = make_uint4(lows[0], lows[1], lows[2], lows[3]);
      *(uint4*)(record + CODES + D / 2 + d / 2) = make_uint4(steps[0], steps[1], steps[2], steps[3]);
    }
  }
#pragma unroll
  for (int v = 0; v < 2 * WORDS; v++)
    ((uint4*)record)[v * 32 + lane] = make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]);
}

__global__ void __launch_bounds__(32 * WARPS) quantize_keys(const __grid_constant__ Arguments a) {
  const int lane = threadIdx.x % 32, tasks = a.B * a.layers * a.heads * a.blocks;
  for (int task = blockIdx.x * WARPS + threadIdx.x / 32; task < tasks; task += gridDim.x * WARPS) {
    int rest = task / a.blocks;
    const int head = rest % a.heads;
    rest /= a.heads;
    const int layer = rest % a.layers, b = rest / a.layers, coded = coded_blocks(load_length(a.lengths, a.wide_lengths, b));
    const int block = a.last ? coded - 1 : task % a.blocks;
    if (block < 0 || block >= coded) continue;
    const long long at = b * a.key_stride[0] + (long long)block * BLOCK * a.key_stride[1] + head * a.key_stride[2];
    const long long to = layer * a.record_stride[0] + b * a.record_stride[1] + head * a.record_stride[2] + block * a.record_stride[3];
    const float scale = IN_FLOAT8 ? a.key_scales[layer][head] : 1;
    encode(a.keys[layer], at, a.key_stride[1], scale, a.records + to, lane);
  }
}

extern "C" int launch(const Arguments* a, int multiprocessors, void* stream) {
  const int tasks = a->B * a->layers * a->heads * a->blocks, needed = (tasks + WARPS - 1) / WARPS;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(needed < 8 * multiprocessors ? needed : 8 * multiprocessors);
  config.blockDim = dim3(32 * WARPS);
  config.stream = (cudaStream_t)stream;
  return (int)cudaLaunchKernelEx(&config, quantize_keys, *a);
}
