// The PTX instructions that the kernels use, each named as in PTX, its operands in the same order.
#pragma once
#include "cuda.h"

namespace ptx_instruction {

using emulation::LANES;
using emulation::self;

inline char* at(uint32_t shared) {
  if (shared >= emulation::STATIC_SHARED + emulation::dynamic_bytes) emulation::fail("an address outside of shared memory");
  return self->block->shared + shared;
}

// A copy may arrive at once, or only when it is waited for: by lot. What is not read of its 16 bytes is zeros.
inline void cp_async_cg_shared_global(uint32_t target, const void* source, int bytes, int read = 16) {
  if (bytes != 16 || target % 16 || (uintptr_t)source % 16) emulation::fail("cp.async of other than 16 aligned bytes");
  memset(at(target) + read, 0, 16 - read);
  if (emulation::draw() % 2)
    memcpy(at(target), source, read);
  else
    self->copies.back().push_back({at(target), source, read});
}
inline void cp_async_commit_group() { self->copies.emplace_back(); }
inline void cp_async_wait_group(int pending) {
  while ((int)self->copies.size() > pending + 1) {
    for (const emulation::Copy& copy : self->copies.front()) memcpy(copy.target, copy.source, copy.bytes);
    self->copies.erase(self->copies.begin());
  }
}
inline void cp_async_wait_all() {
  cp_async_commit_group();
  cp_async_wait_group(0);
}

inline void ld_global_nc_L1_no_allocate_L2_256B_v4_u32(uint32_t& x, uint32_t& y, uint32_t& z, uint32_t& w, const void* source) {
  if ((uintptr_t)source % 16) emulation::fail("ld.v4 of an address that is not aligned");
  const uint4 got = *(const uint4*)source;
  x = got.x, y = got.y, z = got.z, w = got.w;
}

// 8x8 matrices of 16-bit elements: lane l holds the elements 2 * (l % 4) and the next of row l / 4, or of that column if transposed.
template <class... Registers>
void load_matrices(const char* name, bool transposed, uint32_t shared, Registers&... registers) {
  constexpr int count = sizeof...(Registers);
  struct Fragments { uint32_t matrix[count]; };
  const auto fragments = emulation::meet<Fragments>(name, ~0u, shared, [=](const uint32_t* const* rows, Fragments* const* results) {
    for (int lane = 0; lane < LANES; lane++)
      for (int m = 0; m < count; m++) {
        results[lane]->matrix[m] = 0;
        for (int half = 0; half < 2; half++) {
          const int row = transposed ? lane % 4 * 2 + half : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + half;
          const uint32_t address = *rows[m * 8 + row];
          if (address % 16) emulation::fail(std::string(name) + " of a row that is not aligned");
          results[lane]->matrix[m] |= (uint32_t)((const uint16_t*)at(address))[column] << 16 * half;
        }
      }
  });
  int m = 0;
  ((registers = fragments.matrix[m++]), ...);
}
inline void ldmatrix_sync_aligned_m8n8_x4_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t shared) {
  load_matrices("ldmatrix", false, shared, a, b, c, d);
}
inline void ldmatrix_sync_aligned_m8n8_x4_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d, uint32_t shared) {
  load_matrices("ldmatrix", true, shared, a, b, c, d);
}
inline void ldmatrix_sync_aligned_m8n8_x2_shared_b16(uint32_t& a, uint32_t& b, uint32_t shared) {
  load_matrices("ldmatrix", false, shared, a, b);
}
inline void ldmatrix_sync_aligned_m8n8_x2_trans_shared_b16(uint32_t& a, uint32_t& b, uint32_t shared) {
  load_matrices("ldmatrix", true, shared, a, b);
}
inline void movmatrix_sync_aligned_m8n8_trans_b16(uint32_t& result, uint32_t x) {
  result = emulation::meet<uint32_t>("movmatrix", ~0u, x, [](const uint32_t* const* rows, uint32_t* const* results) {
    for (int lane = 0; lane < LANES; lane++) {
      *results[lane] = 0;
      for (int half = 0; half < 2; half++) {
        const int row = lane % 4 * 2 + half, column = lane / 4;
        *results[lane] |= (*rows[row * 4 + column / 2] >> column % 2 * 16 & 0xffff) << 16 * half;
      }
    }
  });
}

