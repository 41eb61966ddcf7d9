// A block of keys in few bits, as `layout.py` has it: codes in the order of tensor cores, then ranges.
#pragma once
#include "ptx.cuh"

#ifndef HEAD_DIM
#define HEAD_DIM 64
#define BITS 2
#endif
#ifndef ELEMENT
#define ELEMENT __nv_bfloat16
#endif
#ifdef FLOAT8
constexpr bool IN_FLOAT8 = true;  // the cache holds e4m3
#else
constexpr bool IN_FLOAT8 = false;
#endif

constexpr int D = HEAD_DIM, BLOCK = 64, EXACT = 64;       // tokens of a block; newest ones that are never coded
constexpr int STEPS = D / 16, PAIRS = D / 8;               // of a product; pairs of dims that a lane has of a token
constexpr int PLACES = 16 / BITS, WORDS = PAIRS / PLACES;  // codes in half a word; a lane's words of a token
constexpr int CODES = 2 * BITS * D, RECORD = CODES + D;    // words
constexpr int MAX_LAYERS = 64;

__device__ __forceinline__ int load_length(const void* lengths, int wide, int b) {
  return wide ? (int)((const long long*)lengths)[b] : ((const int*)lengths)[b];
}

__device__ __forceinline__ int coded_blocks(int length) { return max(length - EXACT, 0) / BLOCK; }

__device__ __forceinline__ float low_float(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair << 16); }
__device__ __forceinline__ float high_float(uint32_t pair, __nv_bfloat16) { return __uint_as_float(pair & 0xffff0000); }
__device__ __forceinline__ float low_float(uint32_t pair, __half) { return ptx::half_to_float(pair); }
__device__ __forceinline__ float high_float(uint32_t pair, __half) { return ptx::half_to_float(pair >> 16); }

// Two neighbouring dims of a cached key as float16; from pairs of `ELEMENT`, or of e4m3.
__device__ __forceinline__ uint32_t as_halves(uint32_t pair) {
  if (IN_FLOAT8) return ptx::unpack_e4m3(pair);
  return std::is_same<ELEMENT, __half>::value ? pair : ptx::pack<__half>(low_float(pair, ELEMENT()), high_float(pair, ELEMENT()));
}
