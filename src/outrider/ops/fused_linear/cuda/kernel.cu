// A weight matrix times up to 8 rows, for Hopper: every weight is read once, as fast as memory gives it.
//
// A *tile* is 16 rows of the weight matrix (with swiglu 8 of the gate and the 8 that they gate) over all of K. Blocks take tiles in
// turn. Within a block the warps share K: warp w has the groups w, w + WARPS, ... of GROUP elements of K, and works alone until the
// tile ends:
//
//     weights   from memory straight into registers, two groups ahead, over the ends of tiles
//     x         from L2, or with a norm from shared memory, where it waits multiplied by the norm's gain
//     multiply  on the tensor cores: weights down, rows of x across
//
// A lane loads the 16 bytes that it will multiply itself: which elements of K share an instruction does not matter to a sum, as long
// as weights and x agree. The norm's factor, one to a row, commutes with the product and is applied to the result. At the end of a tile
// the warps' sums are added in order of warps. So a row of the result depends on no other row, to the bit.
//
// Weights do not depend on the kernel before, so a block loads its first while that one still runs. The kernel behind may begin when
// that one has ended: earlier, several would wait on the chip and take room from those at work.
#include <type_traits>
#include "host.cuh"
#include "ptx.cuh"

using Element = __nv_bfloat16;  // x times gain, before the norm's factor, would leave the range of float16

constexpr int ROWS = 8;              // of x
constexpr int OUTPUTS = 16;          // rows of weights in a tile
constexpr int STEP = 32;             // elements of K, of which a lane has 8
constexpr int STEPS = 4;
constexpr int GROUP = STEPS * STEP;
constexpr int WARPS_AT_ONCE = 16;    // on a multiprocessor
constexpr int MAX_DYNAMIC = 200 << 10;  // bytes of shared memory for rows of x

struct Arguments {
  const Element *x, *weight;              // [R, K], [N, K]; rows of 16-byte pieces
  const Element *bias, *norm, *residual;  // [N], [K], [R, M], or null
  Element* output;                        // [R, M] contiguous; M = N, N / 2 with swiglu
  long long x_stride, weight_stride, residual_stride;  // elements between rows
  int R, K, M, swiglu;
  float eps;
};

struct Group {  // of weights: this lane's pieces of two rows of the tile, eight apart
  uint4 low[STEPS], high[STEPS];
};

// Elements from one row of x to the next in shared memory: no two lanes that read at once meet in a bank.
__host__ __device__ __forceinline__ int x_stride(int K) { return (K + 63) / 64 * 64 + 32; }

