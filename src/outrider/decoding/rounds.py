"""What a round needs from the host, and what the host wants back: one small copy each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.decoding.drafting import Behind
from outrider.decoding.guard import turn_of
from outrider.decoding.noise import Noise
from outrider.decoding.sampling import Sampling, all_greedy, any_filtered, distributions, greedy, in_parts
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import Listed
from outrider.models import KVCache, LanguageModel
from outrider.models.ranks import Ranks
from outrider.ops import token_verify
from outrider.ops.token_verify import Verified
from outrider.types import DraftTrace, Lists, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundKind:
    """What the host decides about a round: shapes and branches. Rounds of one kind differ in numbers alone."""

    rows: int  # B: the running sequences, and idle rows that round their number up to a power of two
    k: int  # K: drafted tokens; 0: the target decodes alone
    sparse: bool  # reads lists, as far as the engine is asked to
    greedy: bool  # every row is: distributions are one-hot
    filtered: bool  # some row has a sampling top-k or top-p
    widest: float | None = None  # the largest share of a row's lists; None: all keep what the budget says
    reads_all: bool = False  # the target has no lists, or every row's would hold everything; the draft may have some
    holds: bool = False  # what it brings sequences that are long enough for lists is tentative

    @classmethod
    def of(
        cls, running: list[Sequence], slots: int, *, k: int, sparse: bool, dense_target: bool = False, holds: bool = False
    ) -> RoundKind:
        """The kind of a round of these sequences. In a `sparse` one with a `dense_target` the draft alone reads lists."""
        params = [sequence.params for sequence in running]
        rows = min(slots, 1 << (len(running) - 1).bit_length())
        shares = [sequence.share for sequence in running if sequence.share is not None] if sparse else []
        return cls(
            rows=rows,
            k=k,
            sparse=sparse,
            greedy=all_greedy(params),
            filtered=any_filtered(params),
            widest=max(shares, default=None),
            reads_all=dense_target or (len(shares) == len(running) and min(shares) == 1),
            holds=holds,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the running sequences bring into a round, on the device."""

    pending: Tensor  # [B] int64
    active: Tensor  # [B] int64: 1, or 0 for idle rows, whose caches stay as they are
    draft_uniforms: Tensor  # [B, K] fp64
    verify_uniforms: Tensor  # [B, K + 1] fp32
    sampling: Sampling
    shares: Tensor | None = None  # [B] fp64: what lists keep of each row; None: as the budget says
    audited: Tensor | None = None  # [B] fp64: 1 + the turn in rows that are to be audited, else 0
    noise: Noise | None = None  # by which draft and target choose; None: they draw by the uniforms
    previous: Tensor | None = None  # [B] int64: the last cached token; None: the draft's cache never lacks it

    def behind(self, cache: KVCache) -> Behind | None:
        """What the target's cache holds, for a draft that may lack the last token of it."""
        return None if self.previous is None else Behind(self.previous, cache.lengths)


