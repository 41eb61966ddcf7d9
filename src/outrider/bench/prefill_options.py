"""What `outrider bench prefill` is asked for, checked before any work starts. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

from outrider.bench import options
from outrider.bench.cases import LLAMA, QWEN3, TINY, Pair
from outrider.bench.options import DEVICES, OURS, VLLM, check_vllm
from outrider.config import KV_DTYPES, PREFILL_METHODS, EngineConfig, check, option
from outrider.errors import OptionError

MODES_OF = {OURS: options.DEFAULT_MODES, VLLM: options.MODES_OF[VLLM]}
MODES = MODES_OF[OURS]


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillCase:
    """A pair that reads one prompt of `context` tokens."""

    name: str
    pair: Pair
    context: int


DEFAULT_CASES = (
    PrefillCase(name="llama-32k", pair=LLAMA, context=32768),
    PrefillCase(name="llama-128k", pair=LLAMA, context=131072),
)
LONG_CASES = (  # of which bf16 caches of the second would not fit one GPU of 141 GB: --kv-dtype fp8
    PrefillCase(name="llama-512k", pair=LLAMA, context=524288),
    PrefillCase(name="llama-1m", pair=LLAMA, context=1048576),
)
OTHER_CASES = (PrefillCase(name="qwen3-128k", pair=QWEN3, context=131072),)
TINY_CASE = PrefillCase(name="tiny", pair=TINY, context=1000)  # for a CPU
CASES = {case.name: case for case in (*DEFAULT_CASES, *LONG_CASES, *OTHER_CASES, TINY_CASE)}


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillRun:
    """One engine in one mode."""

    engine: str
    mode: str
    method: str | None = None  # of mode sparse
    kv_dtype: str | None = None  # fp8; None: in the models' dtype


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillOptions:
    """Which cases, on which engines and in which modes. Raises OptionError for what does not fit."""

    case: tuple[str, ...] = option((), f"{', '.join(CASES)}; default: {', '.join(case.name for case in DEFAULT_CASES)}")
    engine: tuple[str, ...] = option((OURS,), ", ".join(MODES_OF))
    mode: tuple[str, ...] = option(MODES, "plain (the target alone), dense (target and draft) or sparse (target from lists)")
    method: tuple[str, ...] = option(PREFILL_METHODS[:1], f"how mode sparse reads: {', '.join(PREFILL_METHODS)}")
    keep: float = option(
        EngineConfig().prefill_keep,
        "share of the tokens before it that a block reads, or of the prompt that is kept, in (0, 1]",
    )
    block: int = option(EngineConfig().prefill_block, "prompt tokens that share lists")
    draft_keep: float = option(
        EngineConfig().prefill_draft_keep, "share of the tokens before it that a block of the draft reads, in (0, 1]; 1: all"
    )
    draft_least: int = option(EngineConfig().prefill_draft_least, "tokens that it reads at least")
    chunk: int = option(8192, "prompt tokens per forward, where it is not the whole prompt; a multiple of the block")
    kv_dtype: tuple[str, ...] = option(("auto",), "how we cache keys and values: auto (in the models' dtype) or fp8")
    device: str = option("cuda", "cuda; cpu for the tiny case")
    peer_vllm: Path | None = field(
        default=None, metadata={"help": "folder that vLLM was unpacked into; default: the one that is installed"}
    )
    peer_timeout: int = option(300, "seconds after which a peer's process is ended")

    def __post_init__(self) -> None:
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), tuple):
                object.__setattr__(self, f.name, tuple(dict.fromkeys(value)))
        choices: dict[str, Iterable[str]] = {"case": CASES, "engine": MODES_OF, "mode": MODES, "kv_dtype": KV_DTYPES}
        choices["method"] = PREFILL_METHODS
        for name, allowed in choices.items():
            for value in getattr(self, name):
                check(name.replace("_", "-"), value, value in allowed, ", ".join(allowed))
        sparse = OURS in self.engine and "sparse" in self.mode
        check(
            "method", self.method, sparse or self.method == PREFILL_METHODS[:1], f"nothing without engine {OURS}, mode sparse"
        )
        check("device", self.device, self.device in DEVICES, ", ".join(DEVICES))
        EngineConfig(
            prefill_keep=self.keep,
            prefill_block=self.block,
            prefill_chunk=self.chunk,
            prefill_draft_keep=self.draft_keep,
            prefill_draft_least=self.draft_least,
        )
        check("chunk", self.chunk, self.chunk % self.block == 0, f"a multiple of block = {self.block}")
        check("peer-timeout", self.peer_timeout, self.peer_timeout >= 1, "a whole number >= 1")
        if self.device == "cpu":
            check("device", "cpu", self.cases == (TINY_CASE,), f"cuda; cpu with --case {TINY_CASE.name}")
        self._check_peers()

    @property
    def cases(self) -> tuple[PrefillCase, ...]:
        return tuple(CASES[name] for name in self.case) or DEFAULT_CASES

    @property
    def runs(self) -> tuple[PrefillRun, ...]:
        """What every case is measured with: peers first, since they need the device's memory to themselves."""
        return tuple(
            PrefillRun(engine=engine, mode=mode, method=method, kv_dtype=None if kv_dtype == "auto" else kv_dtype)
            for engine in sorted(self.engine, key=lambda name: name == OURS)
            for kv_dtype in (self.kv_dtype if engine == OURS else ("auto",))
            for mode in self.mode
            if mode in MODES_OF[engine]
            for method in (self.method if mode == "sparse" else (None,))
        )

    def _check_peers(self) -> None:
        if VLLM not in self.engine:
            if self.peer_vllm is not None:
                raise OptionError("peer-vllm", str(self.peer_vllm), f"nothing without --engine {VLLM}")
            return
        if not {*self.mode} & {*MODES_OF[VLLM]}:
            raise OptionError("mode", ", ".join(self.mode), f"{', '.join(MODES_OF[VLLM])} for engine {VLLM}")
        check_vllm(self.device, self.peer_vllm)
