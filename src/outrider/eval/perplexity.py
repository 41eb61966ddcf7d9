"""Task "perplexity": how well the target predicts a text's last tokens when it reads only its lists."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy

from outrider.config import check
from outrider.decoding.prefill import ProgressCallback
from outrider.eval.rows import Case, Row, Text, conditions, of_case
from outrider.eval.teacher_forced import TeacherForced, budget_of, check_context, make_selector, tokenize
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.channels import ChannelFile
from outrider.guidance.controller import ControllerFile
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
    controller: ControllerFile | None = None,
    prefill_chunk: int = 2048,
    batch_size: int = 1,
    progress: ProgressCallback | None = None,
) -> Iterator[Row]:
    """Score the last `scored_tokens` of the first `context` tokens of every text; yields one row per (text, case).

    Perplexity is exp of the mean negative log-likelihood in nats; delta_percent is against dense attention over the same
    tokens, which is always run. `batch_size` texts are read together: on a GPU that is as quick as one. All options are checked
    before any work: OptionError, PromptError.
    """
    check("scored-tokens", scored_tokens, 1 <= scored_tokens < context, f"1 .. context - 1 = {context - 1}")
    check("batch-size", batch_size, batch_size >= 1, "a whole number >= 1")
    check_context(context, pair, 2)
    bits = code_bits(score_keys, pair[1], draft_tokens + 1)
    learned = channels, controller
    selectors = [make_selector(case, pair, alignments, map_name, draft_tokens, bits, *learned) for case in cases]
    documents = [(text.name, tokenize(pair[0], text.name, text.text, context)) for text in texts]

    common = conditions(pair, draft_tokens, map_name, bits)

    def together(documents: list[tuple[str, list[int]]]) -> Iterator[Row]:
        names, texts = [name for name, _ in documents], [tokens for _, tokens in documents]
        given, wanted = [tokens[-scored_tokens - 1 : -1] for tokens in texts], torch.tensor(texts)[:, -scored_tokens:]
        reader = TeacherForced(pair, context, draft_tokens, bits, len(texts))
        reader.read([tokens[: -scored_tokens - 1] for tokens in texts], prefill_chunk, progress)
        dense = reader.run(given, None)
        ppl_dense = [perplexity_of(run.logits, tokens) for run, tokens in zip(dense, wanted, strict=True)]
        for done, (case, selector) in enumerate(zip(cases, selectors, strict=True), start=1):
            runs = dense if selector is None else reader.run(given, selector, budget_of(case).min_context)
            if progress is not None:
                progress(f"score {', '.join(names)}", done, len(cases))
            for row, run in enumerate(runs):
                ppl = perplexity_of(run.logits, wanted[row])
                yield Row(
                    task="perplexity",
                    text=names[row],
                    method=case.method,
                    keep=case.budget.keep if case.budget else None,
                    top_p=case.budget.top_p if case.budget else None,
                    context=context,
                    scored_tokens=scored_tokens,
                    ppl=ppl,
                    ppl_dense=ppl_dense[row],
                    delta_percent=100 * (ppl / ppl_dense[row] - 1),
                    agreement=float((run.logits.argmax(-1) == dense[row].logits.argmax(-1)).float().mean()),
                    kept_fraction=run.kept_fraction,
                    kv_read_fraction=run.kv_read_fraction,
                    seconds=run.seconds,
                    conditions=of_case(common, case),
                )

    return (row for start in range(0, len(documents), batch_size) for row in together(documents[start : start + batch_size]))


def perplexity_of(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    """Of tokens `wanted` [n], each predicted by a row of `logits` [n, V]: exp of the mean negative log-likelihood in nats."""
    return float(cross_entropy(logits, wanted.to(logits.device)).exp())
