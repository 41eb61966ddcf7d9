"""Write the documents' tables from the result lines: every figure in a table is a line in `results/`.

python -m benchmarks.tables            rewrite the blocks <!-- table: NAME --> ... <!-- end --> in README.md and docs/
python -m benchmarks.tables --check    exit 1 if a block differs from its results
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from benchmarks import evaluation
from benchmarks.kernels.rows import best_peer
from outrider.bench.cases import CASES
from outrider.bench.results import drafting_of, method_of, scoring_of
from outrider.config import CODE_BITS, DRAFTING, MODES, PREFILL_METHODS, EngineConfig
from outrider.eval.bootstrap import mean_interval

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Line = dict[str, Any]


def lines(name: str) -> list[Line]:
    """The JSON lines of results/NAME.jsonl."""
    return [json.loads(line) for line in (RESULTS / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    """A Markdown table; the first column is text, the others are figures."""
    form = ["|---" + "|---:" * (len(header) - 1) + "|"]
    return "\n".join(["| " + " | ".join(header) + " |", *form, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def mean(rows: list[Line], field: str) -> float:
    return sum(row[field] for row in rows) / len(rows)


def budget(row: Line) -> str:
    if row["top_p"] is not None:
        return f"p = {row['top_p']:g}"
    return "all" if row["keep"] is None else f"{100 * row['keep']:g}%"


def grouped(rows: list[Line]) -> dict[tuple[str, str], list[Line]]:
    """Rows by (method, budget), in order of appearance."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for row in rows:
        groups.setdefault((row["method"], budget(row)), []).append(row)
    return groups


def perplexity_table(name: str) -> str:
    header = ["method", "budget", "kept", "KV bytes read", "perplexity", "change", "agreement with dense"]
    rows = [
        [
            method,
            asked,
            f"{100 * mean(group, 'kept_fraction'):.1f}%",
            f"{100 * mean(group, 'kv_read_fraction'):.1f}%",
            f"{mean(group, 'ppl'):.2f}",
            f"{mean(group, 'delta_percent'):+.2f}%",
            f"{mean(group, 'agreement'):.3f}",
        ]
        for (method, asked), group in grouped(lines(name)).items()
    ]
    return markdown(header, rows)


def facts_lists_table(name: str) -> str:
    """Facts recalled by how lists share a budget and what stands for the rest, a column a kept share."""
    found = [row for row in lines(name) if row["method"] != "dense"]
    keeps = sorted({row["keep"] for row in found}, reverse=True)
    cells: dict[tuple[str, str], dict[float, list[Line]]] = {}
    for row in found:
        about = row["conditions"]["allocation"], row["conditions"]["unlisted"]
        cells.setdefault(about, {}).setdefault(row["keep"], []).append(row)
    rows = [
        [allocation, unlisted, *(f"{sum(x['recalled'] for x in by[k])}/{sum(x['asked'] for x in by[k])}" for k in keeps)]
        for (allocation, unlisted), by in cells.items()
    ]
    return markdown(["lengths", "unlisted", *(f"{100 * keep:g}%" for keep in keeps)], rows)


def prefill_table(name: str) -> str:
    """Seconds to the first token by case, engine and mode, and of the stages."""
    stages = ("draft", "score", "select", "target")
    rows = []
    for row in lines_if_any(name):
        kept = "" if row["kept"] is None else f"{100 * row['kept']:.0f}%"
        method = None if method_of(row) == "outrider" else method_of(row)
        mode = ", ".join(filter(None, (row["mode"], method, row["kv_dtype"])))
        cells = []
        for stage in stages:
            ms, percent = row["stages"].get(stage), row["floors"].get(stage, {}).get("percent")
            cells.append("" if ms is None else f"{ms / 1e3:.2f}" + ("" if percent is None else f" ({percent:.0f}%)"))
        rows.append(
            [row["case"], row["engine"], mode, f"{row['conditions']['chunk']:,}", kept, f"{row['seconds']:.2f}", *cells]
        )
    return markdown(["case", "engine", "mode", "chunk", "kept", "s", *(f"{stage}, s (of floor)" for stage in stages)], rows)


