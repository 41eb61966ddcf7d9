// What the kernels use of CUDA C++, for g++: names, vector types, intrinsics, cooperative groups and launches.
#pragma once
#include <cmath>
#include <type_traits>
#include <utility>
#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))

#define VECTOR_TYPES(T, name)                                               \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                        \
  struct alignas(4 * sizeof(T)) name##4 { T x, y, z, w; };                  \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR_TYPES(int, int)
VECTOR_TYPES(unsigned, uint)
VECTOR_TYPES(float, float)
#undef VECTOR_TYPES
struct alignas(16) double2 { double x, y; };
inline double2 make_double2(double x, double y) { return {x, y}; }

template <class A, class B>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return T(std::fmin(T(a), T(b)));
  else return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  if constexpr (std::is_floating_point_v<T>) return T(std::fmax(T(a), T(b)));
  else return T(a) < T(b) ? T(b) : T(a);
}

namespace emulation {
template <class To, class From>
To bits_of(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &x, sizeof(x));
  return to;
}
}  // namespace emulation

inline unsigned __float_as_uint(float x) { return emulation::bits_of<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::bits_of<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bits_of<float>(x); }
inline float __int_as_float(int x) { return emulation::bits_of<float>(x); }
inline double __longlong_as_double(long long x) { return emulation::bits_of<double>(x); }
inline long long __double_as_longlong(double x) { return emulation::bits_of<long long>(x); }

