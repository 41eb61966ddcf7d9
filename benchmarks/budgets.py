"""Budgets by layer and head, at equal bytes: does one number of tokens for all lists waste reads?

Lists are those of method `outrider`: the tokens a KV head's draft heads look at most, sinks and recent ones always among them.
What differs is how many each list gets of one total: as many as any other (flat), as many as hold one share of the draft's
mass, as a calibration text says (fitted), or as the draft's masses of the round itself say, across lists.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div

from benchmarks.given import Document, Given, Note
from outrider.config import Budget
from outrider.eval.facts_task import Question
from outrider.guidance.budgets import output_errors, rank, water_fill
from outrider.ops import attention_mass, sparse_attention
from outrider.types import Lists, Selection

EVERY = 8  # rounds, of which one says how much of the dense target's attention lists hold
# shares of the cached tokens that calibration tries for a list: all at once, or one list at a time (KL)
SHARES = (0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.045, 0.07, 0.1, 0.15, 0.25, 0.4, 1.0)
KL_SHARES = (0.005, 0.01, 0.02, 0.05, 0.12, 0.3, 1.0)
WEIGHED = 0.02  # in both: where one KL a list says what an error of its output costs


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """A round's cached tokens in the order in which every list takes them."""

    order: Tensor  # [L, Hkv, n] int32: first those that every list holds, then by the draft's mass
    mass: Tensor  # [L, Hkv, n] fp32: that mass, in the same order
    forced: int  # tokens that every list holds

    @classmethod
    def of(cls, given: Given, budget: Budget) -> Ranked:
        order = rank(given.mass, given.length, budget.sinks, budget.recent)
        forced = min(budget.sinks + budget.recent, given.length)
        return cls(order=order.int(), mass=given.mass.gather(-1, order), forced=forced)

    @property
    def length(self) -> int:
        return self.mass.shape[-1]

    def held(self) -> Tensor:
        """[L, Hkv, n] fp64: the share of a list's mass that it holds with one token, two, ..."""
        held = self.mass.cumsum(-1, dtype=torch.float64)
        return held / held[..., -1:]

    def total(self, keep: float) -> int:
        """Tokens of all lists together, where each flat one has ceil(keep n)."""
        return self.mass.shape[:2].numel() * max(math.ceil(self.length * keep - 1e-9), self.forced)

    def select(self, counts: Tensor, layers: Sequence[int]) -> Selection:
        """The first `counts` [len(layers), Hkv] tokens of these layers."""
        listed = torch.arange(int(counts.max())) < counts[..., None]
        places = self.order[list(layers), :, : listed.shape[-1]].masked_fill(~listed, torch.iinfo(torch.int32).max)
        indices = places.sort(-1).values.masked_fill(~listed, -1)
        return Selection(
            layers=tuple(layers),
            indices=indices[:, None],
            counts=counts[:, None].int(),
            lengths=torch.tensor([self.length]),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What calibration finds; curves say what a list of each of some shares of the tokens does, all others being dense."""

    shares: dict[tuple[str, float], Tensor]  # by objective and budget: of each list [L, Hkv], whose mean is the budget
    top_p: dict[float, float]  # by budget: the share of the draft's mass at which lists have that mean length
    weights: dict[float, Tensor]  # by budget: [L, Hkv] KL over the square of the draft's mass that a flat list leaves out


Counts = Callable[[Ranked, float, Fit], Tensor]  # of a round, for a budget -> [L, Hkv]


def flat(ranked: Ranked, keep: float, fit: Fit) -> Tensor:
    shape = ranked.mass.shape[:2]
    return torch.full(shape, ranked.total(keep) // shape.numel())


def one_share(ranked: Ranked, keep: float, fit: Fit) -> Tensor:
    """The fewest tokens that hold the calibrated share of each list's mass (top-p)."""
    return holding(ranked, fit.top_p[keep])


def holding(ranked: Ranked, share: float) -> Tensor:
    return (1 + (ranked.held() < share).sum(-1)).clamp(ranked.forced, ranked.length)


def fitted(ranked: Ranked, keep: float, fit: Fit, objective: str) -> Tensor:
    """Whole numbers near the fitted shares of the tokens, with the exact total."""
    exact = (fit.shares[objective, keep].double() * ranked.length).clamp(ranked.forced, ranked.length)
    counts = exact.floor().long()
    while left := ranked.total(keep) - int(counts.sum()):
        room = counts < ranked.length if left > 0 else counts > ranked.forced
        gap = ((exact - counts) * (1 if left > 0 else -1)).masked_fill(~room, -torch.inf)
        chosen = gap.flatten().topk(min(abs(left), int(room.sum()))).indices
        counts.view(-1)[chosen] += 1 if left > 0 else -1
    return counts


def by_value(
    ranked: Ranked, keep: float, fit: Fit, value: Callable[[Ranked, Tensor], Tensor], by_layer: bool = False
) -> Tensor:
    """The tokens of the highest value over all lists (or those of a layer), beside what every list holds.

    `value` [L, Hkv, n], of the tokens in order and a list's weights [L, Hkv, 1], must not grow along a list.
    """
    values = value(ranked, fit.weights[keep][..., None])[..., ranked.forced :]
    layers, heads = values.shape[:2]
    groups = values.reshape(layers if by_layer else 1, -1)
    extra = ranked.total(keep) // len(groups) - groups.shape[1] // values.shape[2] * ranked.forced
    owners = groups.topk(extra, dim=1, sorted=False).indices // values.shape[2]
    counts = torch.stack([row.bincount(minlength=layers * heads // len(groups)) for row in owners])
    return counts.view(layers, heads) + ranked.forced


def mass(ranked: Ranked, weights: Tensor) -> Tensor:
    """One threshold on the mass: the least mass left out, of all lists together."""
    return ranked.mass


def least_held(ranked: Ranked, weights: Tensor) -> Tensor:
    """One share of the mass for all lists of the round: the least mass left out by the list that leaves out most."""
    return 1 - ranked.held()


def squares(ranked: Ranked, weights: Tensor) -> Tensor:
    """The least sum of weighted squares of what each list leaves out."""
    whole = ranked.mass.double()
    after = whole.sum(-1, keepdim=True) - whole.cumsum(-1)
    return whole * (2 * after + whole) * weights


VARIANTS: dict[str, Counts] = {
    "flat": flat,
    "top-p": one_share,
    "top-p of the round": partial(by_value, value=least_held),
    "fitted to recall": partial(fitted, objective="recall"),
    "fitted to outputs": partial(fitted, objective="output"),
    "fitted to weighted outputs": partial(fitted, objective="weighted output"),
    "fitted to KL": partial(fitted, objective="kl"),
    "fitted to KL, by layer": partial(fitted, objective="kl by layer"),
    "threshold by layer": partial(by_value, value=mass, by_layer=True),
    "threshold": partial(by_value, value=mass),
    "weighted squares": partial(by_value, value=squares),
}


def best_shares(tried: Sequence[float], costs: Tensor, keep: float) -> Tensor:
    """Shares [L, Hkv] of the tokens, mean `keep`, none below the least one tried, of the least costs [L, Hkv, len(tried)]."""
    least = tried[0]
    return (least + water_fill([share - least for share in tried], costs.flatten(0, 1), keep - least)).view(costs.shape[:2])


class Reading(Lists):
    """Lists of a number of tokens each, in some layers; the others are dense."""

    attend = staticmethod(sparse_attention)
    made = None

    def __init__(self, ranked: Sequence[Ranked], counts: Callable[[Ranked], Tensor], layers: Sequence[int]) -> None:
        self.ranked, self.counts, self.layers = ranked, counts, layers
        self.shares: list[Tensor] = []  # of the tokens, by round

    def begin(self, given: Given, number: int) -> float:
        ranked = self.ranked[number]
        counts = self.counts(ranked)
        self.selection = ranked.select(counts, self.layers)
        self.shares.append(counts / ranked.length)
        return float(counts.sum())

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        return self.selection.of(layer)


@dataclass(kw_only=True)
class Looking(Lists):
    """Every layer dense; sees what lists would have held of its attention, and how far their output would have been off."""

    ranked: Sequence[Ranked]
    every: int = 1  # rounds, of which one is looked at
    errors: list[Tensor] = field(default_factory=list)  # a round and layer: [Hkv, len(SHARES)]
    held: dict[int, list[Tensor]] = field(default_factory=dict)  # by round, a layer: [Hkv, n], by number of tokens less one
    made = None

    def begin(self, given: Given, number: int) -> float:
        self.number = number
        return 0.0

    def of(self, layer: int, queries: Tensor) -> tuple[None, None]:
        self.layer = layer
        return None, None

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *rest: Any, scale: float, **options: Any) -> Tensor:
        if self.number % self.every == 0:
            self._look(queries[0], keys[0], values[0], scale)
        return sparse_attention(queries, keys, values, *rest, scale=scale, **options)

    def _look(self, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> None:
        """queries [T, Hq, D], keys and values [N, Hkv, D]."""
        ranked, t = self.ranked[self.number], len(queries)
        n, order = ranked.length, ranked.order[self.layer].long()
        counts = [max(math.ceil(share * n), ranked.forced) for share in SHARES]
        self.errors.append(output_errors(queries, keys[: n + t], values[: n + t], order, scale, counts))
        mass = attention_mass(queries[None], keys[None, : n + t], torch.tensor([n]), scale=scale)[0, :, :n]
        held = mass.unflatten(0, (len(order), -1)).mean(1).gather(1, order).cumsum(-1, dtype=torch.float64)
        self.held.setdefault(self.number, []).append((held / held[:, -1:]).float())


def at_shares(curve: Tensor, shares: Sequence[float]) -> Tensor:
    """[..., n], by number of tokens less one -> [..., len(shares)]."""
    n = curve.shape[-1]
    return curve[..., [math.ceil(share * n) - 1 for share in shares]]


def divergence(dense: Tensor, sparse: Tensor) -> float:
    """Mean KL divergence in nats of predictions [n, V] from the dense ones."""
    return float(kl_div(sparse.log_softmax(-1), dense.log_softmax(-1), log_target=True, reduction="batchmean"))


def fit(document: Document, following: list[int], budgets: Sequence[float], note: Note) -> Fit:
    """Fits budgets on rounds over `following`: curves of each list alone, all others dense, whose costs are taken to add up."""
    rounds = document.rounds(following)
    ranked = [Ranked.of(given, Budget()) for given in rounds]
    looking = Looking(ranked=ranked)
    dense = document.run(rounds, looking).logits
    layers, heads, _ = ranked[0].mass.shape
    held = torch.stack([at_shares(torch.stack(one), SHARES) for one in looking.held.values()]).mean(0)
    errors = torch.stack(looking.errors).view(-1, layers, heads, len(SHARES)).mean(0)
    kl = torch.zeros(layers, heads, len(KL_SHARES))
    for number in range(layers * heads):
        note("calibrating", number, layers * heads)
        layer, head = divmod(number, heads)
        for column, share in enumerate(KL_SHARES[:-1]):
            alone = partial(only, head=head, share=share)
            kl[layer, head, column] = divergence(dense, document.run(rounds, Reading(ranked, alone, [layer])).logits)
    worth = kl[..., KL_SHARES.index(WEIGHED)] / errors[..., SHARES.index(WEIGHED)]
    objectives = {
        "recall": (SHARES, 1 - held),
        "output": (SHARES, errors),
        "weighted output": (SHARES, errors * worth[..., None]),
        "kl": (KL_SHARES, kl),
    }
    shares, top_p, weights = {}, {}, {}
    for keep in budgets:
        for name, (tried, costs) in objectives.items():
            shares[name, keep] = best_shares(tried, costs, keep)
        shares["kl by layer", keep] = best_shares(KL_SHARES, kl.sum(1, keepdim=True), keep).expand(layers, heads)
        top_p[keep] = share_holding(ranked, keep)
        left = torch.stack([1 - at_shares(one.held(), [keep])[..., 0] for one in ranked]).mean(0)
        place = min(range(len(KL_SHARES)), key=lambda i: abs(math.log(KL_SHARES[i] / keep)))
        weights[keep] = kl[..., place] / left.square()
    return Fit(shares=shares, top_p=top_p, weights=weights)


def only(ranked: Ranked, head: int, share: float) -> Tensor:
    """[1, Hkv]: one list of a layer has a share of the tokens, the others all."""
    counts = torch.full((1, ranked.mass.shape[1]), ranked.length)
    counts[0, head] = max(math.ceil(ranked.length * share), ranked.forced)
    return counts


def share_holding(ranked: Sequence[Ranked], keep: float) -> float:
    """The share of the mass at which lists have `keep` of the tokens, mean over rounds; by bisection."""
    wanted = sum(one.total(keep) for one in ranked)
    low, high = 0.0, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        many = sum(int(holding(one, middle).sum()) for one in ranked) > wanted
        low, high = (low, middle) if many else (middle, high)
    return low


def compare(
    document: Document,
    following: list[int],
    questions: list[Question],
    cases: Sequence[tuple[str, float]],
    fit: Fit,
    note: Note,
) -> Iterator[dict[str, Any]]:
    """A row for each case (variant, budget): predictions behind `following` against dense ones, facts, what was read."""
    rounds, wanted = document.rounds(following[:-1]), torch.tensor(following[1:])
    ranked = [Ranked.of(given, Budget()) for given in rounds]
    asked = []
    for question, answer in questions:
        given = document.rounds([*question, *answer][:-1])
        asked.append((given, [Ranked.of(one, Budget()) for one in given], torch.tensor(answer)))
    looking = Looking(ranked=ranked, every=EVERY)
    dense, layers = document.run(rounds, looking).logits, document.target.spec.full_layers
    held = {number: torch.stack(one) for number, one in looking.held.items()}
    loss = cross_entropy(dense, wanted)
    for done, (variant, keep) in enumerate(cases):
        note("comparing", done, len(cases))
        counts = partial(VARIANTS[variant], keep=keep, fit=fit)
        reading = Reading(ranked, counts, layers)
        ran = document.run(rounds, reading)
        shares = torch.stack(reading.shares)  # [rounds, L, Hkv]
        recalls = [
            curve.gather(-1, (shares[number] * ranked[number].length).round().long()[..., None] - 1).mean()
            for number, curve in held.items()
        ]
        answers = [(document.run(given, Reading(order, counts, layers)).logits, answer) for given, order, answer in asked]
        yield {
            "budgets": variant,
            "keep": keep,
            "scored": len(wanted),
            "kl": divergence(dense, ran.logits),
            "ppl_dense": float(loss.exp()),
            "delta_percent": float(100 * torch.expm1(cross_entropy(ran.logits, wanted) - loss)),
            "agreement": float((ran.logits.argmax(-1) == dense.argmax(-1)).double().mean()),
            "recalled": sum(bool((logits[-len(answer) :].argmax(-1) == answer).all()) for logits, answer in answers),
            "asked": len(answers),
            "held": float(torch.stack(recalls).mean()),
            "kept_fraction": float(shares.mean()),
            "kv_read_fraction": ran.bytes_read / ran.bytes_dense,
            "longest": float(shares.max()),
            "shares": [[round(share, 4) for share in layer] for layer in shares.mean(0).tolist()],
        }
