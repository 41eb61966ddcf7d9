"""The closing tables."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from outrider.bench.results import drafting_of

if TYPE_CHECKING:
    from outrider.bench.prefill import PrefillRow
    from outrider.bench.results import Row as BenchRow
    from outrider.decoding.statistics import Statistics
    from outrider.eval.diagnose.summary import ByLayer, Summary
    from outrider.eval.rows import Row
    from outrider.guidance.alignment import AlignmentFile

NONE = "-"
SOMETIMES = {"confirm": "confirmations", "audit": "audits"}  # stages that are shown where there were some


def run_table(runs: Sequence[Statistics]) -> Table:
    """One column a mode: what was read, what was accepted, where the time went."""
    confirmed = any(run.confirmations for run in runs)
    rows: list[tuple[str, Callable[[Statistics], str]]] = [
        ("prompt tokens", lambda s: str(s.prompt_tokens)),
        ("generated tokens", lambda s: str(s.generated_tokens)),
        ("rounds", lambda s: str(s.rounds)),
        ("tokens/s", lambda s: f"{s.tokens_per_second:.1f}"),
        ("accepted tokens per round", lambda s: f"{s.accepted_per_round:.2f}"),
        ("kept fraction", lambda s: _percent(s.kept_fraction)),
        ("KV bytes read, of dense", lambda s: _percent(s.kv_read_fraction)),
        *((f"seconds: {stage}", _seconds_of(stage)) for stage in _stages(runs)),
    ]
    if any(run.prefill_before for run in runs):
        rows.insert(1, ("kept by the prompt's blocks", lambda s: _percent(s.prefill_kept_fraction)))
    if confirmed:
        at = [name for name, _ in rows].index("kept fraction")
        rows[at:at] = [
            ("tentative tokens", _of_tentative(lambda s: s.tentative)),
            ("of these confirmed", _of_tentative(lambda s: s.confirmed)),
            ("rolled back", _of_tentative(lambda s: s.rolled_back)),
            ("dense forwards that confirm", _of_tentative(lambda s: s.confirmations)),
            ("drafted tokens behind them", _of_tentative(lambda s: s.drafted_on)),
        ]
    if any(run.mode == "auto" for run in runs):
        at = [name for name, _ in rows].index("tokens/s")
        rows[at:at] = [("rounds by how they were run", _chosen), ("seconds of rounds, as predicted", _predicted)]
    if any(run.audits for run in runs):
        rows += [
            ("audits by the guard", _of_audits(lambda s: str(s.audits))),
            ("disagreement with the dense target", _of_audits(lambda s: _number(s.disagreement, ".1%"))),
            ("of its attention on the lists", _of_audits(lambda s: _number(s.recalled_mass, ".1%"))),
            ("budget raised, lowered again", _of_audits(lambda s: f"{s.budget_raised}, {s.budget_lowered}")),
            ("prompts that read everything", _of_audits(lambda s: str(s.fallbacks))),
        ]
    if any(run.audited for run in runs):
        rows.append(("agreement with the dense target", _agreement))
    headers = [run.mode if run.method is None else f"{run.mode} ({run.method})" for run in runs]
    return _table("", ["", *headers], [[name, *(cell(run) for run in runs)] for name, cell in rows])


def _chosen(run: Statistics) -> str:
    return ", ".join(f"{name}: {rounds}" for name, rounds in sorted(run.chosen.items())) if run.mode == "auto" else NONE


def _predicted(run: Statistics) -> str:
    return f"{run.predicted_seconds:.3f}" if run.predicted_seconds else NONE


def quality_table(file: AlignmentFile) -> Group:
    """The held-out figures of every map of an alignment file."""
    rounds = f"{file.rounds} rounds of {file.queries_per_round} queries"
    title = f"{rounds}, {file.tokens} tokens of {file.text}, recall at {file.keep:g} kept"
    figures = list(dict.fromkeys(name for entry in file.maps.values() for name in entry.quality))
    rows = [
        [name, *(f"{entry.quality[figure]:.4f}" if figure in entry.quality else NONE for figure in figures)]
        for name, entry in file.maps.items()
    ]
    return Group(Text(title), _table("", ["map", *figures], rows))


def evaluation_table(title: str, rows: Sequence[Row]) -> Table:
    """One row a method and budget (and part of the task); columns that the task does not measure are left out.

    Behind a mean over documents stands its 95% bootstrap interval.
    """
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("family", lambda r: r.part or NONE),
        ("method", lambda r: r.method),
        ("budget", _budget),
        ("ppl", lambda r: _number(r.ppl, ".3f")),
        ("vs dense", lambda r: _number(r.delta_percent, "+.2f", "%") + _interval(r, "delta_percent", ".1f")),
        ("recalled", lambda r: NONE if r.recalled is None else f"{r.recalled}/{r.asked}{_interval(r, 'recall', '.0%')}"),
        ("questions", lambda r: NONE if r.f1 is None else str(r.asked)),
        ("token F1", lambda r: _number(r.f1, ".3f") + _interval(r, "f1", ".3f")),
        ("ROUGE-L", lambda r: _number(r.rouge_l, ".3f") + _interval(r, "rouge_l", ".3f")),
        ("agreement", lambda r: _number(r.agreement, ".4f") + _interval(r, "agreement", ".3f")),
        ("kept", lambda r: _percent(r.kept_fraction)),
        ("KV read", lambda r: _percent(r.kv_read_fraction)),
        ("seconds", lambda r: f"{r.seconds:.1f}"),
    ]
    cells = [[cell(row) for row in rows] for _, cell in columns]
    shown = [i for i, column in enumerate(cells) if any(cell != NONE for cell in column) or columns[i][0] == "budget"]
    names = sum(columns[i][0] in ("family", "method", "budget") for i in shown)
    return _table(
        title, [columns[i][0] for i in shown], [[cells[i][at] for i in shown] for at in range(len(rows))], names=names
    )


def diagnosis_tables(title: str, found: Sequence[Summary]) -> Group:
    """One row a method and budget: all figures in short, then recall and overlap by layer where there are lists."""
    columns: list[tuple[str, Callable[[Summary], str]]] = [
        ("method", lambda s: s.method),
        ("budget", _budget),
        ("kept", lambda s: _percent(s.kept_fraction)),
        ("KV read", lambda s: _percent(s.kv_read_fraction)),
        ("disagreement", lambda s: _percent(s.disagreement)),
        ("recall", lambda s: _number(_mean(s.recall), ".3f")),
        ("lowest head", lambda s: _lowest(s.recall)),
        ("as the round before", lambda s: _number(_mean(s.with_previous), ".3f")),
        ("as the target's own", lambda s: _number(_mean(s.with_target), ".3f")),
        ("accepted at 1 .. K", lambda s: " ".join(f"{share:.2f}" for share in s.by_position) or NONE),
    ]
    tables = [_table(title, [name for name, _ in columns], [[cell(s) for _, cell in columns] for s in found], names=2)]
    listed = [s for s in found if s.recall]
    layers = sorted({layer for s in listed for layer in s.recall})
    by_layer: list[tuple[str, Callable[[Summary], ByLayer]]] = [
        ("share of the dense attention that lists hold, by layer: mean of heads (lowest)", lambda s: s.recall),
        ("overlap with the target's own lists, by layer: mean of lists (lowest)", lambda s: s.with_target),
    ]
    for what, figures in by_layer if listed else ():
        cells = [[s.method, _budget(s), *(_heads(figures(s).get(layer)) for layer in layers)] for s in listed]
        tables.append(_table(what, ["method", "budget", *map(str, layers)], cells, names=2))
    return Group(*tables)


def decode_table(rows: Sequence[BenchRow]) -> Table:
    """The engines and modes of one case, and how they compare with vLLM's target alone and with their own dense mode."""
    by_run = {(row.engine, row.mode, row.drafting, row.kv_dtype): row.tokens_per_second for row in rows}
    columns: list[tuple[str, Callable[[BenchRow], str]]] = [
        ("engine", lambda r: r.engine),
        ("mode", lambda r: r.mode),
        ("drafting", _drafting),
        ("tokens/s", lambda r: _number(r.tokens_per_second, ".1f")),
        ("vs plain vLLM", lambda r: _ratio(r.tokens_per_second, by_run.get(("vllm", "plain", None, None)))),
        ("vs its dense", lambda r: _ratio(r.tokens_per_second, by_run.get((r.engine, "dense", "dense", r.kv_dtype)))),
        ("tokens a round", lambda r: _number(r.acceptance.get("tokens_per_round"), ".2f")),
        ("ms a round", lambda r: _number(r.round_ms, ".2f")),
        ("predicted", lambda r: _number(r.predicted_ms, ".2f")),
        ("host ms", lambda r: _number(r.host_ms, ".2f")),
        ("kept", lambda r: NONE if r.kept is None else _percent(r.kept)),
    ]
    cells = [[cell(row) for _, cell in columns] for row in rows]
    title = f"{rows[0].case}: {rows[0].batch} x {rows[0].context} tokens"
    return _table(title, [name for name, _ in columns], cells, names=3)