def prefill_quality_table(name: str) -> str:
    """What prompts lose that are read from our lists, by what the draft itself reads of them."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for row in lines(name):
        conditions, about = row["conditions"], ("", "", "")
        if row["method"] not in ("dense", PREFILL_METHODS[0]):
            continue
        if row["method"] != "dense":
            lists = {"auto": "by layer and head", "flat": "equal"}[conditions["allocation"]]
            about = str(conditions["prefill_block"]), lists, _drafts(conditions)
        groups.setdefault((f"{row['context']:,}", _kept(row), *about), []).append(row)
    return _prefill_quality(["context", "kept", "block", "lists", "draft reads"], groups)


def prefill_rivals_table(name: str) -> str:
    """The same for methods of others, beside ours as it is by default."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for row in [*lines("prefill-quality"), *lines_if_any(name)]:
        method, conditions = row["method"], row["conditions"]
        other = (conditions.get("allocation"), conditions["prefill_block"], _drafts(conditions)) != ("auto", 128, DRAFTS)
        if method != "dense" and row["keep"] in (0.1, 0.2) and not (method == PREFILL_METHODS[0] and other):
            groups.setdefault((f"{row['context']:,}", _kept(row), method), []).append(row)
    order = sorted(groups, key=lambda key: (groups[key][0]["context"], key[1], PREFILL_METHODS.index(key[2])))
    ordered = {key: groups[key] for key in order}
    return _prefill_quality(["context", "kept", "method"], ordered)


def draft_estimates_table(name: str) -> str:
    """Facts and perplexity by what chose the blocks that the draft read."""
    found: dict[str, dict[float, list[Line]]] = {}
    for row in lines(name):
        found.setdefault(row["estimate"], {}).setdefault(row["draft_keep"], []).append(row)
    shares = sorted({share for by in found.values() for share in by}, reverse=True)

    def cell(rows: list[Line]) -> str:
        recalled = f"{sum(row['recalled'] for row in rows)}/{sum(row['asked'] for row in rows)}"
        return f"{recalled}, {mean(rows, 'delta_percent'):+.1f}%" if rows else ""

    cells = ([estimate, *(cell(by.get(share, [])) for share in shares)] for estimate, by in found.items())
    return markdown(["the draft's blocks by", *(f"{share:.0%} read" for share in shares)], cells)


def _kept(row: Line) -> str:
    return "all" if row["keep"] is None else budget({"top_p": None} | row)


def _drafts(conditions: Mapping[str, Any]) -> str:
    """What the draft reads of a prompt; all, before there was a choice."""
    keep, least = conditions.get("prefill_draft_keep", 1.0), conditions.get("prefill_draft_least", 0)
    return "all" if keep == 1.0 else f"{keep:.0%}" + (f", {least:,} tokens at least" if least else "")


DRAFTS = _drafts(
    {"prefill_draft_keep": EngineConfig().prefill_draft_keep, "prefill_draft_least": EngineConfig().prefill_draft_least}
)


def _prefill_quality(header: list[str], groups: Mapping[tuple[str, ...], list[Line]]) -> str:
    """A row a group: means over texts of its prompts, of what follows, and recalled facts."""
    cells = []
    for key, rows in groups.items():
        figures = []
        for part in ("prompt", "continuation"):
            found = [row for row in rows if row["part"] == part]
            if not found:  # dropped tokens have no prediction
                figures += ["", ""]
                continue
            interval = mean_interval([row["delta_percent"] for row in found])
            band = "" if interval is None or "all" in key[:2] else f" ({interval[0]:+.2f} .. {interval[1]:+.2f})"
            figures += [f"{mean(found, 'delta_percent'):+.2f}%{band}", f"{mean(found, 'agreement'):.3f}"]
        facts = [row for row in rows if row["part"] == "facts"]
        cells.append([*key, *figures, f"{sum(row['recalled'] for row in facts)}/{sum(row['asked'] for row in facts)}"])
    figures = ["prompt: perplexity", "agreement", "behind it: perplexity", "agreement", "facts"]
    return markdown([*header, *figures], cells)


def pair_table(name: str) -> str:
    last = lines(name)[-1]
    rows = [
        ["perplexity, last 8K of 16K, mean of 17 held-out books", f"{last['target']:.2f}", f"{last['draft']:.2f}"],
        *(
            [
                f"planted facts recalled at {length // 1024}K",
                *("/".join(map(str, last[f"facts_{length}"][m])) for m in ("target", "draft")),
            ]
            for length in (16384, 32768)
        ),
        ["greedy agreement of draft and target", f"{last['agreement']:.3f}", ""],
    ]
    return markdown(["", "target", "draft"], rows)


