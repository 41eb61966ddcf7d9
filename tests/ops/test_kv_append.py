"""The contract of kv_append: what is refused, by name, before anything is written."""

from __future__ import annotations

import pytest
import torch

from outrider.ops import kv_append

FP8 = torch.float8_e4m3fn


def arguments(**changes):
    made = {
        "keys": torch.randn(2, 3, 2, 8),
        "values": torch.randn(2, 3, 2, 8),
        "key_cache": torch.zeros(2, 10, 2, 8),
        "value_cache": torch.zeros(2, 10, 2, 8),
        "lengths": torch.tensor([0, 7]),
    }
    return made | changes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"keys": torch.zeros(2, 3, 2, 8, dtype=torch.int32)}, TypeError, "keys: expected dtype .*, got int32"),
        ({"values": torch.zeros(2, 3, 1, 8)}, ValueError, r"values: expected shape \[B, T, Hkv, D\]"),
        ({"key_cache": torch.zeros(2, 10, 2, 8, dtype=torch.float16)}, TypeError, "key_cache: expected dtype"),
        ({"value_cache": torch.zeros(2, 10, 2, 8).to(FP8)}, TypeError, "value_cache: expected dtype"),
        ({"lengths": torch.tensor([0, 8])}, ValueError, r"lengths: expected values in 0 \.\. 7, got 0 \.\. 8"),
        ({"lengths": torch.tensor([-1, 0])}, ValueError, r"lengths: expected values in 0 \.\. 7"),
        ({"key_scale": torch.ones(2)}, ValueError, "key_scale: expected None"),
        ({"key_cache": torch.zeros(2, 10, 8, 2).transpose(2, 3)}, ValueError, "key_cache: expected a contiguous head dim"),
        ({"backend": "cuda"}, ValueError, "backend"),
    ],
)
def test_bad_arguments_are_named(changes, error, message):
    given = arguments(**changes)
    with pytest.raises(error, match=message):
        kv_append(**given)
    assert not given["key_cache"].float().any()
    assert not given["value_cache"].float().any()


def test_a_float8_cache_needs_its_scales():
    caches = {name: torch.zeros(2, 10, 2, 8).to(FP8) for name in ("key_cache", "value_cache")}
    with pytest.raises(ValueError, match="key_scale: expected float32"):
        kv_append(**arguments(**caches))


def test_rows_lie_behind_the_cached_ones():
    given = arguments()
    kv_append(**given)
    for new, cache in ((given["keys"], given["key_cache"]), (given["values"], given["value_cache"])):
        assert torch.equal(cache[0, :3], new[0])
        assert torch.equal(cache[1, 7:], new[1])
        assert not cache[0, 3:].any()
        assert not cache[1, :7].any()
