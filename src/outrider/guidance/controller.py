"""A small recurrent network that guesses which cached tokens a target will look at: trained once per target, kept in a file.

A file is safetensors, weights in 16 bits; its metadata say which target it was made for, and of which text. `recipes/adore`
trains one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialized
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from outrider.errors import AlignmentError
from outrider.guidance.files import ModelIdentity, Reader

FORMAT = "outrider-controller"
VERSION = "1"
WIDTH = 32  # of the state
DISTANCES = 25  # buckets, two to an octave: tokens 4,096 and further away are one, so that training may do with shorter texts
POSITIONS = 9  # the same for a text's first tokens; from the 16th on they are one


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerFile:
    """The controller of one target, with the conditions of its training."""

    target: ModelIdentity
    text: str  # names of the texts
    text_digest: str
    tokens: int  # that labels were made for
    controller: Controller


class Controller(nn.Module):
    """A GRU over the text, whose states answer each other.

    logit(asking token n, token i < n) = (W z_n + b) . z_i + distance[n - i] + position[i]

    z are states over the tokens' input embeddings, so a score depends on nothing behind the asking token; b . z_i is what a
    token is worth whoever asks; the two tables go by logarithmic buckets.
    """

    def __init__(self, embedding: int, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Linear(embedding, width, bias=False)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.asks = nn.Linear(width, width)
        self.distance = nn.Parameter(torch.zeros(DISTANCES))
        self.position = nn.Parameter(torch.zeros(POSITIONS))

    @property
    def width(self) -> int:
        """Numbers in a state."""
        return self.gru.hidden_size

    def states(self, embeddings: Tensor, before: Tensor | None = None) -> Tensor:
        """Of n tokens with input embeddings [B, n, E], behind a token with state `before` [B, w]: [B, n, w] fp32."""
        normal = layer_norm(embeddings.float(), embeddings.shape[-1:])  # whatever a model's embeddings are scaled by
        first = None if before is None else before.float()[None].contiguous()
        states: Tensor = self.gru(self.embed(normal), first)[0]
        return states

    def logits(self, asking: Tensor, states: Tensor, lengths: Tensor) -> Tensor:
        """Of T tokens with states `asking` [B, T, w] at positions lengths[b] + t, about tokens with `states` [B, S, w] that
        come before them: [B, T, S]; elsewhere it means nothing."""
        position = torch.arange(states.shape[1], device=states.device)
        asked_at = lengths[:, None] + torch.arange(asking.shape[1], device=states.device)  # [B, T]
        away = asked_at[..., None] - position  # [B, T, S]
        agreement = self.asks(asking.float()) @ states.float().transpose(1, 2)
        return agreement + _entry(self.distance, away) + _entry(self.position, position + 1)


def _entry(table: Tensor, count: Tensor) -> Tensor:
    """Of a table's buckets, two to an octave: 1, 2, 3, 4.. are in bucket 0, 2, 3, 4.., all behind the last one in that."""
    return table[(2 * count.clamp(min=1).float().log2()).long().clamp(max=len(table) - 1)]


def save(file: ControllerFile, path: str | os.PathLike[str]) -> None:
    """Write `file` to `path` in one step. Raises AlignmentError when it cannot be written."""
    path = Path(path)
    said = {"target.name": file.target.name, "target.digest": file.target.digest, "text": file.text}
    said |= {"format": FORMAT, "version": VERSION, "text_digest": file.text_digest, "tokens": str(file.tokens)}
    weights = {name: weight.detach().half().contiguous() for name, weight in file.controller.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        temporary.write_bytes(serialized(weights, metadata=said))
        os.replace(temporary, path)
    except OSError as error:
        raise AlignmentError(f"controller file {path}: cannot be written: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], *, target: ModelIdentity | None) -> ControllerFile:
    """Read a controller file and check that it belongs to `target` (None: do not check).

    Raises AlignmentError, naming the file, what came and what is allowed, when it is unreadable or malformed or was made for
    another model.
    """
    reader = Reader("controller", Path(path))
    try:
        with safe_open(path, "pt") as opened:
            said: dict[str, str] = opened.metadata() or {}
            weights: dict[str, Tensor] = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError) as error:
        reader.fail(f"cannot be read: {error}")
    for name, allowed in (("format", FORMAT), ("version", VERSION)):
        if (got := reader.get(said, name)) != allowed:
            reader.fail(f"{name}: got {got!r}; allowed: {allowed!r}")
    found = ModelIdentity(*(reader.get(said, f"target.{name}") for name in ("name", "digest")))
    reader.check_made_for("target", target, found)
    if not (tokens := reader.get(said, "tokens")).isdecimal():
        reader.fail(f"tokens: got {tokens!r}; allowed: a whole number")
    embed = weights.get("embed.weight")
    if embed is None or embed.dim() != 2:
        reader.fail("embed.weight: missing or no matrix; allowed: weights written by `recipes/adore`")
    controller = Controller(embed.shape[1], embed.shape[0])
    try:
        controller.load_state_dict(weights)
    except RuntimeError as error:
        reader.fail(f"weights: {error}")
    if not all(bool(weight.isfinite().all()) for weight in weights.values()):
        reader.fail("weights: some are no numbers; allowed: finite ones")
    return ControllerFile(
        target=found,
        text=reader.get(said, "text"),
        text_digest=reader.get(said, "text_digest"),
        tokens=int(tokens),
        controller=controller.eval().requires_grad_(False),
    )
