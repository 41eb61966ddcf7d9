"""The CUDA C++ kernels in the emulated CUDA, at shapes that matter to them alone, and what the emulation must find.

The tests of the ops run the same kernels, as backend "cuda".
"""

from __future__ import annotations

import ctypes

import emulation
import pytest
import test_attention_mass as mass
import test_chunk_attention as chunk
import test_sparse_attention as attention
import test_token_select as selection
import torch

from outrider.ops import attention_mass, chunk_attention, sparse_attention, token_select
from outrider.ops.attention_mass import cuda as mass_cuda

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs the kernels themselves")
CPU = torch.device("cpu")


@pytest.mark.parametrize("S", [2047, 2049, 8193, 40_000], ids=lambda S: f"S{S}")
@pytest.mark.parametrize("Hs", [1, 2, 3, 8], ids=lambda Hs: f"Hs{Hs}")  # the fewer lists, the more blocks to each
def test_rows_over_several_blocks(emulated, Hs, S):
    for kind, dtype, G, budget in (
        ("softmax", torch.bfloat16, 1, {"top_p": 0.9}),
        ("softmax", torch.bfloat16, 4, {"top_k": 1000}),
        ("ties", torch.float32, 2, {"top_k": 1500}),
    ):
        scores = selection.random_scores(kind, 1, 5, S, dtype, CPU)
        arguments = scores, torch.tensor([S - 3]), selection.rows_of(CPU, 1, Hs, G, 5)
        with emulated():
            lists = token_select(*arguments, sinks=4, recent=64, backend="cuda", **budget)
        selection.verify(lists, *arguments, sinks=4, recent=64, **budget)


@pytest.mark.parametrize("G", [1, 2])
def test_rows_longer_than_shared_memory(emulated, G):
    S = 700_000
    scores = selection.random_scores("softmax", 1, G, S, torch.bfloat16, CPU)
    arguments = scores, torch.tensor([S - 5]), torch.arange(G).view(1, 1, G)
    for budget in ({"top_p": 0.5, "width": 9000}, {"top_k": 70_000}):
        with emulated():
            lists = token_select(*arguments, backend="cuda", **budget)
        selection.verify(lists, *arguments, **budget)


@pytest.mark.parametrize("Hs", [1, 8], ids=lambda Hs: f"Hs{Hs}")
def test_merged_keys_stay_when_the_window_moves(emulated, Hs):
    """Scores so small that the threshold lies below the histogram's first window: keys are counted again."""
    S = 20_000
    scores = selection.random_scores("softmax", 1, 5, S, torch.bfloat16, CPU) * 2.0**-40
    arguments = scores, torch.tensor([S - 3]), selection.rows_of(CPU, 1, Hs, 3, 5)
    for budget in ({"top_p": 0.8}, {"top_k": 1500}):
        with emulated():
            lists = token_select(*arguments, sinks=4, recent=64, backend="cuda", **budget)
        selection.verify(lists, *arguments, sinks=4, recent=64, **budget)


BF16, FP16 = torch.bfloat16, torch.float16
ATTENTION = [
    attention.Case(BF16, BF16, 64, (8, 2), 16, (70, 0, 9), "plain", "kv_head", "most"),  # 64 rows: two problems to a list
    attention.Case(BF16, BF16, 64, (8, 2), 5, (1600, 1), "pages_3", "kv_head", "all"),
    attention.Case(FP16, FP16, 128, (8, 8), 5, (33, 0, 64, 200), "pages_16", "shared", "some"),
    attention.Case(BF16, BF16, 64, (8, 2), 16, (900, 0, 33), "pages_3", "none", "all"),
    attention.Case(BF16, BF16, 128, (8, 2), 5, (900, 300, 1), "pages_3", "kv_head", "first"),
    attention.Case(FP16, FP16, 64, (8, 2), 5, (900, 33), "plain", "shared", "first"),
    attention.Case(FP16, FP16, 128, (4, 1), 5, (300, 300), "head_token_kv", "none", "all"),
    attention.Case(BF16, BF16, 64, (8, 2), 16, (300, 5, 0, 40), "pages_16", "none", "all", window=37),
]


@pytest.mark.parametrize("multiprocessors", [1, 3, 7])
@pytest.mark.parametrize("case", ATTENTION, ids=str)
def test_any_number_of_blocks(emulated, margin, case, multiprocessors):
    """Fewer blocks than problems, and more; where a list is cut must not matter."""
    problem = attention.make(case, CPU)
    filled = torch.full(problem.logsumexp.shape, torch.nan)
    with emulated(multiprocessors=multiprocessors):
        got = sparse_attention(**problem.arguments, logsumexp=filled, backend="cuda")
    margin(got, problem.rounded, problem.exact)
    torch.testing.assert_close(filled.double(), problem.logsumexp, rtol=1e-5, atol=1e-5)


MASS = [
    mass.Case(D=64, heads=(8, 2), T=5, lengths=(0, 700, *range(20)), layout="pages_3"),
    mass.Case(D=64, heads=(8, 2), T=5, lengths=(5000,), reduce="max"),
]


@pytest.mark.parametrize("multiprocessors", [1, 3, 7])
@pytest.mark.parametrize("case", MASS, ids=str)
def test_any_number_of_blocks_of_masses(emulated, run_or_skip, margin, case, multiprocessors):
    problem = mass.make(case, CPU)
    with emulated(multiprocessors=multiprocessors):
        got = run_or_skip(lambda: attention_mass(**problem.arguments, backend="cuda"))
    margin(got[..., : problem.N], problem.rounded, problem.exact)


