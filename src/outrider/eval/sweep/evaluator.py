"""The models of a plan, loaded once, and the cells they run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from outrider.decoding.pair import find_alignment, load_pair
from outrider.eval.rows import Case, Row, conditions
from outrider.eval.sweep.plan import Cell, Models, Plan
from outrider.eval.sweep.tasks import digest
from outrider.eval.teacher_forced import tokenize
from outrider.guidance.alignment import AlignmentFile
from outrider.models.quantized_keys import code_bits


class Evaluator:
    """Runs cells of a plan, on models that stay loaded."""

    def __init__(self, models: Models, alignment: Path | AlignmentFile | None) -> None:
        """Raises OptionError, ModelError, PairError or AlignmentError for models that cannot run."""
        self.models, self.batch_size = models, models.batch_size
        self.pair = load_pair(
            models.target,
            models.draft,
            dtype=models.dtype,
            device=models.device,
            backend=models.backend,
            kv_dtype=models.kv_dtype,
        )
        self.alignments = find_alignment(alignment, *self.pair)

    def identity(self) -> dict[str, Any]:
        """What figures depend on that belongs to the models: names, digests and number formats."""
        bits = code_bits(self.models.score_keys, self.pair[1], self.models.draft_tokens + 1)
        found = conditions(self.pair, self.models.draft_tokens, None, bits)
        names = ("target", "draft", "draft_tokens", "dtype", "kv_dtype", "score_keys")
        maps = None if self.alignments is None else self.alignments.maps
        sources = {name: maps[name].alignment.sources.tolist() for name in sorted(maps)} if maps else None
        return {name: found[name] for name in names} | {"alignment": sources and digest(str(sources))}

    def check(self, plan: Plan) -> None:
        """Raise what a task, case, context or text of the plan would be refused for, before any work."""
        lengths: dict[str, int] = {}
        for work in plan.works:
            for context in work.contexts:
                work.task.evaluate([], **self._given(work.cases, context))
                if work.task.fills_context:
                    lengths |= {one.name: max(context, lengths.get(one.name, 0)) for one in work.subjects}
        texts = {one.name: one.content for work in plan.works if work.task.fills_context for one in work.subjects}
        for name, least in lengths.items():
            tokenize(self.pair[0], name, texts[name].text, least)

    def rows(self, cells: Sequence[Cell], cases: tuple[Case, ...]) -> Iterator[Row]:
        """The rows of some of the cases of cells that have one task, part and context, as they come."""
        first = cells[0]
        given = self._given(cases, first.context)
        if first.task.batches:
            given["batch_size"] = self.batch_size
        return first.task.evaluate([cell.subject for cell in cells], **given)

    def _given(self, cases: tuple[Case, ...], context: int) -> dict[str, Any]:
        models = self.models
        return {
            "pair": self.pair,
            "alignments": self.alignments,
            "cases": list(cases),
            "context": context,
            "draft_tokens": models.draft_tokens,
            "score_keys": models.score_keys,
            "prefill_chunk": models.prefill_chunk,
        }
