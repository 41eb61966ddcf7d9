"""Real models on a real text: the acceptance is theirs."""

from __future__ import annotations

import torch

from outrider.bench.floors import Weights
from outrider.bench.options import LISTED, DecodeOptions
from outrider.bench.workload import DTYPES, Workload
from outrider.config import EngineConfig
from outrider.decoding.pair import find_alignment, load_pair
from outrider.errors import OptionError, PromptError
from outrider.guidance.selectors import SELECTORS
from outrider.models import LanguageModel


def real_workload(options: DecodeOptions, text: str, new_tokens: int) -> Workload:
    """The pair that the options name, continuing `text` by `new_tokens`.

    Raises OptionError, ModelError, PairError, AlignmentError or PromptError before anything runs.
    """
    assert options.target is not None and options.context is not None
    target, draft = load_pair(
        options.target,
        options.draft,
        dtype=DTYPES[options.device],
        device=options.device,
        tensor_parallel=options.tensor_parallel,
        shard_draft=options.shard_draft,
    )
    limit = min(target.spec.context, draft.spec.context)
    if options.context + new_tokens > limit:
        allowed = f"at most {limit - new_tokens}: the pair holds {limit} tokens, and {new_tokens} are generated"
        raise OptionError("context", options.context, allowed)
    alignments = find_alignment(options.alignment, target, draft)
    if alignments is None and {*LISTED} & {*options.mode} - {"auto"}:
        raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair")
    method = SELECTORS[EngineConfig().method]
    batch = options.batch or 1
    return Workload(
        name=f"{target.spec.name}-{options.context}-b{batch}",
        target=target,
        draft=draft,
        weights=(Weights.of(target), Weights.of(draft)),
        alignment=None if alignments is None else alignments.map(method.default_map).alignment,
        prompts=_prompts(target, text, options.context, batch),
    )


def _prompts(target: LanguageModel, text: str, context: int, batch: int) -> list[list[int]]:
    """`batch` pieces of the text, `context` tokens each, that begin at evenly spread places."""
    if target.tokenizer is None:
        raise PromptError(f"prompt-file: {target.spec.name!r} has no tokenizer to read it with; allowed: a checkpoint with one")
    tokens = target.tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < context:
        raise PromptError(f"prompt-file: got {len(tokens)} tokens; allowed: at least --context {context}")
    starts = torch.linspace(0, len(tokens) - context, batch).long().tolist()
    return [tokens[start : start + context] for start in starts]
