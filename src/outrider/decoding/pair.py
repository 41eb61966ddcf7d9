"""A target and its draft: where they are, whether they fit together, and the alignment that goes with them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from outrider.config import Budget, EngineConfig, check
from outrider.decoding.scoring import score
from outrider.errors import AlignmentError, OptionError
from outrider.guidance import channels, controller
from outrider.guidance.alignment import AlignmentFile, ModelIdentity, load
from outrider.guidance.rivals import RIVALS, Rival, Target, build_rival
from outrider.guidance.selectors import SELECTORS, build_selector
from outrider.guidance.selectors.base import Selector
from outrider.models import LanguageModel, ModelSpec, check_pair, load_model
from outrider.models.cache import aligned
from outrider.models.quantized_keys import QuantizedKeys, check_codes, code_bits
from outrider.ops.backends import BackendError
from outrider.ops.quantized_keys.layout import BLOCK
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
) -> tuple[LanguageModel, LanguageModel]:
    """Load target and draft and check that they speak the same tokens; warns when both are the same checkpoint."""
    if draft is None:
        if target != BUILTIN:
            raise OptionError("draft", None, f"a folder or hub id: only --target {BUILTIN} brings its own draft")
        draft = BUILTIN
    target_path, draft_path = _folder(target, "target"), _folder(draft, "draft")
    options = {"dtype": dtype, "device": device, "backend": backend, "kv_dtype": kv_dtype}
    target_model = load_model(target_path, **options, role="target")
    if draft_path == target_path:
        warnings.warn(
            f"draft and target are the same checkpoint ({draft_path}): correct, but nothing becomes faster", stacklevel=2
        )
        return target_model, target_model
    draft_model = load_model(draft_path, **options, role="draft")
    check_pair(target_model, draft_model)
    return target_model, draft_model


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
        heads = draft.spec.full_shape.query_heads
        own = torch.cartesian_prod(torch.arange(len(draft.spec.layers)), torch.arange(heads)).view(-1, heads, 1, 2)
        drafting = build_pair_selector("outrider", draft, draft, Alignment(sources=own), config.draft_budget, scored)
    bits = code_bits(config.score_keys, draft, config.draft_tokens + 1)
    rehearse(target, draft, choosing, config.draft_tokens + 1, drafting, bits)
    if bits is not None and config.confirms:  # from round to round a sequence may grow by a bonus token more
        allowed = f"at most {BLOCK - 2} with keys in few bits and mode {config.mode}"
        check("K (draft-tokens)", k := config.draft_tokens, k + 2 <= BLOCK, allowed)
    if not (choosing or drafting or rival):
        return None
    return Guidance(target=choosing, draft=drafting, rival=rival, bits=bits if choosing or drafting else None)


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

    Raises OptionError for an unknown method, PairError for a misfit.
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
        kv_heads=reader.spec.full_shape.kv_heads,
        draft_heads=draft.spec.full_shape.query_heads,
        backend=reader.backend,
        scored=scored,
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
