"""python -m benchmarks kernels: each op's speed beside its peers', checked first, with the conditions it was measured under."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from outrider.errors import OptionError, OutriderError

if TYPE_CHECKING:
    from benchmarks.kernels.case import Case
    from benchmarks.kernels.run import Bench
    from outrider.cli.screen import Screen

PROGRAM = "python -m benchmarks"
RESULTS = Path(__file__).parent / "results" / "kernels.jsonl"
DRAFTING_RESULTS = RESULTS.with_name("drafting.jsonl")
EVALUATION_RESULTS = RESULTS.with_name("evaluation.jsonl")
TAIL_RESULTS = RESULTS.with_name("tail-correction.jsonl")
SPATTEN_RESULTS = RESULTS.with_name("spatten.jsonl")
BUDGET_RESULTS = RESULTS.with_name("budgets.jsonl")
EXACTNESS_RESULTS = RESULTS.with_name("exactness.jsonl")
DRAWS_RESULTS = RESULTS.with_name("draws.jsonl")
GUARD_RESULTS = RESULTS.with_name("guard.jsonl")
BACKENDS = ("auto", "triton", "cuda", "reference")
BAD_INPUT = 2

app = typer.Typer(add_completion=False, context_settings={"help_option_names": ["-h", "--help"]})


@app.callback()
def benchmarks() -> None:
    """Benchmarks of Outrider."""


@app.command()
def kernels(
    only: Annotated[list[str] | None, typer.Option(help="run the cases whose name holds this; can be repeated")] = None,
    backend: Annotated[list[str] | None, typer.Option(help=f"{', '.join(BACKENDS)}; can be repeated")] = None,
    peer_fa3: Annotated[Path | None, typer.Option(help="FlashAttention-3's .so file")] = None,
    peer_flashinfer: Annotated[Path | None, typer.Option(help="folder that FlashInfer was unpacked into")] = None,
    output: Annotated[Path, typer.Option(help="file of JSON lines; those of the same case and backend are replaced")] = RESULTS,
    quick: Annotated[bool, typer.Option("--quick", help="10 iterations in place of 50, and no chains")] = False,
) -> None:
    """Check every op on a GPU, then time it: alone, in a chain of 8, and next to its peers. Backends: triton and cuda."""
    from benchmarks import peers
    from benchmarks.kernels.cases import chosen
    from outrider.cli.files import writable_file

    backends = list(dict.fromkeys(backend or ("triton", "cuda")))
    for name in backends:
        if name not in BACKENDS:
            raise OptionError("--backend", name, ", ".join(BACKENDS))
    for option, path in ((peers.FA3, peer_fa3), (peers.FLASHINFER, peer_flashinfer)):
        if path is not None and not path.exists():
            raise OptionError(option, str(path), "a path that exists")
    cases, output = chosen(only or []), writable_file("--output", output)

    import torch

    from benchmarks.kernels.run import Bench
    from benchmarks.timing import FLUSH_BYTES, GraphTimer, empty_graph_us
    from outrider.bench.conditions import conditions
    from outrider.bench.stream.rate import stream_rate
    from outrider.cli.screen import Screen

    if not torch.cuda.is_available():
        raise OptionError("kernels", "a machine without a CUDA device", "a machine with one")
    device, screen = torch.device("cuda"), Screen()
    timer = GraphTimer(device, iterations=10 if quick else 50)
    known = conditions(device, shlex.join([*PROGRAM.split(), *sys.argv[1:]])) | {
        "stream_gb_s": stream_rate(device),
        "empty_graph_us": empty_graph_us(timer, device),
        "iterations": timer.iterations,
        "flush_mb": FLUSH_BYTES // 2**20,
    }
    bench = Bench(
        backends=backends,
        timer=timer,
        device=device,
        conditions=known,
        missing=peers.load({peers.FA3: peer_fa3, peers.FLASHINFER: peer_flashinfer}),
        chained=not quick,
        note=lambda text: print(text, file=sys.stderr, flush=True),
    )
    if not run_cases(cases, bench, output, screen):
        raise typer.Exit(1)


@app.command()
def drafting(
    text: Annotated[Path, typer.Option(help="file of UTF-8 text that neither model has seen")],
    context: Annotated[int, typer.Option(help="tokens of the text, those that are scored among them")] = 16384,
    scored: Annotated[int, typer.Option(help="last tokens that are compared")] = 2000,
    draft_tokens: Annotated[int, typer.Option("--draft-tokens", "-K", help="tokens of a round, but one")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path, typer.Option(help="file of JSON lines; same rows are replaced")] = DRAFTING_RESULTS,
) -> None:
    """How often the built-in draft chooses as the dense target does, by what the draft reads while it drafts."""
    from outrider.bench.conditions import conditions
    from outrider.bench.results import replace_rows
    from outrider.cli.files import read_text, writable_file
    from outrider.cli.screen import Screen

    words, output = read_text("--text", text), writable_file("--output", output)

    import torch

    from benchmarks.drafting import compare
    from outrider.decoding.pair import BUILTIN, load_pair

    pair = load_pair(BUILTIN, None, device=device, dtype="bfloat16" if device == "cuda" else "float32")
    tokens = pair[0].tokenizer(words, verbose=False)["input_ids"]
    if not 1 <= scored < context <= min(len(tokens), pair[0].spec.context):
        raise OptionError("--context", context, f"more than --scored, at most the {len(tokens)} tokens of the text")
    known = conditions(torch.device(device), shlex.join([*PROGRAM.split(), *sys.argv[1:]]))
    screen = Screen()
    with screen.working():
        rows = compare(pair, tokens[:context], scored, draft_tokens, screen.progress)
    for row in rows:
        print(f"{row['reads']:24s} {row['agreement']:.3f}", *(f"{x:.3f}" for x in row["by_position"]))
    made = [{"text": text.stem, "context": context, "scored": scored} | row | {"conditions": known} for row in rows]
    replace_rows(output, made, ("text", "context", "scored", "reads"))


@app.command()
def tail_correction(
    text: Annotated[list[Path], typer.Option(help="file of UTF-8 text that neither model has seen; can be repeated")],
    calibrate: Annotated[Path, typer.Option(help="another one, which shares and offsets are fitted on")],
    correction: Annotated[list[str] | None, typer.Option(help="its name, all unless given; can be repeated")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="what may be read, in listed tokens; can be repeated")] = None,
    lists: Annotated[str, typer.Option(help="who chooses: draft, or oracle (the target's own attention)")] = "draft",
    context: Annotated[int, typer.Option(help="tokens of a text, those that are scored among them")] = 16384,
    scored: Annotated[int, typer.Option(help="last tokens that are predicted")] = 1280,
    calibrated: Annotated[int, typer.Option(help="tokens that shares and offsets are fitted on")] = 320,
    facts: Annotated[int, typer.Option(help="facts planted in each text")] = 20,
    draft_tokens: Annotated[int, typer.Option("--draft-tokens", "-K", help="tokens of a round, but one")] = 4,
    seed: Annotated[int, typer.Option(help="of facts and of sampled tokens")] = 0,
    output: Annotated[Path, typer.Option(help="file of JSON lines; same rows are replaced")] = TAIL_RESULTS,
) -> None:
    """What estimates of the unlisted tokens are worth, at equal bytes, to the built-in pair on a CPU."""
    from outrider.bench.results import replace_rows
    from outrider.cli.files import writable_file
    from outrider.cli.screen import Screen

    output = writable_file("--output", output)

    from benchmarks.given import prepare
    from benchmarks.tail_correction import CORRECTIONS, LISTS, Case, check_budgets, compare, fit

    for name in correction or ():
        if name not in CORRECTIONS:
            raise OptionError("--correction", name, ", ".join(CORRECTIONS))
    if lists not in LISTS:
        raise OptionError("--lists", lists, ", ".join(LISTS))
    for share in keep or ():
        if not 0 < share < 1:
            raise OptionError("--keep", share, "a number in (0, 1)")
    cases = [
        Case(name=name, keep=share, lists=lists) for share in keep or (0.1, 0.05, 0.02) for name in correction or CORRECTIONS
    ]
    check_budgets(cases, (context - max(scored, calibrated)) * 9 // 10)  # facts take some room, too
    pair, tokens, known = read_study(text, calibrate, context, scored, calibrated, facts, draft_tokens)
    screen = Screen()
    with screen.working():
        document, following, _ = prepare(pair, tokens[calibrate], calibrated, 0, draft_tokens, seed)
        fits = fit(document, following, cases, seed, screen.progress)
        for path in text:
            given = prepare(pair, tokens[path], scored, facts, draft_tokens, seed)
            for row in compare(*given, fits, seed, screen.progress):
                made = {"text": path.stem, "context": context} | row | {"conditions": known}
                replace_rows(output, [made], ("text", "context", "scored", "correction", "keep", "lists", "seed"))
                shown = f"{row['delta_percent']:+.2f}% {row['output_error']:.3f} {row['recalled']}/{row['asked']}"
                print(f"{path.stem:40s} {row['keep']:<5g} {row['correction']:44s} {shown}", flush=True)


@app.command()
def evaluation(
    folder: Annotated[Path, typer.Argument(help="folder that `outrider eval sweep benchmarks/evaluation.yaml` has made")],
    commit: Annotated[str, typer.Option(help="of the code that it ran")],
    output: Annotated[Path, typer.Option(help="file of JSON lines; lines about the same are replaced")] = EVALUATION_RESULTS,
) -> None:
    """Result lines of the project's sweep, which the documents' tables are made from."""
    from benchmarks.evaluation import KEY, collect
    from outrider.bench.results import replace_rows
    from outrider.cli.files import writable_file

    if not (folder / "sweep.json").is_file():
        raise OptionError("FOLDER", str(folder), "a folder that `outrider eval sweep` has made")
    output = writable_file("--output", output)
    known = {"commit": commit, "command": "outrider eval sweep benchmarks/evaluation.yaml"}
    rows = [line | {"conditions": line["conditions"] | known} for line in collect(folder)]
    replace_rows(output, rows, KEY)


@app.command()
def spatten(
    text: Annotated[list[Path], typer.Option(help="file of UTF-8 text that the target has not seen; can be repeated")],
    keep: Annotated[list[float], typer.Option(help="share of the tokens; can be repeated")],
    context: Annotated[int, typer.Option(help="tokens of a text, those that are scored among them")] = 16384,
    scored: Annotated[int, typer.Option(help="last tokens that are predicted")] = 1280,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path, typer.Option(help="file that JSON lines are appended to")] = SPATTEN_RESULTS,
) -> None:
    """SpAtten on the built-in target: tokens alone, with heads, with values, with both."""
    from outrider.cli.files import read_text
    from outrider.eval.rows import Text, append_rows, check_rows_path

    words = [(path.stem, read_text("--text", path)) for path in text]
    check_rows_path(output)

    from benchmarks.spatten import compare
    from outrider.decoding.pair import BUILTIN, load_pair

    texts = [Text(name=name, text=content) for name, content in words]
    for row in compare(load_pair(BUILTIN, None, device=device), texts, keep, context, scored):
        append_rows(output, [row], shlex.join([*PROGRAM.split(), *sys.argv[1:]]))
        shown = f"{100 * row.kv_read_fraction:5.1f}% {row.delta_percent:+.2f}% {row.agreement:.3f}"
        print(f"{row.text:40s} {row.keep:<5g} {row.method:28s} {shown}", flush=True)


@app.command()
def budgets(
    text: Annotated[list[Path], typer.Option(help="file of UTF-8 text that neither model has seen; can be repeated")],
    calibrate: Annotated[Path, typer.Option(help="another one, which budgets are fitted on")],
    variant: Annotated[list[str] | None, typer.Option(help="how budgets are made, all unless given; can be repeated")] = None,
    keep: Annotated[list[float] | None, typer.Option(help="share of the cached tokens of all lists; can be repeated")] = None,
    context: Annotated[int, typer.Option(help="tokens of a text, those that are scored among them")] = 16384,
    scored: Annotated[int, typer.Option(help="last tokens that are predicted")] = 1280,
    calibrated: Annotated[int, typer.Option(help="tokens that budgets are fitted on")] = 320,
    facts: Annotated[int, typer.Option(help="facts planted in each text")] = 10,
    draft_tokens: Annotated[int, typer.Option("--draft-tokens", "-K", help="tokens of a round, but one")] = 4,
    seed: Annotated[int, typer.Option(help="of facts")] = 0,
    output: Annotated[Path, typer.Option(help="file of JSON lines; same rows are replaced")] = BUDGET_RESULTS,
) -> None:
    """What one budget for all lists wastes, at equal bytes, to the built-in pair on a CPU."""
    from outrider.bench.results import replace_rows
    from outrider.cli.files import writable_file
    from outrider.cli.screen import Screen

    output = writable_file("--output", output)

    from benchmarks.budgets import SHARES, VARIANTS, compare, fit
    from benchmarks.given import prepare

    for name in variant or ():
        if name not in VARIANTS:
            raise OptionError("--variant", name, ", ".join(VARIANTS))
    for share in keep or ():
        if not SHARES[0] < share < 1:
            raise OptionError("--keep", share, f"a number in ({SHARES[0]}, 1)")
    pair, tokens, known = read_study(text, calibrate, context, scored, calibrated, facts, draft_tokens)
    asked = keep or [0.1, 0.05, 0.02]
    cases = [(name, share) for share in asked for name in variant or VARIANTS]
    screen = Screen()
    with screen.working():
        document, following, _ = prepare(pair, tokens[calibrate], calibrated, 0, draft_tokens, seed)
        found = fit(document, following, asked, screen.progress)
        for path in text:
            given = prepare(pair, tokens[path], scored, facts, draft_tokens, seed)
            for row in compare(*given, cases, found, screen.progress):
                made = {"text": path.stem, "context": context} | row | {"seed": seed, "conditions": known}
                replace_rows(output, [made], ("text", "context", "scored", "budgets", "keep", "seed"))
                shown = f"{row['kl']:.4f} {row['delta_percent']:+.2f}% {row['held']:.3f} {row['recalled']}/{row['asked']}"
                print(f"{path.stem:40s} {row['keep']:<5g} {row['budgets']:24s} {shown}", flush=True)


@app.command()
def exactness(
    text: Annotated[list[Path], typer.Option(help="file of UTF-8 text that prompts are taken from; can be repeated")],
    prompts: Annotated[int, typer.Option(help="of each text, at evenly spread places")] = 8,
    context: Annotated[int, typer.Option(help="tokens of a prompt")] = 1200,
    tokens: Annotated[int, typer.Option(help="that are generated behind each")] = 480,
    batch: Annotated[int, typer.Option(help="prompts at a time")] = 16,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path, typer.Option(help="file of JSON lines; same rows are replaced")] = EXACTNESS_RESULTS,
) -> None:
    """Is the text of mode exact the dense target's own? The built-in pair in fp32, under settings that make it hard."""
    from outrider.bench.results import replace_rows
    from outrider.cli.files import writable_file
    from outrider.cli.screen import Screen

    output = writable_file("--output", output)

    from benchmarks.exactness import compare

    engine, pieces, known = read_prompts(text, prompts, context, tokens, device)
    known |= {"texts": [path.stem for path in text], "prompts": prompts, "context": context, "batch": batch}
    screen = Screen()
    with screen.working():
        given = [prompt for each in pieces.values() for prompt in each]
        for row in compare(engine, given, tokens, batch, screen.progress):
            replace_rows(output, [row | {"device": known["device"], "conditions": known}], ("setting", "device"))
            shown = f"{row['identical']:>7,} of {row['tokens']:>7,}, {row['rolled_back']:,} rolled back, {row['seconds']:.0f} s"
            print(f"{row['setting']:36s} {shown}", *row["parted"], flush=True)


