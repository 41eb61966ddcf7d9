"""Which draft heads one target layer's heads follow, given the draft layers it may follow.

Rows are draft heads numbered layer * Hd + head, R = Ld * Hd of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

HEAD_MAPS = ("average", "jaccard", "recall", "divergence")
MAX_SOURCES = 4
SHORTLIST = 16
MIN_GAIN = 1e-3


def average(kl: Tensor, allowed: Tensor, draft_heads: int) -> list[list[int]]:
    """All heads of the allowed draft layer of least KL, for one list shared by the whole target layer (SpecAttn).

    kl [Ld], allowed [Ld] bool -> one list of Hd rows.
    """
    layer = int(kl.masked_fill(~allowed, torch.inf).argmin())
    return [list(range(layer * draft_heads, (layer + 1) * draft_heads))]


def best_overlap(table: Tensor, allowed: Tensor) -> list[list[int]]:
    """For every target query head the allowed draft head of highest Jaccard overlap (STS); heads may share one.

    table [Hq, Ld, Hd], allowed [Ld] bool -> Hq lists of one row.
    """
    rows = table.masked_fill(~allowed.view(1, -1, 1), -torch.inf).flatten(1).argmax(1)
    return [[int(row)] for row in rows]


def greedy_mean(draft: Tensor, singles: Tensor, score: Callable[[Tensor], Tensor], max_sources: int = MAX_SOURCES) -> list[int]:
    """The draft heads whose mean of masses scores best, found by adding one head at a time.

    draft [N, C, S]: masses of the candidate heads. singles [C]: the score of each alone. `score` rates merged masses
    [N, c, S] (up to a factor) -> [c], higher is better. Returns indices into the candidates, best first.

    Only the 16 best single heads are tried, and an addition must gain 0.001. An alignment holds the same number G of sources
    for every head and takes their plain mean, so a shorter list is repeated to fill it (`repeated`), which leaves its mean
    unchanged only if its size divides G. Hence sizes are divisors of `max_sources` (1, 2 or 4), and a found third head that
    no fourth follows is dropped again.
    """
    shortlist = singles.topk(min(SHORTLIST, len(singles))).indices
    best = singles[shortlist[0]]
    path = [0]  # positions in the shortlist
    masses = draft[:, shortlist]
    merged = masses[:, 0]
    while len(path) < min(max_sources, len(shortlist)):
        scores = score(merged.unsqueeze(1) + masses)
        scores[path] = -torch.inf
        place = int(scores.argmax())
        if scores[place] - best < MIN_GAIN:
            break
        best = scores[place]
        path.append(place)
        merged = merged + masses[:, place]
    size = max(d for d in range(1, len(path) + 1) if max_sources % d == 0)
    return shortlist[path[:size]].tolist()


def repeated(rows: list[list[list[int]]]) -> Tensor:
    """Rows per target layer and head [Lt][Hs][g], g varying -> [Lt, Hs, G] int64 with the same means: each list repeats.

    G is the largest g; every g must divide it.
    """
    width = max(len(head) for layer in rows for head in layer)
    assert all(width % len(head) == 0 for layer in rows for head in layer), "sizes must divide the largest"
    return torch.tensor([[head * (width // len(head)) for head in layer] for layer in rows])
