"""A target and its draft: where they are, whether they fit together, and the alignment that goes with them."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from outrider.config import Budget, check
from outrider.decoding.scoring import score
from outrider.errors import AlignmentError, OptionError
from outrider.guidance import channels, controller
from outrider.guidance.alignment import AlignmentFile, ModelIdentity, load
from outrider.guidance.rivals import RIVALS, Rival, Target, build_rival
from outrider.guidance.selectors import SELECTORS, build_selector
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel, check_pair, load_model
from outrider.models.cache import aligned
from outrider.models.quantized_keys import QuantizedKeys, check_codes
from outrider.models.ranks import ALONE, join, own_device
from outrider.ops.backends import BackendError
from outrider.types import Alignment, UnlistedFit

METHODS = (*SELECTORS, *RIVALS)
BUILTIN = "builtin"  # the name of the pair that ships with Outrider
PAIR_FOLDER = Path(__file__).parents[1] / "pair"
BUILTIN_ALIGNMENT = PAIR_FOLDER / "alignment.json"
BUILTIN_CHANNELS = PAIR_FOLDER / "channels.json"
BUILTIN_CONTROLLER = PAIR_FOLDER / "target" / "controller.safetensors"


def load_pair(
    target: str,
    draft: str | None,
    *,
    dtype: str = "float32",
    device: str = "cpu",
    backend: str = "auto",
    kv_dtype: str = "auto",
    tensor_parallel: int = 1,
    shard_draft: bool = False,
) -> tuple[LanguageModel, LanguageModel]:
    """Load target and draft and check that they speak the same tokens; warns when both are the same checkpoint.

    With `tensor_parallel` above 1 this is one of as many processes: it has its part of the target's heads, and of the draft's
    with `shard_draft`, else all of the draft. Raises OptionError where there are not as many processes or GPUs, where heads
    cannot be shared among them, and for a draft that is to be shared among one.
    """
    if draft is None:
        if target != BUILTIN:
            raise OptionError("draft", None, f"a folder or hub id: only --target {BUILTIN} brings its own draft")
        draft = BUILTIN
    target_path, draft_path = _folder(target, "target"), _folder(draft, "draft")
    check("shard-draft", shard_draft, not shard_draft or tensor_parallel != 1, "False with tensor-parallel 1")
    ranks = join(tensor_parallel, device)
    own = partial(load_model, dtype=dtype, device=own_device(device, ranks), backend=backend, kv_dtype=kv_dtype)
    target_model = own(target_path, role="target", ranks=ranks)
    if draft_path == target_path:
        warnings.warn(
            f"draft and target are the same checkpoint ({draft_path}): correct, but nothing becomes faster", stacklevel=2
        )
        return target_model, target_model
    draft_model = own(draft_path, role="draft", ranks=ranks if shard_draft else ALONE)
    check_pair(target_model, draft_model)
    return target_model, draft_model


def make_selector(
    target: LanguageModel,
    draft: LanguageModel,
    method: str,
    alignment: Alignment,
    budget: Budget,
    draft_tokens: int,
    bits: int | None = None,
) -> Selector:
    """The selector of `method` for this pair's shapes, on its device, under the target's backend.

    Raises OptionError for an unknown method, and for a backend or `bits` of scored keys (None: the cache's own) that cannot run
    rounds of `draft_tokens`, PairError for a misfit.
    """
    selector = build_pair_selector(method, target, draft, alignment, budget, ())
    rehearse(target, draft, selector, draft_tokens + 1, bits=bits)
    return selector


def make_rival(
    method: str,
    target: LanguageModel,
    budget: Budget,
    ranked: channels.ChannelFile | None = None,
    trained: controller.ControllerFile | None = None,
) -> Rival:
    """The method of that name inside this target; `ranked` are the target's channels, `trained` its controller, None: those
    that ship with it, if any.

    Raises OptionError for an unknown method, and for what it does not take.
    """
    spec, shape = target.spec, target.spec.full_shape
    found, learned = ranked or find_channels(None, target), trained or find_controller(None, target)
    embeddings = target.module.get_input_embeddings()
    known = Target(
        layers=spec.full_layers,
        query_heads=shape.query_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scales=tuple(layer.scale for layer in spec.layers),
        value_bytes=spec.cache_dtype.itemsize,
        channels=None if found is None else found.ranking,
        controller=None if learned is None else learned.controller.to(spec.device),
        embed=lambda tokens: embeddings(tokens).detach(),
    )
    return build_rival(method, known, budget)


def build_pair_selector(
    method: str,
    reader: LanguageModel,  # who attends to the lists
    draft: LanguageModel,
    alignment: Alignment,
    budget: Budget,
    scored: tuple[int, ...] = (),
) -> Selector:
    """The selector of `method` for this pair's shapes, on its device; draft layers that are `scored` anyway are scored besides.

    It makes the lists of the heads that the reader has here. Raises OptionError for an unknown method, PairError for a misfit.
    """
    device = draft.spec.device
    fits = {
        name: UnlistedFit(values=fit.values.to(device), weights=fit.weights.to(device))
        for name, fit in alignment.unlisted.items()
    }
    return build_selector(
        method,
        alignment=replace(alignment, sources=alignment.sources.to(device), unlisted=fits),
        budget=budget,
        target_layers=reader.spec.full_layers,
        kv_heads=reader.spec.whole.full_shape.kv_heads,
        draft_heads=draft.spec.whole.full_shape.query_heads,
        backend=reader.backend,
        scored=scored,
        part=(reader.ranks.rank, reader.ranks.size),
    )


def rehearse(
    target: LanguageModel,
    draft: LanguageModel,
    selector: Selector | None,
    t: int,
    drafting: Selector | None = None,
    bits: int | None = None,
) -> None:
    """Run a round of `t` tokens over nothing, so that a backend that cannot run this pair says so before any work.

    `selector` chooses for the target, `drafting` for the draft, from keys in `bits`. Raises OptionError, for such keys under
    any backend. Backends that find an implementation for everything need no rehearsal.
    """
    choosers = [chooser for chooser in (drafting, selector) if chooser is not None]
    if bits is not None:
        for chooser in choosers:
            check_codes(draft, chooser.draft_layers, bits, t)
    if target.backend in ("auto", "reference"):
        return
    tokens = torch.zeros(1, t, dtype=torch.int64)
    caches = [model.new_cache(1, aligned(1 + t)) for model in (target, draft)]
    for cache in caches:
        cache.advance(1)
    selection = None
    try:
        draft.forward(tokens[:, :1], caches[1], logits=False)
        for chooser in choosers:
            queries = draft.forward(tokens, caches[1], record_queries=True, logits=False).queries
            layers, per_query = chooser.draft_layers, chooser.per_query
            quantized = None if bits is None else QuantizedKeys(draft, layers, bits, 1, caches[1].capacity)
            given = draft, caches[1], queries, caches[1].lengths, layers
            selection = chooser.select(score(*given, per_query=per_query, quantized=quantized))
            if chooser is drafting:
                draft.forward(tokens[:, :1], caches[1], selection=selection, logits=False)
                selection = None
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


def find_channels(given: str | Path | None, target: LanguageModel) -> channels.ChannelFile | None:
    """The channels asked for, or the built-in target's own; None when there are none."""
    if given is not None:
        return channels.load(given, target=identity(target))
    if BUILTIN_CHANNELS.exists():
        shipped = channels.load(BUILTIN_CHANNELS, target=None)
        if shipped.target == identity(target):
            return shipped
    return None


def find_controller(given: str | Path | None, target: LanguageModel) -> controller.ControllerFile | None:
    """The controller asked for, or the built-in target's own; None when there is none."""
    if given is not None:
        return controller.load(given, target=identity(target))
    if BUILTIN_CONTROLLER.exists():
        shipped = controller.load(BUILTIN_CONTROLLER, target=None)
        if shipped.target == identity(target):
            return shipped
    return None


def _folder(name: str, role: str) -> str:
    """The folder of the built-in target or draft for "builtin"; any other name as it is."""
    return str(PAIR_FOLDER / role) if name == BUILTIN else name
