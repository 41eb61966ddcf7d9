"""Law 1: with everything kept, sparse attention equals dense attention, seen through whole models.

The oracle is the same weights in float64 under transformers' own attention. The sparse forward may err at most twice as much as
the dense forward in the same precision does, and one rounding.
"""

from __future__ import annotations

import pytest
import torch

PROMPTS = [37, 12, 26]


def oracle_logits(module, prompt, tokens):
    """Logits over `tokens` behind the prompt's cached part, [T, V] float64."""
    sequence = torch.tensor([prompt[:-1] + tokens])
    with torch.inference_mode():
        return module(input_ids=sequence).logits[0, -len(tokens) :]


def check(found, dense, oracle):
    assert found.isfinite().all()
    error, allowed = ((x.double() - oracle).abs().max().item() for x in (found, dense))
    rounding = torch.finfo(found.dtype).eps * oracle.abs().max().item()
    assert error <= 2 * allowed + rounding, f"error {error:.3g} exceeds 2 * {allowed:.3g} + {rounding:.3g}"
    assert allowed < 0.2 * oracle.std().item(), "the dense forward is no yardstick when it is lost itself"


def check_round(begun, prompts, oracle):
    lists = begun.selection
    kept = torch.minimum(lists.counts, lists.lengths[:, None].int())
    assert torch.equal(kept, lists.lengths[:, None].expand_as(kept).int()), "every cached token must be listed"
    sparse, dense = begun.verify(lists), begun.verify(None)
    for row, prompt in enumerate(prompts):
        check(sparse[row], dense[row], oracle_logits(oracle, prompt, begun.tokens[row].tolist()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_family(family, dtype, make_pair, begin_round, independent, random_prompts):
    pair, prompts = make_pair(family, "other", dtype=dtype), random_prompts(PROMPTS)
    if not pair[0].spec.full_layers:
        pytest.skip("no layer with full attention, so no lists")
    begun = begin_round(pair, prompts, keep=1.0)
    check_round(begun, prompts, independent(pair[0], "eager", "float64"))


@pytest.mark.parametrize("budget", [{"keep": 1.0}, {"top_p": 1.0}], ids=["keep", "top_p"])
def test_every_method(method, budget, make_pair, begin_round, independent, random_prompts):
    pair, prompts = make_pair("qwen2", "other"), random_prompts(PROMPTS)
    check_round(begin_round(pair, prompts, method, **budget), prompts, independent(pair[0], "eager", "float64"))


@pytest.mark.parametrize("budget", [{"keep": 1.0}, {"top_p": 1.0}, {"keep": 0.1, "min_context": 50}], ids=str)
def test_nothing_stands_for_unlisted_tokens_where_there_are_none(method, budget, make_pair, begin_round, random_prompts):
    pair, prompts = make_pair("qwen2", "other"), random_prompts(PROMPTS)
    begun, plain = (begin_round(pair, prompts, method, unlisted=unlisted, **budget) for unlisted in ("mean", "none"))
    assert begun.selection.unlisted is not None and plain.selection.unlisted is None
    assert torch.equal(begun.verify(begun.selection), plain.verify(plain.selection))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_builtin_pair(dtype, builtin_pair, begin_round, independent, book):
    from outrider.decoding.pair import load_pair

    pair = builtin_pair if dtype == "float32" else load_pair("builtin", None, dtype=dtype)
    tokens = pair[0].tokenizer(book, verbose=False)["input_ids"]
    prompts = [tokens[3000:3300], tokens[7000:7120]]
    check_round(begin_round(pair, prompts, keep=1.0), prompts, independent(pair[0], "eager", "float64"))
