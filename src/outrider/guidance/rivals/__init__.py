"""Methods that choose inside the target's forward, without a draft: what others have published, one small file each.

A new method is a class with the same fields and one line here.
"""

from __future__ import annotations

from outrider.config import Budget, check_flat
from outrider.errors import OptionError
from outrider.guidance.rivals.adore import Adore
from outrider.guidance.rivals.base import InForward, Rival, Rows, Target, as_selection
from outrider.guidance.rivals.double_sparsity import DoubleSparsity
from outrider.guidance.rivals.h2o import H2O
from outrider.guidance.rivals.oracle import Oracle
from outrider.guidance.rivals.quest import Quest
from outrider.guidance.rivals.snapkv import SnapKV
from outrider.guidance.rivals.spatten import SpAtten
from outrider.guidance.rivals.streaming import Streaming
from outrider.guidance.rivals.tidal import Tidal
from outrider.guidance.rivals.twilight import Twilight

RIVALS: dict[str, type[Rival]] = {
    "oracle": Oracle,
    "streaming": Streaming,
    "h2o": H2O,
    "snapkv": SnapKV,
    "quest": Quest,
    "tidal": Tidal,
    "spatten": SpAtten,
    "double-sparsity": DoubleSparsity,
    "twilight": Twilight,
    "adore": Adore,
}

__all__ = ["RIVALS", "InForward", "Rival", "Rows", "Target", "as_selection", "build_rival"]


def build_rival(method: str, target: Target, budget: Budget) -> Rival:
    """The method of that name for one target.

    Raises OptionError for an unknown method, for a budget of the kind that the method has no use for, and for a target that it
    does not fit.
    """
    if method not in RIVALS:
        raise OptionError("method", method, ", ".join(RIVALS))
    check_flat(budget, method)
    wanted = RIVALS[method].budgeted
    if getattr(budget, wanted) is None:
        other, value = ("keep", budget.keep) if wanted == "top_p" else ("top-p", budget.top_p)
        raise OptionError(other, value, f"--{wanted.replace('_', '-')} with method {method}")
    if budget.unlisted == "mean":
        raise OptionError("unlisted", budget.unlisted, f"none with method {method}, whose lists the draft does not score")
    return RIVALS[method](target=target, budget=budget)