class InputBuffer:
    """The rows of up to `slots` sequences, on host and device, as doubles, which hold tokens and parameters exactly.

    The pending tokens never leave the device, nor those before them: a round puts them where the next one finds them.
    """

    PARAMETERS = 7  # active, temperature, top-k, top-p, key of the noise, share, audited; random numbers behind them

    def __init__(
        self,
        slots: int,
        draft_tokens: int,
        device: torch.device,
        *,
        common_noise: bool = False,
        share: float = 1.0,
        lags: bool = False,
    ) -> None:
        """With `common_noise` draft and target choose by the same noise. `share` is what the budget lets lists keep. A draft
        that `lags` may lack the last cached token."""
        self.k, self.common_noise, self._share = draft_tokens, common_noise, share
        self.pending = torch.zeros(slots, dtype=torch.int64, device=device)
        self.previous = torch.zeros_like(self.pending) if lags else None
        shape = slots, self.PARAMETERS + 2 * draft_tokens + 1
        # two, in turn: the copy of one round may still wait for the round before when the next one is filled in
        self._hosts = [torch.zeros(shape, dtype=torch.float64, pin_memory=device.type == "cuda") for _ in range(2)]
        self._device = torch.zeros(shape, dtype=torch.float64, device=device)

    def begin(self, slot: int, sequence: Sequence) -> None:
        """A sequence whose prompt is cached runs there from now on."""
        self.pending[slot] = sequence.pending
        if self.previous is not None:
            self.previous[slot] = sequence.prompt[-2] if len(sequence.prompt) > 1 else 0

    def move(self, source: int, slot: int) -> None:
        """A sequence changes its slot."""
        for stored in (self.pending, self.previous):
            if stored is not None:
                stored[slot] = stored[source]

    def load(self, running: list[Sequence], rows: int, audited: list[bool]) -> None:
        """Put the next round of the sequences into the first rows, some to be `audited`; draws their random numbers."""
        host = self._hosts[0]
        self._hosts.reverse()
        host.zero_()
        for row, sequence in enumerate(running):
            params = sequence.params
            share = self._share if sequence.share is None else sequence.share
            turn = audited[row] * (1 + turn_of(sequence))
            numbers = (1.0, params.temperature, params.top_k, params.top_p, sequence.key, share, turn)
            host[row, : self.PARAMETERS] = torch.tensor(numbers, dtype=torch.float64)
            host[row, self.PARAMETERS :] = sequence.uniforms(2 * self.k + 1)
        self._device[:rows].copy_(host[:rows], non_blocking=True)

    def unpack(self, kind: RoundKind, lengths: Tensor) -> Inputs:
        """The first rows, typed; `lengths` [B] are cached. Part of a round: waits for nothing."""
        active, temperature, top_k, top_p, keys, shares, audited = self._device[: kind.rows, : self.PARAMETERS].unbind(1)
        uniforms, k = self._device[: kind.rows, self.PARAMETERS :], kind.k
        return Inputs(
            pending=self.pending[: kind.rows],
            active=active.long(),
            draft_uniforms=uniforms[:, :k],
            verify_uniforms=uniforms[:, k : 2 * k + 1].float(),
            sampling=Sampling(
                temperature=temperature.float(),
                top_k=top_k.long(),
                top_p=top_p.float(),
                greedy=kind.greedy,
                filtered=kind.filtered,
            ),
            shares=None if kind.widest is None else shares,
            audited=audited,
            noise=Noise(keys=keys.long(), first=lengths + 1) if self.common_noise else None,
            previous=None if self.previous is None else self.previous[: kind.rows],
        )


Judge = Callable[[DraftTrace, Tensor, Inputs], Verified]  # of the drafted tokens, by the target's logits [B, K + 1, V]


def judge(trace: DraftTrace, logits: Tensor, inputs: Inputs) -> Verified:
    """Speculative sampling: how many drafted tokens pass, and the recovered or bonus token."""
    if trace.probs is None:  # nothing was drawn but by the target's own noise: a token passes where the target has the same
        choices = choose(logits, inputs)
        accepted = (trace.tokens == choices[:, :-1]).long().cumprod(-1).sum(-1)
        return Verified(accepted, choices.gather(1, accepted[:, None])[:, 0])
    return token_verify(trace.tokens, trace.probs, distributions(logits, inputs.sampling), inputs.verify_uniforms)


def choose(logits: Tensor, inputs: Inputs) -> Tensor:
    """What the target chooses, logits [B, T, V] -> [B, T]: the most probable tokens, or those that the noise makes of them."""
    if inputs.sampling.greedy or inputs.noise is None:
        return greedy(logits)
    return inputs.noise.choose(distributions(logits, inputs.sampling))


def propose_nothing(inputs: Inputs, vocabulary: int) -> DraftTrace:
    """The trace of a round without a draft: K = 0."""
    rows, device = inputs.pending.shape[0], inputs.pending.device
    unneeded = inputs.sampling.greedy or inputs.noise is not None
    probs = None if unneeded else torch.zeros(rows, 0, vocabulary, device=device)
    return DraftTrace(tokens=torch.zeros(rows, 0, dtype=torch.int64, device=device), probs=probs, queries=())


