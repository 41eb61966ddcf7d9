"""Task "perplexity": how well the target predicts a text's last tokens when it reads only its lists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy

from outrider.config import check
from outrider.decoding.prefill import ProgressCallback
from outrider.eval.rows import Case, Row, Text, conditions, with_map
from outrider.eval.teacher_forced import Run, TeacherForced, budget_of, check_context, make_selector, tokenize
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.channels import ChannelFile
from outrider.models import LanguageModel
from outrider.models.quantized_keys import code_bits


def evaluate(
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    texts: list[Text],
    cases: list[Case],
    *,
    context: int,
    scored_tokens: int,
    draft_tokens: int = 4,
    score_keys: str = "auto",
    map_name: str | None = None,
    channels: ChannelFile | None = None,
    prefill_chunk: int = 2048,
    progress: ProgressCallback | None = None,
) -> Iterator[Row]:
    """Score the last `scored_tokens` of the first `context` tokens of every text; yields one row per (text, case).

    Perplexity is exp of the mean negative log-likelihood in nats; delta_percent is against dense attention over the same
    tokens, which is always run. All options are checked before any work: OptionError, PromptError.
    """
    check("scored-tokens", scored_tokens, 1 <= scored_tokens < context, f"1 .. context - 1 = {context - 1}")
    check_context(context, pair, 2)
    bits = code_bits(score_keys, pair[1], draft_tokens + 1)
    selectors = [make_selector(case, pair, alignments, map_name, draft_tokens, bits, channels) for case in cases]
    documents = [(text.name, tokenize(pair[0], text.name, text.text, context)) for text in texts]

    common = conditions(pair, draft_tokens, map_name, bits)

    def rows() -> Iterator[Row]:
        reader = TeacherForced(pair, context, draft_tokens, bits)
        for name, tokens in documents:
            given, wanted = tokens[-scored_tokens - 1 : -1], torch.tensor(tokens[-scored_tokens:])
            reader.read(tokens[: -scored_tokens - 1], prefill_chunk, progress)
            dense = reader.run(given, None)
            ppl_dense = _perplexity(dense, wanted)
            for done, (case, selector) in enumerate(zip(cases, selectors, strict=True), start=1):
                run = dense if selector is None else reader.run(given, selector, budget_of(case).min_context)
                ppl = _perplexity(run, wanted)
                if progress is not None:
                    progress(f"score {name}", done, len(cases))
                yield Row(
                    task="perplexity",
                    text=name,
                    method=case.method,
                    keep=case.budget.keep if case.budget else None,
                    top_p=case.budget.top_p if case.budget else None,
                    context=context,
                    scored_tokens=scored_tokens,
                    ppl=ppl,
                    ppl_dense=ppl_dense,
                    delta_percent=100 * (ppl / ppl_dense - 1),
                    agreement=float((run.logits.argmax(-1) == dense.logits.argmax(-1)).float().mean()),
                    kept_fraction=run.kept_fraction,
                    kv_read_fraction=run.kv_read_fraction,
                    seconds=run.seconds,
                    conditions=with_map(common, case),
                )

    return rows()


def _perplexity(run: Run, wanted: torch.Tensor) -> float:
    return float(cross_entropy(run.logits, wanted.to(run.logits.device)).exp())