def generate_table(name: str) -> str:
    runs = lines(name)
    figures: list[tuple[str, Callable[[Line], str]]] = [
        ("tokens/s (decoding)", lambda r: f"{r['tokens_per_second']:.1f}"),
        ("accepted tokens a round, of 4 drafted", lambda r: f"{r['accepted_per_round']:.2f}"),
        ("kept fraction", lambda r: f"{100 * r['kept_fraction']:.1f}%"),
        ("share of KV bytes read, scoring counted", lambda r: f"{100 * r['kv_read_fraction']:.1f}%"),
        *((f"{s}, s", lambda r, s=s: f"{r['seconds'][s]:.2f}") for s in ("prefill", "propose", "score", "select", "verify")),
        ("tokens the dense target would also have chosen", lambda r: f"{r['agreed']} of {r['audited']}"),
    ]
    names = [run["mode"] + (", eager" if run.get("eager") else "") for run in runs]
    return markdown(["", *names], ([text, *(figure(run) for run in runs)] for text, figure in figures))


def pair_gpu_table(name: str) -> str:
    """The built-in pair on a GPU, a column a context, mode and drafting."""
    runs = lines(name)
    figures: list[tuple[str, Callable[[Line], str]]] = [
        ("tokens/s (decoding)", lambda r: f"{r['tokens_per_second']:.0f}"),
        ("accepted tokens a round", lambda r: f"{r['accepted_per_round']:.2f}" if r["drafted"] else ""),
        ("kept fraction", lambda r: f"{100 * r['kept_fraction']:.0f}%"),
        *((f"{s}, ms a round", lambda r, s=s: f"{1e3 * r['seconds'][s] / r['rounds']:.2f}") for s in STAGES),
        ("tokens the dense target would also have chosen", lambda r: f"{100 * r['agreed'] / r['audited']:.1f}%"),
    ]
    drafts = {None: "", "dense": "", "sparse": ", sparse draft"}
    names = [f"{run['context']:,}: {run['mode']}{drafts[run['drafting']]}" for run in runs]
    return markdown(["", *names], ([text, *(figure(run) for run in runs)] for text, figure in figures))


STAGES = ("propose", "score", "select", "verify", "accept")


def decode_rows() -> list[dict]:
    """Lines of decoding by case, real models last, then peers, our modes, and what the draft and scoring read."""
    orders = {"case": list(CASES), "engine": ["transformers", "vllm", "outrider"], "mode": MODES, "drafting": [None, *DRAFTING]}

    def place(row: dict) -> tuple[int, ...]:
        scoring = [None, *CODE_BITS].index(scoring_of(row))
        return (*(order.index(row[name]) if row[name] in order else len(order) for name, order in orders.items()), scoring)

    return sorted(lines_if_any("decode"), key=place)


def decode_table(name: str) -> str:
    """Name "decode": tokens a second of every case, beside vLLM's plain and speculative decoding and our dense speculation."""
    found = decode_rows()
    by_key = {(row["case"], row["engine"], row["mode"], row["drafting"]): row for row in found}
    rows = []
    for row in found:
        speed = row["tokens_per_second"]
        peers = ("vllm", "plain", None), ("vllm", "dense", "dense"), ("outrider", "dense", "dense")
        beside = [by_key.get((row["case"], *peer)) for peer in peers]
        ratios = ["" if other is None else f"{speed / other['tokens_per_second']:.2f}x" for other in beside]
        emitted = f"{row['acceptance']['tokens_per_round']:.2f}" if row["drafting"] else ""
        rows.append([row["case"], row["engine"], row["mode"], drafting_of(row), f"{speed:.0f}", *ratios, emitted])
    header = [
        "case",
        "engine",
        "mode",
        "drafting",
        "tokens/s",
        "of vLLM plain",
        "of vLLM dense",
        "of our dense",
        "tokens a round",
    ]
    return markdown(header, rows) if rows else NOT_MEASURED


def decode_trust_table(name: str) -> str:
    """Exact, auto and guarded rounds beside plain, dense and sparse ones of the same machine."""
    found = lines_if_any(name)
    beside = {(row["case"], row["mode"]): row for row in reversed(found) if row["conditions"]["guard_every"] is None}

    def run(row: Line) -> str:
        said = row["acceptance"]
        script = (
            f"agreement {said['agreement']:g}" if "agreement" in said else None,
            "acceptance 0" if said["kind"] == "scripted" and not any(said["rates"]) else None,
            f"audits every {row['conditions']['guard_every']} rounds" if row["conditions"]["guard_every"] else None,
        )
        return ", ".join(filter(None, (row["mode"], *script)))

    rows = []
    for row in found:
        speed, extra = row["tokens_per_second"], row["stages"]
        ratios = [
            f"{speed / beside[row['case'], mode]['tokens_per_second']:.2f}x" if (row["case"], mode) in beside else ""
            for mode in ("plain", "dense")
        ]
        confirm = extra.get("confirm", extra.get("audit"))
        rows.append(
            [
                row["case"],
                run(row),
                f"{speed:.0f}",
                *ratios,
                f"{row['acceptance']['tokens_per_round']:.2f}",
                f"{row['round_ms']:.2f}",
                "" if confirm is None else f"{confirm:.2f}",
                f"{row['predicted_ms']:.2f}",
            ]
        )
    header = [
        "case",
        "mode",
        "tokens/s",
        "of plain",
        "of dense",
        "tokens a round",
        "ms a round",
        "of these dense forwards",
        "predicted",
    ]
    return markdown(header, rows)


