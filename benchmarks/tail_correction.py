"""Corrections for what token lists leave out, at equal bytes: fewer listed tokens, and something about the rest in their place.

A list of k tokens leaves out N - k with some softmax mass, and renormalising makes the listed tokens stand in for them. A
correction gives up listed tokens for an estimate of the rest (the tail), of as many bytes: tail rows sampled with known
probabilities and weighted by their inverse, or means and products of all cached rows, kept up as tokens are cached, from which
the listed rows, read anyway, are subtracted. Rounds are those of `decoding/teacher_forced.py`, with the attention of listed
layers replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.given import Document, Given, Note
from outrider.config import Budget
from outrider.errors import OptionError
from outrider.eval.facts_task import Question
from outrider.types import Lists

LISTS = ("draft", "oracle")
EVERY = 8  # rounds, of which one is also attended to densely, for the error of a layer's output

# of the draft's mass outside a list: what the tail's share is a linear combination of
FEATURES: dict[str, Callable[[Tensor], list[Tensor]]] = {
    "fixed": lambda unlisted: [torch.ones_like(unlisted)],
    "draft": lambda unlisted: [torch.ones_like(unlisted), unlisted],
    "proportional": lambda unlisted: [unlisted],
}
SEVERAL = (0.02, 0.05, 0.1, 0.2)  # budgets that one fit can be made for

# what a summary reads a KV head, in rows of keys and values of head dim 64
SUMMARY_ROWS = {
    None: 0.0,
    "constant": 0.0,
    "learned": 0.0,
    "mean": 0.5,
    "all": 0.5,
    "bound": 0.5,
    "centroid": 1.0,
    "diagonal": 1.5,
    "covariance": 33.0,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Correction:
    """What is read in place of some listed tokens. Sampling and a summary exclude each other."""

    sampled: float = 0.0  # share of the budget that goes to sampled tail tokens
    by: str = "uniform"  # probabilities of the tail's tokens: uniform, pages (uniform in each) or draft (its mass)
    power: float = 1.0  # of the draft's mass
    blend: float = 0.0  # share of the sample that is spread evenly, whatever the mass
    shrink: float = 1.0  # weights are the inverse probabilities to this power; 0: no weights
    # of the tail: mean (value), all (listed ones in it), constant (all of the text calibrated on), learned (what fits best
    # there, by query head), centroid (mean key and value), diagonal or covariance (of keys, besides), bound (the mean with the
    # tail's true share, which nobody knows)
    summary: str | None = None
    fitted: str | None = None  # the summary's weight, by head: one of FEATURES, or offset (to the log mass)
    fitted_at: tuple[float, ...] = ()  # the budgets fitted for, in one; none: that of the case

    page: int | None = None  # the mean is that of pages of so many tokens, weighted by the draft's mass; None: of all alike

    def rows(self, length: int) -> float:
        """Bytes of the summary of one KV head with `length` tokens, in rows of keys and values of head dim 64."""
        rows = SUMMARY_ROWS[self.summary]
        return rows if self.page is None else rows * math.ceil(length / self.page)


CORRECTIONS = {
    "none": Correction(),
    **{f"uniform {share:.0%}": Correction(sampled=share) for share in (0.1, 0.25, 0.5)},
    "pages 25%": Correction(sampled=0.25, by="pages"),
    **{f"draft {share:.0%}": Correction(sampled=share, by="draft") for share in (0.1, 0.25, 0.5, 0.9)},
    **{f"draft {share:.0%}, root": Correction(sampled=share, by="draft", power=0.5) for share in (0.25, 0.5)},
    **{f"draft {share:.0%}, weights root": Correction(sampled=share, by="draft", shrink=0.5) for share in (0.25, 0.5, 0.9)},
    **{f"draft {share:.0%}, no weights": Correction(sampled=share, by="draft", shrink=0.0) for share in (0.25, 0.5)},
    "mean, fixed share": Correction(summary="mean", fitted="fixed"),
    "mean, share from the draft": Correction(summary="mean", fitted="draft"),
    "mean, true share": Correction(summary="bound"),
    "mean of all, share from the draft": Correction(summary="all", fitted="draft"),
    "constant, share from the draft": Correction(summary="constant", fitted="draft"),
    "constant, fixed share": Correction(summary="constant", fitted="fixed"),
    "mean, proportional share": Correction(summary="mean", fitted="proportional"),
    "constant, proportional share": Correction(summary="constant", fitted="proportional"),
    "learned, proportional share": Correction(summary="learned", fitted="proportional"),
    "learned, fixed share": Correction(summary="learned", fitted="fixed"),
    "constant, share from the draft, all budgets": Correction(summary="constant", fitted="draft", fitted_at=SEVERAL),
    "constant, proportional share, all budgets": Correction(summary="constant", fitted="proportional", fitted_at=SEVERAL),
    "learned, proportional share, all budgets": Correction(summary="learned", fitted="proportional", fitted_at=SEVERAL),
    **{f"pages of {page}, fixed share": Correction(summary="mean", fitted="fixed", page=page) for page in (1024, 256, 64)},
    **{
        f"pages of {page}, share from the draft": Correction(summary="mean", fitted="draft", page=page)
        for page in (1024, 256, 64)
    },
    "pages of 256, true share": Correction(summary="bound", page=256),
    "draft 50%, mean, fixed share": Correction(sampled=0.5, by="draft", summary="mean", fitted="fixed"),
    "draft 50%, weights root, mean, fixed share": Correction(
        sampled=0.5, by="draft", shrink=0.5, summary="mean", fitted="fixed"
    ),
    "centroid": Correction(summary="centroid"),
    "centroid, offset": Correction(summary="centroid", fitted="offset"),
    "diagonal, offset": Correction(summary="diagonal", fitted="offset"),
    "covariance, offset": Correction(summary="covariance", fitted="offset"),
}


@dataclass(kw_only=True)
class Fit:
    """What calibration finds for one correction and budget, by layer: sums over queries, by query head."""

    sums: dict[int, list[Tensor]] = field(default_factory=dict)
    means: dict[int, Tensor] = field(default_factory=dict)  # mean value of the text [Hkv, 1, D]

    def add(self, layer: int, *terms: Tensor) -> None:
        """Adds terms [Hkv, g, T, ...], summed over T."""
        found = [term.sum(2) for term in terms]
        held = self.sums.get(layer)
        self.sums[layer] = found if held is None else [a + b for a, b in zip(held, found, strict=True)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One correction at one budget, with lists by the draft or by the target's own attention ("oracle")."""

    name: str
    keep: float
    lists: str = "draft"

    @property
    def correction(self) -> Correction:
        return CORRECTIONS[self.name]

    def entries(self, length: int) -> int:
        """Listed and sampled tokens among `length` cached ones: what the budget has left beside a summary."""
        return math.ceil(length * self.keep - 1e-9) - math.ceil(self.correction.rows(length))