@app.command()
def draws(
    count: Annotated[int, typer.Option("--draws", help="texts of two tokens, in each setting")] = 100_000,
    batch: Annotated[int, typer.Option(help="of them at a time")] = 512,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path, typer.Option(help="file of JSON lines; same rows are replaced")] = DRAWS_RESULTS,
) -> None:
    """Are drawn texts of mode exact distributed as the dense target's? Chi-square, on a tiny model with 12 tokens."""
    from outrider.bench.results import replace_rows
    from outrider.cli.files import writable_file
    from outrider.cli.screen import Screen

    for option, number in (("--draws", count), ("--batch", batch)):
        if number < 1:
            raise OptionError(option, number, "a whole number >= 1")
    output = writable_file("--output", output)

    import torch

    from benchmarks.draws import count as counted
    from outrider.bench.conditions import conditions

    known = conditions(torch.device(device), shlex.join([*PROGRAM.split(), *sys.argv[1:]]))
    screen = Screen()
    with screen.working():
        for row in counted(count, batch, torch.device(device), screen.progress):
            replace_rows(output, [row | {"device": known["device"], "conditions": known}], ("setting", "device"))
            print(f"{row['setting']:44s} {row['chi_square']:10.1f} of {row['freedom']}, p {row['p']:.3g}", flush=True)


