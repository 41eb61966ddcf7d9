"""Prompts read from lists on a GPU: the kernels against the reference, everything kept against dense. make test-gpu."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams, engine_config
from outrider.decoding.sparse_prefill import make_sparse_prefill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

PROMPTS = [400, 77, 340]  # of any length against chunks and blocks
FEW = SamplingParams(max_new_tokens=16)
SPARSE = {"prefill": "sparse", "prefill_block": 32, "prefill_chunk": 128, "prefill_min_context": 0}


def tokens(results):
    return [result.token_ids for result in results]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
@pytest.mark.parametrize("kernels", ["auto", "triton", "reference"])
def test_keeping_everything_gives_the_dense_tokens(kernels, eager, gpu_pair, generate, random_prompts):
    pair, prompts = gpu_pair("float32"), random_prompts(PROMPTS)
    options = {"backend": kernels, "eager": eager, "batch_size": 2}
    dense = generate(pair, prompts, FEW, **options)
    sparse = generate(pair, prompts, FEW, **options, **SPARSE, prefill_keep=1.0)
    assert tokens(sparse) == tokens(dense)
    assert [result.statistics.prefill_kept_fraction for result in sparse] == [1.0] * 3


@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_the_tokens_of_the_reference(kernels, gpu_pair, generate, random_prompts):
    """With sinks and recent tokens alone, since kernels compare scores by their upper 16 bits and other lists may differ."""
    pair, prompts = gpu_pair("float32"), random_prompts(PROMPTS)
    options = SPARSE | {"prefill_keep": 0.05, "sinks": 4, "recent": 24, "allocation": "flat"}
    found, wanted = (generate(pair, prompts, FEW, backend=backend, **options) for backend in (kernels, "reference"))
    assert tokens(found) == tokens(wanted)
    assert all(result.statistics.prefill_kept_fraction < 0.5 for result in (found[0], found[2]))  # 28 tokens are half of 77


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("mode", ["dense", "sparse"])
def test_in_16_and_8_bits(mode, kv_dtype, gpu_pair, generate, random_prompts):
    """A run repeats itself, and reports what it read."""
    pair, prompts = gpu_pair("bfloat16"), random_prompts(PROMPTS)
    options = SPARSE | {"mode": mode, "kv_dtype": kv_dtype, "prefill_keep": 0.3}
    first, second = (generate(pair, prompts, FEW, **options) for _ in range(2))
    assert tokens(first) == tokens(second)
    assert all(result.error is None and 0.2 < result.statistics.prefill_kept_fraction < 0.6 for result in first)


@pytest.fixture
def read(align):
    """`read(pair, prompt, backend, kv_dtype)`: the target's logits; lists of sinks and recent tokens, the draft's of blocks."""

    def run(pair, prompt, backend, kv_dtype="auto"):
        models = [model.with_backend(backend).with_kv_dtype(kv_dtype) for model in pair]
        options = {"prefill_block": 32, "prefill_chunk": 128, "prefill_min_context": 0, "prefill_draft_keep": 0.4}
        config = engine_config(mode="dense", sinks=4, recent=24, allocation="flat", backend=backend, **options)
        reader = make_sparse_prefill(*models, config, 0.05, align(*pair).map("joint+divergence").alignment)
        rows, logits = [(model, model.new_cache(1, len(prompt))) for model in models], []
        for start in range(0, len(prompt), 128):
            part = torch.tensor([prompt[start : start + 128]])
            logits.append(reader.read(rows, part, start + part.shape[1], logits=True)[0].float())
        return torch.cat(logits, 1)

    return run


@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize("kernels", ["auto", "triton"])
def test_logits_in_16_and_8_bits_are_near_the_reference(kernels, kv_dtype, gpu_pair, read, random_prompts):
    """Nearer than 16 bits are to 32, twice; or than 8 bits are to 16."""
    pair, [prompt] = gpu_pair("bfloat16"), random_prompts([700])
    found, wanted = (read(pair, prompt, backend, kv_dtype) for backend in (kernels, "reference"))
    if kv_dtype == "fp8":
        allowed = (wanted - read(pair, prompt, "reference")).norm()
    else:
        allowed = 2 * (wanted - read(gpu_pair("float32"), prompt, "reference")).norm()
    assert 0 < (found - wanted).norm() < allowed


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_dense_chunk_by_the_kernel_is_that_of_pytorch(dtype, gpu_pair, random_prompts):
    """Chunks of 16 bits take the kernel, with backend "reference" PyTorch's attention."""
    pair = gpu_pair("bfloat16" if dtype == "bfloat16" else dtype)
    [prompt] = random_prompts([600])
    logits = []
    for backend in ("auto", "reference"):
        model = pair[0].with_backend(backend)
        cache = model.new_cache(1, 640)
        for start in range(0, 600, 200):
            part = torch.tensor([prompt[start : start + 200]])
            logits.append(model.forward(part, cache, stop=start + 200).logits.float())
            cache.advance(200)
    found, wanted = torch.cat(logits[:3], 1), torch.cat(logits[3:], 1)
    assert (found - wanted).norm() < 0.05 * wanted.norm()