def check_budgets(cases: Sequence[Case], length: int) -> None:
    """Raise OptionError unless each case can list, behind `length` tokens, all that every list holds, and sample something."""
    least = Budget().sinks + Budget().recent
    for case in cases:
        if case.entries(length) < least + (case.correction.sampled > 0):
            allowed = f"enough for {least} tokens beside what correction {case.name!r} reads of {length}"
            raise OptionError("--keep", case.keep, allowed)


class Reader(Lists):
    """Says that every layer has lists (`types.Lists`), and attends to them with a correction in place of `sparse_attention`."""

    def __init__(self, case: Case, budget: Budget, fit: Fit, seed: int, fitting: bool = False) -> None:
        self.case, self.budget, self.fit, self.fitting = case, budget, fit, fitting
        self.generator = torch.Generator().manual_seed(seed)
        self.errors: dict[int, list[float]] = {}  # by layer: of the rounds compared, relative L2 error of the output
        self.totals: dict[tuple[int, str], tuple[int, Tensor]] = {}  # by layer and kind: cached rows in it, and their sum

    def begin(self, given: Given, number: int) -> float:
        """The next round; returns the cached rows that it reads, of all layers and KV heads, summaries among them."""
        self.given, self.compares = given, number % EVERY == 0
        correction, forced = self.case.correction, self.budget.sinks + self.budget.recent
        rows = self.case.entries(given.length)
        self.listed = max(round(rows * (1 - correction.sampled)), forced)
        self.sampled = rows - self.listed if correction.sampled else 0
        return (self.listed + self.sampled + correction.rows(given.length)) * given.mass.shape[0] * given.mass.shape[1]

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor]:
        self.layer = layer
        none = torch.zeros(1, 1, 0, dtype=torch.int32)
        return none, none.sum(-1)

    def attend(self, queries: Tensor, keys: Tensor, values: Tensor, *_: Any, scale: float, **__: Any) -> Tensor:
        """queries [1, T, Hq, D], keys and values [1, N, Hkv, D] -> [1, T, Hq, D]."""
        n, (t, query_heads, d) = self.given.length, queries.shape[1:]
        k, v = (x[0].transpose(0, 1)[:, : n + t] for x in (keys, values))  # [Hkv, n + T, D]
        q = queries[0].transpose(0, 1).reshape(len(k), -1, d) * scale  # [Hkv, g T, D]
        known = self.fitting or self.compares or self.case.correction.summary == "bound"
        dense = dense_attention(q, k, v, t) if known else None
        mass = self.given.mass[self.layer, :, :n] if self.case.lists == "draft" else own_mass(q, k, t)[:, :n]

        listed = top(mass, self.listed, self.budget)  # [Hkv, k]
        rows, weights = listed, torch.zeros(listed.shape)
        if self.sampled:
            chosen, chance = self._sample(mass, listed)
            rows, weights = torch.cat([rows, chosen], 1), torch.cat([weights, -self.case.correction.shrink * chance.log()], 1)
        rows = torch.cat([rows, torch.arange(n, n + t).expand(len(k), t)], 1)
        logits = q @ take(k, rows).transpose(1, 2)
        logits[..., :-t] += weights[:, None]
        hide(logits, t)
        out = logits.softmax(-1) @ take(v, rows)  # [Hkv, g T, D]
        if self.case.correction.summary is not None:
            unlisted = 1 - mass.gather(1, listed).sum(1) / mass.sum(1)
            out = self._mixed(q, k[:, :n], v[:, :n], mass, listed, unlisted, out, logits.logsumexp(-1), dense)
        if dense is not None and self.compares:
            self.errors.setdefault(self.layer, []).append(float((out - dense[0]).norm() / dense[0].norm()))
        if dense is not None and self.fitting:
            out = dense[0]
        return out.reshape(query_heads, t, d).transpose(0, 1)[None]

    def _sample(self, mass: Tensor, listed: Tensor) -> tuple[Tensor, Tensor]:
        correction, size = self.case.correction, torch.ones_like(mass)
        if correction.by == "draft":
            size = (mass.clamp(min=1e-12) ** correction.power).scatter_(1, listed, 0)
            size = size / size.sum(1, keepdim=True) * (1 - correction.blend) + correction.blend / size.shape[1]
        return sample(size.scatter_(1, listed, 0), self.sampled, correction.by == "pages", self.generator)

    def _mixed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        draft: Tensor,
        listed: Tensor,
        unlisted: Tensor,
        out: Tensor,
        mass: Tensor,
        dense: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        """`out` [Hkv, g T, D], of rows with log mass [Hkv, g T], with a share of the tail's mean value; `out` while fitting."""
        kind, fitted, t = self.case.correction.summary, self.case.correction.fitted, self.given.tokens.shape[1]
        left = k.shape[1] - listed.shape[1]
        mean_value = self._mean_value(v, draft, listed)

        def by_head(x: Tensor) -> Tensor:  # [Hkv, g T, ...] -> [Hkv, g, T, ...]
            return x.unflatten(1, (-1, t))

        def by_query(x: Tensor) -> Tensor:  # [Hkv, g, ...] -> [Hkv, g T, ...]
            return x.repeat_interleave(t, dim=1)

        if fitted in FEATURES:
            features = FEATURES[fitted](unlisted[:, None].expand(mass.shape))
            if dense is not None and self.fitting:
                terms = moments if kind == "learned" else squares
                self.fit.add(self.layer, *map(by_head, terms(features, out, dense[0] - out, mean_value)))
                return out
            if kind == "learned":
                weight, vector = learned(*self.fit.sums[self.layer])
                share = (by_query(weight) * features[0]).clamp(0, 1)
                return torch.lerp(out, by_query(vector), share[..., None])
            share = sum(by_query(weight) * x for weight, x in zip(solved(self.fit.sums[self.layer]), features, strict=True))
            share = torch.as_tensor(share).clamp(0, 1)
        elif dense is not None and kind == "bound":
            share = -torch.expm1(mass - dense[1]).clamp(max=0)
        else:
            mean = self._unlisted("keys", k, listed, row_sum) / left
            guess = (q @ mean.transpose(1, 2))[..., 0] + math.log(left)
            if kind == "diagonal":
                square = self._unlisted("squares", k, listed, lambda x: row_sum(x.square())) / left
                guess += (q * q @ (square - mean.square()).transpose(1, 2))[..., 0] / 2
            elif kind == "covariance":
                products = self._unlisted("products", k, listed, lambda x: x.transpose(1, 2) @ x) / left
                spread = products - mean.transpose(1, 2) @ mean
                guess += ((q @ spread) * q).sum(-1) / 2
            if dense is not None and self.fitting:
                missing = torch.expm1((dense[1] - mass).clamp(min=1e-6)).log() + mass - guess
                self.fit.add(self.layer, by_head(missing), by_head(torch.ones_like(missing)))
                return out
            if fitted == "offset":
                sums, count = self.fit.sums[self.layer]
                guess += by_query(sums / count)
            share = (guess - mass).sigmoid()
        return torch.lerp(out, mean_value.expand_as(out), share[..., None])

    def _mean_value(self, v: Tensor, draft: Tensor, listed: Tensor) -> Tensor:
        """[Hkv, 1, D]: what stands for the tail's values, of cached rows [Hkv, n, D]."""
        kind, page = self.case.correction.summary, self.case.correction.page
        if kind == "constant":
            return self.fit.means.setdefault(self.layer, v.mean(1, keepdim=True))
        if page is not None:
            return paged_mean(v, draft, listed, page)
        if kind == "all":
            listed = listed[:, :0]
        return self._unlisted("values", v, listed, row_sum) / (v.shape[1] - listed.shape[1])

    def _unlisted(self, kind: str, x: Tensor, listed: Tensor, total: Callable[[Tensor], Tensor]) -> Tensor:
        """`total` of the rows [Hkv, n, D] that are not listed: of all, kept up as they come, less that of the listed ones."""
        known, held = self.totals.get((self.layer, kind), (0, torch.zeros(())))
        held = held + total(x[:, known:])
        self.totals[self.layer, kind] = x.shape[1], held
        return held - total(take(x, listed))