def decode_stages_table(name: str) -> str:
    """The stages of our sparse rounds: ms, and the share of the floor."""
    rows = []
    for row in decode_rows():
        if row["engine"] == "outrider" and row["mode"] == "sparse":
            cells = [f"{row['stages'][s]:.2f} ({row['floors'][s]['percent']:.0f}%)" for s in STAGES[:4]]
            rows.append([row["case"], drafting_of(row), *cells, f"{row['stages']['accept']:.2f}", f"{row['round_ms']:.2f}"])
    return markdown(["case", "drafting", *STAGES, "round"], rows) if rows else NOT_MEASURED


def decode_lists_table(name: str) -> str:
    """Sparse rounds with lists alone, with a mean value for what they leave out, and with lengths by layer and head besides."""
    peers = [row for row in lines("decode") if (row["engine"], row["mode"]) == ("vllm", "plain")]
    plain = {row["case"]: row["tokens_per_second"] for row in peers}
    cells = []
    for row in sorted(lines(name), key=lambda row: list(CASES).index(row["case"])):
        about, speed = row["conditions"], row["tokens_per_second"]
        more = ["mean value"] * (about["unlisted"] == "mean") + ["fitted lengths"] * (about["allocation"] == "fitted")
        figures = (
            f"{speed:.0f}",
            f"{speed / plain[row['case']]:.2f}x",
            *(f"{row['stages'][x]:.2f}" for x in ("select", "verify")),
        )
        cells.append([row["case"], ", ".join(more) or "alone", *figures, f"{row['round_ms']:.2f}"])
    return markdown(["case", "lists", "tokens/s", "of vLLM plain", "select, ms", "verify, ms", "round, ms"], cells)


def decode_profile_table(name: str) -> str:
    """What runs in a round: microseconds and launches by stage."""
    found = lines(name)
    kinds = dict.fromkeys(row["what"] for row in sorted(found, key=lambda row: -row["us"]))
    cells = {(row["what"], row["stage"]): f"{row['us']:.0f} ({row['count']})" for row in found}
    sums = {kind: sum(row["us"] for row in found if row["what"] == kind) for kind in kinds}
    whole = sum(sums.values())
    rows = [
        [kind, *(cells.get((kind, stage), "") for stage in STAGES), f"{sums[kind]:.0f}", f"{100 * sums[kind] / whole:.0f}%"]
        for kind in sorted(kinds, key=lambda kind: -sums[kind])
    ]
    return markdown(["", *STAGES, "us", "share"], rows)


def drafting_table(name: str) -> str:
    rows = [
        [f"{row['context']:,}", row["reads"], f"{row['agreement']:.3f}", *(f"{x:.3f}" for x in row["by_position"])]
        for row in lines_if_any(name)
    ]
    positions = [f"token {i + 1}" for i in range(len(rows[0]) - 3)] if rows else []
    return markdown(["context", "the draft reads", "agreement", *positions], rows) if rows else NOT_MEASURED


def score_keys_table(name: str) -> str:
    """Lines with keys in few bits, beside those of the same texts and budgets with exact ones."""
    few = lines(name)
    about = {(row["task"], row["text"], row["keep"]) for row in few}
    exact = [
        row
        for row in (*lines("perplexity"), *lines("facts"))
        if row["method"] == "outrider" and row["context"] == few[0]["context"]
        if (row["task"], row["text"], row["keep"]) in about
    ]
    cells = []
    for task, figures in (("perplexity", ("delta_percent", "agreement")), ("facts", ("recalled", "asked"))):
        for keep in sorted({row["keep"] for row in few if row["task"] == task}, reverse=True):
            for keys in ("exact", *dict.fromkeys(row["conditions"]["score_keys"] for row in few)):
                rows = exact if keys == "exact" else [row for row in few if row["conditions"]["score_keys"] == keys]
                rows = [row for row in rows if row["task"] == task and row["keep"] == keep]
                read = f"{100 * mean(rows, 'kv_read_fraction'):.1f}%"
                one, other = (mean(rows, figure) for figure in figures)
                quality = [f"{one:+.2f}%", f"{other:.3f}", ""] if task == "perplexity" else ["", "", f"{one:.0f}/{other:.0f}"]
                cells.append([keys, f"{100 * keep:g}%", read, *quality])
    return markdown(["scored keys", "kept", "KV bytes read", "perplexity", "agreement with dense", "facts recalled"], cells)


