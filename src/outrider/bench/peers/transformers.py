"""transformers with dummy weights: `python -P -m outrider.bench.peers.transformers`, a job on stdin.

Its own `generate` over a dynamic cache that is filled with noise, with attention by PyTorch (sdpa).
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor

from outrider.bench.peers.job import Job, decoding, read_job, serve
from outrider.bench.prompts import random_prompts
from outrider.bench.workload import DTYPES
from outrider.models.dummy import dummy_module


def noise_cache(module: Any, batch: int, tokens: int) -> Any:
    """A `DynamicCache` of `tokens` tokens of noise."""
    from transformers import DynamicCache

    config = module.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = batch, config.num_key_value_heads, tokens, width
    weights = next(module.parameters())
    cache = DynamicCache(config=config)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, dtype=weights.dtype, device=weights.device) for _ in range(2))
        cache.update(keys, values, layer)
    return cache


def generated(module: Any, prompts: Tensor, cache: Any, count: int) -> Tensor:
    """Continue prompts [B, S], of which the cache has all but the last token, by `count` tokens [B, count]; all done on return.

    The cache is brought back to where it was.
    """
    before = cache.get_seq_length()
    output = module.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=count,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    if prompts.is_cuda:
        torch.cuda.synchronize()
    cache.crop(before - cache.get_seq_length())
    return output[:, prompts.shape[1] :]


@torch.inference_mode()
def measure(module: Any, job: Job, case: dict[str, Any]) -> dict[str, Any]:
    """Decoding speed of one case."""
    rows = random_prompts(case["context"], case["batch"], job.target["vocab_size"])
    prompts = torch.tensor(rows, device=job.device)
    cache = noise_cache(module, case["batch"], case["context"] - 1)
    seconds, _ = decoding(lambda count: generated(module, prompts, cache, count).shape[1], job.tokens)
    return {
        "tokens_per_second": case["batch"] * job.tokens / seconds,
        "tokens_per_round": 1.0,
        "versions": {"transformers": version("transformers")},
    }


def main() -> None:
    job = read_job()
    device = torch.device(job.device)
    module = dummy_module(job.target, dtype=getattr(torch, DTYPES[device.type]), device=device, attention="sdpa")
    serve(job, lambda case: measure(module, job, case))


if __name__ == "__main__":
    main()
