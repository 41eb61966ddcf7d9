"""Options, validated once, before any work starts. Command-line flags are derived from these fields and their help texts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from outrider.errors import OptionError

VERSION = "0.1.0"  # as pyproject.toml has it
MODES = ("plain", "dense", "sparse", "exact", "auto")
DRAFTING = ("auto", "dense", "sparse")
PREFILL = ("dense", "sparse")
PREFILL_METHODS = ("outrider", "token-sparse", "vertical-slash", "spec-prefill")  # the engine has the first
DTYPES = ("float32", "bfloat16", "float16")
KV_DTYPES = ("auto", "fp8")
CODE_BITS: dict[str, int | None] = {"exact": None, "4bit": 4, "2bit": 2}
SCORE_KEYS = ("auto", *CODE_BITS)
UNLISTED = ("none", "mean")
ALLOCATIONS = ("auto", "flat", "fitted")
BACKENDS = ("auto", "reference", "triton", "cuda")
DEFAULT_KEEP = 0.1
MAX_EXACT_EVERY = 64


def option(default: Any, text: str) -> Any:
    """A dataclass field with the help text that the command line shows."""
    return field(default=default, metadata={"help": text})


def check(option_name: str, value: object, ok: bool, allowed: str) -> None:
    """Raise OptionError unless `ok`."""
    if not ok:
        raise OptionError(option_name, value, allowed)


def check_share(name: str, value: object, *, optional: bool = False) -> None:
    """Raise OptionError unless `value` is a share of something, or None where that is allowed."""
    allowed = "a number in (0, 1]" + " or None" * optional
    check(name, value, (optional and value is None) or (_is_number(value) and 0 < value <= 1), allowed)  # type: ignore[operator]


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much of the cache the target may read: a top-k share (`keep`) or a share of the scored mass (`top_p`).

    Exactly one of `keep` and `top_p` may be given; with neither, `keep` is 0.1. Both lie in (0, 1].
    """

    keep: float | None = option(None, "share of the cached tokens each list keeps (top-k), in (0, 1]; default 0.1")
    top_p: float | None = option(None, "keep the smallest list that holds this share of the scored mass, in (0, 1]")
    sinks: int = option(4, "first tokens of the context that every list of methods outrider and dustin keeps")
    recent: int = option(64, "last cached tokens that every list of methods outrider and dustin keeps")
    min_context: int = option(1024, "below this many cached tokens a sequence is verified densely")
    unlisted: str = option(
        "none",
        "what stands for the tokens that a list of methods outrider, sts, specattn and dustin leaves out: none (the listed "
        "tokens do) or mean (a mean value, by as much as calibrated)",
    )
    allocation: str = option(
        "auto",
        "how lists share what all may keep: flat (each the same), fitted (by layer and head, as calibration found; method "
        "outrider) or auto (fitted where the alignment has it, else flat)",
    )

    def __post_init__(self) -> None:
        if self.keep is not None and self.top_p is not None:
            raise OptionError("keep and top-p", (self.keep, self.top_p), "only one of the two")
        for name, value in (("keep", self.keep), ("top-p", self.top_p)):
            check(name, value, value is None or (_is_number(value) and 0 < value <= 1), "a number in (0, 1]")
        for name, value in (("sinks", self.sinks), ("recent", self.recent), ("min-context", self.min_context)):
            check(name, value, _is_int(value) and value >= 0, "a whole number >= 0")
        check("unlisted", self.unlisted, self.unlisted in UNLISTED, ", ".join(UNLISTED))
        check("allocation", self.allocation, self.allocation in ALLOCATIONS, ", ".join(ALLOCATIONS))
        if self.allocation == "fitted" and self.top_p is not None:
            raise OptionError("allocation", self.allocation, "flat or auto with top-p, under which lists differ anyway")
        if self.keep is None and self.top_p is None:
            object.__setattr__(self, "keep", DEFAULT_KEEP)


