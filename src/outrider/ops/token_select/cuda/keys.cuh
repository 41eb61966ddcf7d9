// Scores as keys: the upper half of a merged fp32 score, 15 bits that order like the score.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <stdint.h>
#include "ptx.cuh"

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

struct Row {  // one merged row of scores
  const ELEMENT* scores;     // of the sequence
  const long long* sources;  // [G]
  long long stride;
  int G, length, forced_below, forced_from;
  bool take_max;
  float factor;  // on the sum of the rows, where that is exact; 0: it is divided by G

  __device__ __forceinline__ bool is_forced(int position) const { return position < forced_below || position >= forced_from; }

  // NaN and negative scores count as 0.
  __device__ __forceinline__ float add(float merged, float score) const {
    return take_max ? fmaxf(merged, score) : merged + fmaxf(score, 0);
  }
  template <bool DIVIDE>
  __device__ __forceinline__ unsigned key(float merged) const {
    return __float_as_uint(DIVIDE ? __fdiv_rn(merged, G) : merged * factor) >> 16;
  }
  __device__ __noinline__ unsigned key_at(int position) const {
    float merged = 0;
#pragma unroll 4
    for (int g = 0; g < G; g++) merged = add(merged, as_float(scores[sources[g] * stride + position]));
    return factor ? key<false>(merged) : key<true>(merged);
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
    return factor ? pack<false>(merged) : pack<true>(merged);
  }
  template <bool DIVIDE>
  __device__ __forceinline__ uint4 pack(const float (&merged)[VECTOR]) const {
    unsigned keys[VECTOR];
#pragma unroll
    for (int i = 0; i < VECTOR; i++) keys[i] = key<DIVIDE>(merged[i]);
    return make_uint4(keys[0] | keys[1] << 16, keys[2] | keys[3] << 16, keys[4] | keys[5] << 16, keys[6] | keys[7] << 16);
  }
};

// The eight scores of a vector; NaN and negative ones are 0.
__device__ __forceinline__ void unpack(const __nv_bfloat16* vector, float (&scores)[VECTOR]) {
  const uint4 words = *(const uint4*)vector;
  const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const uint32_t pair = ptx::not_negative(pairs[i]);
    scores[2 * i] = __uint_as_float(pair << 16), scores[2 * i + 1] = __uint_as_float(pair & 0xffff0000);
  }
}
template <typename Element>
__device__ __forceinline__ void unpack(const Element* vector, float (&scores)[VECTOR]) {
  constexpr int WORDS = sizeof(Element) * VECTOR / 16;
  uint4 words[WORDS];
#pragma unroll
  for (int i = 0; i < WORDS; i++) words[i] = ((const uint4*)vector)[i];
#pragma unroll
  for (int i = 0; i < VECTOR; i++) scores[i] = fmaxf(as_float(((const Element*)words)[i]), 0);
}

// Adds the lane's scores of one row's step.
template <bool TAKE_MAX>
__device__ __forceinline__ void merge(float (&merged)[VECTORS][VECTOR], const uint4* piece) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < VECTORS; i++) {
    float scores[VECTOR];
    unpack((const ELEMENT*)piece + (i * 32 + lane) * VECTOR, scores);
#pragma unroll
    for (int k = 0; k < VECTOR; k++) merged[i][k] = TAKE_MAX ? fmaxf(merged[i][k], scores[k]) : merged[i][k] + scores[k];
  }
}

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
