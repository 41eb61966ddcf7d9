"""What `outrider bench decode` is asked for, checked before any work starts. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from importlib.util import find_spec
from pathlib import Path

from outrider.bench.cases import CASES, DEFAULT_CASES, TINY_CASE, Case
from outrider.config import KV_DTYPES, SCORE_KEYS, Budget, EngineConfig, check, option
from outrider.errors import OptionError

OURS, VLLM, TRANSFORMERS = "outrider", "vllm", "transformers"
DEFAULT_MODES = ("plain", "dense", "sparse")
MODES_OF = {OURS: (*DEFAULT_MODES, "exact", "auto"), VLLM: ("plain", "dense"), TRANSFORMERS: ("plain",)}
LISTED = ("sparse", "exact", "auto")  # modes whose rounds read lists, or may
DRAFTING = ("dense", "sparse")
DEVICES = ("cuda", "cpu")
DEFAULT_RATES = (0.9, 0.8, 0.7, 0.6)  # of 4 drafted tokens
DEFAULT_AGREEMENT = 0.98
WITH_TARGET = ("draft", "alignment", "prompt_file", "context", "batch")  # options that real models need and cases do not take


def is_scored(engine: str, mode: str, drafting: str | None) -> bool:
    """Someone reads lists, so the draft's keys are scored."""
    return engine == OURS and (mode in LISTED or drafting == "sparse")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One engine in one mode."""

    engine: str
    mode: str
    drafting: str | None  # None where there is no draft
    scoring: str | None = None  # of SCORE_KEYS, or of CODE_BITS once it is decided; None where nothing is scored
    kv_dtype: str | None = None  # fp8; None: as the engine does by itself, in the models' dtype
    parallel: str | None = None  # ranks that share the target, and the draft, too, if they do; None: one process has all


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeOptions:
    """Which cases, or which real models, on which engines and in which modes. Raises OptionError for what does not fit."""

    case: tuple[str, ...] = option((), f"{', '.join(CASES)}; default: {DEFAULT_CASES[0].name} to {DEFAULT_CASES[-1].name}")
    engine: tuple[str, ...] = option((OURS,), ", ".join(MODES_OF))
    mode: tuple[str, ...] = option(
        DEFAULT_MODES,
        "plain (the target alone), dense or sparse verification, exact (sparse, then confirmed densely), or auto (the fastest "
        "of plain, dense and exact)",
    )
    drafting: tuple[str, ...] = option(DRAFTING, "what the draft reads: dense (all) or sparse (the kept share)")
    score_keys: tuple[str, ...] = option(
        ("auto",),
        "what scoring reads of the draft's keys: exact (all), 4bit or 2bit (a copy in few bits) or auto (the engine decides)",
    )
    kv_dtype: tuple[str, ...] = option(("auto",), "how we cache keys and values: auto (in the models' dtype) or fp8")
    keep: float = option(0.1, "share of the cached tokens that each list keeps, in (0, 1]")
    allocation: str = option("auto", "how lists share what all may keep: flat, fitted or auto, as in generation")
    unlisted: str = option("none", "what stands for the tokens that lists leave out: none or mean, as in generation")
    draft_tokens: int = option(4, "tokens the draft proposes each round (K)")
    acceptance: str | None = option(
        None,
        "scripted acceptance of dummy weights: for each of the K drafted tokens the share of rounds in which it and all before "
        "it are accepted, by commas; default .9,.8,.7,.6",
    )
    agreement: float | None = option(
        None,
        "scripted agreement of dummy weights in modes exact and auto: the chance that a tentative token is confirmed where all "
        f"before it are, in [0, 1]; default {DEFAULT_AGREEMENT:g}",
    )
    exact_every: int | None = option(None, "mode exact: tokens before a dense forward confirms them, as in generation")
    guard_every: int | None = option(
        None, "mode sparse: rounds from one audit by the quality guard to the next, as in generation; here it only watches"
    )
    rounds: int = option(40, "rounds that are measured")
    device: str = option("cuda", "cuda; cpu for the tiny case and for real models")
    tensor_parallel: int = option(1, "GPUs of this host that share the target, by heads; with device cpu: processes")
    shard_draft: bool = option(False, "with several GPUs: they share the draft, too; default: each has all of it")
    target: str | None = option(None, "a real target (folder, hub id or builtin) in place of cases with dummy weights")
    draft: str | None = option(None, "its draft; target builtin brings its own")
    alignment: Path | None = field(
        default=None, metadata={"help": "file made by outrider calibrate for this pair; the built-in pair has its own"}
    )
    prompt_file: Path | None = field(default=None, metadata={"help": "file of UTF-8 text that real models continue"})
    context: int | None = option(None, "tokens of the text that are read, with --target")
    batch: int | None = option(None, "sequences, with --target: they begin at different places of the text; default 1")
    peer_vllm: Path | None = field(
        default=None, metadata={"help": "folder that vLLM was unpacked into; default: the one that is installed"}
    )
    peer_timeout: int = option(300, "seconds after which a peer's process is ended")

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), tuple):
                object.__setattr__(self, f.name, tuple(dict.fromkeys(value)))
        self._check_choices()
        self._check_numbers()
        self._check_models()
        self._check_peers()

    @property
    def cases(self) -> tuple[Case, ...]:
        """The cases with dummy weights; none for real models."""
        if self.target is not None:
            return ()
        return tuple(CASES[name] for name in self.case) or DEFAULT_CASES

    @property
    def rates(self) -> tuple[float, ...]:
        """Scripted acceptance, one share for each drafted token."""
        return DEFAULT_RATES if self.acceptance is None else tuple(float(part) for part in self.acceptance.split(","))

    @property
    def scripted_agreement(self) -> float:
        """Of tentative tokens of dummy weights with those of a dense target."""
        return DEFAULT_AGREEMENT if self.agreement is None else self.agreement

    @property
    def parallel(self) -> str | None:
        """See `Run`."""
        if self.tensor_parallel == 1:
            return None
        return f"{self.tensor_parallel} ranks" + ", shared draft" * self.shard_draft

    @property
    def runs(self) -> tuple[Run, ...]:
        """What every case is measured with: peers first, since they need the device's memory to themselves."""
        found: list[Run] = []
        for engine in sorted(self.engine, key=lambda name: name == OURS):
            ours = engine == OURS
            for kv_dtype in [None if one == "auto" else one for one in self.kv_dtype] if ours else [None]:
                for mode in (mode for mode in self.mode if mode in MODES_OF[engine]):
                    for drafting in (None,) if mode == "plain" else self.drafting if ours else ("dense",):
                        for scoring in self.score_keys if is_scored(engine, mode, drafting) else (None,):
                            run = Run(engine=engine, mode=mode, drafting=drafting, scoring=scoring, kv_dtype=kv_dtype)
                            found.append(replace(run, parallel=self.parallel))
        return tuple(found)

    def _check_choices(self) -> None:
        choices: dict[str, Iterable[str]] = {
            "case": CASES,
            "engine": MODES_OF,
            "mode": MODES_OF[OURS],
            "drafting": DRAFTING,
            "score_keys": SCORE_KEYS,
            "kv_dtype": KV_DTYPES,
        }
        for name, allowed in choices.items():
            for value in getattr(self, name):
                check(name.replace("_", "-"), value, value in allowed, ", ".join(allowed))
        check("device", self.device, self.device in DEVICES, ", ".join(DEVICES))
        for engine in self.engine:
            modes = MODES_OF[engine]
            check("mode", ", ".join(self.mode), bool({*modes} & {*self.mode}), f"{', '.join(modes)} for engine {engine}")
        if self.tensor_parallel > 1:
            check("engine", ", ".join(self.engine), self.engine == (OURS,), f"{OURS} with tensor-parallel above 1")
            check("mode", ", ".join(self.mode), "auto" not in self.mode, "all but auto with tensor-parallel above 1")
        else:
            check("shard-draft", self.shard_draft, not self.shard_draft, "False with tensor-parallel 1")

    def _check_numbers(self) -> None:
        Budget(keep=self.keep, allocation=self.allocation, unlisted=self.unlisted)
        EngineConfig(exact_every=self.exact_every, guard_every=self.guard_every)
        agreement = self.agreement
        check("agreement", agreement, agreement is None or 0 <= agreement <= 1, "a number in [0, 1]")
        for name in ("draft_tokens", "rounds", "peer_timeout", "tensor_parallel"):
            value = getattr(self, name)
            check(name.replace("_", "-"), value, value >= 1, "a whole number >= 1")
        try:
            rates = self.rates
        except ValueError:
            rates = ()
        falling = all(1 >= before >= after >= 0 for before, after in zip((1.0, *rates), rates, strict=False))
        shown = ",".join(f"{rate:g}" for rate in DEFAULT_RATES) if self.acceptance is None else self.acceptance
        wanted = f"{self.draft_tokens} numbers in [0, 1] by commas, one for each drafted token, none larger than the one before"
        if self.target is None:
            check("acceptance", shown, falling and len(rates) == self.draft_tokens, wanted)

    def _check_models(self) -> None:
        if self.target is None:
            for name in WITH_TARGET:
                check(name.replace("_", "-"), getattr(self, name), getattr(self, name) is None, "nothing without --target")
            if self.device == "cpu":
                check("device", "cpu", self.cases == (TINY_CASE,), "cuda; cpu with --case tiny or --target")
            return
        for name in ("case", "acceptance", "agreement"):
            given = getattr(self, name)
            check(name, given, given in (None, ()), "nothing with --target: real models bring their own")
        check("engine", ", ".join(self.engine), self.engine == (OURS,), f"{OURS} with --target: peers run with dummy weights")
        check("prompt-file", self.prompt_file, self.prompt_file is not None, "a file of UTF-8 text with --target")
        check("context", self.context, (self.context or 0) >= 2, "a whole number >= 2 with --target")
        check("batch", self.batch, self.batch is None or self.batch >= 1, "a whole number >= 1")

    def _check_peers(self) -> None:
        if VLLM not in self.engine:
            if self.peer_vllm is not None:
                raise OptionError("peer-vllm", str(self.peer_vllm), f"nothing without --engine {VLLM}")
            return
        check_vllm(self.device, self.peer_vllm)


def check_vllm(device: str, folder: Path | None) -> None:
    """Raise OptionError where vLLM cannot run: not on `device`, or nowhere; `folder` holds it where it is not installed."""
    check("device", device, device == "cuda", f"cuda with --engine {VLLM}")
    if folder is None and find_spec(VLLM) is None:
        raise OptionError("peer-vllm", None, "the folder that vLLM was unpacked into (it is not installed here)")
    if folder is not None and not (folder / VLLM).is_dir():
        raise OptionError("peer-vllm", str(folder), f"a folder that holds the package {VLLM}")