def against(rows: list[Line], plain: list[Line], figure: str, digits: int) -> tuple[str, str]:
    """The mean difference of a figure from its rows' partners, and its 95% interval over texts."""
    gains = [row[figure] - other[figure] for row, other in zip(rows, plain, strict=True)]
    low, high = mean_interval(gains) or (gains[0], gains[0])
    return f"{sum(gains) / len(gains):+.{digits}f}", f"{low:+.{digits}f} .. {high:+.{digits}f}"


def unlisted_table(name: str) -> str:
    """Lists with a mean value for what they leave out, paired text by text with lists alone."""
    found = lines(name)
    recalls = [row for row in found if row["task"] == "facts"]
    groups: dict[tuple[str, float], dict[str, dict[str, Line]]] = {}
    for row in found:
        if row["task"] == "perplexity":
            variants = groups.setdefault((row["method"], row["keep"]), {})
            variants.setdefault(row["conditions"]["unlisted"], {})[row["text"]] = row
    cells = []
    for (method, keep), variants in groups.items():
        for unlisted in ("none", "mean"):
            rows, plain = ([variants[kind][text] for text in variants["none"]] for kind in (unlisted, "none"))
            asked = [
                row
                for row in recalls
                if (row["method"], row["keep"], row["conditions"]["unlisted"]) == (method, keep, unlisted)
            ]
            compared = unlisted != "none"
            cells.append([
                method,
                unlisted,
                f"{100 * keep:g}%",
                f"{100 * mean(rows, 'kv_read_fraction'):.1f}%",
                str(len(rows)),
                f"{mean(rows, 'delta_percent'):+.2f}%",
                *(against(rows, plain, "delta_percent", 2) if compared else ("", "")),
                f"{mean(rows, 'agreement'):.3f}",
                *(against(rows, plain, "agreement", 3) if compared else ("", "")),
                f"{sum(row['recalled'] for row in asked)}/{sum(row['asked'] for row in asked)}" if asked else "",
            ])  # fmt: skip
    header = ["method", "unlisted", "budget", "KV bytes read", "texts", "perplexity", "against none", "95%"]
    return markdown([*header, "agreement with dense", "against none", "95%", "facts recalled"], cells)


def tail_correction_table(name: str) -> str:
    """Corrections of one budget side by side, paired with "none" text by text. Lines of a stage of development are left out."""
    groups: dict[tuple[str, float, int], dict[str, dict[str, Line]]] = {}
    for row in lines(name):
        if "stage" not in row:
            about = row["lists"], row["keep"], row["scored"]
            groups.setdefault(about, {}).setdefault(row["correction"], {})[row["text"]] = row
    cells = []
    for (lists, keep, scored), corrections in groups.items():
        for correction, by_text in corrections.items():
            rows, plain = list(by_text.values()), [corrections["none"][text] for text in by_text]
            compared = correction != "none"
            gains = against(rows, plain, "delta_percent", 2) if compared else ("", "")
            agrees = against(rows, plain, "agreement", 3) if compared else ("", "")
            cells.append([
                correction if lists == "draft" else f"{correction}, {lists}'s lists",
                f"{100 * keep:g}%",
                f"{100 * mean(rows, 'kv_read_fraction'):.1f}%",
                f"{len(rows)} x {scored:,}",
                f"{mean(rows, 'output_error'):.4f}",
                f"{mean(rows, 'delta_percent'):+.2f}%",
                *gains,
                f"{mean(rows, 'agreement'):.3f}",
                *agrees,
                f"{sum(row['recalled'] for row in rows)}/{sum(row['asked'] for row in rows)}",
            ])  # fmt: skip
    header = ["correction", "budget", "KV bytes read", "texts x tokens", "output error", "perplexity", "against none", "95%"]
    return markdown([*header, "agreement with dense", "against none", "95%", "facts recalled"], cells)


