// Norm, rotation and appending for Hopper: one launch, a warp or a part of one to each head of each token.
//
// A lane holds four elements of the head's first half and the four of the second half that they are rotated with, so the norm's sum
// of squares is all that lanes tell each other. Everything is computed in fp32, and rounded once, into the output or the cache.
//
// The launch may begin while the kernel before it still runs: until `wait_for_predecessor` only gains are read, and nothing is
// written. What that kernel may have written is read past L1, where a block that began early could meet what was there before.
// Built for one ELEMENT; everything else is an argument.
#include "host.cuh"
#include "ptx.cuh"

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif

constexpr int THREADS = 128, VECTOR = 4;  // VECTOR: elements that a lane holds of each half

struct Arguments {
  const ELEMENT *projected, *cos, *sin;    // [B, T, heads, D] contiguous; [B, T, D], of which the first half is read
  const ELEMENT *query_norm, *key_norm;    // [D], or null
  const float *key_scale, *value_scale;    // [kv_heads], or null where the caches hold ELEMENT instead of e4m3
  const void* lengths;                     // [B] int32 or int64
  ELEMENT* queries;                        // [B, T, query_heads, D] contiguous
  void *keys, *values;                     // [B, N, kv_heads, D]
  long long cos_stride[2], sin_stride[2], key_stride[3], value_stride[3];  // elements: (b, t), and (b, position, head)
  unsigned T, heads, rows;                 // rows: B * T * heads
  int wide_lengths, query_heads, kv_heads, D;
  int lane_bits;                           // 2^lane_bits lanes to a head: at least D / (2 * VECTOR)
  float eps;
};

__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }

__device__ __forceinline__ void unpack(float (&x)[VECTOR], uint2 packed) {
  const ELEMENT* elements = (const ELEMENT*)&packed;
#pragma unroll
  for (int i = 0; i < VECTOR; i++) x[i] = as_float(elements[i]);
}

__device__ __forceinline__ void store(ELEMENT* to, const float (&x)[VECTOR]) {
  *(uint2*)to = make_uint2(ptx::pack<ELEMENT>(x[0], x[1]), ptx::pack<ELEMENT>(x[2], x[3]));
}

// As 8-bit floats, divided by `scale`.
__device__ __forceinline__ void store(uint8_t* to, const float (&x)[VECTOR], float scale) {
  const uint32_t low = ptx::pack_e4m3(__fdiv_rn(x[0], scale), __fdiv_rn(x[1], scale));
  *(uint32_t*)to = low | (uint32_t)ptx::pack_e4m3(__fdiv_rn(x[2], scale), __fdiv_rn(x[3], scale)) << 16;
}

__global__ void __launch_bounds__(THREADS) rotary_append(const __grid_constant__ Arguments a) {
  const int lanes = 1 << a.lane_bits;
  const unsigned row = blockIdx.x * (THREADS >> a.lane_bits) + (threadIdx.x >> a.lane_bits);
  const unsigned token = row / a.heads, b = token / a.T, t = token - b * a.T;
  const int head = row - token * a.heads, kv = head - a.query_heads;  // kv: keys from 0, values from kv_heads
  const bool is_query = kv < 0, is_value = kv >= a.kv_heads;
  const int half = a.D / 2, d = (threadIdx.x & (lanes - 1)) * VECTOR;
  const bool active = row < a.rows && d < half;
  const ELEMENT* gain = is_value ? nullptr : is_query ? a.query_norm : a.key_norm;
  const float* scales = is_query ? nullptr : is_value ? a.value_scale : a.key_scale;
  const int kv_head = is_value ? kv - a.kv_heads : kv;

  uint2 packed_gain[2] = {};
  if (active && gain) packed_gain[0] = __ldg((const uint2*)(gain + d)), packed_gain[1] = __ldg((const uint2*)(gain + half + d));

  ptx::wait_for_predecessor();
  uint2 packed[2] = {}, packed_cos = {}, packed_sin = {};
  long long position = t;
  float scale = 1;
  if (active) {
    const ELEMENT* from = a.projected + (long long)row * a.D + d;
    packed[0] = __ldcg((const uint2*)from), packed[1] = __ldcg((const uint2*)(from + half));
    if (!is_value) {
      packed_cos = __ldcg((const uint2*)(a.cos + b * a.cos_stride[0] + t * a.cos_stride[1] + d));
      packed_sin = __ldcg((const uint2*)(a.sin + b * a.sin_stride[0] + t * a.sin_stride[1] + d));
    }
    if (!is_query) position += a.wide_lengths ? __ldcg((const long long*)a.lengths + b) : __ldcg((const int*)a.lengths + b);
    if (scales) scale = __ldcg(scales + kv_head);
  }
  float first[VECTOR], second[VECTOR];
  unpack(first, packed[0]), unpack(second, packed[1]);

  if (a.query_norm || a.key_norm) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; i++) sum += first[i] * first[i] + second[i] * second[i];
#pragma unroll
    for (int step = 16; step; step /= 2)
      if (step < lanes) sum += __shfl_xor_sync(~0u, sum, step);
    if (gain) {
      const float factor = rsqrtf(__fdividef(sum, (float)a.D) + a.eps);
      float first_gain[VECTOR], second_gain[VECTOR];
      unpack(first_gain, packed_gain[0]), unpack(second_gain, packed_gain[1]);
#pragma unroll
      for (int i = 0; i < VECTOR; i++) first[i] *= factor * first_gain[i], second[i] *= factor * second_gain[i];
    }
  }
  if (!active) return;

  if (!is_value) {
    float cos[VECTOR], sin[VECTOR];
    unpack(cos, packed_cos), unpack(sin, packed_sin);
#pragma unroll
    for (int i = 0; i < VECTOR; i++) {
      const float x = first[i], y = second[i];
      first[i] = x * cos[i] - y * sin[i], second[i] = y * cos[i] + x * sin[i];
    }
  }
  if (is_query) {
    ELEMENT* to = a.queries + ((long long)token * a.query_heads + head) * a.D + d;
    store(to, first), store(to + half, second);
    return;
  }
  const long long* stride = is_value ? a.value_stride : a.key_stride;
  const long long at = b * stride[0] + position * stride[1] + kv_head * stride[2] + d;
  void* cache = is_value ? a.values : a.keys;
  if (scales) {
    uint8_t* to = (uint8_t*)cache + at;
    store(to, first, scale), store(to + half, second, scale);
  } else {
    ELEMENT* to = (ELEMENT*)cache + at;
    store(to, first), store(to + half, second);
  }
}

extern "C" int launch(const Arguments* arguments, void* stream) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  const int rows_per_block = THREADS >> arguments->lane_bits;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3((arguments->rows + rows_per_block - 1) / rows_per_block);
  config.blockDim = dim3(THREADS);
  config.stream = (cudaStream_t)stream;
  config.attrs = &early, config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, rotary_append, *arguments);
}
