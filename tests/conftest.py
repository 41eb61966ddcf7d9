"""Shared by all tests: tiny random checkpoints of every family, pairs with an alignment, and transformers as the reference.

The checkpoints are made here, from configs alone. Their weights are wide (initializer range 0.3), so that greedy text wanders
and the best token leads by far more than rounding: comparing tokens one by one is then a sharp test, not a lucky one.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: a name that is no folder must fail at once

import pytest
import torch

if not torch.cuda.is_available():  # before triton is imported, which transformers does: kernels run in its interpreter
    os.environ["TRITON_INTERPRET"] = "1"

from hypothesis import settings
from torch import Tensor

from outrider.config import SamplingParams, engine_config
from outrider.decoding.outrider import Outrider, Result
from outrider.decoding.pair import PAIR_FOLDER, find_alignment, identity, load_pair
from outrider.guidance.alignment import AlignmentFile, AlignmentMap
from outrider.guidance.budgets import SHARES
from outrider.guidance.controller import Controller, ControllerFile
from outrider.guidance.selectors import SELECTORS
from outrider.models import LanguageModel, wrap
from outrider.models.attention import NAME, register
from outrider.types import Alignment, ListCosts, UnlistedFit

# one thread: the models are so small that threads only wait for each other, 20 times slower on a busy machine
torch.set_num_threads(1)
settings.register_profile("outrider", deadline=None, derandomize=True, database=None)
settings.register_profile("explore", deadline=None)  # pytest --hypothesis-profile=explore looks for new examples
settings.load_profile("outrider")

BOOKS = Path(__file__).parents[1] / "examples" / "books"
VOCABULARY = 97
BASE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "llama-mha": ("LlamaConfig", {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", {"sliding_window": None}),
    "mistral-window": ("MistralConfig", {"sliding_window": 8}),  # every layer looks at a window
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {"sliding_window": None, "hidden_size": 48, "num_attention_heads": 6}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,  # numbers of layers and of their lists differ
        },
    ),
}
# another architecture than any target above: fewer layers, fewer and narrower heads, one KV head
DRAFT = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 8}
METHODS = ("outrider", "sts", "specattn", "dustin")  # lists per KV head, per query head, per layer, one for all layers


@pytest.fixture(scope="session", params=list(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    """A test that asks for it runs for every model family."""
    return request.param


@pytest.fixture(scope="session", params=METHODS)
def method(request: pytest.FixtureRequest) -> str:
    """A test that asks for it runs for every selection method."""
    return request.param


@pytest.fixture(scope="session")
def make_module() -> Callable[..., torch.nn.Module]:
    """`make_module(family, seed=0, dtype="float32", **config)`: a new transformers module, random, routed through Outrider."""

    def make(family: str, seed: int = 0, dtype: str = "float32", **overrides: Any) -> torch.nn.Module:
        import transformers

        register()
        config_class, own = FAMILIES.get(family, (family, {}))
        config = getattr(transformers, config_class)(**(BASE | own | overrides))
        torch.manual_seed(seed)
        made = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME, dtype=getattr(torch, dtype))
        return made.eval()

    return make


@pytest.fixture(scope="session")
def make_model(make_module: Callable[..., torch.nn.Module]) -> Callable[..., LanguageModel]:
    """`make_model(family, seed=0, dtype="float32", tokenizer=None, **config)`: made once for each set of arguments."""
    made: dict[str, LanguageModel] = {}

    def make(family: str, seed: int = 0, dtype: str = "float32", tokenizer: Any = None, **overrides: Any) -> LanguageModel:
        key = repr((family, seed, dtype, id(tokenizer), sorted(overrides.items())))
        if key not in made:
            made[key] = wrap(make_module(family, seed, dtype, **overrides), tokenizer, name=f"tiny-{family}")
        return made[key]

    return make


@pytest.fixture(scope="session")
def noisy() -> Callable[..., LanguageModel]:
    """`noisy(model, amount=0.04)`: a draft that agrees with `model` on about half of the tokens."""
    made: dict[tuple[int, float], tuple[LanguageModel, LanguageModel]] = {}  # the original too, so that its id stays its own

    def make(model: LanguageModel, amount: float = 0.04) -> LanguageModel:
        key = (id(model), amount)
        if key not in made:
            module = copy.deepcopy(model.module)
            generator = torch.Generator().manual_seed(5)
            with torch.no_grad():
                for weights in module.parameters():
                    if weights.dim() > 1:
                        weights += amount * weights.std() * torch.randn(weights.shape, generator=generator).to(weights)
            made[key] = model, wrap(module, model.tokenizer, name=f"noisy-{model.spec.name}")
        return made[key][1]

    return make


@pytest.fixture(scope="session")
def make_pair(make_model: Callable[..., LanguageModel], noisy: Callable[..., LanguageModel]) -> Callable[..., Any]:
    """`make_pair(family, draft="noisy")`: (target, draft); the draft is a "noisy" copy, an "other" model, or the "same"."""

    def make(family: str, draft: str = "noisy", **overrides: Any) -> tuple[LanguageModel, LanguageModel]:
        target = make_model(family, **overrides)
        if draft == "same":
            return target, target
        shared = {name: overrides[name] for name in ("vocab_size", "tokenizer", "dtype") if name in overrides}
        return target, noisy(target) if draft == "noisy" else make_model("llama", 9, **(DRAFT | shared))

    return make


@pytest.fixture(scope="session")
def untrained() -> Callable[[LanguageModel], ControllerFile]:
    """`untrained(target)`: a controller for method adore whose scores are noise, always the same."""

    def make(target: LanguageModel) -> ControllerFile:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = Controller(target.module.get_input_embeddings().weight.shape[1], width=4).requires_grad_(False)
        return ControllerFile(target=identity(target), text="", text_digest="", tokens=0, controller=made.eval())

    return make


@pytest.fixture
def controllers(monkeypatch: pytest.MonkeyPatch, untrained: Callable[[LanguageModel], ControllerFile]) -> None:
    """Every target has a controller, an untrained one."""
    monkeypatch.setattr("outrider.decoding.pair.find_controller", lambda given, target: untrained(target))


@pytest.fixture(scope="session")
def align() -> Callable[..., AlignmentFile]:
    """`align(target, draft, seed=0)`: random alignments under the names that the methods ask for, with random fits of what
    stands for unlisted tokens, and with costs for outrider."""

    def make(target: LanguageModel, draft: LanguageModel, seed: int = 0) -> AlignmentFile:
        generator = torch.Generator().manual_seed(seed)
        layers, shape, heads = len(target.spec.layers), target.spec.layers[0], draft.spec.layers[0].query_heads

        def sources(owners: int, merged: int) -> Tensor:
            layer = torch.randint(len(draft.spec.layers), (layers, owners, merged), generator=generator)
            head = torch.randint(heads, (layers, owners, merged), generator=generator)
            return torch.stack([layer, head], dim=-1)

        one_layer = torch.randint(len(draft.spec.layers), (layers, 1, 1), generator=generator).expand(-1, 1, heads)
        whole = torch.stack([one_layer, torch.arange(heads).expand(layers, 1, heads)], dim=-1)
        made = {
            ("joint", "divergence"): sources(shape.kv_heads, 2),
            ("proportional", "jaccard"): sources(shape.query_heads, 1),
            ("monotone", "average"): whole,
        }
        values = torch.randn(layers, shape.kv_heads, shape.head_dim, generator=generator)
        fits = {
            name: UnlistedFit(values=values, weights=torch.rand(layers, shape.query_heads, generator=generator))
            for name in SELECTORS
        }
        falls = torch.rand(layers, shape.kv_heads, len(SHARES) - 1, generator=generator, dtype=torch.float64) ** 4
        values = torch.cat([falls.flip(-1).cumsum(-1).flip(-1), torch.zeros(layers, shape.kv_heads, 1)], dim=-1)
        costs = {("joint", "divergence"): ListCosts(shares=SHARES, values=values)}
        maps = [
            AlignmentMap(*names, Alignment(sources=tensor, costs=costs.get(names), unlisted=fits), {"recall": 0.5})
            for names, tensor in made.items()
        ]
        return AlignmentFile(
            target=identity(target),
            draft=identity(draft),
            text="random",
            text_digest="0" * 16,
            tokens=0,
            rounds=0,
            queries_per_round=1,
            keep=0.1,
            maps={entry.name: entry for entry in maps},
        )

    return make


@pytest.fixture(scope="session")
def make_engine(align: Callable[..., AlignmentFile]) -> Callable[..., Outrider]:
    """`make_engine((target, draft), **options)`: the public face over a pair, with a random alignment.

    Lists are short, nothing stands for unlisted tokens and sparse rounds begin early, so that tiny contexts are enough, unless
    the options say otherwise.
    """

    def make(pair: tuple[LanguageModel, LanguageModel], **options: Any) -> Outrider:
        short = {"sinks": 2, "recent": 4, "min_context": 8, "unlisted": "none"} | ({} if "top_p" in options else {"keep": 0.3})
        config = engine_config(**({"mode": "dense", "draft_tokens": 3} | short | options))
        return Outrider(*pair, config, align(*pair))

    return make


@pytest.fixture(scope="session")
def generate(make_engine: Callable[..., Outrider]) -> Callable[..., list[Result]]:
    """`generate(pair, prompts, params, **options)`: results of one run of such an engine."""

    def run(pair: Any, prompts: list[list[int]], params: SamplingParams | list[SamplingParams], **options: Any) -> list[Result]:
        return make_engine(pair, **options).generate(prompts, params)

    return run


@pytest.fixture(scope="session")
def independent() -> Callable[..., torch.nn.Module]:
    """`independent(model, implementation="eager")`: a copy of its module with transformers' own attention."""
    made: dict[tuple[int, str, str], tuple[LanguageModel, torch.nn.Module]] = {}

    def make(model: LanguageModel, implementation: str = "eager", dtype: str | None = None) -> torch.nn.Module:
        key = (id(model), implementation, str(dtype))
        if key not in made:
            module = copy.deepcopy(model.module)
            module.set_attn_implementation(implementation)
            made[key] = model, module if dtype is None else module.to(getattr(torch, dtype))
        return made[key][1]

    return make


