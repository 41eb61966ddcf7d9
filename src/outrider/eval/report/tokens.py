"""Traces as the page's token view reads them."""

from __future__ import annotations

import json
from typing import Any

from outrider.errors import ResultsError
from outrider.eval.report.trace import Trace

MAX_BYTES = 10 << 20  # of all traces of a page


def page_data(traces: list[Trace]) -> str:
    """JSON that may stand inside a script element. Raises ResultsError where a phone could not show it."""
    text = json.dumps([_view(trace) for trace in traces], ensure_ascii=False, separators=(",", ":")).replace("<", "\\u003c")
    if (size := len(text.encode())) > MAX_BYTES:
        names = ", ".join(trace.text for trace in traces)
        raise ResultsError(
            f"traces of {names}: got {size / 2**20:.1f} MB; allowed: {MAX_BYTES >> 20} MB in a page, by fewer of them "
            "or a smaller `generate --trace-rounds`"
        )
    return text


def _view(trace: Trace) -> dict[str, Any]:
    return {
        "name": trace.text,
        "method": trace.method,
        "budget": f"keep {100 * trace.keep:g}%" if trace.keep is not None else f"top-p {trace.top_p:g}",
        "prompt": trace.prompt_tokens,
        "pieces": trace.pieces,
        "layers": trace.layers,
        "all": trace.all_rounds,
        "rounds": [
            {
                "cached": one.cached,
                "drafted": one.drafted_pieces,
                "accepted": one.accepted,
                "next": one.next_piece,
                "lists": one.lists,
            }
            for one in trace.rounds
        ],
    }