def squares(features: list[Tensor], out: Tensor, missing: Tensor, value: Tensor) -> list[Tensor]:
    """Terms [Hkv, g T] of the normal equations of missing [Hkv, g T, D] ~ share (value - out), share linear in the features."""
    x = value - out
    xx, xy = (x * x).sum(-1), (x * missing).sum(-1)
    return [*(a * b * xx for a in features for b in features), *(a * xy for a in features)]


def solved(sums: list[Tensor]) -> list[Tensor]:
    """The weight [Hkv, g] of each feature, from sums of `squares`."""
    n = 1 if len(sums) == 2 else 2  # n n + n sums
    square, right = torch.stack(sums[: n * n], -1).unflatten(-1, (n, n)), torch.stack(sums[n * n :], -1)
    return list(torch.linalg.lstsq(square.double(), right.double()[..., None]).solution[..., 0].float().unbind(-1))


def moments(features: list[Tensor], out: Tensor, missing: Tensor, _: Tensor) -> list[Tensor]:
    """Terms of the same where the value is sought, too, with one feature."""
    f = features[0]
    by_value = [f[..., None] * missing, (f * f)[..., None] * out]
    return [*by_value, f * f, f * (out * missing).sum(-1), f * f * (out * out).sum(-1)]


def learned(y: Tensor, out: Tensor, count: Tensor, out_y: Tensor, out_out: Tensor) -> tuple[Tensor, Tensor]:
    """The weight [Hkv, g] of the feature and the value [Hkv, g, D], from sums of `moments`: a regression with an intercept."""
    count = count.clamp(min=1e-30)
    weight = ((y * out).sum(-1) / count - out_y) / (out_out - (out * out).sum(-1) / count)
    weight = weight.clamp(min=1e-3)
    return weight, out / count[..., None] + y / count[..., None] / weight[..., None]