// d[16 x 8] = a[16 x 16] b[16 x 8] + c[16 x 8], laid out as the PTX manual says for m16n8k16.
inline float element(uint16_t bits, __nv_bfloat16) { return __bfloat162float({bits}); }
inline float element(uint16_t bits, __half) { return __half2float({bits}); }
template <class Element>
void multiply_add(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                  uint32_t b1, float c0, float c1, float c2, float c3) {
  struct Operand { uint32_t a[4], b[2]; float c[4]; };
  struct Sums { float c[4]; };
  const Operand own = {{a0, a1, a2, a3}, {b0, b1}, {c0, c1, c2, c3}};
  const Sums sums = emulation::meet<Sums>("mma", ~0u, own, [](const Operand* const* operands, Sums* const* results) {
    float a[16][16], b[16][8];
    for (int lane = 0; lane < LANES; lane++)
      for (int half = 0; half < 2; half++) {
        const int row = lane / 4, k = lane % 4 * 2 + half;
        for (int i = 0; i < 4; i++) a[row + i % 2 * 8][k + i / 2 * 8] = element(operands[lane]->a[i] >> 16 * half, Element());
        for (int i = 0; i < 2; i++) b[k + i * 8][row] = element(operands[lane]->b[i] >> 16 * half, Element());
      }
    for (int lane = 0; lane < LANES; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
        float sum = operands[lane]->c[i];
        for (int k = 0; k < 16; k++) sum += a[row][k] * b[k][column];
        results[lane]->c[i] = sum;
      }
  });
  d0 = sums.c[0], d1 = sums.c[1], d2 = sums.c[2], d3 = sums.c[3];
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_bf16_bf16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1,
                                                                uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                                                                float c2, float c3) {
  multiply_add<__nv_bfloat16>(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3);
}
inline void mma_sync_aligned_m16n8k16_row_col_f32_f16_f16_f32(float& d0, float& d1, float& d2, float& d3, uint32_t a0, uint32_t a1,
                                                              uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, float c0, float c1,
                                                              float c2, float c3) {
  multiply_add<__half>(d0, d1, d2, d3, a0, a1, a2, a3, b0, b1, c0, c1, c2, c3);
}

inline void cvt_rn_bf16x2_f32(uint32_t& result, float high, float low) {
  result = (uint32_t)__float2bfloat16_rn(high).bits << 16 | __float2bfloat16_rn(low).bits;
}
inline void cvt_rn_f16x2_f32(uint32_t& result, float high, float low) {
  result = (uint32_t)__float2half_rn(high).bits << 16 | __float2half_rn(low).bits;
}
inline uint8_t e4m3(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  const float size = std::fabs(x);
  if (x != x) return 0x7f;
  if (size >= 448) return sign | 0x7e;
  int exponent = -5;  // below 2^-6, the same spacing as at the smallest normal number
  if (size >= 0x1p-6f) std::frexp(size, &exponent);
  return sign | (((exponent + 5) << 3) + (int)std::nearbyint(std::ldexp(size, 4 - exponent)));
}
inline void cvt_rn_satfinite_e4m3x2_f32(uint16_t& result, float high, float low) { result = e4m3(high) << 8 | e4m3(low); }
inline float e4m3_value(uint8_t bits) {
  const int exponent = bits >> 3 & 15, fraction = bits & 7;
  const float size = (bits & 127) == 127 ? NAN : std::ldexp(float(exponent ? fraction + 8 : fraction), max(exponent, 1) - 10);
  return bits & 128 ? -size : size;
}
inline void cvt_rn_f16x2_e4m3x2(uint32_t& result, uint16_t pair) {
  result = (uint32_t)__float2half_rn(e4m3_value(pair >> 8)).bits << 16 | __float2half_rn(e4m3_value(pair & 255)).bits;
}
inline void cvt_f32_f16(float& result, uint16_t bits) { result = __half2float({bits}); }
inline void fma_rn_f16x2(uint32_t& result, uint32_t x, uint32_t y, uint32_t z) {
  auto each = [](uint16_t x, uint16_t y, uint16_t z) {
    return (uint32_t)__float2half_rn(__half2float({x}) * __half2float({y}) + __half2float({z})).bits;
  };
  result = each(x >> 16, y >> 16, z >> 16) << 16 | each(x & 0xffff, y & 0xffff, z & 0xffff);
}
inline void mul_rn_f16x2(uint32_t& result, uint32_t x, uint32_t y) { fma_rn_f16x2(result, x, y, 0); }
inline void max_bf16x2(uint32_t& result, uint32_t x, uint32_t y) {
  const auto larger = [=](int shift) { return __float_as_uint(std::fmax(__uint_as_float(x >> shift << 16), __uint_as_float(y >> shift << 16))) >> 16; };
  result = larger(16) << 16 | larger(0);
}
inline void ex2_approx_ftz_f32(float& result, float x) { result = std::exp2(x); }
template <class T>
void mad_wide_u32(uint64_t& result, uint32_t x, uint32_t y, T z) { result = (uint64_t)x * y + (uint64_t)z; }
template <class T>
void selp_u32(uint32_t& result, T yes, T no, bool which) { result = which ? yes : no; }

