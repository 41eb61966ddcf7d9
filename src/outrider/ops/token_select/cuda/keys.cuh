// Scores as keys: the upper half of a merged fp32 score, 15 bits that order like the score.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>

#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif

constexpr int VECTOR = 8, VECTORS = 4;               // tokens a thread reads at a time; and how often, in a step
constexpr int SPAN = 32 * VECTOR * VECTORS;          // tokens of a step
constexpr int INFINITE = 0x7f80;                     // the largest key
constexpr int NONE = 0x7ffe;                         // a threshold above every key

__device__ __forceinline__ float as_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float as_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float as_float(float x) { return x; }
template <typename T>
__device__ constexpr bool is_bfloat(T) { return false; }
__device__ constexpr bool is_bfloat(__nv_bfloat16) { return true; }

struct Row {  // one merged row of scores
  const ELEMENT* scores;     // of the sequence
  const long long* sources;  // [G]
  long long stride;
  int G, length, forced_below, forced_from;
  bool take_max;

  __device__ __forceinline__ bool is_forced(int position) const { return position < forced_below || position >= forced_from; }

  // NaN and negative scores count as 0.
  __device__ __forceinline__ float add(float merged, float score) const {
    return take_max ? fmaxf(merged, score) : merged + fmaxf(score, 0);
  }
  __device__ __forceinline__ unsigned key(float merged) const {
    if (!take_max && G > 1) merged = (G & G - 1) ? __fdiv_rn(merged, G) : merged * (1.0f / G);  // both exact to the last bit
    return __float_as_uint(merged) >> 16;
  }
  __device__ __noinline__ unsigned key_at(int position) const {
    float merged = 0;
#pragma unroll 1
    for (int g = 0; g < G; g++) merged = add(merged, as_float(scores[sources[g] * stride + position]));
    return key(merged);
  }
  // Keys of the eight tokens from `start` on, 0 past the end.
  __device__ __noinline__ uint4 keys_at(int start) const {
    float merged[VECTOR] = {};
#pragma unroll 1
    for (int g = 0; g < G; g++) {
      const ELEMENT* source = scores + sources[g] * stride + start;
#pragma unroll
      for (int i = 0; i < VECTOR; i++)
        if (start + i < length) merged[i] = add(merged[i], as_float(source[i]));
    }
    return keys_of(merged);
  }
  __device__ __forceinline__ uint4 keys_of(const float (&merged)[VECTOR]) const {
    unsigned keys[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) keys[i] = key(merged[i]);
    return make_uint4(keys[0] | keys[1] << 16, keys[2] | keys[3] << 16, keys[4] | keys[5] << 16, keys[6] | keys[7] << 16);
  }
  // Keys of a step, whose first token is `first`, if its scores are all there and aligned; false if not. Many reads are under way at once.
  __device__ __noinline__ bool merge_step(uint4* home, int first, int last) const {
    constexpr int WORDS = sizeof(ELEMENT) * VECTOR / 16, ROWS = 2 / WORDS;  // of a vector; rows at a time
    const int lane = threadIdx.x % 32;
    if (first + SPAN > last || (uintptr_t)(scores + first) % 16 || stride * sizeof(ELEMENT) % 16) return false;
    float merged[VECTORS][VECTOR] = {};
#pragma unroll 1
    for (int g = 0; g < G; g += ROWS) {
      uint4 raw[ROWS][VECTORS][WORDS];
#pragma unroll
      for (int r = 0; r < ROWS; r++) {
        const ELEMENT* source = scores + sources[min(g + r, G - 1)] * stride + first + lane * VECTOR;
#pragma unroll
        for (int i = 0; i < VECTORS; i++)
#pragma unroll
          for (int w = 0; w < WORDS; w++) raw[r][i][w] = __ldg((const uint4*)(source + i * 32 * VECTOR) + w);
      }
#pragma unroll
      for (int r = 0; r < ROWS; r++)
        if (g + r < G)
#pragma unroll
          for (int i = 0; i < VECTORS; i++)
#pragma unroll
            for (int k = 0; k < VECTOR; k++) merged[i][k] = add(merged[i][k], as_float(((const ELEMENT*)raw[r][i])[k]));
    }
#pragma unroll
    for (int i = 0; i < VECTORS; i++) home[i * 32 + lane] = keys_of(merged[i]);
    return true;
  }
};

// A key's mass. Infinity weighs as much as the largest finite key.
__device__ __forceinline__ double mass_of(unsigned key) { return __uint_as_float(min(key, INFINITE - 1) << 16); }
template <typename Weight>
__device__ __forceinline__ Weight weight_of(unsigned key);
template <>
__device__ __forceinline__ int weight_of<int>(unsigned) { return 1; }
template <>
__device__ __forceinline__ double weight_of<double>(unsigned key) { return mass_of(key); }

__device__ __forceinline__ bool clean(const uint4& keys) {  // no negative score, no NaN
  const uint32_t highest = __vmaxu2(__vmaxu2(keys.x, keys.y), __vmaxu2(keys.z, keys.w));
  return (highest & 0xffff) <= INFINITE && highest <= (INFINITE << 16 | 0xffff);
}

// One bit a token: is its key at least `key` (0 .. 0x8000)? Adding 0x8000 - key sets a key's top bit exactly then; the product
// collects the top bits of four bytes.
__device__ __forceinline__ unsigned at_least(const uint4& keys, unsigned key) {
  const uint32_t lift = (0x8000 - key) * 0x10001;
  const uint32_t low = __byte_perm(keys.x + lift, keys.y + lift, 0x7531), high = __byte_perm(keys.z + lift, keys.w + lift, 0x7531);
  return ((low & 0x80808080) * 0x00204081 >> 28) | ((high & 0x80808080) * 0x00204081 >> 28 << 4);
}
