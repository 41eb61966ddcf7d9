"""A target and its draft: where they are, whether they fit together, and the alignment that goes with them."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch

from outrider.config import Budget
from outrider.decoding.scoring import score
from outrider.errors import AlignmentError, OptionError
from outrider.guidance.alignment import AlignmentFile, ModelIdentity, load
from outrider.guidance.selectors import build_selector
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel, check_pair, load_model
from outrider.ops.backends import BackendError
from outrider.types import Alignment

BUILTIN = "builtin"  # the name of the pair that ships with Outrider
PAIR_FOLDER = Path(__file__).parents[1] / "pair"
BUILTIN_ALIGNMENT = PAIR_FOLDER / "alignment.json"


def load_pair(
    target: str, draft: str | None, *, dtype: str = "float32", device: str = "cpu", backend: str = "auto"
) -> tuple[LanguageModel, LanguageModel]:
    """Load target and draft and check that they speak the same tokens; warns when both are the same checkpoint."""
    if draft is None:
        if target != BUILTIN:
            raise OptionError("draft", None, f"a folder or hub id: only --target {BUILTIN} brings its own draft")
        draft = BUILTIN
    target_path, draft_path = _folder(target, "target"), _folder(draft, "draft")
    target_model = load_model(target_path, dtype=dtype, device=device, backend=backend, role="target")
    if draft_path == target_path:
        warnings.warn(
            f"draft and target are the same checkpoint ({draft_path}): correct, but nothing becomes faster", stacklevel=2
        )
        return target_model, target_model
    draft_model = load_model(draft_path, dtype=dtype, device=device, backend=backend, role="draft")
    check_pair(target_model, draft_model)
    return target_model, draft_model


def make_selector(
    target: LanguageModel, draft: LanguageModel, method: str, alignment: Alignment, budget: Budget, draft_tokens: int
) -> Selector:
    """The selector of `method` for this pair's shapes, on its device, under the target's backend.

    Raises OptionError for an unknown method and for a backend that cannot run rounds of `draft_tokens`, PairError for a misfit.
    """
    selector = build_selector(
        method,
        alignment=Alignment(sources=alignment.sources.to(draft.spec.device)),
        budget=budget,
        target_layers=target.spec.full_layers,
        kv_heads=target.spec.full_shape.kv_heads,
        draft_heads=draft.spec.full_shape.query_heads,
        backend=target.backend,
    )
    rehearse(target, draft, selector, draft_tokens + 1)
    return selector


def rehearse(target: LanguageModel, draft: LanguageModel, selector: Selector | None, t: int) -> None:
    """Run a round of `t` tokens over nothing, so that a backend that cannot run this pair says so before any work.

    Raises OptionError. Backends that find an implementation for everything need no rehearsal.
    """
    if target.backend in ("auto", "reference"):
        return
    tokens = torch.zeros(1, t, dtype=torch.int64)
    caches = [model.new_cache(1, 1 + t) for model in (target, draft)]
    for cache in caches:
        cache.advance(1)
    selection = None
    try:
        draft.forward(tokens[:, :1], caches[1], logits=False)
        if selector is not None:
            queries = draft.forward(tokens, caches[1], record_queries=True, logits=False).queries
            layers, per_query = selector.draft_layers, selector.per_query
            selection = selector.select(score(draft, caches[1], queries, caches[1].lengths, layers, per_query=per_query))
        target.forward(tokens, caches[0], selection=selection, logits=False)
    except BackendError as error:
        allowed = f"auto, reference, or one that runs this pair in {target.spec.dtype} with K = {t - 1} ({error.reason})"
        raise OptionError("backend", target.backend, allowed) from error


def identity(model: LanguageModel) -> ModelIdentity:
    """The name and digest by which alignment files know a model."""
    return ModelIdentity(name=model.spec.name, digest=model.spec.digest)


def find_alignment(
    given: str | Path | AlignmentFile | None, target: LanguageModel, draft: LanguageModel
) -> AlignmentFile | None:
    """The alignment asked for, or the built-in pair's own; None when there is none."""
    if isinstance(given, AlignmentFile):
        for role, wanted, found in (("target", identity(target), given.target), ("draft", identity(draft), given.draft)):
            if wanted != found:
                raise AlignmentError(f"alignment: made for the {role} {found}, but the {role} here is {wanted}")
        return given
    if given is not None:
        return load(given, target=identity(target), draft=identity(draft))
    if BUILTIN_ALIGNMENT.exists():
        shipped = load(BUILTIN_ALIGNMENT, target=None, draft=None)
        if (shipped.target, shipped.draft) == (identity(target), identity(draft)):
            return shipped
    return None


def _folder(name: str, role: str) -> str:
    """The folder of the built-in target or draft for "builtin"; any other name as it is."""
    return str(PAIR_FOLDER / role) if name == BUILTIN else name