def stage_table(rows: Sequence[BenchRow]) -> Table:
    """The stages of every row that has them: time, bytes that must be read, and how near the time comes to reading them."""
    cells = [
        [row.mode, _drafting(row), stage, f"{ms:.3f}", *_floor(row.floors.get(stage, {}))]
        for row in rows
        for stage, ms in row.stages.items()
    ]
    headers = ["mode", "drafting", "stage", "ms a round", "GB", "floor, ms", "of floor"]
    return _table(f"{rows[0].case}: stages", headers, cells, names=3)


def prefill_table(rows: Sequence[PrefillRow]) -> Table:
    """The engines and modes of one prompt, a line a stage: seconds, products, and how near the time comes to what they take."""
    cells = []
    for row in rows:
        about = [row.engine, row.mode, row.method or NONE, row.kv_dtype or NONE]
        kept = NONE if row.kept is None else _percent(row.kept)
        cells.append([*about, "all", _number(row.seconds, ".3f"), NONE, NONE, NONE, kept])
        for stage, ms in row.stages.items():
            tflop, floor, percent = (row.floors.get(stage, {}).get(name) for name in ("tflop", "ms", "percent"))
            least = None if floor is None else floor / 1e3
            figures = [_number(tflop, ".1f"), _number(least, ".3f"), _number(percent, ".0f", "%")]
            cells.append(["", "", "", "", stage, f"{ms / 1e3:.3f}", *figures, ""])
    headers = ["engine", "mode", "method", "cache", "stage", "s", "TFLOP", "floor, s", "of floor", "kept"]
    return _table(f"{rows[0].case}: {rows[0].context} tokens", headers, cells, names=5)