def take(x: Tensor, rows: Tensor) -> Tensor:
    """[Hkv, n, D], [Hkv, M] -> [Hkv, M, D]."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[2]))


def paged_mean(v: Tensor, mass: Tensor, listed: Tensor, page: int) -> Tensor:
    """[Hkv, 1, D]: the mean value of each page's unlisted rows, weighted by the mass [Hkv, n] of these."""
    heads, n, d = v.shape
    tail = torch.ones_like(mass).scatter_(1, listed, 0)
    pages = torch.arange(n) // page
    size = int(pages[-1]) + 1
    count, weight = (torch.zeros(heads, size).index_add_(1, pages, x) for x in (tail, tail * mass))
    total = torch.zeros(heads, size, d).index_add_(1, pages, v * tail[..., None])
    weight = weight / weight.sum(1, keepdim=True) / count.clamp(min=1)
    return weight[:, None] @ total


def row_sum(x: Tensor) -> Tensor:
    """[Hkv, n, D] -> [Hkv, 1, D]."""
    return x.sum(1, keepdim=True)


def hide(logits: Tensor, t: int) -> None:
    """Logits [Hkv, g T, n + T]: a query does not see the round's tokens behind its own."""
    behind = torch.ones(t, t, dtype=torch.bool).triu(1)
    logits.view(len(logits), -1, t, logits.shape[2])[..., -t:].masked_fill_(behind, -torch.inf)


