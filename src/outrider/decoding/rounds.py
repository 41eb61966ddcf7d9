"""What a round needs from the host, and what the host wants back, in a few small copies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from outrider.decoding.sampling import Sampling, all_greedy, any_filtered, distributions
from outrider.decoding.sequence import Sequence
from outrider.decoding.statistics import Listed
from outrider.models import KVCache, LanguageModel, ModelSpec
from outrider.ops import token_verify
from outrider.types import DraftTrace, Selection


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundKind:
    """What the host decides about a round: shapes and branches. Rounds of one kind differ in numbers alone."""

    rows: int  # B
    guided: bool  # sparse
    greedy: bool  # every row is: distributions are one-hot
    filtered: bool  # some row has a sampling top-k or top-p

    @classmethod
    def of(cls, running: list[Sequence], *, guided: bool) -> RoundKind:
        params = [sequence.params for sequence in running]
        return cls(rows=len(running), guided=guided, greedy=all_greedy(params), filtered=any_filtered(params))


@dataclass(frozen=True, slots=True, kw_only=True)
class Inputs:
    """What the running sequences bring into a round, on the device."""

    pending: Tensor  # [B] int64
    draft_uniforms: Tensor  # [B, K] fp64
    verify_uniforms: Tensor  # [B, K + 1] fp32
    sampling: Sampling


class InputBuffer:
    """The rows of up to `slots` sequences, on host and device, as doubles, which hold tokens and parameters exactly."""

    PARAMETERS = 4  # pending token, temperature, top-k, top-p; random numbers behind them

    def __init__(self, slots: int, draft_tokens: int, device: torch.device) -> None:
        self.k = draft_tokens
        shape = slots, self.PARAMETERS + 2 * draft_tokens + 1
        self._host = torch.zeros(shape, dtype=torch.float64, pin_memory=device.type == "cuda")
        self._device = torch.zeros(shape, dtype=torch.float64, device=device)

    def load(self, running: list[Sequence]) -> None:
        """Put the next round of the sequences into the first rows; draws their random numbers."""
        for row, sequence in enumerate(running):
            params = sequence.params
            numbers = (sequence.pending, params.temperature, params.top_k, params.top_p)
            self._host[row, : self.PARAMETERS] = torch.tensor(numbers, dtype=torch.float64)
            self._host[row, self.PARAMETERS :] = sequence.uniforms(2 * self.k + 1)
        self._device[: len(running)].copy_(self._host[: len(running)], non_blocking=True)

    def unpack(self, kind: RoundKind) -> Inputs:
        """The first rows, typed. Part of a round: waits for nothing."""
        pending, temperature, top_k, top_p = self._device[: kind.rows, : self.PARAMETERS].unbind(1)
        uniforms = self._device[: kind.rows, self.PARAMETERS :]
        return Inputs(
            pending=pending.long(),
            draft_uniforms=uniforms[:, : self.k],
            verify_uniforms=uniforms[:, self.k :].float(),
            sampling=Sampling(
                temperature=temperature.float(),
                top_k=top_k.long(),
                top_p=top_p.float(),
                greedy=kind.greedy,
                filtered=kind.filtered,
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a round leaves to the host.

    *accepted* tokens are the longest prefix of the drafted ones that passes; then one more token is emitted: *recovered*
    where a drafted token was rejected, *bonus* where all K passed.
    """

    drafted: Tensor  # [B, K] int64
    accepted: Tensor  # [B] int64 in 0 .. K
    next_token: Tensor  # [B] int64, recovered or bonus
    listed: Listed | None  # None where the round was dense

    def cpu(self) -> Outcome:
        """On the host; waits for the round."""
        tokens = torch.cat([self.drafted, self.accepted[:, None], self.next_token[:, None]], dim=1).cpu()
        listed = self.listed.cpu() if self.listed is not None else None
        return Outcome(drafted=tokens[:, :-2], accepted=tokens[:, -2], next_token=tokens[:, -1], listed=listed)


def verify(target: LanguageModel, cache: KVCache, pending: Tensor, drafted: Tensor, selection: Selection | None) -> Tensor:
    """The target's logits [B, K + 1, V] over the pending and the drafted tokens, over the lists or, without any, densely."""
    return target.forward(torch.cat([pending[:, None], drafted], dim=1), cache, selection=selection).logits


def accept(
    trace: DraftTrace,
    logits: Tensor,
    inputs: Inputs,
    selection: Selection | None,
    target: ModelSpec,
    target_cache: KVCache,
    draft_cache: KVCache,
) -> Outcome:
    """Speculative sampling, and both caches brought to what was accepted. `logits` [B, K + 1, V] are the target's."""
    verified = token_verify(trace.tokens, trace.probs, distributions(logits, inputs.sampling), inputs.verify_uniforms)
    listed = Listed.of(selection, target, target_cache.capacity) if selection is not None else None
    target_cache.advance(verified.accepted + 1)
    draft_cache.truncate(target_cache.lengths)
    return Outcome(drafted=trace.tokens, accepted=verified.accepted, next_token=verified.next_token, listed=listed)
