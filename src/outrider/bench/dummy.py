"""Cases with dummy weights: noise in place of weights and of a prefill, and scripted agreement between draft and target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from outrider.bench.cases import Case, Pair
from outrider.bench.floors import Weights
from outrider.bench.prompts import random_prompts
from outrider.bench.workload import DTYPES, Workload
from outrider.decoding.confirmation import tail
from outrider.decoding.rounds import Inputs
from outrider.decoding.sampling import greedy
from outrider.guidance.budgets import SHARES
from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.models.dummy import dummy_model
from outrider.models.ranks import ALONE, Ranks
from outrider.ops.token_verify import Verified
from outrider.types import Alignment, DraftTrace, ListCosts, UnlistedFit

GOLDEN = (5**0.5 - 1) / 2
MOST_ROWS = 1024  # of a batch


@dataclass(frozen=True, slots=True, eq=False)
class ScriptedJudge:
    """Accepts drafted tokens at given rates, in place of the engine's `judge`. Never waits for the device.

    The numbers that decide are evenly spread (multiples of the golden ratio), so that few rounds already have the rates.
    """

    rates: Tensor  # [K] fp32, on the device: share of rounds in which drafted token i and all before it pass
    judged: Tensor = field(init=False)  # [1] fp64: rows so far

    def __post_init__(self) -> None:
        object.__setattr__(self, "judged", torch.zeros(1, dtype=torch.float64, device=self.rates.device))

    def __call__(self, trace: DraftTrace, logits: Tensor, inputs: Inputs) -> Verified:
        """logits [B, K + 1, V] -> accepted [B] and the target's own next token [B]. Without drafted tokens, K = 0."""
        k = trace.tokens.shape[1]
        rows = torch.arange(len(trace.tokens), device=self.rates.device)
        numbers = (self.judged + rows + 0.5) * GOLDEN % 1  # one decides for all positions of a row
        self.judged.add_(len(rows))
        accepted = (numbers[:, None] < self.rates[:k]).sum(-1)
        return Verified(accepted, greedy(logits).gather(1, accepted[:, None])[:, 0])


@dataclass(frozen=True, slots=True, eq=False)
class ScriptedAgreement:
    """Confirms tentative tokens at a given rate, in place of the engine's `judge` of these, by numbers as evenly spread."""

    rate: float  # chance that a tentative token passes where all before it do
    drafted: Tensor  # fp32: share of blocks in which drafted token i passes, of those whose tentative tokens all pass
    judged: Tensor  # [rows] fp64: tentative tokens of each row so far, those behind a rejected one left out
    passed: Tensor  # [rows] fp64: blocks whose tentative tokens have all passed

    @classmethod
    def at(cls, rate: float, drafted: tuple[float, ...], rows: int, device: torch.device) -> ScriptedAgreement:
        """For batches of up to `rows`, each of which begins with a number of its own; `drafted`: see `ScriptedJudge`.

        More tokens are drafted here than in a round: behind the last of these rates they fall on as there, to 0 at least.
        """
        begin = torch.arange(rows, dtype=torch.float64, device=device)
        last, before = drafted[-1], drafted[-2] if len(drafted) > 1 else 1.0
        further = (max(last - (before - last) * at, 0.0) for at in range(1, 1 + tail(len(drafted)) - len(drafted)))
        return cls(rate, torch.tensor([*drafted, *further], device=device), 1000 * begin, 1000 * begin)

    def __call__(self, trace: DraftTrace, logits: Tensor, inputs: Inputs) -> Verified:
        """logits [B, W, V] over W - 1 tokens, tentative, drafted and filler -> accepted [B] and the target's next token [B]."""
        tokens, judged, blocks = trace.tokens, self.judged[: len(logits)], self.passed[: len(logits)]
        assert trace.tentative is not None
        place = torch.arange(tokens.shape[1], device=logits.device)
        numbers = (judged[:, None] + place + 0.5) * GOLDEN % 1
        tentative = place < trace.tentative[:, None]
        stand = ((numbers < self.rate) & tentative).long().cumprod(-1).sum(-1)
        judged += torch.minimum(stand + 1, trace.tentative)
        whole = stand == trace.tentative
        behind = ((blocks + 0.5) * GOLDEN % 1)[:, None] < self.drafted  # one number decides for all positions
        accepted = stand + whole * torch.minimum(behind.sum(-1), (tokens >= 0).sum(-1) - trace.tentative)
        blocks += whole
        return Verified(accepted, greedy(logits).gather(1, accepted[:, None])[:, 0])