@pytest.fixture(scope="session")
def alone(independent: Callable[..., torch.nn.Module]) -> Callable[..., list[int]]:
    """`alone(model, prompt, count)`: the tokens that transformers' own greedy `generate` continues with, without Outrider."""

    def run(model: LanguageModel, prompt: list[int], count: int, implementation: str = "eager") -> list[int]:
        tokens = torch.tensor([prompt])
        output = independent(model, implementation).generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=count,
            eos_token_id=list(model.spec.eos_tokens) or None,
            pad_token_id=0,
        )
        return output[0, len(prompt) :].tolist()

    return run


@pytest.fixture(scope="session")
def random_prompts() -> Callable[..., list[list[int]]]:
    """`random_prompts(lengths, seed=0, vocabulary=97)`: one prompt of random tokens for each length."""

    def make(lengths: list[int], seed: int = 0, vocabulary: int = VOCABULARY) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocabulary, (n,), generator=generator).tolist() for n in lengths]

    return make


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A tokenizer of 256 bytes and an end-of-text token (256), so that a token may be a part of a character."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = _byte_alphabet()
    backend = Tokenizer(models.BPE(vocab={symbol: byte for byte, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", clean_up_tokenization_spaces=False)


def _byte_alphabet() -> list[str]:
    """The printable stand-in of every byte in byte-level tokenizers (the table of GPT-2)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


@pytest.fixture(scope="session")
def builtin_pair() -> tuple[LanguageModel, LanguageModel]:
    """The pair that ships with Outrider: (target, draft)."""
    return load_pair("builtin", None)


@pytest.fixture(scope="session")
def builtin_alignment(builtin_pair: tuple[LanguageModel, LanguageModel]) -> AlignmentFile:
    """The alignment that ships with the built-in pair."""
    found = find_alignment(None, *builtin_pair)
    assert found is not None, f"no alignment of this pair in {PAIR_FOLDER}"
    return found


@pytest.fixture(scope="session")
def book() -> str:
    """A real book, as text."""
    return (BOOKS / "persuasion.txt").read_text(encoding="utf-8")