def budgets_table(name: str) -> str:
    """Ways to divide a budget side by side, paired with "flat" text by text. Lines of a stage of development are left out."""
    groups: dict[tuple[float, int], dict[str, dict[str, Line]]] = {}
    for row in lines_if_any(name):
        if "stage" not in row:
            groups.setdefault((row["keep"], row["scored"]), {}).setdefault(row["budgets"], {})[row["text"]] = row
    cells = []
    for (keep, scored), variants in groups.items():
        for variant, by_text in variants.items():
            rows, flat = list(by_text.values()), [variants["flat"][text] for text in by_text]
            more = {
                figure: [row[figure] - other[figure] for row, other in zip(rows, flat, strict=True)]
                for figure in ("kl", "delta_percent", "agreement")
            }
            whole = [other["kl"] for other in flat]
            intervals = mean_interval(more["kl"], whole), mean_interval(more["delta_percent"]), mean_interval(more["agreement"])
            factors = 100, 1, 100
            compared = ["" if found is None or variant == "flat" else f"{factor * found[0]:+.1f} .. {factor * found[1]:+.1f}"
                        for found, factor in zip(intervals, factors, strict=True)]  # fmt: skip
            cells.append([
                variant,
                f"{100 * keep:g}%",
                f"{100 * mean(rows, 'kv_read_fraction'):.1f}%",
                f"{len(rows)} x {scored:,}",
                f"{mean(rows, 'kl'):.4f}",
                "" if variant == "flat" else f"{100 * sum(more['kl']) / sum(whole):+.0f}%",
                compared[0],
                f"{mean(rows, 'agreement'):.3f}",
                compared[2],
                f"{mean(rows, 'delta_percent'):+.2f}%",
                compared[1],
                f"{mean(rows, 'held'):.3f}",
                f"{sum(row['recalled'] for row in rows)}/{sum(row['asked'] for row in rows)}",
            ])  # fmt: skip
    header = ["budgets", "share", "KV bytes read", "texts x tokens", "KL", "against flat", "95%, percent"]
    header += ["agreement with dense", "95%, points", "perplexity", "95%, points", "attention held", "facts recalled"]
    return markdown(header, cells) if cells else NOT_MEASURED


def diagnosed(rows: list[Line], task: str, between: str | None = None) -> list[Line]:
    """The lines of one question."""
    return [row for row in rows if row["task"] == task and row.get("between") == between]


def by_layer(rows: list[Line], figure: str) -> dict[int, list[float]]:
    """Means over texts by layer and head; the texts have the same layers."""
    found = zip(*(row[figure] for row in rows), strict=True)
    means = [[sum(column) / len(column) for column in zip(*layer, strict=True)] for layer in found]
    return dict(zip(rows[0]["layers"], means, strict=True)) if rows else {}


def diagnostics_table(name: str) -> str:
    """What was found of every method and budget, in short."""
    cells = []
    for (method, asked), group in grouped(lines(name)).items():
        read, drafts = diagnosed(group, "disagreement"), diagnosed(group, "acceptance")
        shares = (f"{100 * mean(read, field):.1f}%" for field in ("kept_fraction", "kv_read_fraction", "disagreement"))
        figures = []
        for task, between, figure in (
            ("heads", None, "recall"),
            ("overlap", "draft and target", "overlap"),
            ("overlap", "rounds", "overlap"),
        ):
            values = [value for heads in by_layer(diagnosed(group, task, between), figure).values() for value in heads]
            figures.append(f"{sum(values) / len(values):.3f}" if values else "")
        positions = zip(*(row["by_position"] for row in drafts), strict=True)
        accepted = " ".join(f"{sum(column) / len(column):.2f}" for column in positions)
        cells.append([method, asked, *shares, *figures, accepted])
    header = ["method", "budget", "kept", "KV bytes read", "disagreement", "attention held", "as the target's own"]
    return markdown([*header, "as the round before", "accepted at 1 .. 4"], cells)


def diagnostics_layers_table(name: str) -> str:
    """At 5%: attention held, and overlap with the target's own lists, by layer."""
    rows = [row for row in lines("diagnostics") if row["keep"] == 0.05]
    layers = sorted({layer for row in rows for layer in row.get("layers", ())})
    cells = []
    for task, between, figure, what in (
        ("heads", None, "recall", "attention held"),
        ("overlap", "draft and target", "overlap", "as the target's own"),
    ):
        for (method, _), group in grouped(diagnosed(rows, task, between)).items():
            found = by_layer(group, figure)
            shown = (f"{sum(found[x]) / len(found[x]):.2f} ({min(found[x]):.2f})" if x in found else "" for x in layers)
            cells.append([what, method, *shown])
    return markdown(["mean (lowest)", "method", *(f"layer {layer}" for layer in layers)], cells)


