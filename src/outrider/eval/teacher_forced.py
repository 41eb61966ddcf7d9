"""What the tasks share: the selector of a case, texts as tokens; reading itself is `decoding/teacher_forced.py`."""

from __future__ import annotations

from outrider.config import Budget
from outrider.decoding.pair import make_rival
from outrider.decoding.pair import make_selector as pair_selector
from outrider.decoding.teacher_forced import Run, TeacherForced
from outrider.errors import OptionError, PromptError
from outrider.eval.rows import DENSE, Case
from outrider.guidance.alignment import AlignmentFile
from outrider.guidance.channels import ChannelFile
from outrider.guidance.controller import ControllerFile
from outrider.guidance.rivals import RIVALS, Rival
from outrider.guidance.selectors import SELECTORS
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel

__all__ = ["DENSE", "Run", "TeacherForced", "budget_of", "check_context", "make_selector", "tokenize"]


def make_selector(
    case: Case,
    pair: tuple[LanguageModel, LanguageModel],
    alignments: AlignmentFile | None,
    map_name: str | None,
    draft_tokens: int,
    bits: int | None = None,
    channels: ChannelFile | None = None,
    controller: ControllerFile | None = None,
) -> Selector | Rival | None:
    """The selector of a case, or a rival; None for "dense".

    Raises OptionError for an unknown method, for an alignment, channels or a controller that are missing, and where keys in
    `bits` cannot be scored.
    """
    if case.method == DENSE:
        return None
    if case.method in RIVALS:
        return make_rival(case.method, pair[0], budget_of(case), channels, controller)
    if case.method not in SELECTORS:
        raise OptionError("method", case.method, ", ".join((DENSE, *SELECTORS, *RIVALS)))
    if alignments is None:
        raise OptionError("alignment", None, "a file made by `outrider calibrate` for this pair")
    alignment = alignments.map(case.map or map_name or SELECTORS[case.method].default_map).alignment
    return pair_selector(*pair, case.method, alignment, budget_of(case), draft_tokens, bits)


def budget_of(case: Case) -> Budget:
    """The case's budget, the default one when it names none."""
    return case.budget or Budget()


def tokenize(model: LanguageModel, name: str, text: str, least: int) -> list[int]:
    """The first `least` tokens of a text. Raises PromptError when it has fewer or the model has no tokenizer."""
    if model.tokenizer is None:
        raise PromptError(f"text {name}: {model.spec.name!r} has no tokenizer to read it with")
    tokens = model.tokenizer(text, verbose=False)["input_ids"]
    if len(tokens) < least:
        raise PromptError(f"text {name}: got {len(tokens)} tokens; allowed: at least {least} (the context asked for)")
    return tokens[:least]


def check_context(context: int, pair: tuple[LanguageModel, LanguageModel], least: int) -> None:
    """Raise OptionError unless `context` lies between `least` and what both models were made for."""
    limit = min(model.spec.context for model in pair)
    if not least <= context <= limit:
        raise OptionError("context", context, f"{least} .. {limit} tokens")
