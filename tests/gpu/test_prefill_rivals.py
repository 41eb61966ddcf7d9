"""Methods that read a prompt whole, on a GPU: kernels against the reference, everything kept against dense. make test-gpu."""

from __future__ import annotations

import pytest
import torch

from outrider.config import EngineConfig
from outrider.decoding.prefill_rivals import READERS
from outrider.decoding.prompt_reader import make_prompt_reader

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

LENGTH = 403
CONFIG = EngineConfig(prefill_block=32, prefill_chunk=128, prefill_min_context=0)


def read(pair, method, prompt, keep, backend, kv_dtype="auto"):
    """The logits [V] behind the prompt, and the cache of the target."""
    target, draft = (model.with_backend(backend).with_kv_dtype(kv_dtype) for model in pair)
    reader = make_prompt_reader(method, target, draft, CONFIG, keep)
    models = (target, draft) if reader.drafts else (target,)
    rows = [(model, model.new_cache(1, LENGTH + reader.ahead)) for model in models]
    logits, _ = reader.read(rows, torch.tensor([prompt]), LENGTH, logits=True, last=1)
    return logits[0, -1], rows[0][1]


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize("kernels", ["auto", "triton", "reference"])
def test_keeping_everything_is_dense(kernels, method, gpu_pair, random_prompts):
    pair, [prompt] = gpu_pair("float32"), random_prompts([LENGTH])
    target = pair[0].with_backend(kernels)
    dense = target.forward(torch.tensor([prompt]), target.new_cache(1, LENGTH)).logits[0, -1]
    torch.testing.assert_close(read(pair, method, prompt, 1.0, kernels)[0], dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", READERS)
@pytest.mark.parametrize("dtype, kv_dtype", [("bfloat16", "auto"), ("bfloat16", "fp8"), ("float16", "auto")])
def test_in_16_and_8_bits(method, dtype, kv_dtype, gpu_pair, random_prompts):
    """Repeats itself; the first layer's keys, which nothing sparse comes before, are those of the reference where both keep the
    same tokens."""
    pair, [prompt] = gpu_pair(dtype), random_prompts([LENGTH])
    (found, cache), (again, _) = (read(pair, method, prompt, 0.5, "auto", kv_dtype) for _ in range(2))
    assert torch.equal(found, again) and found.isfinite().all()
    _, reference = read(pair, method, prompt, 0.5, "reference", kv_dtype)
    assert torch.equal(cache.lengths, reference.lengths)
    if method != "spec-prefill":  # chunks whose importance is nearly equal may be others
        ours, wanted = (x.keys(0, LENGTH).float() for x in (cache, reference))
        torch.testing.assert_close(ours, wanted, rtol=0.1, atol=0.1)
