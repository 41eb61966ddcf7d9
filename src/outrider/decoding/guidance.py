"""Who chooses tokens in a round of generation: the selectors or the rival that an engine's options ask for."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from outrider.config import EngineConfig, check
from outrider.decoding.confirmation import tail
from outrider.decoding.pair import build_pair_selector, make_rival, rehearse
from outrider.errors import OptionError
from outrider.guidance.rivals import RIVALS, Rival
from outrider.guidance.selectors import SELECTORS
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel, ModelSpec
from outrider.models.quantized_keys import code_bits
from outrider.ops.quantized_keys.layout import BLOCK
from outrider.types import Alignment


@dataclass(frozen=True, slots=True, kw_only=True)
class Guidance:
    """Who chooses tokens in a round, for whom, from which scores. At least one of the three is there."""

    target: Selector | None  # lists for verification; None: dense, or a rival's
    draft: Selector | None  # lists for the next round's drafting; None: dense
    rival: Rival | None = None  # makes lists inside the target's forward
    bits: int | None = None  # of the keys that are scored; None: the cache's own

    @property
    def scores(self) -> bool:
        """Somebody chooses from the draft's scores."""
        return self.target is not None or self.draft is not None

    @property
    def layers(self) -> tuple[int, ...]:
        """The draft layers that are scored."""
        return next((selector.draft_layers for selector in (self.target, self.draft) if selector is not None), ())

    @property
    def per_query(self) -> bool:
        """The round's queries are kept apart."""
        return self.target is not None and self.target.per_query

    def score_rows(self, draft: ModelSpec, t: int) -> int:
        """Rows of masses that scoring `t` queries of one sequence makes."""
        return len(self.layers) * draft.full_shape.query_heads * (t if self.per_query else 1)

    def entries(self, size: int, share: float | None = None) -> int:
        """A bound on the list entries of one sequence of `size` tokens; `share`: of these, the target's lists may keep."""
        owners = (self.target, share), (self.draft, None)
        return sum(selector.entries(size, own) for selector, own in owners if selector is not None)

    @property
    def waits(self) -> bool:
        """Selecting waits for the device."""
        return self.rival is not None or (self.target is not None and self.target.waits)


def make_guidance(
    target: LanguageModel, draft: LanguageModel, config: EngineConfig, alignment: Alignment | None
) -> Guidance | None:
    """The selectors or the rival that `config` asks for; None where target and draft read all.

    Raises like `make_selector` and `make_rival`, and OptionError where sparse verification lacks its alignment.
    """
    choosing = drafting = rival = None
    auto = config.mode == "auto"  # has less to choose from where something is missing
    drafts_sparsely = config.drafts_sparsely and not (auto and not draft.spec.full_layers)
    scored = draft.spec.full_layers if drafts_sparsely else ()
    if auto:
        check("method", config.method, config.method in SELECTORS, f"{', '.join(SELECTORS)} with mode auto")
    if config.verifies_sparsely and config.method in RIVALS:
        rival = make_rival(config.method, target, config.budget)
    elif config.verifies_sparsely and not (auto and (alignment is None or not target.spec.full_layers)):
        if alignment is None:
            raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair (mode dense needs none)")
        choosing = build_pair_selector(config.method, target, draft, alignment, config.budget, scored)
        scored = choosing.draft_layers
    if drafts_sparsely:
        heads = draft.spec.whole.full_shape.query_heads
        own = torch.cartesian_prod(torch.arange(len(draft.spec.layers)), torch.arange(heads)).view(-1, heads, 1, 2)
        drafting = build_pair_selector("outrider", draft, draft, Alignment(sources=own), config.draft_budget, scored)
    bits = code_bits(config.score_keys, draft, config.draft_tokens + 1)
    rehearse(target, draft, choosing, config.draft_tokens + 1, drafting, bits)
    if bits is not None and config.confirms:  # from round to round a sequence may grow by what a confirmation brings, too
        most = max(k for k in range(1, BLOCK) if k + 1 + tail(k) + 1 <= BLOCK)
        allowed = f"at most {most} with keys in few bits and mode {config.mode}"
        check("K (draft-tokens)", config.draft_tokens, config.draft_tokens <= most, allowed)
    if not (choosing or drafting or rival):
        return None
    return Guidance(target=choosing, draft=drafting, rival=rival, bits=bits if choosing or drafting else None)