def _drafting(row: BenchRow) -> str:
    return drafting_of(row.as_dict()) or NONE


def _floor(floor: Mapping[str, float | None]) -> list[str]:
    size, ms, percent = (floor.get(name) for name in ("bytes", "ms", "percent"))
    return [NONE if size is None else f"{size / 1e9:.3f}", _number(ms, ".3f"), _number(percent, ".0f", "%")]


def _table(title: str, headers: Sequence[str], rows: Iterable[Sequence[str]], names: int = 1) -> Table:
    """The first columns hold names and stand to the left, figures to the right. What users named is not read as markup."""
    table = Table(title=Text(title) if title else None, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for i, header in enumerate(headers):
        table.add_column(Text(header), justify="left" if i < names else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _percent(share: float) -> str:
    return f"{share:.1%}"


def _number(value: float | None, form: str, unit: str = "") -> str:
    return NONE if value is None else f"{value:{form}}{unit}"


def _interval(row: Row, figure: str, form: str) -> str:
    """ " [0.1, 0.9]", nothing where the row has no such interval."""
    found = row.intervals.get(figure)
    return "" if found is None else f" [{found[0]:{form}}, {found[1]:{form}}]"


def _ratio(value: float | None, base: float | None) -> str:
    return NONE if value is None or not base else f"{value / base:.2f}x"


def _stages(runs: Sequence[Statistics]) -> list[str]:
    return [stage for stage in runs[0].seconds if stage not in SOMETIMES or any(getattr(run, SOMETIMES[stage]) for run in runs)]


def _seconds_of(stage: str) -> Callable[[Statistics], str]:
    return lambda statistics: f"{statistics.seconds[stage]:.2f}"


def _of_tentative(count: Callable[[Statistics], int]) -> Callable[[Statistics], str]:
    return lambda statistics: str(count(statistics)) if statistics.confirmations else NONE


def _of_audits(cell: Callable[[Statistics], str]) -> Callable[[Statistics], str]:
    return lambda statistics: cell(statistics) if statistics.audits else NONE


def _agreement(statistics: Statistics) -> str:
    if statistics.agreement is None:
        return NONE
    return f"{statistics.agreed} of {statistics.audited} ({_percent(statistics.agreement)})"


def _mean(figures: ByLayer) -> float | None:
    """Over the heads of all layers."""
    values = [value for heads in figures.values() for value in heads]
    return sum(values) / len(values) if values else None


def _lowest(figures: ByLayer) -> str:
    """ "0.312 (layer 4, head 1)"."""
    places = [(value, layer, head) for layer, heads in figures.items() for head, value in enumerate(heads)]
    if not places:
        return NONE
    value, layer, head = min(places)
    return f"{value:.3f} (layer {layer}, head {head})"


def _heads(values: Sequence[float] | None) -> str:
    """ "0.81 (0.52)"; a layer without lists has none."""
    return NONE if values is None else f"{sum(values) / len(values):.2f} ({min(values):.2f})"


def _budget(row: Row | Summary) -> str:
    if row.keep is not None:
        return f"keep {row.keep:g}"
    return NONE if row.top_p is None else f"top-p {row.top_p:g}"
