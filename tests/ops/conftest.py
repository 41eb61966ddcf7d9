"""Shared by the op tests: cache layouts, the tolerance rule, and poisoned uninitialised memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor


def poisoned(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """An allocator whose memory is NaN (floats) or the most negative number (integers)."""

    def allocate(*args, **kwargs) -> Tensor:
        x = make(*args, **kwargs)
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).min)

    return allocate


@pytest.fixture(autouse=True, scope="module")
def poison_uninitialised_memory() -> Iterator[None]:
    """Guards against reading a buffer before it is written: on fresh, zeroed memory such a read passes by luck."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", poisoned(torch.empty))
        patch.setattr(torch, "empty_like", poisoned(torch.empty_like))
        patch.setattr(Tensor, "new_empty", poisoned(Tensor.new_empty))
        yield


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small tensors gain nothing from more, and on a busy machine threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["contiguous", "head_major", "gaps", "pages_1", "pages_3", "pages_16"])
def lay_out(request: pytest.FixtureRequest) -> Callable[[Tensor], tuple[Tensor, Tensor | None]]:
    """Lays a logical cache `[B, N, Hkv, D]` out in memory: `(cache, page_table)`. A test that asks for it runs per layout.

    Memory that holds no row is NaN. Caches of equal shape share their page table, so keys and values may be laid out apart.
    """
    layout: str = request.param

    def apply(rows: Tensor) -> tuple[Tensor, Tensor | None]:
        B, N, Hkv, D = rows.shape
        if layout == "contiguous":
            return rows.contiguous(), None
        if layout == "head_major":
            return rows.transpose(1, 2).contiguous().transpose(1, 2), None
        if layout == "gaps":  # between rows, heads and sequences
            storage = torch.full((B + 1, N + 2, Hkv + 1, D + 3), torch.nan, dtype=rows.dtype)
            view = storage[1:, 1:-1, :Hkv, 2:-1]
            return view.copy_(rows), None
        page_size = int(layout.removeprefix("pages_"))
        P = -(-N // page_size)
        order = torch.randperm(B * P + 3, generator=torch.Generator().manual_seed(0))[: B * P]
        padded = torch.full((B, P * page_size, Hkv, D), torch.nan, dtype=rows.dtype)
        padded[:, :N] = rows
        pages = torch.full((B * P + 3, page_size, Hkv, D), torch.nan, dtype=rows.dtype)
        pages[order] = padded.view(B * P, page_size, Hkv, D)
        return pages, order.view(B, P).int()

    return apply


@pytest.fixture(scope="session")
def assert_as_good_as_torch() -> Callable[[Tensor, Tensor, Tensor], None]:
    """The tolerance rule: an error of at most twice that of PyTorch's own low-precision result, and one rounding."""

    def check(got: Tensor, low_precision: Tensor, oracle: Tensor) -> None:
        assert not got.isnan().any()
        error = (got.double() - oracle).abs().max().item()
        allowed = 2 * (low_precision.double() - oracle).abs().max().item()
        rounding = torch.finfo(got.dtype).eps * oracle.abs().max().item()
        assert error <= allowed + rounding, f"error {error:.3g} exceeds {allowed:.3g} + {rounding:.3g}"

    return check
