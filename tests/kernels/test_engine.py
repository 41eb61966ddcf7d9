"""Generation with the Triton kernels in their interpreter gives the reference's tokens. On a GPU see tests/gpu."""

from __future__ import annotations

import pytest
import torch

from outrider.config import SamplingParams

pytest.importorskip("triton", reason="kernels need triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu does this on the GPU")


# The kernels compare scores by their upper 16 bits: all, or only sinks and recent tokens, are kept, which no tie changes.
@pytest.mark.parametrize(
    "name, budget",
    [
        ("outrider", {"keep": 1.0}),
        ("outrider", {"keep": 0.1, "recent": 5}),
        ("outrider", {"keep": 0.1, "recent": 5, "unlisted": "mean"}),
        ("sts", {"keep": 1.0}),
        ("specattn", {"top_p": 1.0}),
    ],
    ids=["outrider-all", "outrider-forced", "outrider-unlisted", "sts", "specattn"],
)
def test_triton_gives_the_tokens_of_the_reference(name, budget, make_pair, generate, random_prompts):
    pair, prompts = make_pair("llama", "other"), random_prompts([12, 9])
    options = {"mode": "sparse", "method": name, "draft_tokens": 2} | budget
    params = SamplingParams(max_new_tokens=2)
    found, wanted = (generate(pair, prompts, params, backend=backend, **options) for backend in ("triton", "reference"))
    assert [result.token_ids for result in found] == [result.token_ids for result in wanted]
    kept = [result.statistics.kept_fraction for result in found]
    assert kept == [result.statistics.kept_fraction for result in wanted]
    assert (min(kept) < 1) is ("recent" in budget)


def test_audits_find_the_same(make_pair, generate, random_prompts):
    """Of one row that is audited, and one that is too short."""
    pair, prompts = make_pair("llama", "other"), random_prompts([10, 4])
    options = {"mode": "sparse", "draft_tokens": 1, "keep": 0.1, "recent": 5, "guard_every": 1, "guard_tolerance": 1.0}
    params = SamplingParams(max_new_tokens=1)
    found, wanted = (generate(pair, prompts, params, backend=backend, **options) for backend in ("triton", "reference"))
    for one, other in zip(found, wanted, strict=True):
        ours, theirs = one.statistics, other.statistics
        assert (ours.audits, ours.differed) == (theirs.audits, theirs.differed)
        assert ours.recalled == pytest.approx(theirs.recalled, rel=1e-4)
    assert [result.statistics.audits > 0 for result in found] == [True, False]