@app.command()
def guard(
    text: Annotated[list[Path], typer.Option(help="file of UTF-8 text that prompts are taken from; can be repeated")],
    prompts: Annotated[int, typer.Option(help="of each text, at evenly spread places")] = 4,
    context: Annotated[int, typer.Option(help="tokens of a prompt")] = 4000,
    tokens: Annotated[int, typer.Option(help="that are generated behind each")] = 256,
    every: Annotated[int, typer.Option(help="rounds from one audit to the next")] = 4,
    device: Annotated[str, typer.Option(help="cpu or cuda")] = "cpu",
    output: Annotated[Path, typer.Option(help="file of JSON lines; same rows are replaced")] = GUARD_RESULTS,
) -> None:
    """What the guard of mode sparse finds of the built-in pair at its default tolerance, text by text."""
    from outrider.bench.results import replace_rows
    from outrider.cli.files import writable_file
    from outrider.cli.screen import Screen

    output = writable_file("--output", output)

    from benchmarks.guard import watch

    engine, pieces, known = read_prompts(text, prompts, context, tokens, device)
    known |= {"prompts": prompts, "context": context, "tokens": tokens, "every": every}
    screen = Screen()
    with screen.working():
        for row in watch(engine, {path.stem: each for path, each in pieces.items()}, tokens, every, screen.progress):
            made = row | {"device": known["device"], "conditions": known}
            replace_rows(output, [made], ("text", "lists", "temperature", "device"))
            shown = f"{row['audits']:4d} audits, {row['disagreement']:.3f}, {row['recalled']:.2f}, {row['raised']} raised"
            print(f"{row['text']:36s} {row['lists']:10s} {row['temperature']:.1f} {shown}", flush=True)


