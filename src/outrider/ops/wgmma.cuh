// Products of a warpgroup (4 warps) on Hopper's tensor cores, 64 rows at a time, with fp32 sums: PTX's wgmma.
//
// They run on while the warps go on. `begin` comes before the first product that reads registers written since, `commit` after the last
// of a batch; `wait<n>` returns when at most n batches are under way. What a batch reads and writes must rest until then, and `settle`
// tells the compiler that its results are there.
//
// Operands in shared memory are tiles of rows of 128 bytes, 64 elements, with 16-byte pieces swizzled: piece c of row r lies at
// c ^ (r % 8) of it, and a tile begins at a multiple of 1024 bytes. Longer rows are several such tiles.
#pragma once
#include <type_traits>

#include "ptx.cuh"

namespace wgmma {

__device__ __forceinline__ void begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int pending>
__device__ __forceinline__ void wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory"); }
template <int size>
__device__ __forceinline__ void settle(float (&x)[size]) {
#pragma unroll
  for (int i = 0; i < size; i++) asm volatile("" : "+f"(x[i])::"memory");
}

// Byte offset of 16-byte piece `piece` of row `row` within a tile.
__device__ __forceinline__ int swizzled(int row, int piece) { return row * 128 + ((piece ^ (row % 8)) << 4); }

// Where a matrix begins and how it lies: `tiles` apart lie its tiles of 64 columns, where the product runs over its rows.
__device__ __forceinline__ uint64_t descriptor(uint32_t shared, int tiles = 16) {
  return (uint64_t)((shared & 0x3ffff) >> 4) | (uint64_t)(tiles >> 4) << 16 | (uint64_t)(1024 >> 4) << 32 | 1ull << 62;
}

#define OUTRIDER_R8(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define OUTRIDER_R32(d, i) OUTRIDER_R8(d, i), OUTRIDER_R8(d, i + 8), OUTRIDER_R8(d, i + 16), OUTRIDER_R8(d, i + 24)
#define OUTRIDER_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, " \
  "%28, %29, %30, %31"
#define OUTRIDER_64 \
  OUTRIDER_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
              "%55, %56, %57, %58, %59, %60, %61, %62, %63"

// d[64 x 128] (+)= a[64 x 16] b[128 x 16]^T, both in shared memory, the 16 in a row; d as the columns 8 i + 2 (lane % 4) + {0, 1} of
// the rows lane / 4 (d[4 i], d[4 i + 1]) and lane / 4 + 8 (the two behind), 16 rows a warp.
template <typename Element>
__device__ __forceinline__ void multiply_transposed(float (&d)[64], uint64_t a, uint64_t b, bool add) {
#define OUTRIDER_PRODUCT(type)                                                                                        \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0; wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type    \
               " {" OUTRIDER_64 "}, %64, %65, p, 1, 1, 0, 0; }"                                                       \
               : OUTRIDER_R32(d, 0), OUTRIDER_R32(d, 32) : "l"(a), "l"(b), "r"((int)add))
  if constexpr (std::is_same_v<Element, __half>) OUTRIDER_PRODUCT("f16"); else OUTRIDER_PRODUCT("bf16");
#undef OUTRIDER_PRODUCT
}

// d[64 x 2 size] += a[64 x 16] b[16 x 2 size]: a in registers as the tensor cores take it, b in shared memory row by row.
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&d)[64], const uint32_t* a, uint64_t b) {
#define OUTRIDER_PRODUCT(type)                                                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                                           \
               " {" OUTRIDER_64 "}, {%64, %65, %66, %67}, %68, 1, 1, 1, 1;"                                           \
               : OUTRIDER_R32(d, 0), OUTRIDER_R32(d, 32) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<Element, __half>) OUTRIDER_PRODUCT("f16"); else OUTRIDER_PRODUCT("bf16");
#undef OUTRIDER_PRODUCT
}
template <typename Element>
__device__ __forceinline__ void multiply_add(float (&d)[32], const uint32_t* a, uint64_t b) {
#define OUTRIDER_PRODUCT(type)                                                                                        \
  asm volatile("wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type                                            \
               " {" OUTRIDER_32 "}, {%32, %33, %34, %35}, %36, 1, 1, 1, 1;"                                           \
               : OUTRIDER_R32(d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))
  if constexpr (std::is_same_v<Element, __half>) OUTRIDER_PRODUCT("f16"); else OUTRIDER_PRODUCT("bf16");
#undef OUTRIDER_PRODUCT
}
#undef OUTRIDER_R8
#undef OUTRIDER_R32
#undef OUTRIDER_32
#undef OUTRIDER_64

}  // namespace wgmma
