"""Make the feed-forward layers of a trained model narrower, by leaving out the channels that matter least.

    python -m pair.prune --checkpoint wide.pt --data tokens.bin --hidden 576 --out pruned.pt

A channel matters as much as it moves the residual stream: its root mean square on a sample of the training texts, times the
norm of its column of the output projection. Training on from the pruned weights heals them (`pair.train --init`).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pair.model import Model
from pair.train import load_model

SAMPLES, LENGTH = 24, 1024
"""Windows of the sample, spread evenly over the token file, and tokens in each."""
RIDGE = 1e-3
"""Share of the mean square added to the least squares' diagonal."""


@torch.inference_mode()
def second_moments(model: Model, windows: Tensor) -> list[Tensor]:
    """Per layer, the mean outer product [hidden, hidden] fp64 of the feed-forward activations on ``windows`` [N, T]."""
    hidden = model.config.hidden
    moments = [torch.zeros(hidden, hidden, dtype=torch.float64) for _ in model.layers]

    def watch(moment: Tensor) -> Callable[[nn.Module, tuple[Tensor]], None]:
        def add(module: nn.Module, inputs: tuple[Tensor]) -> None:
            activations = inputs[0].flatten(0, 1)
            moment.add_((activations.T @ activations).double() / windows.numel())

        return add

    hooks = [layer.mlp.down_proj.register_forward_pre_hook(watch(m)) for layer, m in zip(model.layers, moments, strict=True)]
    for window in windows:
        model(window[None])
    for hook in hooks:
        hook.remove()
    return moments


def prune(model: Model, moments: list[Tensor], hidden: int) -> Model:
    """The same model with the ``hidden`` channels of every layer that matter most, in their order.

    The output projection is refitted by least squares, so that the kept channels stand in for the others as well as they can.
    """
    if not 0 < hidden <= model.config.hidden:
        raise ValueError(f"hidden must be between 1 and {model.config.hidden}, got {hidden}")
    weights = model.state_dict()
    for number, moment in enumerate(moments):
        names = {name: f"layers.{number}.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
        down = weights[names["down"]].double()  # [width, hidden]
        kept = (moment.diagonal().sqrt() * down.norm(dim=0)).topk(hidden).indices.sort().values
        within = moment[kept][:, kept]
        within = within + RIDGE * within.diagonal().mean() * torch.eye(hidden, dtype=torch.float64)
        weights[names["down"]] = torch.linalg.solve(within, moment[kept] @ down.T).T.float().contiguous()
        for name in ("gate", "up"):
            weights[names[name]] = weights[names[name]][kept]
    narrow = Model(replace(model.config, hidden=hidden))
    narrow.load_state_dict(weights)
    return narrow


def sample(data: Path) -> Tensor:
    """Windows [N, T] of a token file."""
    tokens = np.memmap(data, dtype="<u2", mode="r")
    starts = np.linspace(0, len(tokens) - LENGTH, SAMPLES).astype(np.int64)
    return torch.from_numpy(np.stack([tokens[start : start + LENGTH] for start in starts]).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="token file made by pair.data")
    parser.add_argument("--hidden", type=int, required=True, help="feed-forward channels to keep in every layer")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    windows = sample(args.data)
    wide = load_model(args.checkpoint)
    narrow = prune(wide, second_moments(wide, windows), args.hidden)
    with torch.inference_mode():
        losses = [F.cross_entropy(m(windows[:4, :-1]).flatten(0, 1), windows[:4, 1:].flatten()).item() for m in (wide, narrow)]
    print(f"loss on a sample: {losses[0]:.3f} wide, {losses[1]:.3f} pruned")
    torch.save({"config": narrow.config.to_dict(), "model": narrow.state_dict()}, args.out)


if __name__ == "__main__":
    main()