def diagnostics_heads_table(name: str) -> str:
    """Attention held by the lists of outrider at 5%, by layer and query head."""
    rows = [row for row in diagnosed(lines("diagnostics"), "heads") if (row["method"], row["keep"]) == ("outrider", 0.05)]
    found = by_layer(rows, "recall")
    cells = [[f"layer {layer}", *(f"{value:.2f}" for value in heads)] for layer, heads in found.items()]
    return markdown(["", *(f"head {head}" for head in range(len(cells[0]) - 1))], cells)


def evaluation_table(name: str) -> str:
    """Name "evaluation-WHAT-CONTEXT" or "evaluation-facts", of the sweep that `evaluation.yaml` describes."""
    what, _, context = name.removeprefix("evaluation-").partition("-")
    found = lines_if_any("evaluation")
    found = [line for line in found if not context or line["context"] == int(context)]
    task = what if what in ("facts", "ruler") else "perplexity"
    found = [line for line in found if line["task"] == task]
    if not found:
        return NOT_MEASURED
    if task != "perplexity":
        header, *rows = evaluation.recalled(found, "context" if what == "facts" else "part")
    elif what == "top_p":
        header, *rows = evaluation.shares_of_mass(found)
    else:
        header, *rows = evaluation.by_budget(found, {"read": "kv_read_fraction"}.get(what, what))
    return markdown(header, rows)


NOT_MEASURED = "Not measured yet.\n"


def exactness_table(name: str) -> str:
    """Tokens of mode exact that are the dense target's, by setting."""
    header = [
        "device",
        "setting",
        "tokens",
        "the dense target's",
        "texts that part",
        "kept",
        "tentative a token",
        "rolled back",
    ]
    rows = [
        [
            row["device"],
            row["setting"],
            f"{row['tokens']:,}",
            f"{row['identical']:,}",
            f"{len(row['parted'])} of {row['texts']}",
            f"{100 * row['kept']:g}%" if row["kept"] >= 0.995 else f"{100 * row['kept']:.1f}%",
            f"{row['tentative'] / row['tokens']:.2f}",
            f"{100 * row['rolled_back'] / row['tentative']:.0f}%",
        ]
        for row in lines_if_any(name)
    ]
    return markdown(header, rows)


def draws_table(name: str) -> str:
    """Chi-square of drawn texts against the dense target's distribution."""
    header = ["device", "rounds", "texts", "chi-square", "degrees of freedom", "p", "rolled back"]
    rows = [
        [
            row["device"],
            row["setting"],
            f"{row['draws']:,}",
            f"{row['chi_square']:,.0f}",
            str(row["freedom"]),
            f"{row['p']:.2f}" if row["p"] >= 0.01 else "< 1e-6" if row["p"] < 1e-6 else f"{row['p']:.1g}",
            f"{100 * row['rolled_back'] / row['tentative']:.0f}%" if row["tentative"] else "",
        ]
        for row in lines_if_any(name)
    ]
    return markdown(header, rows)


def guard_table(name: str) -> str:
    """What audits found, by lists and temperature, over all texts."""
    groups: dict[tuple[str, str, float], list[Line]] = {}
    for row in lines_if_any(name):
        groups.setdefault((row["device"], row["lists"], row["temperature"]), []).append(row)
    header = [
        "device",
        "lists",
        "temperature",
        "texts",
        "tokens",
        "audits",
        "disagreement",
        "recalled",
        "alarms",
        "dense behind",
    ]
    rows = []
    for (device, lists, temperature), group in groups.items():
        until = sorted(audits for row in group for audits in row["audits_until_dense"])
        spread = [min(row["disagreement"] for row in group), max(row["disagreement"] for row in group)]
        recalled = [min(row["recalled"] for row in group), max(row["recalled"] for row in group)]
        rows.append(
            [
                device,
                lists,
                f"{temperature:g}",
                str(len(group)),
                f"{sum(row['tokens'] for row in group):,}",
                f"{sum(row['audits'] for row in group):,}",
                f"{spread[0]:.3f} .. {spread[1]:.3f}",
                f"{recalled[0]:.2f} .. {recalled[1]:.2f}",
                str(sum(row["raised"] for row in group)),
                f"{until[0]} .. {until[-1]} audits, {len(until)} sequences" if until else "",
            ]
        )
    return markdown(header, rows)


def lines_if_any(name: str) -> list[Line]:
    return lines(name) if (RESULTS / f"{name}.jsonl").exists() else []


def microseconds(alone: float | None, chained: float | None) -> str:
    """ "31.5 / 29.8": a call alone, and one of a chain in a single graph."""
    return " / ".join(f"{us:.{0 if us >= 100 else 1}f}" for us in (alone, chained) if us is not None)