struct __nv_bfloat16 { uint16_t bits; };
struct __half { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float((uint32_t)x.bits << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t bits = __float_as_uint(x);
  return {(uint16_t)(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int sign = x.bits >> 15, exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                                    : std::ldexp(float(exponent ? fraction + 1024 : fraction), max(exponent, 1) - 25);
  return sign ? -size : size;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const float size = std::fabs(x);
  if (x != x) return {0x7fff};
  if (size >= 65520) return {(uint16_t)(sign | 0x7c00)};
  int exponent = -13;  // below 2^-14, the same spacing as at the smallest normal number
  if (size >= 0x1p-14f) std::frexp(size, &exponent);
  return {(uint16_t)(sign | (((exponent + 13) << 10) + (int)std::nearbyint(std::ldexp(size, 11 - exponent))))};
}

inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline unsigned __vmaxu2(unsigned x, unsigned y) {
  return max(x & 0xffff, y & 0xffff) | max(x >> 16, y >> 16) << 16;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t bytes = (uint64_t)y << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; i++) {
    const int choice = selector >> 4 * i & 15;
    const unsigned byte = bytes >> 8 * (choice & 7) & 0xff;
    result |= (choice & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return result;
}
inline size_t __cvta_generic_to_shared(const void* p) { return (const char*)p - emulation::self->block->shared; }

template <class T> T __ldg(const T* p) { return *p; }
template <class T> T __ldcs(const T* p) { return *p; }
template <class T> T __ldcg(const T* p) { emulation::poll("__ldcg"); return *p; }
template <class T> T __ldcv(const T* p) { emulation::poll("__ldcv"); return *p; }
template <class T> void __stcg(T* p, T x) { *p = x; }
template <class T> void __stcs(T* p, T x) { *p = x; }
template <class T> void __stwt(T* p, T x) { *p = x; }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { emulation::poll("__nanosleep"); }
inline long long clock64() { return 0; }

template <class T, class Change>
T emulate_atomic(T* p, Change change) {
  const T before = *p;
  *p = change(before);
  return before;
}
template <class T, class U> T atomicAdd(T* p, U x) { return emulate_atomic(p, [=](T old) { return T(old + T(x)); }); }
template <class T, class U> T atomicSub(T* p, U x) { return emulate_atomic(p, [=](T old) { return T(old - T(x)); }); }
template <class T, class U> T atomicMax(T* p, U x) { return emulate_atomic(p, [=](T old) { return max(old, T(x)); }); }
template <class T, class U> T atomicMin(T* p, U x) { return emulate_atomic(p, [=](T old) { return min(old, T(x)); }); }
template <class T, class U> T atomicOr(T* p, U x) { return emulate_atomic(p, [=](T old) { return T(old | T(x)); }); }
template <class T, class U> T atomicAnd(T* p, U x) { return emulate_atomic(p, [=](T old) { return T(old & T(x)); }); }
template <class T, class U> T atomicExch(T* p, U x) { return emulate_atomic(p, [=](T) { return T(x); }); }
template <class T, class U, class V>
T atomicCAS(T* p, U expected, V x) {
  emulation::poll("atomicCAS");
  return emulate_atomic(p, [=](T old) { return old == T(expected) ? T(x) : old; });
}

// Instructions of a warp.
namespace emulation {
template <class T>
struct Shuffle {
  T value;
  int source;
};
template <class T>
T shuffle(const char* name, unsigned mask, T value, int source) {
  return meet<T>(name, mask, Shuffle<T>{value, source}, [=](const Shuffle<T>* const* operands, T* const* results) {
    for (int lane = 0; lane < LANES; lane++)
      if (results[lane]) {
        const Shuffle<T>* from = operands[operands[lane]->source];
        if (!from) fail(std::string(name) + " from a lane that does not take part");
        *results[lane] = from->value;
      }
  });
}
template <class Operand, class Result, class Reduce>  // reduce(result so far, operand), from `start` on
Result reduce_warp(const char* name, unsigned mask, Operand operand, Result start, Reduce reduce) {
  return meet<Result>(name, mask, operand, [=](const Operand* const* operands, Result* const* results) {
    Result all = start;
    for (int lane = 0; lane < LANES; lane++)
      if (operands[lane]) all = reduce(all, *operands[lane], lane);
    for (int lane = 0; lane < LANES; lane++)
      if (results[lane]) *results[lane] = all;
  });
}
}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  const int lane = emulation::self->lane;
  return emulation::shuffle("__shfl_sync", mask, x, lane / width * width + (source & (width - 1)));
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int other, int width = 32) {
  const int lane = emulation::self->lane, source = lane ^ other;
  return emulation::shuffle("__shfl_xor_sync", mask, x, source / width <= lane / width ? source : lane);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, int step, int width = 32) {
  const int lane = emulation::self->lane;
  return emulation::shuffle("__shfl_up_sync", mask, x, lane % width >= step ? lane - step : lane);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, int step, int width = 32) {
  const int lane = emulation::self->lane;
  return emulation::shuffle("__shfl_down_sync", mask, x, lane % width + step < width ? lane + step : lane);
}
inline unsigned __ballot_sync(unsigned mask, int x) {
  return emulation::reduce_warp("__ballot_sync", mask, x, 0u, [](unsigned all, int x, int lane) { return all | (x ? 1u << lane : 0); });
}
inline int __any_sync(unsigned mask, int x) {
  return emulation::reduce_warp("__any_sync", mask, x, 0, [](int all, int x, int) { return int(all || x); });
}
inline int __all_sync(unsigned mask, int x) {
  return emulation::reduce_warp("__all_sync", mask, x, 1, [](int all, int x, int) { return int(all && x); });
}
template <class T>
T __reduce_add_sync(unsigned mask, T x) {
  return emulation::reduce_warp("__reduce_add_sync", mask, x, T(0), [](T all, T x, int) { return T(all + x); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T x) {
  return emulation::reduce_warp("__reduce_max_sync", mask, x, x, [](T all, T x, int) { return max(all, x); });
}
template <class T>
T __reduce_min_sync(unsigned mask, T x) {
  return emulation::reduce_warp("__reduce_min_sync", mask, x, x, [](T all, T x, int) { return min(all, x); });
}
template <class T>
unsigned __match_any_sync(unsigned mask, T x) {
  return emulation::meet<unsigned>("__match_any_sync", mask, x, [](const T* const* operands, unsigned* const* results) {
    for (int lane = 0; lane < emulation::LANES; lane++)
      if (results[lane]) {
        *results[lane] = 0;
        for (int other = 0; other < emulation::LANES; other++)
          if (operands[other] && *operands[other] == *operands[lane]) *results[lane] |= 1u << other;
      }
  });
}
inline void __syncwarp(unsigned mask = ~0u) {
  emulation::reduce_warp("__syncwarp", mask, 0, 0, [](int, int, int) { return 0; });
}
inline unsigned __activemask() { return ~0u; }

inline void __syncthreads() {
  emulation::Barrier& barrier = emulation::self->block->barrier;
  barrier.wait(barrier.arrive(), "__syncthreads");
}

namespace cooperative_groups {
struct cluster_group {
  static unsigned num_blocks() { return emulation::self->block->cluster->blocks.size(); }
  static unsigned block_rank() { return emulation::self->block->rank; }
  static void barrier_arrive() { emulation::self->cluster_phase = emulation::self->block->cluster->barrier.arrive(); }
  static void barrier_wait() { emulation::self->block->cluster->barrier.wait(emulation::self->cluster_phase, "cluster.sync"); }
  static void sync() { barrier_arrive(), barrier_wait(); }
  template <class T>
  static T* map_shared_rank(T* p, int rank) {
    const emulation::Block& block = emulation::self->block->cluster->blocks.at(rank);
    if (!block.alive) emulation::fail("shared memory of a block that has left");
    return (T*)(block.shared + __cvta_generic_to_shared(p));
  }
};
inline cluster_group this_cluster() { return {}; }
struct thread_block {
  static void sync() { __syncthreads(); }
  static unsigned thread_rank() { return threadIdx.x; }
};
inline thread_block this_thread_block() { return {}; }
}  // namespace cooperative_groups

// Host.
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize, cudaFuncAttributePreferredSharedMemoryCarveout,
                         cudaFuncAttributeNonPortableClusterSizeAllowed };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone, cudaStreamCaptureStatusActive };
enum cudaLaunchAttributeID { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative,
                             cudaLaunchAttributeProgrammaticStreamSerialization };
using cudaStream_t = void*;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    uint3 clusterDim;
    int cooperative, programmaticStreamSerializationAllowed;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

inline cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus* status, unsigned long long*) {
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t) { return emulation::failure.c_str(); }
inline cudaError_t cudaGetLastError() { return emulation::failure.empty() ? cudaSuccess : cudaErrorLaunchFailure; }

namespace emulation {
inline std::map<const void*, size_t> granted;  // dynamic shared memory beyond 48 KB, by kernel
template <class... Parameters, class... Given>
cudaError_t launch_kernel(void (*function)(Parameters...), dim3 grid, dim3 block, unsigned cluster, size_t dynamic, bool cooperative,
                          const Given&... given) {
  if (dynamic > max(size_t(48 << 10), granted[(const void*)function])) {
    failure = "the kernel was not granted as much dynamic shared memory";
    return cudaErrorInvalidValue;
  }
  return launch(grid, block, cluster, dynamic, cooperative, [&] { function(given...); }) ? cudaSuccess : cudaErrorLaunchFailure;
}
}  // namespace emulation

template <class Function>
cudaError_t cudaFuncSetAttribute(Function* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) emulation::granted[(const void*)function] = value;
  return cudaSuccess;
}
template <class Function>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Function*, const cudaLaunchConfig_t* config) {
  *count = max(1, emulation::MULTIPROCESSORS / (int)config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}
template <class... Parameters, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*function)(Parameters...), const Given&... given) {
  unsigned cluster = 1;
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; i++) {
    if (config->attrs[i].id == cudaLaunchAttributeClusterDimension) cluster = config->attrs[i].val.clusterDim.x;
    if (config->attrs[i].id == cudaLaunchAttributeCooperative) cooperative = config->attrs[i].val.cooperative;
  }
  return emulation::launch_kernel(function, config->gridDim, config->blockDim, cluster, config->dynamicSmemBytes, cooperative, given...);
}
template <class... Parameters, size_t... i>
cudaError_t launch_cooperative(void (*function)(Parameters...), dim3 grid, dim3 block, void** parameters, size_t dynamic,
                               std::index_sequence<i...>) {
  return emulation::launch_kernel(function, grid, block, 1, dynamic, true, *(std::remove_cv_t<Parameters>*)parameters[i]...);
}
template <class... Parameters>
cudaError_t cudaLaunchCooperativeKernel(void (*function)(Parameters...), dim3 grid, dim3 block, void** parameters, size_t dynamic,
                                        cudaStream_t) {
  return launch_cooperative(function, grid, block, parameters, dynamic, std::index_sequence_for<Parameters...>());
}