def read_noise(model: LanguageModel, cache: KVCache, tokens: Tensor, stop: int) -> None:
    """Fill the rows of a chunk `tokens` [B, T], which ends at row `stop`, with noise; in place of the engine's `read`."""
    rows = slice(stop - tokens.shape[1], stop)
    for layer in range(len(cache.layers)):
        for stored in (cache.keys(layer)[:, rows], cache.values(layer)[:, rows]):
            stored.copy_(torch.randn(stored.shape, dtype=model.spec.dtype, device=stored.device))  # also as fp8
    cache.advance(tokens.shape[1])


def random_alignment(target: ModelSpec, draft: ModelSpec, seed: int = 0) -> Alignment:
    """A random draft layer and head for every target layer and query head, a value of zeros for unlisted tokens, random costs.

    With these, lists differ in length.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = len(target.layers), target.full_shape.query_heads, 1
    layers = torch.randint(len(draft.layers), shape, generator=generator)
    heads = torch.randint(draft.full_shape.query_heads, shape, generator=generator)
    values = torch.zeros(shape[0], target.full_shape.kv_heads, target.full_shape.head_dim)
    fit = UnlistedFit(values=values, weights=torch.full(shape[:2], 0.5))
    weights = torch.rand(shape[0], target.full_shape.kv_heads, 1, generator=generator, dtype=torch.float64)
    shares = torch.tensor(SHARES, dtype=torch.float64)
    costs = ListCosts(shares=SHARES, values=(0.2 + weights) * (1 - shares.sqrt()))
    return Alignment(sources=torch.stack([layers, heads], dim=-1), costs=costs, unlisted={"outrider": fit})


def dummy_models(
    pair: Pair, device: torch.device, ranks: Ranks = ALONE, draft_ranks: Ranks = ALONE
) -> tuple[LanguageModel, LanguageModel]:
    """Target and draft, of each the part of this rank: bf16 on a GPU, fp32 on a CPU."""
    dtype = getattr(torch, DTYPES[device.type])
    return (
        dummy_model(pair.target, name=f"{pair.name} target", dtype=dtype, device=device, ranks=ranks),
        dummy_model(pair.draft, name=f"{pair.name} draft", dtype=dtype, device=device, ranks=draft_ranks),
    )


def dummy_workloads(
    cases: Sequence[Case],
    rates: tuple[float, ...],
    device: torch.device,
    agreement: float = 1.0,
    ranks: Ranks = ALONE,
    draft_ranks: Ranks = ALONE,
) -> list[Workload]:
    """The cases of one pair, on the same models. `rates` and `agreement` are those of the two scripts; ranks: see
    `dummy_models`."""
    target, draft = dummy_models(cases[0].pair, device, ranks, draft_ranks)
    judge = ScriptedJudge(torch.tensor(rates, device=device))
    return [
        Workload(
            name=case.name,
            target=target,
            draft=draft,
            weights=(Weights.of(target), Weights.of(draft)),
            alignment=random_alignment(target.spec.whole, draft.spec.whole),
            prompts=random_prompts(case.context, case.batch, target.spec.vocabulary),
            rates=rates,
            agreement=agreement,
            seams={"read": read_noise, "judge": judge, "confirming": ScriptedAgreement.at(agreement, rates, MOST_ROWS, device)},
        )
        for case in cases
    ]