CHUNKS = [
    chunk.Case(BF16, BF16, 128, (8, 2), (150, 64), (700, 0), "token_kv", "kv_head", "some"),  # two row tiles a block
    chunk.Case(FP16, FP16, 128, (3, 1), (70, 512), (300, 0), "plain", "none", "all"),
    chunk.Case(BF16, BF16, 64, (8, 2), (150, 128), (257, 129), "head_token_kv", "kv_head", "most"),
    chunk.Case(FP16, FP16, 64, (4, 2), (40, 17), (1400, 0), "plain", "query_head", "most"),  # the ring goes round
]


@pytest.mark.parametrize("case", CHUNKS, ids=str)
def test_chunks_of_several_row_tiles(emulated, margin, case):
    problem = chunk.make(case, CPU)
    with emulated():
        got = chunk_attention(**problem.arguments, backend="cuda")
    margin(got, problem.rounded, problem.exact)


@pytest.mark.parametrize(("D", "T", "group"), [(64, 5, 4), (128, 5, 3)])
def test_as_many_keys_fit_as_is_said(emulation_folder, D, T, group):
    """What `obstacle` refuses is told without building."""
    library = emulation.build(mass_cuda.SOURCE, emulation_folder, f"HEAD_DIM={D}", f"QUERIES={T}", f"GROUP={group}")
    assert library.max_chunk() == mass_cuda._max_chunk(D, T * group)


EXERCISES = r"""
#include <cooperative_groups.h>
#include "host.cuh"
#include "ptx.cuh"
struct Arguments { float* out; const float* in; int exercise, blocks; };

__global__ void exercise(const __grid_constant__ Arguments a) {
  extern __shared__ __align__(16) char dynamic[];
  __shared__ __align__(16) float x[64], y;
  auto cluster = cooperative_groups::this_cluster();
  const int thread = threadIdx.x, lane = thread % 32;
  float got = 0;
  if (a.exercise < 2) {
    x[thread] = thread;
    if (a.exercise == 0) __syncthreads();
    got = x[63 - thread];
  } else if (a.exercise < 4) {
    if (thread < 16) ptx::copy16(ptx::shared_address(x + 4 * thread), a.in + 4 * thread);
    ptx::commit();
    if (a.exercise == 2) ptx::wait_group<0>();
    __syncthreads();
    got = x[thread];
  } else if (a.exercise < 6) {
    y = cluster.block_rank();
    cluster.sync();
    if (cluster.block_rank()) {
      for (int i = 0; i < 4; i++) __syncthreads();
      got = *cluster.map_shared_rank(&y, 0) + 1;
    }
    if (a.exercise == 4) cluster.sync();
  } else if (a.exercise == 6) {
    if (lane % 2) got = __shfl_sync(~0u, got, 0);
  } else if (a.exercise == 7) {
    got = lane % 2 ? __shfl_sync(~0u, got, 0) : (float)__any_sync(~0u, 1);
  } else if (a.exercise == 8) {
    ((float*)dynamic)[thread * 5] = 0;
  } else if (a.exercise == 9) {
    while (__ldcg(a.in) == 0) {}
  } else if (a.exercise == 10) {
    got = a.in[1ll << 40];
  }
  a.out[blockIdx.x * 64 + thread] = got;
}

extern "C" int launch(const Arguments* a) {
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = a->blocks, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(a->blocks), config.blockDim = dim3(64), config.dynamicSmemBytes = 1024;
  config.attrs = &attribute, config.numAttrs = 1;
  return (int)cudaLaunchKernelEx(&config, exercise, *a);
}
"""


class Arguments(ctypes.Structure):
    _fields_ = (("out", ctypes.c_void_p), ("in", ctypes.c_void_p), ("exercise", ctypes.c_int), ("blocks", ctypes.c_int))


@pytest.fixture(scope="module")
def exercise(emulation_folder):
    """Runs one of the exercises: its output, or what the emulation says."""
    source = emulation_folder / "exercise" / "cuda" / "kernel.cu"
    source.parent.mkdir(parents=True)
    source.write_text(EXERCISES, encoding="utf-8")
    library = emulation.build(source, emulation_folder)

    def run(number: int, blocks: int = 1) -> torch.Tensor | str:
        given, out = torch.arange(64.0), torch.zeros(blocks * 64)
        arguments = Arguments(out.data_ptr(), given.data_ptr(), number, blocks)
        return library.describe(error).decode() if (error := library.launch(ctypes.byref(arguments))) else out

    return run


def test_what_is_right_passes(exercise):
    assert torch.equal(exercise(0), torch.arange(64.0).flip(0))
    assert torch.equal(exercise(2), torch.arange(64.0))
    assert torch.equal(exercise(4, blocks=2), torch.arange(2.0).repeat_interleave(64))


@pytest.mark.parametrize(("number", "what"), [(1, "__syncthreads"), (3, "cp.async.wait_group")])
def test_what_is_not_waited_for_is_not_there(exercise, number, what):
    assert exercise(number).isnan().any(), what


ERRORS = [
    pytest.param(5, "shared memory of a block that has left", id="cluster_left_early"),
    pytest.param(6, "all threads wait: 64 in __shfl_sync", id="lanes_missing"),
    pytest.param(7, "lanes of a warp meet in ", id="different_instructions"),
    pytest.param(8, "a write behind the dynamic shared memory", id="overflow"),
    pytest.param(9, "nothing happens any more; threads poll in __ldcg", id="message_missing"),
    pytest.param(10, "an access to memory that is not there, by thread ", id="fault"),
]


@pytest.mark.parametrize(("number", "message"), ERRORS)
def test_errors_are_named(exercise, number, message):
    assert message in str(exercise(number, blocks=2))
