"""Make `recipes/` importable, and share a small tokenizer and its books."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("tokenizers")
RECIPES = Path(__file__).parents[2] / "recipes"
if str(RECIPES) not in sys.path:
    sys.path.insert(0, str(RECIPES))


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of three documents of random sentences."""
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(0)
    words = ["the", "a", "sea", "river", "house", "man", "woman", "said", "went", "over", "under", "quietly", "never", "always"]
    for name in ("one", "two", "three"):
        sentences = (" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(400))
        (folder / f"{name}.txt").write_text("\n\n".join(sentences), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def tokenizer_file(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer of 512 tokens trained on ``texts`` and 2,000 facts."""
    from pair import tokenizer

    out = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    out.write_text(tokenizer.train(tokenizer.corpus(texts, facts=2000), 512).to_str(), encoding="utf-8")
    return out


@pytest.fixture(scope="session")
def token_file(texts: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``texts`` as one token file."""
    from pair.data import encode_folder

    out = tmp_path_factory.mktemp("tokens") / "tokens.bin"
    encode_folder(texts, tokenizer_file, out, workers=1)
    return out