def read_prompts(
    text: list[Path], prompts: int, context: int, tokens: int, device: str
) -> tuple[Any, dict[Path, list[list[int]]], dict[str, Any]]:
    """An engine over the built-in pair, prompts of `context` tokens from every text, and the conditions; checked before."""
    from outrider.bench.conditions import conditions
    from outrider.cli.files import read_text

    for option, count in (("--prompts", prompts), ("--context", context), ("--tokens", tokens)):
        if count < 1:
            raise OptionError(option, count, "a whole number >= 1")
    words = {path: read_text("--text", path) for path in text}

    import torch

    from outrider import Outrider

    engine = Outrider.load(device=device, dtype="float32")
    pieces = {}
    for path, found in words.items():
        whole = engine.tokenize(found)
        if len(whole) < context:
            raise OptionError("--context", context, f"at most the {len(whole)} tokens of {path}")
        starts = torch.linspace(0, len(whole) - context, prompts).long().tolist()
        pieces[path] = [whole[start : start + context] for start in starts]
    return engine, pieces, conditions(torch.device(device), shlex.join([*PROGRAM.split(), *sys.argv[1:]]))


def read_study(
    text: list[Path], calibrate: Path, context: int, scored: int, calibrated: int, facts: int, draft_tokens: int
) -> tuple[Any, dict[Path, list[int]], dict[str, Any]]:
    """The built-in pair, the first `context` tokens of every text, and the conditions of a study of both; checked before."""
    from outrider.bench.conditions import conditions
    from outrider.cli.files import read_text

    counts = ("--scored", scored, 2), ("--calibrated", calibrated, 1), ("--facts", facts, 0), ("-K", draft_tokens, 1)
    for option, count, least in counts:
        if count < least:
            raise OptionError(option, count, f"a whole number >= {least}")
    if calibrate in text:
        raise OptionError("--calibrate", str(calibrate), "a text that is not among those compared")
    words = {path: read_text("--text", path) for path in (calibrate, *text)}

    import torch

    from outrider.decoding.pair import BUILTIN, load_pair

    pair = load_pair(BUILTIN, None)
    tokens = {path: pair[0].tokenizer(found, verbose=False)["input_ids"][:context] for path, found in words.items()}
    shortest = min(map(len, tokens.values()))
    if not max(scored, calibrated) < context <= min(shortest, pair[0].spec.context):
        raise OptionError("--context", context, f"more than --scored, at most the {shortest} tokens of the shortest text")
    known = conditions(torch.device("cpu"), shlex.join([*PROGRAM.split(), *sys.argv[1:]])) | {"calibrate": calibrate.stem}
    return pair, tokens, known


def run_cases(cases: Sequence[Case], bench: Bench, output: Path, screen: Screen) -> bool:
    """Measure, write and show the cases. False if any failed."""
    from benchmarks.kernels import show
    from benchmarks.kernels.rows import replace_rows
    from benchmarks.kernels.run import measure

    screen.show(show.card(bench.conditions))
    rows, well = [], True
    for i, case in enumerate(cases):
        screen.progress("measuring", i, len(cases))
        made, good = measure(case, bench)
        well &= good
        replace_rows(output, made)  # after every case: what is measured stays, should a later one end the run
        rows += made
        for row in made:
            bench.note(show.line(row))
    screen.progress("measuring", len(cases), len(cases))
    for table in show.tables(rows, {case.id: case.op for case in cases}):
        screen.show(table)
    return well


def run(arguments: Sequence[str]) -> int:
    """The exit code: 0, 1 where a case failed, 2 for bad input."""
    try:
        return typer.main.get_command(app).main(list(arguments), prog_name=PROGRAM, standalone_mode=False) or 0
    except OutriderError as error:
        message = str(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own complaints have it
            raise
        message = error.format_message()
    print(f"benchmarks: error: {message}", file=sys.stderr)
    return BAD_INPUT


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
