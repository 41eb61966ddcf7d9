"""The processes that hold a model together, one a device: who this one is, and what they tell each other.

Each *rank* has some of the heads and of the columns of every layer (`sharding`), and runs the same rounds on the same tokens.
Everything here is collective: all ranks call it, in the same order. A rank alone tells nobody anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from outrider.config import check
from outrider.errors import OptionError, RankError

TIMEOUT = timedelta(minutes=3)  # that a rank waits for the others inside a collective, which come seconds apart at most
VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # by which a launcher tells a process its place


@dataclass(frozen=True, slots=True)
class Ranks:
    """This rank among all, and the collectives. Results are the same on every rank, bit by bit."""

    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """This is the rank that adds what must be added once, and that writes."""
        return self.rank == 0

    def own(self, count: int) -> slice:
        """Which of `count` equal parts are this rank's."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def sum(self, part: Tensor) -> Tensor:
        """The sum of all ranks' tensors of a shape, in place."""
        if self.size > 1:
            _collective(lambda dist: dist.all_reduce(part))
        return part

    def mean(self, part: Tensor) -> Tensor:
        """The mean of all ranks' tensors of a shape, in place."""
        return self.sum(part).div_(self.size) if self.size > 1 else part

    def gather(self, part: Tensor, dim: int = -1) -> Tensor:
        """All ranks' tensors side by side along a dimension, `size` times as wide there."""
        if self.size == 1:
            return part
        dim, part = dim % part.dim(), part.contiguous()
        found = part.new_empty(self.size * part.shape[0], *part.shape[1:])
        # `all_gather_single` in newer releases
        _collective(lambda dist: getattr(dist, "all_gather_single", dist.all_gather_into_tensor)(found, part))
        return found.view(self.size, *part.shape).movedim(0, dim).flatten(dim, dim + 1)

    def same(self, tensor: Tensor) -> Tensor:
        """The first rank's tensor, in place."""
        if self.size > 1:
            _collective(lambda dist: dist.broadcast(tensor, 0))
        return tensor

    def least(self, number: float, device: torch.device) -> float:
        """The least of all ranks' numbers. Waits for the device."""
        if self.size == 1:
            return number
        found = torch.tensor([number], dtype=torch.float64, device=device)
        _collective(lambda dist: dist.all_reduce(found, dist.ReduceOp.MIN))
        return float(found)


ALONE = Ranks()


def check_size(size: int, device: str) -> None:
    """Raise OptionError for a number of ranks that is none, and where there are fewer GPUs."""
    check("tensor-parallel", size, isinstance(size, int) and not isinstance(size, bool) and size >= 1, "a whole number >= 1")
    if size > 1 and torch.device(device).type == "cuda" and size > (present := torch.cuda.device_count()):
        raise OptionError("tensor-parallel", size, f"at most {max(present, 1)}, the GPUs that are visible here")


def join(size: int, device: str) -> Ranks:
    """Meet the other ranks, all of one host: by NCCL between GPUs, by gloo between CPUs.

    Raises OptionError where this process is not one of `size` that were started together, or where there are fewer GPUs, and
    RankError where the others do not come.
    """
    check_size(size, device)
    if size == 1:
        return ALONE
    started = {name: os.environ.get(name) for name in VARIABLES}
    if None in started.values() or int(started["WORLD_SIZE"] or 0) != size:
        allowed = (
            f"{started['WORLD_SIZE'] or 1}, as many as there are processes (`torchrun --nproc-per-node {size}` starts {size}, "
            "and so does the command line)"
        )
        raise OptionError("tensor-parallel", size, allowed)

    def meet(dist: Any) -> None:
        if not dist.is_initialized():
            dist.init_process_group("nccl" if torch.device(device).type == "cuda" else "gloo", timeout=TIMEOUT)

    _collective(meet)
    return Ranks(int(started["RANK"] or 0), size)


def leave() -> None:
    """Part from the other ranks, when all have come to their end; nothing for one that is alone."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def own_device(device: str, ranks: Ranks) -> str:
    """The device of this rank: each has a GPU of its own, which is the current one from now on."""
    if ranks.size == 1 or torch.device(device).type != "cuda":
        return device
    torch.cuda.set_device(ranks.rank)
    return f"cuda:{ranks.rank}"


def _collective(call: Callable[[Any], Any]) -> None:
    """Raises RankError where the others cannot be reached, or have not come in time."""
    import torch.distributed as dist

    try:
        call(dist)
    except RuntimeError as error:  # each backend has its own ways to say so
        raise RankError(
            f"tensor-parallel: a rank has ended or does not answer ({str(error).strip().splitlines()[0]})"
        ) from error