def check_flat(budget: Budget, method: str) -> None:
    """Raise OptionError where lists of several lengths are asked for of a method that has none."""
    if budget.allocation == "fitted":
        raise OptionError("allocation", budget.allocation, f"flat or auto with method {method}")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How one prompt is continued. Temperature 0 is greedy; the same seed gives the same tokens, whatever the batch."""

    max_new_tokens: int = option(128, "generate at most this many tokens")
    temperature: float = option(0.0, "sampling temperature; 0 is greedy")
    top_k: int = option(0, "sample among the k most probable tokens; 0 is off")
    top_p: float = option(1.0, "sample among the most probable tokens that hold this share of the probability")
    seed: int = option(0, "seed of the random numbers")
    stop: tuple[str, ...] = option((), "end before the first of these strings")
    ignore_eos: bool = option(False, "go on after the end-of-text token")
    prefill: str | None = option(None, "how this prompt is read: dense, sparse, or None, as the engine says")
    prefill_keep: float | None = option(
        None, "what a block of this prompt reads of the tokens before it; None: as the engine says"
    )

    def __post_init__(self) -> None:
        n, t, k, p = self.max_new_tokens, self.temperature, self.top_k, self.top_p
        check("max-new-tokens", n, _is_int(n) and n >= 1, "a whole number >= 1")
        check("temperature", t, _is_number(t) and 0 <= t < float("inf"), "a number >= 0")
        check("sampling top-k", k, _is_int(k) and k >= 0, "a whole number >= 0 (0 is off)")
        check("sampling top-p", p, _is_number(p) and 0 < p <= 1, "a number in (0, 1]")
        check("seed", self.seed, _is_int(self.seed) and 0 <= self.seed < 2**63, "a whole number in 0 .. 2^63 - 1")
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        check("stop", self.stop, all(isinstance(s, str) and s for s in stop), "non-empty strings")
        check("prefill", self.prefill, self.prefill in (None, *PREFILL), f"None, {', '.join(PREFILL)}")
        check_share("prefill-keep", self.prefill_keep, optional=True)
        object.__setattr__(self, "stop", stop)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """How rounds are run, for all prompts of an engine."""

    mode: str = option(
        "sparse",
        "verification: dense (every round), sparse (from lists, approximate) or exact (from lists, then confirmed densely); "
        "plain: the target alone, no draft; auto: the fastest of plain, dense and exact, by what rounds cost here",
    )
    approximate: bool = option(
        False, "mode auto: rounds that read lists need not be confirmed (the fastest of plain, dense and sparse)"
    )
    method: str = option("outrider", "how tokens are selected: outrider, sts, specattn, dustin or a rival (docs/methods.md)")
    budget: Budget = field(default_factory=Budget)
    draft_tokens: int = option(4, "tokens the draft proposes each round (K); in mode auto at most")
    drafting: str = option(
        "auto", "what the draft reads: dense (all), sparse (what its last round looked at) or auto (sparse in mode sparse)"
    )
    draft_keep: float = option(0.05, "sparse drafting: share of the cached tokens each of the draft's lists keeps, in (0, 1]")
    draft_recent: int = option(512, "sparse drafting: last cached tokens that every list of the draft keeps")
    score_keys: str = option(
        "auto",
        "what scoring reads of the draft's keys: exact (all), 4bit or 2bit (a copy in few bits: less to read each round, more "
        "memory) or auto (4bit where a GPU has a kernel for it, else exact)",
    )
    exact_every: int | None = option(
        None,
        "mode exact: tokens that sparse rounds bring before a dense forward confirms them, 1 .. 64; default: as many as pay, "
        "by how often they were confirmed so far",
    )
    guard_every: int | None = option(
        None,
        "mode sparse: rounds of a sequence from one audit by its quality guard to the next: there the dense target reads the "
        "round's tokens, too; default: no guard",
    )
    guard_tolerance: float = option(
        0.25,
        "guard: share of its tokens that a sequence may choose otherwise than the dense target would, in (0, 1]; beyond it, it "
        "reads more; 1: only watch",
    )
    batch_size: int = option(8, "sequences that run at the same time; more prompts wait")
    prefill_chunk: int = option(2048, "prompt tokens per forward of the prefill")
    prefill: str = option("dense", "how prompts are read: dense, or sparse (the draft chooses what each block reads)")
    prefill_keep: float = option(0.1, "sparse prefill: share of the tokens before it that a block reads, in (0, 1]")
    prefill_block: int = option(128, "sparse prefill: prompt tokens that share lists; prefill-chunk is a multiple of it")
    prefill_draft_keep: float = option(
        0.1, "sparse prefill: share of the tokens before it that a block of the draft reads, in (0, 1]; 1: all"
    )
    prefill_draft_least: int = option(8192, "sparse prefill: tokens before it that a block of the draft reads at least")
    prefill_min_context: int = option(4096, "sparse prefill: so many first tokens of a prompt are read densely, at least")
    kv_dtype: str = option(
        "auto", "how keys and values are cached: auto (in the models' dtype) or fp8 (8 bits, half the memory of bfloat16)"
    )
    eager: bool = option(False, "on a GPU, run rounds kernel by kernel; default: as CUDA graphs, captured once")
    audit: bool = option(False, "after each sequence, count the tokens that the dense target would also have chosen")
    backend: str = option(
        "auto",
        "kernels of the ops: auto (the best for the device; on a CPU reference), reference (plain PyTorch), triton or cuda",
    )

    def __post_init__(self) -> None:
        check("mode", self.mode, self.mode in MODES, ", ".join(MODES))
        check(
            "K (draft-tokens)", self.draft_tokens, _is_int(self.draft_tokens) and self.draft_tokens >= 1, "a whole number >= 1"
        )
        check("drafting", self.drafting, self.drafting in DRAFTING, ", ".join(DRAFTING))
        keep, recent = self.draft_keep, self.draft_recent
        check_share("draft-keep", keep)
        check("draft-recent", recent, _is_int(recent) and recent >= 0, "a whole number >= 0")
        check("score-keys", self.score_keys, self.score_keys in SCORE_KEYS, ", ".join(SCORE_KEYS))
        every, allowed = self.exact_every, f"a whole number in 1 .. {MAX_EXACT_EVERY}, or None"
        check("exact-every", every, every is None or (_is_int(every) and 1 <= every <= MAX_EXACT_EVERY), allowed)
        every, allowed = self.guard_every, "a whole number >= 1, or None"
        check("guard-every", every, every is None or (_is_int(every) and every >= 1), allowed)
        check_share("guard-tolerance", self.guard_tolerance)
        check("batch-size", self.batch_size, _is_int(self.batch_size) and self.batch_size >= 1, "a whole number >= 1")
        chunk = self.prefill_chunk
        check("prefill-chunk", chunk, _is_int(chunk) and chunk >= 1, "a whole number >= 1")
        check("prefill", self.prefill, self.prefill in PREFILL, ", ".join(PREFILL))
        check_share("prefill-keep", self.prefill_keep)
        check_share("prefill-draft-keep", self.prefill_draft_keep)
        least = self.prefill_draft_least
        check("prefill-draft-least", least, _is_int(least) and least >= 0, "a whole number >= 0")
        block, least = self.prefill_block, self.prefill_min_context
        check("prefill-block", block, _is_int(block) and block >= 1, "a whole number >= 1")
        check("prefill-min-context", least, _is_int(least) and least >= 0, "a whole number >= 0")
        check("kv-dtype", self.kv_dtype, self.kv_dtype in KV_DTYPES, ", ".join(KV_DTYPES))
        check("backend", self.backend, self.backend in BACKENDS, ", ".join(BACKENDS))
        check("budget", self.budget, isinstance(self.budget, Budget), "a Budget")

    @property
    def verifies_sparsely(self) -> bool:
        """Rounds of the target read lists."""
        return self.mode in ("sparse", "exact", "auto")

    @property
    def confirms(self) -> bool:
        """What rounds bring is tentative until a dense forward has confirmed it."""
        return self.mode == "exact" or (self.mode == "auto" and not self.approximate)

    @property
    def shares_noise(self) -> bool:
        """Draft and target choose by the same noise: a text does not depend on how its rounds were run."""
        return self.mode in ("exact", "auto")

    @property
    def guards(self) -> bool:
        """Rounds of mode sparse are audited now and then."""
        return self.mode == "sparse" and self.guard_every is not None

    @property
    def drafts_sparsely(self) -> bool:
        """The draft reads lists of its own."""
        return self.mode != "plain" and (self.drafting == "sparse" or (self.drafting == "auto" and self.verifies_sparsely))

    def prefill_budget(self, keep: float) -> Budget:
        """What a block of a prompt may read before itself when it reads `keep` of it."""
        return replace(self.budget, keep=keep, top_p=None, min_context=self.prefill_min_context, unlisted="none")

    @property
    def draft_budget(self) -> Budget:
        """What the draft may read when it drafts sparsely."""
        budget = self.budget
        return Budget(
            keep=self.draft_keep,
            sinks=budget.sinks,
            recent=self.draft_recent,
            min_context=budget.min_context,
            allocation="flat",
            unlisted="none",
        )


def engine_config(**options: Any) -> EngineConfig:
    """An `EngineConfig` from flat options: its own fields and those of `Budget`. Unknown names raise OptionError."""
    own = {f.name for f in fields(EngineConfig)} - {"budget"}
    budget = {f.name for f in fields(Budget)}
    for name in options:
        if name not in own | budget:
            raise OptionError("option", name, ", ".join(sorted(own | budget)))
    chosen = Budget(**{name: value for name, value in options.items() if name in budget})
    return EngineConfig(budget=chosen, **{name: value for name, value in options.items() if name in own})