template <int WARPS, bool NORM>
__global__ void __launch_bounds__(32 * WARPS, WARPS_AT_ONCE / WARPS) fused_linear(const __grid_constant__ Arguments a) {
  constexpr int THREADS = 32 * WARPS;
  extern __shared__ __align__(128) char dynamic[];
  __shared__ float sums[2][WARPS][OUTPUTS][ROWS], squares[WARPS][ROWS];
  Element* rows = (Element*)dynamic;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int tile_outputs = a.swiglu ? OUTPUTS / 2 : OUTPUTS, tiles = (a.M + tile_outputs - 1) / tile_outputs;
  const int groups = (a.K + GROUP - 1) / GROUP, piece = lane % 4 * 8, row = lane / 4;

  // The tile and group that are loaded next; behind the last tile nothing is.
  int tile_ahead = blockIdx.x, group_ahead = warp;
  const Element *low_ahead, *high_ahead;  // rows of weights
  auto enter_tile = [&]() {
    if (tile_ahead >= tiles) return;
    const int low = min(tile_ahead * tile_outputs + row, a.M - 1), high = a.swiglu ? low + a.M : min(low + 8, a.M - 1);
    low_ahead = a.weight + low * a.weight_stride + piece;
    high_ahead = a.weight + high * a.weight_stride + piece;
  };
  auto load = [&](Group& group) {
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int k = group_ahead * GROUP + step * STEP;
      const bool there = tile_ahead < tiles && k + piece < a.K;
      group.low[step] = there ? ptx::load_once(low_ahead + k) : make_uint4(0, 0, 0, 0);
      group.high[step] = there ? ptx::load_once(high_ahead + k) : make_uint4(0, 0, 0, 0);
    }
    group_ahead += WARPS;
    if (group_ahead >= groups) {
      group_ahead = warp;
      tile_ahead += gridDim.x;
      enter_tile();
    }
  };
  Group ahead[2];
  enter_tile();
  load(ahead[0]);
  load(ahead[1]);
  ptx::wait_for_predecessor();  // what it wrote is read past L1, which may hold what was there before
  ptx::let_successor_start();

  if (NORM) {
    float square[ROWS] = {};
    for (int k = thread * 8; k < a.K; k += THREADS * 8) {
      const uint4 gain = __ldg((const uint4*)(a.norm + k));
#pragma unroll
      for (int first = 0; first < ROWS; first += ROWS / 2) {
        uint4 x[ROWS / 2];
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++)
          if (first + i < a.R) x[i] = __ldcg((const uint4*)(a.x + (first + i) * a.x_stride + k));
#pragma unroll
        for (int i = 0; i < ROWS / 2; i++) {
          if (first + i >= a.R) break;
          const Element *elements = (Element*)&x[i], *gains = (Element*)&gain;
          uint32_t scaled[4];
#pragma unroll
          for (int j = 0; j < 4; j++) {
            const float even = __bfloat162float(elements[2 * j]), odd = __bfloat162float(elements[2 * j + 1]);
            square[first + i] += even * even + odd * odd;
            scaled[j] = ptx::pack<Element>(even * __bfloat162float(gains[2 * j]), odd * __bfloat162float(gains[2 * j + 1]));
          }
          *(uint4*)(rows + (first + i) * x_stride(a.K) + k) = make_uint4(scaled[0], scaled[1], scaled[2], scaled[3]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      if (r >= a.R) break;
#pragma unroll
      for (int other = 16; other; other /= 2) square[r] += __shfl_xor_sync(~0u, square[r], other);
      if (lane == 0) squares[warp][r] = square[r];
    }
    __syncthreads();
  }

  float product[4] = {};  // [rows of weights lane / 4 and lane / 4 + 8][rows of x lane % 4 * 2 and the next]
  auto multiply = [&](const Group& weights, int group) {
    uint4 x[STEPS];
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const int k = group * GROUP + step * STEP + piece;
      const bool there = row < a.R && k < a.K;
      if (NORM)
        x[step] = there ? *(const uint4*)(rows + row * x_stride(a.K) + k) : make_uint4(0, 0, 0, 0);
      else
        x[step] = there ? __ldcg((const uint4*)(a.x + row * a.x_stride + k)) : make_uint4(0, 0, 0, 0);
    }
#pragma unroll
    for (int step = 0; step < STEPS; step++) {
      const uint4 &low = weights.low[step], &high = weights.high[step];
      const uint32_t left[2][4] = {{low.x, high.x, low.y, high.y}, {low.z, high.z, low.w, high.w}};
      ptx::multiply_add<Element>(product, left[0], x[step].x, x[step].y);
      ptx::multiply_add<Element>(product, left[1], x[step].z, x[step].w);
    }
  };
  auto finish = [&](int tile, int turn) {  // adds up what the warps have, and starts anew
    auto& shares = sums[turn];  // in turn, so that one barrier a tile is enough
#pragma unroll
    for (int i = 0; i < 2; i++) {
      *(float2*)&shares[warp][row + i * 8][lane % 4 * 2] = make_float2(product[2 * i], product[2 * i + 1]);
      product[2 * i] = product[2 * i + 1] = 0;
    }
    ptx::named_barrier<1, THREADS>();  // a warp may come here from either half of the loop
    const int output = thread % tile_outputs, r = thread / tile_outputs, column = tile * tile_outputs + output;
    if (r >= a.R || column >= a.M) return;
    float scale = 1;
    if (NORM) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) all += squares[w][r];
      scale = rsqrtf(all / a.K + a.eps);
    }
    auto sum = [&](int place, int of_bias) {
      float all = 0;
#pragma unroll
      for (int w = 0; w < WARPS; w++) all += shares[w][place][r];
      return a.bias ? all * scale + __bfloat162float(a.bias[of_bias]) : all * scale;
    };
    float y = sum(output, column);
    if (a.swiglu) y = y / (1 + __expf(-y)) * sum(output + 8, column + a.M);
    if (a.residual) y += __bfloat162float(__ldcg(a.residual + r * a.residual_stride + column));
    a.output[(long long)r * a.M + column] = __float2bfloat16_rn(y);
  };

  int tile = blockIdx.x, group = warp, turn = 0;
  while (tile < tiles)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      if (tile >= tiles) break;
      multiply(ahead[half], group);
      load(ahead[half]);
      group += WARPS;
      if (group >= groups) {
        finish(tile, turn);
        group = warp;
        tile += gridDim.x;
        turn ^= 1;
      }
    }
}

template <int WARPS, bool NORM>
cudaError_t run(const Arguments& a, int multiprocessors, cudaStream_t stream) {
  const auto kernel = fused_linear<WARPS, NORM>;
  static const cudaError_t prepared = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, MAX_DYNAMIC);
  if (prepared != cudaSuccess) return prepared;
  const int tile_outputs = a.swiglu ? OUTPUTS / 2 : OUTPUTS, tiles = (a.M + tile_outputs - 1) / tile_outputs;
  const int blocks = WARPS_AT_ONCE / WARPS * multiprocessors;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(tiles < blocks ? tiles : blocks), config.blockDim = dim3(32 * WARPS);
  config.dynamicSmemBytes = NORM ? a.R * x_stride(a.K) * 2 : 0, config.stream = stream;
  config.attrs = &attribute, config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, a);
}

// `multiprocessors`: of the device. A warp gets two groups of a tile where there are enough.
extern "C" int launch(const Arguments* arguments, int multiprocessors, void* stream) {
  const auto run_norm = [&](auto warps) {
    constexpr int WARPS = decltype(warps)::value;
    const auto run_kernel = arguments->norm ? run<WARPS, true> : run<WARPS, false>;
    return (int)run_kernel(*arguments, multiprocessors, (cudaStream_t)stream);
  };
  if (arguments->K >= 32 * GROUP) return run_norm(std::integral_constant<int, 16>());
  if (arguments->K >= 16 * GROUP) return run_norm(std::integral_constant<int, 8>());
  return run_norm(std::integral_constant<int, 4>());
}