inline void max_NaN_f32(float& result, float x, float y) { result = x != x || y != y ? NAN : std::fmax(x, y); }

template <class T>
void ld_global_nc_u32(uint32_t& x, const T* p) { x = *(const uint32_t*)p; }
// Loads past the caches, in which threads wait for others.
inline void ld_relaxed_gpu_global_v2_f32(float& x, float& y, const void* p) {
  emulation::poll("ld.relaxed");
  x = ((const float*)p)[0], y = ((const float*)p)[1];
}

// Barriers in shared memory, eight bytes: arrivals expected and missing, bytes missing, the phase.
struct Mbarrier {
  uint64_t expected : 16, missing : 16, phase : 1;
  int64_t bytes : 31;
  void complete_if_all_arrived() {
    if (missing == 0 && bytes == 0) missing = expected, phase ^= 1;
  }
};
static_assert(sizeof(Mbarrier) == 8);
inline Mbarrier& mbarrier(uint32_t shared) { return *(Mbarrier*)at(shared); }
inline void mbarrier_init_shared_b64(uint32_t shared, int arrivals) {
  mbarrier(shared) = {(uint64_t)arrivals, (uint64_t)arrivals, 0, 0};
}
inline void mbarrier_arrive_expect_tx_shared_b64(uint32_t shared, int bytes) {
  Mbarrier& barrier = mbarrier(shared);
  if (barrier.missing == 0) emulation::fail("more arrivals at an mbarrier than it expects");
  barrier.bytes += bytes, barrier.missing--;
  barrier.complete_if_all_arrived();
}
inline void mbarrier_arrive_shared_b64(uint32_t shared) { mbarrier_arrive_expect_tx_shared_b64(shared, 0); }

// A bulk copy arrives at once, or when somebody looks at its barrier: by lot.
inline void land(const emulation::Copy& copy) {
  memcpy(copy.target, copy.source, copy.bytes);
  mbarrier(copy.barrier).bytes -= copy.bytes;
  mbarrier(copy.barrier).complete_if_all_arrived();
}
inline void mbarrier_try_wait_parity_shared_b64(bool& done, uint32_t shared, uint32_t parity) {
  auto& copies = self->block->copies;
  for (size_t i = 0; i < copies.size(); i++)
    if (copies[i].barrier == shared && emulation::draw() % 2) {
      const emulation::Copy copy = copies[i];
      copies.erase(copies.begin() + i--);
      land(copy);
      emulation::patience = emulation::PATIENCE;
    }
  done = mbarrier(shared).phase != parity;
  if (!done) emulation::poll("mbarrier.try_wait");
}
inline void cp_async_bulk_shared_cluster_global_mbarrier_complete_tx_bytes(uint32_t target, const void* source, int bytes,
                                                                           uint32_t barrier) {
  if (bytes % 16 || target % 16 || (uintptr_t)source % 16) emulation::fail("a bulk copy of other than aligned pieces of 16 bytes");
  const emulation::Copy copy = {at(target), source, bytes, barrier};
  if (emulation::draw() % 2)
    land(copy);
  else
    self->block->copies.push_back(copy);
}
inline void cp_async_mbarrier_arrive_noinc_shared_b64(uint32_t shared) {
  cp_async_wait_all();
  mbarrier_arrive_shared_b64(shared);
}
inline void fence_proxy_async_shared_cta() {}
inline void fence_proxy_async_global() {}
inline void setmaxnreg_inc_sync_aligned_u32(int count) {
  if (count % 8 || count > 256) emulation::fail("setmaxnreg takes multiples of 8 up to 256");
}
inline void setmaxnreg_dec_sync_aligned_u32(int count) { setmaxnreg_inc_sync_aligned_u32(count); }
inline void fence_mbarrier_init_release_cluster() {}

// Launches follow one another: the one before has always ended.
inline void griddepcontrol_wait() {}
inline void griddepcontrol_launch_dependents() {}

inline void barrier_cluster_arrive_aligned() { cooperative_groups::cluster_group::barrier_arrive(); }
inline void barrier_cluster_wait_aligned() { cooperative_groups::cluster_group::barrier_wait(); }
inline emulation::Barrier& named_barrier(int number, int count) {
  auto& [expected, barrier] = self->block->named_barriers[number];
  expected = count;
  barrier.expected = &expected;
  return barrier;
}
inline void bar_sync(int number, int count) {
  emulation::Barrier& barrier = named_barrier(number, count);
  barrier.wait(barrier.arrive(), "bar.sync");
}
inline void bar_arrive(int number, int count) { named_barrier(number, count).arrive(); }

}  // namespace ptx_instruction