def verify(target: LanguageModel, cache: KVCache, pending: Tensor, drafted: Tensor, selection: Lists | None) -> Tensor:
    """The target's logits [B, K + 1, V] over the pending and the drafted tokens, over the lists or, without any, densely."""
    return target.forward(torch.cat([pending[:, None], drafted], dim=1), cache, selection=selection).logits


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a round leaves to the host.

    *accepted* tokens are the longest prefix of the drafted ones that passes; then one more token is emitted: *recovered*
    where a drafted token was rejected, *bonus* where all K passed.
    """

    numbers: Tensor  # [B, K + 5] fp64: K drafted tokens, how many are accepted, the next token, 1 if logits are finite, Listed
    selection: Selection | None  # the lists that the target read

    @property
    def emitted(self) -> tuple[Tensor, Tensor]:
        """How many tokens each row emits, [B] int64, and which, [B, K + 1]; behind the last of them it stands again."""
        drafted, accepted, following = self.numbers[:, :-3].long().split([self.numbers.shape[1] - 5, 1, 1], dim=1)
        place = torch.arange(drafted.shape[1] + 1, device=drafted.device)
        return accepted[:, 0] + 1, torch.where(place < accepted, torch.cat([drafted, following], dim=1), following)


@dataclass(frozen=True, slots=True, kw_only=True)
class RowOutcome:
    """What a round leaves to one sequence, on the host."""

    drafted: list[int]
    tokens: list[int]  # emitted: accepted ones, then the recovered or bonus token
    finite: bool  # every logit of the target was a number
    listed_tokens: float  # see Listed
    listed_rows: float

    @classmethod
    def of(cls, numbers: list[float]) -> RowOutcome:
        """From a row of `Outcome.numbers`."""
        *drafted, accepted, following, finite, tokens, rows = numbers
        emitted = [*drafted[: int(accepted)], following]
        return cls(
            drafted=[int(x) for x in drafted],
            tokens=[int(x) for x in emitted],
            finite=finite == 1,
            listed_tokens=tokens,
            listed_rows=rows,
        )


def accept(
    trace: DraftTrace,
    logits: Tensor,
    inputs: Inputs,
    selection: Selection | None,
    target: LanguageModel,
    caches: list[KVCache],
    judge: Judge,
) -> Outcome:
    """Judge the drafted tokens by the target's logits [B, K + 1, V]; bring the caches, the target's first, to what passed.

    Where ranks share the target, the first one's judgement counts, and `Listed` is of the lists of all.
    """
    verified = judge(trace, logits, inputs)
    finite = in_parts(logits).amax(-1).amax(-1).isfinite().all(-1)
    if selection is None:
        listed = torch.zeros(2, *finite.shape, dtype=torch.float64, device=finite.device).unbind()
    else:
        counted = Listed.of(selection, target.spec, caches[0].capacity)
        listed = counted.tokens, counted.rows
    accepted, following = verified.accepted, verified.next_token
    columns = [accepted, following, finite, *listed]
    numbers = torch.cat([trace.tokens.double(), torch.stack([column.double() for column in columns], dim=1)], dim=1)
    if target.ranks.size > 1:
        numbers = _of_all_ranks(numbers, target.ranks)
        accepted, following = numbers[:, -5:-3].long().unbind(1)
    if inputs.previous is not None:
        read = torch.cat([inputs.pending[:, None], trace.tokens], dim=1)
        inputs.previous.copy_(read.gather(1, accepted[:, None])[:, 0])
    inputs.pending.copy_(following)
    caches[0].advance((accepted + 1) * inputs.active)
    for cache in caches[1:]:
        cache.truncate(torch.minimum(caches[0].lengths, cache.lengths))
    return Outcome(numbers=numbers, selection=selection)


def _of_all_ranks(numbers: Tensor, ranks: Ranks) -> Tensor:
    """`Outcome.numbers` as the first rank has them, but for `Listed`: its tokens are averaged over heads, its rows summed."""
    if not ranks.leads:
        numbers[:, :-2] = 0
    numbers[:, -2] /= ranks.size
    return ranks.sum(numbers)
