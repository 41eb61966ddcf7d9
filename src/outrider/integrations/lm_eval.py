"""lm-evaluation-harness: its tasks on the model "outrider".

    python -m outrider.integrations.lm_eval run --model outrider --model_args mode=sparse,keep=0.1 --tasks ...

is the harness's own command with this model in its registry. Versions that read entry points find the model by themselves:
`lm_eval run` will do there.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
import warnings
from collections import Counter
from dataclasses import dataclass, fields
from typing import Any

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, has_bos_prefix, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from outrider.config import VERSION, Budget, EngineConfig, SamplingParams, check, option
from outrider.decoding.continuations import Continuation, Scorer
from outrider.decoding.outrider import Outrider, Prompt
from outrider.decoding.statistics import Statistics, total
from outrider.errors import EngineError, OutriderError, PromptError

Request = tuple[tuple[str, str] | None, list[int], list[int]]  # what a cache knows it by, context, continuation


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """Model arguments that are the harness's affair, not the engine's."""

    max_length: int | None = option(None, "tokens of a prompt and its continuation; default: the context of the pair")
    max_gen_toks: int = option(256, "generate at most this many tokens where a task does not say")
    seed: int = option(0, "seed of the random numbers, where a task samples")
    enable_thinking: bool | None = option(None, "passed to the chat template where given")
    think_end_token: str | None = option(None, "what is generated up to the last of these is not part of the answer")

    def __post_init__(self) -> None:
        for name, least in (("max_length", 2), ("max_gen_toks", 1)):
            value = getattr(self, name)
            ok = value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= least)
            check(name, value, ok, f"a whole number >= {least}")
        SamplingParams(seed=self.seed)
        ends = bool(self.think_end_token or not self.enable_thinking)
        check("think_end_token", self.think_end_token, ends, "with enable_thinking, the text that ends the thoughts")


LOADING = tuple(name for name, p in inspect.signature(Outrider.load).parameters.items() if p.kind is not p.VAR_KEYWORD)
HARNESS = tuple(f.name for f in fields(HarnessOptions))
ENGINE = tuple(f.name for f in (*fields(EngineConfig), *fields(Budget)) if f.name != "budget")
GENERATION = ("until", "max_gen_toks", "do_sample", "temperature", "top_k", "top_p")


@register_model("outrider")
class OutriderLM(TemplateLM):
    """A target, guided by its draft. Model arguments: those of `Outrider.load`, and the fields of `HarnessOptions`.

    Texts become tokens, and tokens texts, by the rules of the harness's own model "hf": in mode dense the results are its own.
    Raises like `Outrider.load`, and OptionError for an unknown argument, before any loading.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__()
        given = {name: value for name, value in arguments.items() if value is not None}  # flags not given come as None
        known = (*LOADING, *ENGINE, *HARNESS)
        for name in given:
            check("model argument", name, name in known, ", ".join(sorted(known)))
        self.options = HarnessOptions(**{name: given.pop(name) for name in HARNESS if name in given})
        if str(given.get("batch_size", "")).isdecimal():
            given["batch_size"] = int(given["batch_size"])  # the command line passes text
        self.engine = Outrider.load(**given)
        spec = self.engine.target.spec
        self._device = spec.device
        self.tokenizer: Any = self.engine.target.tokenizer
        if self.tokenizer is None:
            raise PromptError(f"target: {spec.name!r} has no tokenizer; allowed: one that can read the texts of tasks")
        context = min(spec.context, self.engine.draft.spec.context)
        self.max_length = self.options.max_length or context
        check("max_length", self.max_length, self.max_length <= context, f"2 .. {context}, the context of the pair")
        self.scorer = Scorer(self.engine)
        self.cut = 0  # requests that were too long, and lost the beginning of their prompt
        self.parts: list[Statistics] = []  # of all requests so far

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """Stands where there is no context. Raises PromptError when the tokenizer has no such token."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is None and eos is None:
            raise PromptError("prompt: got an empty one, and the tokenizer has neither a BOS nor an EOS token to begin with")
        return eos if bos is None else bos

    @property
    def batch_size(self) -> int:
        return self.engine.config.batch_size

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation; without its system messages, and with a warning, where the template takes none."""
        options: dict[str, Any] = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        if self.options.enable_thinking is not None:
            options["enable_thinking"] = self.options.enable_thinking
        try:
            return self.tokenizer.apply_chat_template(chat_history, **options)
        except TemplateError:
            warnings.warn("the chat template refuses the conversation: tried without system messages", stacklevel=2)
            rest = [message for message in chat_history if message["role"] != "system"]
            return self.tokenizer.apply_chat_template(rest, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Token ids; by default with the special tokens that the tokenizer adds, unless the text brings its BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token or self.tokenizer.eos_token
            add_special_tokens = not has_bos_prefix(string, bos)
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens, verbose=False)

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside its results: the conditions, and what was read."""
        config, pair = self.engine.config, {"target": self.engine.target.spec, "draft": self.engine.draft.spec}
        read = total(self.parts) if self.parts else None
        info = {
            "version": VERSION,
            **{role: f"{spec.name} {spec.digest}" for role, spec in pair.items()},
            "dtype": str(pair["target"].dtype).removeprefix("torch."),
            "mode": config.mode,
            "method": config.method if config.verifies_sparsely else None,
            "draft_tokens": config.draft_tokens,
            "kept_fraction": read and read.kept_fraction,
            "kv_read_fraction": read and read.kv_read_fraction,
            "agreement": read and read.agreement,  # where audit=True asked for it
            "prompts_cut": self.cut,
        }
        return {"outrider": info}

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue every context as `Outrider.generate` does. Raises OptionError for what a task asks for in vain.

        Raises EngineError where a prompt fails: an answer that is missing would count as a wrong one.
        """
        prompts: list[Prompt] = []
        params, asked, cut = [], Counter[str](), self.cut
        for context, arguments in (request.args for request in requests):
            asked[context] += 1  # one that comes again is drawn again
            own = self._sampling(arguments, f"{asked[context]} {context}")
            room = self.max_length - own.max_new_tokens
            check("max_gen_toks", own.max_new_tokens, room >= 1, f"less than max_length, {self.max_length}")
            prompts.append(self._fit(self.tok_encode(context) or [self.prefix_token_id], room))
            params.append(own)
        self._warn_of_cuts(self.cut - cut, len(requests))
        answers = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="outrider generate_until") as bar:
            for chunk in self.engine.stream(prompts, params) if prompts else ():
                if (result := chunk.result) is None:
                    continue
                if result.error is not None:
                    raise EngineError(f"request {chunk.index}: {result.error}")
                # the harness's way: what was generated is decoded alone, then cut
                text = self.tokenizer.decode(result.token_ids, skip_special_tokens=True)
                text = postprocess_generated_text(text, list(params[chunk.index].stop), self.options.think_end_token)
                answers[chunk.index] = text
                self.parts.append(result.statistics)
                self.cache_hook.add_partial("generate_until", requests[chunk.index].args, text)
                bar.update()
        return answers

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of every continuation behind its context: its log-probability, and whether greedy decoding would write it."""
        check("enable_thinking", True, not self.options.enable_thinking, "for tasks that generate, none that score")
        return super().loglikelihood(requests, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of every text, in windows of `max_length` tokens that predict each token once."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, (text,) in enumerate(request.args for request in requests):
            tokens = self.tok_encode(text)
            cover = [*get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)]
            windows += [(None, *make_disjoint_window(window)) for window in cover]
            owners += [owner] * len(cover)
        sums = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            sums[owner] += logprob
        for request, logprob in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, logprob)
        return sums

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        cut = self.cut
        continuations = [self._continuation(index, *tokens) for index, (_, *tokens) in enumerate(requests)]
        self._warn_of_cuts(self.cut - cut, len(requests))
        answers = [(0.0, False)] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="outrider loglikelihood") as bar:
            for one, score in self.scorer.score(continuations):
                answers[one.index] = score.logprob, score.is_greedy
                self.parts.append(score.statistics)
                if (key := requests[one.index][0]) is not None:
                    self.cache_hook.add_partial("loglikelihood", key, answers[one.index])
                bar.update()
        return answers

    def _continuation(self, index: int, context: list[int], wanted: list[int]) -> Continuation:
        if not context or not 1 <= len(wanted) <= self.max_length:
            got = f"{len(context)} tokens and a continuation of {len(wanted)}"
            raise PromptError(
                f"request {index}: got {got}; allowed: at least 1 each, a continuation of {self.max_length} at most"
            )
        # the last of the continuation is predicted, never read
        return Continuation.of(index, self._fit(context, self.max_length + 1 - len(wanted)), wanted)

    def _sampling(self, arguments: dict[str, Any], salt: str) -> SamplingParams:
        """What a task asks for; its random numbers depend on the seed and the salt, not on other requests."""
        known: dict[str, Any] = dict(normalize_gen_kwargs(arguments, self.options.max_gen_toks))
        for name in known:
            check("generation argument", name, name in GENERATION, ", ".join(GENERATION))
        digest = hashlib.sha256(f"{self.options.seed} {salt}".encode()).digest()
        return SamplingParams(
            max_new_tokens=known["max_gen_toks"],
            temperature=known.get("temperature", 0.0),
            top_k=known.get("top_k", 0),
            top_p=known.get("top_p", 1.0),
            seed=int.from_bytes(digest[:7], "big"),
            stop=tuple(filter(None, handle_stop_sequences(known["until"], eos=self.tokenizer.eos_token))),
        )

    def _fit(self, tokens: list[int], room: int) -> list[int]:
        """The last tokens, as many as there is room for."""
        self.cut += len(tokens) > room
        return tokens[-room:]

    def _warn_of_cuts(self, cut: int, of: int) -> None:
        if cut:
            text = f"{cut} of {of} requests do not fit into {self.max_length} tokens with their continuation"
            warnings.warn(f"{text}: the beginning of their prompt is cut off", stacklevel=3)


def main() -> None:
    """The harness's command line; what Outrider refuses ends it with exit code 2, as in its own."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except OutriderError as error:
        print(f"outrider: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