def kernels_table(name: str) -> str:
    """Name "kernels" for all rows, each with its best peer; "kernels-OP" for one op, with a column a peer."""
    op = name.removeprefix("kernels").removeprefix("-")
    found = [row for row in lines_if_any("kernels") if row["id"].startswith(op)]
    if not found:
        return NOT_MEASURED
    names = list(dict.fromkeys(peer for row in found for peer in [*row["peers"], *row["peers_chained"]]))
    columns = [f"{peer}, us" for peer in names] if op else ["best peer", "its us"]
    products = any(row.get("tflop_s") for row in found)  # what bounds ops over prompts
    rows = []
    for row in found:
        times = {peer: microseconds(row["peers"].get(peer), row["peers_chained"].get(peer)) for peer in names}
        best = best_peer(row["peers"])
        shown = list(times.values()) if op else ["", ""] if best is None else [best[0], times[best[0]]]
        ours = [microseconds(row["us"], row["us_chained"]), f"{row['gb']:.3f}", f"{row['gb_s']:.0f}"]
        share, ratio = f"{100 * row['stream_fraction']:.0f}%", "" if row["ratio"] is None else f"{row['ratio']:.2f}x"
        rate = [f"{row['tflop_s']:.0f}" if row.get("tflop_s") else ""] if products else []
        rows.append([row["id"].removeprefix(f"{op}-"), row["backend"], *ours, share, *rate, *shown, ratio])
    rates = ["of streaming rate", *["TFLOP/s"] * products]
    header = ["case", "backend", "us, alone / in a chain", "GB", "GB/s", *rates, *columns, "best peer / ours"]
    return markdown(header, rows)


def kernel_matrix_table(name: str) -> str:
    header = ["op", "backend", "passed", "failed", "skipped", "largest error / allowed", "device"]
    rows = [
        [row["op"], row["backend"], *(str(row[count]) for count in ("passed", "failed", "skipped")), f"{row['margin']:.2f}",
         row["conditions"]["device"]]
        for row in lines_if_any(name)
    ]  # fmt: skip
    return markdown(header, rows) if rows else NOT_MEASURED


def kernel_development_table(name: str) -> str:
    """What each version of a kernel took while it was written: one row a version, its cases in one cell."""
    versions: dict[tuple[str, str], list[str]] = {}
    for row in lines(name):
        versions.setdefault((row["kernel"], row["version"]), []).append(f"{row['case']} **{row['us']:.1f}**")
    return markdown(["kernel", "version", "us"], ([*version, ", ".join(cells)] for version, cells in versions.items()))


TABLES: dict[str, Callable[[str], str]] = {
    "facts-32k": facts_lists_table,
    "exactness": exactness_table,
    "draws": draws_table,
    "guard": guard_table,
    "prefill": prefill_table,
    "prefill-quality": prefill_quality_table,
    "prefill-rivals": prefill_rivals_table,
    "draft-estimates": draft_estimates_table,
    "pair": pair_table,
    "generate": generate_table,
    "pair-gpu": pair_gpu_table,
    "decode": decode_table,
    "decode-trust": decode_trust_table,
    "decode-stages": decode_stages_table,
    "decode-lists": decode_lists_table,
    "decode-profile": decode_profile_table,
    "drafting": drafting_table,
    "score-keys": score_keys_table,
    "spatten": perplexity_table,
    "tail-correction": tail_correction_table,
    "unlisted": unlisted_table,
    "budgets": budgets_table,
    "diagnostics": diagnostics_table,
    "diagnostics-layers": diagnostics_layers_table,
    "diagnostics-heads": diagnostics_heads_table,
    "evaluation-facts": evaluation_table,
    **{
        f"evaluation-{what}-{context}": evaluation_table
        for what in ("perplexity", "agreement", "read", "top_p", "ruler")
        for context in (16384, 32768)
    },
    "kernels": kernels_table,
    "kernels-sparse_attention": kernels_table,
    "kernels-token_select": kernels_table,
    "kernels-attention_mass": kernels_table,
    "kernel-matrix": kernel_matrix_table,
    "kernel-development": kernel_development_table,
}


def rewritten(text: str) -> str:
    """A document with all its tables made anew."""
    return BLOCK.sub(lambda block: block[1] + TABLES[block[2]](block[2]) + block[3], text)


def main() -> None:
    stale = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = path.read_text(encoding="utf-8")
        if rewritten(text) != text:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(rewritten(text), encoding="utf-8")
    if stale:
        print("stale tables in" if "--check" in sys.argv else "rewrote", *stale)
    sys.exit(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    main()
