"""What a selection method is, and the pieces all of them share."""

from __future__ import annotations

import math
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from outrider.config import Budget
from outrider.errors import OptionError, PairError
from outrider.ops import TokenLists, unlisted_mass
from outrider.types import Alignment, DraftScores, Selection, Shares, Unlisted, UnlistedFit


class Selector(Protocol):
    """Turns the draft's scores of a round into the token lists of the target."""

    default_map: ClassVar[str]  # the alignment this method is used with, "layer_map+head_map"

    @property
    def draft_layers(self) -> tuple[int, ...]:
        """The draft layers that must be scored, ascending: those the alignment uses."""

    @property
    def waits(self) -> bool:
        """True: `select` waits for the device on a GPU, and cannot be captured in a CUDA graph."""

    @property
    def per_query(self) -> bool:
        """True: scores are kept apart per query of the round (DraftScores.mass with Q = T); False: averaged (Q = 1)."""

    def entries(self, size: int, share: float | None = None) -> int:
        """A bound on the list entries of one sequence of `size` tokens, in all layers; `share`: see `Shares`."""

    def select(self, scores: DraftScores, shares: Shares | None = None) -> Selection:
        """The lists of the round; `scores.layers` must equal `draft_layers`. `shares` stand in place of the budget's."""


def layer_sources(alignment: Alignment, target_layers: tuple[int, ...], draft_heads: int) -> Tensor:
    """The alignment of the target layers that get lists: [len(target_layers), Hs, G, 2].

    Raises PairError where the alignment has none for such a layer or names a draft head that does not exist.
    """
    count = alignment.sources.shape[0]
    if not target_layers or list(target_layers) != sorted(set(target_layers)) or not 0 <= target_layers[0] <= target_layers[-1]:
        raise OptionError("target layers", target_layers, "at least one layer number, ascending")
    if target_layers[-1] >= count:
        raise PairError(f"alignment: covers {count} target layers, but lists are asked for layer {target_layers[-1]}")
    sources = alignment.sources[list(target_layers)]
    if (sources < 0).any():
        layer = target_layers[int((sources < 0).flatten(1).any(1).nonzero()[0])]
        raise PairError(f"alignment: has no sources for target layer {layer}, which needs lists")
    head = int(sources[..., 1].max())
    if head >= draft_heads:
        raise PairError(f"alignment: names draft head {head}, but the draft has {draft_heads} query heads")
    return sources


def per_kv_head(sources: Tensor, kv_heads: int) -> Tensor:
    """One list per KV head: [L, Hq, G, 2] -> [L, Hkv, Hq / Hkv * G, 2]; sources per KV head or shared by all stay as they are.

    Raises PairError when the heads of the alignment cannot be grouped.
    """
    heads = sources.shape[1]
    if heads in (1, kv_heads):
        return sources
    if heads % kv_heads:
        raise PairError(f"alignment: has {heads} heads; allowed: 1, {kv_heads} (KV heads) or a multiple of it (query heads)")
    return sources.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)


def own_part(heads: Tensor, part: tuple[int, int], dim: int = 1) -> Tensor:
    """Of what is there by head along a dimension, one of several equal parts; all of what is shared by all heads.

    `part`: which one, of how many.
    """
    at, of = part
    return heads if heads.shape[dim] == 1 else heads.chunk(of, dim)[at].contiguous()


def score_rows(sources: Tensor, draft_heads: int, scored: tuple[int, ...] = ()) -> tuple[tuple[int, ...], Tensor]:
    """sources [L, Hs, G, 2] -> the draft layers to score, ascending, and the score row of each source [L, Hs, G] int64.

    Layers that are `scored` anyway are scored besides those of the sources.
    """
    wanted = torch.tensor(scored, dtype=sources.dtype, device=sources.device)
    layers = torch.cat([sources[..., 0].flatten(), wanted]).unique()
    place = torch.searchsorted(layers, sources[..., 0].contiguous())
    return tuple(layers.tolist()), place * draft_heads + sources[..., 1]


def check_layers(scores: DraftScores, draft_layers: tuple[int, ...]) -> None:
    if scores.layers != draft_layers:
        raise OptionError("scored draft layers", scores.layers, f"{draft_layers}, those of the alignment")


def query_mean(scores: DraftScores) -> Tensor:
    """[B, Q, R, S] -> [B, R, S]: the mean over the queries of the round."""
    return scores.mass[:, 0] if scores.mass.shape[1] == 1 else scores.mass.mean(1)


def stand_in(fit: UnlistedFit | None, scores: DraftScores, rows: Tensor, lists: TokenLists, backend: str) -> Unlisted | None:
    """What stands for the tokens that `lists` [L, B, Hs, M] leave out; None without a fit.

    A list was chosen from the score rows `rows` [L, Hs, G]; L is that of the fit, or 1 where all its layers share the lists.
    What a list leaves out of the draft's mass, times the fitted weight, is the share that the mean value takes.
    """
    if fit is None:
        return None
    given = query_mean(scores), scores.lengths, rows, *lists
    mass = unlisted_mass(*given, backend="auto" if backend == "cuda" else backend)  # it has no kernel in CUDA C++
    weights = fit.weights.unflatten(1, (rows.shape[1], -1))[:, None]  # [L, 1, Hs, Hq / Hs]
    return Unlisted(values=fit.values, shares=(weights * mass[..., None]).clamp(max=1).flatten(2))


def top_k(budget: Budget, lengths: Tensor, shares: Shares | None = None) -> Tensor | None:
    """Tokens each list may keep: ceil(keep * length), all of a sequence shorter than min_context. lengths [B] -> [B] int64.

    None when the budget is a share of the mass (top-p). `shares` stand in place of the budget's.
    """
    if budget.keep is None:
        return None
    keep = budget.keep if shares is None else shares.kept
    kept = (lengths.double() * keep - 1e-9).ceil().long()  # 1e-9: 0.1 * 30 must not become 4 by rounding
    return torch.where(lengths < budget.min_context, lengths, kept)


def top_p(budget: Budget, lengths: Tensor, shares: Shares | None = None) -> Tensor | None:
    """Share of the mass each list must hold; 1, which keeps everything, below min_context. lengths [B] -> [B] fp32.

    None when the budget is a share of the tokens (top-k). `shares` stand in place of the budget's.
    """
    if budget.top_p is None:
        return None
    share = torch.full(lengths.shape, budget.top_p, dtype=torch.float32, device=lengths.device)
    if shares is not None:
        share = shares.kept.float()
    return share.masked_fill(lengths < budget.min_context, 1.0)


def list_width(
    budget: Budget, size: int, forced: int, device: torch.device, factor: float = 1.0, shares: Shares | None = None
) -> int | None:
    """Padded length M of lists over `size` tokens, known on the host, so that selecting need not wait.

    `forced`, `factor`: see `longest_list`. None, the longest list, on the CPU, where nothing waits.
    """
    if device.type == "cpu":
        return None
    return longest_list(budget, size, forced, factor, None if shares is None else shares.most)


def longest_list(budget: Budget, size: int, forced: int, factor: float = 1.0, share: float | None = None) -> int:
    """A bound on the length of lists over `size` tokens; `forced`: sinks + recent of the method.

    `factor`: what the longest list has beside these, in terms of an equal part. `share` stands in place of the budget's.
    """
    if budget.keep is None:
        return size  # a share of the mass has no smaller bound
    kept = math.ceil(size * (budget.keep if share is None else share))
    if factor > 1:
        kept += math.ceil((factor - 1) * max(kept - forced, 0)) + 1
    return max(1, min(size, max(kept, budget.min_context - 1, forced)))