def dense_attention(q: Tensor, k: Tensor, v: Tensor, t: int) -> tuple[Tensor, Tensor]:
    """Of queries [Hkv, g T, D]: the output, and its log mass [Hkv, g T]."""
    logits = q @ k.transpose(1, 2)
    hide(logits, t)
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def own_mass(q: Tensor, k: Tensor, t: int) -> Tensor:
    """[Hkv, n + T]: the mean softmax mass of queries [Hkv, g T, D]."""
    logits = q @ k.transpose(1, 2)
    hide(logits, t)
    return logits.softmax(-1).mean(1)


def top(mass: Tensor, count: int, budget: Budget) -> Tensor:
    """The `count` tokens with the most mass [..., S], sinks and recent ones among them."""
    forced = mass.clone()
    forced[..., : budget.sinks] = torch.inf
    forced[..., mass.shape[-1] - budget.recent :] = torch.inf
    return forced.topk(min(count, mass.shape[-1]), dim=-1).indices


def sample(size: Tensor, count: int, in_order: bool, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """`count` tokens of each row of `size` [Hkv, S], each with a probability proportional to its size, at most 1.

    Systematic sampling (Madow 1949): exactly `count` tokens, inclusion probabilities exact. `in_order` of position it spreads
    the sample evenly over pages; in random order all pairs can occur. Returns positions and probabilities [Hkv, count].
    """
    n = size.shape[1]
    order = torch.arange(n) if in_order else torch.randperm(n, generator=generator)
    chance = inclusion(size[:, order].double(), count)
    ends = chance.cumsum(1)
    ends *= count / ends[:, -1:]
    points = torch.arange(count) + torch.rand(len(size), 1, generator=generator, dtype=torch.float64)
    found = torch.searchsorted(ends, points, right=True).clamp(max=n - 1)
    return order[found], chance.gather(1, found).float()


def inclusion(size: Tensor, count: int) -> Tensor:
    """Probabilities min(1, c size) [Hkv, S], with c such that they sum to `count`."""
    certain = torch.zeros_like(size, dtype=torch.bool)
    while True:
        rest = size.masked_fill(certain, 0)
        chance = rest * ((count - certain.sum(1, keepdim=True)) / rest.sum(1, keepdim=True).clamp(min=1e-300))
        more = chance >= 1
        if not bool(more.any()):
            return chance.masked_fill(certain, 1)
        certain |= more


def fit(document: Document, following: list[int], cases: Sequence[Case], seed: int, note: Note) -> dict[Case, Fit]:
    """What the cases have to know, from dense rounds over `following`."""
    rounds, fits = document.rounds(following), {case: Fit() for case in cases}
    fitted = [case for case in cases if case.correction.fitted is not None]
    for done, case in enumerate(fitted):
        note("calibrating", done, len(fitted))
        for keep in case.correction.fitted_at or (case.keep,):
            document.run(rounds, Reader(replace(case, keep=keep), Budget(), fits[case], seed, fitting=True))
    return fits


def compare(
    document: Document, following: list[int], questions: list[Question], fits: dict[Case, Fit], seed: int, note: Note
) -> Iterator[dict[str, Any]]:
    """A row for each case: change of perplexity over all of `following` but the first token, facts recalled, error by layer."""
    rounds, wanted = document.rounds(following[:-1]), torch.tensor(following[1:])
    asked = [(document.rounds([*question, *answer][:-1]), torch.tensor(answer)) for question, answer in questions]
    dense = document.run(rounds, None).logits
    loss = cross_entropy(dense, wanted)
    for done, (case, fit) in enumerate(fits.items()):
        note("comparing", done, len(fits))
        reader = Reader(case, Budget(), fit, seed)
        ran = document.run(rounds, reader)
        errors = [sum(found) / len(found) for _, found in sorted(reader.errors.items())]
        answers = [(document.run(question, Reader(case, Budget(), fit, seed)).logits, answer) for question, answer in asked]
        yield {
            "correction": case.name,
            "keep": case.keep,
            "lists": case.lists,
            "scored": len(wanted),
            "ppl_dense": float(loss.exp()),
            "delta_percent": float(100 * torch.expm1(cross_entropy(ran.logits, wanted) - loss)),
            "agreement": float((ran.logits.argmax(-1) == dense.argmax(-1)).double().mean()),
            "recalled": sum(bool((logits[-len(answer) :].argmax(-1) == answer).all()) for logits, answer in answers),
            "asked": len(answers),
            "output_error": sum(errors) / len(errors),
            "output_error_by_layer": errors,
            "kv_read_fraction": ran.bytes_read / ran.bytes_dense,
            "seed": seed,
        }
