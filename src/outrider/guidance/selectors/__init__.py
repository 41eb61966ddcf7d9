"""Selection methods, one small file each. A new method is a class with the same constructor and one line here."""

from __future__ import annotations

from outrider.config import Budget, check_flat
from outrider.errors import OptionError
from outrider.guidance.selectors.base import Selector, own_part
from outrider.guidance.selectors.dustin import Dustin
from outrider.guidance.selectors.outrider import Outrider
from outrider.guidance.selectors.specattn import SpecAttn
from outrider.guidance.selectors.sts import Sts
from outrider.types import Alignment, UnlistedFit

SELECTORS: dict[str, type[Outrider] | type[Sts] | type[SpecAttn] | type[Dustin]] = {
    "outrider": Outrider,
    "sts": Sts,
    "specattn": SpecAttn,
    "dustin": Dustin,
}

__all__ = ["SELECTORS", "Dustin", "Outrider", "Selector", "SpecAttn", "Sts", "build_selector"]


def build_selector(
    method: str,
    *,
    alignment: Alignment,
    budget: Budget,
    target_layers: tuple[int, ...],
    kv_heads: int,
    draft_heads: int,
    backend: str = "auto",
    scored: tuple[int, ...] = (),
    part: tuple[int, int] = (0, 1),
) -> Selector:
    """The selector of that name for one pair of models.

    alignment: sources [Lt, Hs, G, 2] for all target layers, on the device where scores will be. target_layers: the target
    layers with full attention, ascending; the others get no lists. kv_heads: of the target; draft_heads: query heads of the
    draft. backend: of the ops. scored: draft layers that are scored anyway, whether the alignment uses them or not.
    part: of the target's heads, for whom lists are made: which one, of how many equal ones.
    Raises OptionError for an unknown method, PairError when the alignment does not fit the models, and OptionError when the
    budget asks for a mean value in place of unlisted tokens and the alignment has none for the method.
    """
    if method not in SELECTORS:
        raise OptionError("method", method, ", ".join(SELECTORS))
    if method != "outrider":
        check_flat(budget, method)
    return SELECTORS[method](
        alignment=alignment,
        budget=budget,
        target_layers=tuple(target_layers),
        kv_heads=kv_heads,
        draft_heads=draft_heads,
        backend=backend,
        scored=scored,
        unlisted=_unlisted(method, alignment, budget, tuple(target_layers), part),
        part=part,
    )


def _unlisted(
    method: str, alignment: Alignment, budget: Budget, layers: tuple[int, ...], part: tuple[int, int]
) -> UnlistedFit | None:
    """The fit that the budget asks for, of these target layers and this part of the heads."""
    if budget.unlisted == "none":
        return None
    fit = alignment.unlisted.get(method)
    if fit is None:
        allowed = f"none, or an alignment with shares for method {method} and this map: calibrate again"
        raise OptionError("unlisted", budget.unlisted, allowed)
    values, weights = (own_part(x[list(layers)], part) for x in (fit.values, fit.weights))
    return UnlistedFit(values=values, weights=weights)
