"""Who reads prompts in place of a dense forward: our sparse prefill, and what others have published, by name."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from outrider.config import PREFILL_METHODS, EngineConfig, check, check_flat
from outrider.decoding.prefill_rivals import READERS
from outrider.decoding.sparse_prefill import PREFILL_METHOD, make_sparse_prefill, no_clock
from outrider.models import KVCache, LanguageModel
from outrider.types import Alignment, KeptShare, Stage


class PromptReader(Protocol):
    """Reads prompts through a target, and through a draft where it needs one.

    Caches may hold fewer tokens afterwards than the text has: what follows is read at its place in the text, by
    `LanguageModel.forward(positions=...)`.
    """

    whole: bool  # a prompt is read at once, from its beginning; else in chunks that begin with a block
    drafts: bool  # the draft reads it, too
    ahead: int  # tokens that it reads behind the prompt, in order to choose; caches have room for them
    block: int  # tokens of a prompt that share lists
    min_context: int  # prompts (chunks) that end up to here are for others to read, densely

    def read(
        self,
        rows: list[tuple[LanguageModel, KVCache]],
        tokens: Tensor,
        stop: int,
        *,
        logits: bool = False,
        last: int | None = None,
        stage: Stage = no_clock,
    ) -> tuple[Tensor, KeptShare]:
        """Run `tokens` [B, T], which end at token `stop` of the text, through the target and, where it `drafts`, the draft.

        `rows` are these models, the target first, and their caches. Returns the target's logits [B, n, V] of the last n tokens,
        where asked for: n is T, or `last` where that is given, or less where there is no prediction behind the others; and what
        was read.
        """


def make_prompt_reader(
    method: str,
    target: LanguageModel,
    draft: LanguageModel,
    config: EngineConfig,
    keep: float,
    alignment: Alignment | None = None,
) -> PromptReader:
    """The method of that name, reading the share `keep` of a prompt.

    Raises OptionError for an unknown method, and for what the models, `config` or `alignment` (of method outrider) lack.
    """
    check("method", method, method in PREFILL_METHODS, ", ".join(PREFILL_METHODS))
    if method == PREFILL_METHOD:
        return make_sparse_prefill(target, draft, config, keep, alignment)
    check_flat(config.budget, method)
    return READERS[method](target, draft, config, keep)
