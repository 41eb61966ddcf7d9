"""Token files, training windows and planted facts.

    python -m pair.data --texts TEXTS --tokenizer tokenizer.json --out tokens.bin

A token file is every document of a folder, in the order of names, each followed by the end-of-text token,
as little-endian uint16. Windows are a pure function of the seed and their number, so a run may stop and
resume, or use another number of GPUs, and still read the same data in the same order.
"""

from __future__ import annotations

import argparse
import os
import random
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.utils.data import Dataset

from outrider.eval.facts import Fact, draw_facts
from pair.tokenizer import END_OF_TEXT

PLANTED_SHARE = 0.5
FACTS_PER_8K = (4, 12)


def encode_file(path: Path, tokenizer_file: Path) -> np.ndarray:
    """Tokens of one document and the end-of-text token, uint16 [tokens + 1]."""
    tokenizer = _load(str(tokenizer_file))
    ids = tokenizer.encode(path.read_text(encoding="utf-8")).ids
    return np.array([*ids, tokenizer.token_to_id(END_OF_TEXT)], dtype="<u2")


def encode_folder(texts: Path, tokenizer_file: Path, out: Path, workers: int | None = None) -> int:
    """Write the token file of the ``.txt`` files in ``texts``; return its number of tokens."""
    paths = sorted(texts.glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"no .txt files in {texts}")
    total, partial = 0, out.with_suffix(".partial")
    with ProcessPoolExecutor(workers or os.cpu_count()) as pool, partial.open("wb") as file:
        for tokens in pool.map(encode_file, paths, [tokenizer_file] * len(paths)):
            file.write(tokens.tobytes())
            total += len(tokens)
    partial.replace(out)
    return total


@cache
def _load(tokenizer_file: str) -> Tokenizer:
    return Tokenizer.from_file(tokenizer_file)


def lay_out(tokens: np.ndarray, pieces: list[list[int]], rng: random.Random) -> np.ndarray:
    """Write ``pieces`` over ``tokens`` [T] in their order, at uniform places, without overlaps."""
    free = len(tokens) - sum(map(len, pieces))
    if free < 0:
        raise ValueError(f"{len(pieces)} pieces do not fit into {len(tokens)} tokens")
    planted = tokens.copy()
    shift = 0
    for gap, piece in zip(sorted(rng.randint(0, free) for _ in pieces), pieces, strict=True):
        planted[gap + shift : gap + shift + len(piece)] = piece
        shift += len(piece)
    return planted


def plant(tokens: np.ndarray, pairs: list[tuple[list[int], list[int]]], rng: random.Random) -> np.ndarray:
    """Write each pair (statement, exchange) over ``tokens`` [T]; of a pair's two random slots the first states."""
    slots = [i for i in range(len(pairs)) for _ in range(2)]
    rng.shuffle(slots)
    stated: set[int] = set()
    pieces = []
    for i in slots:
        pieces.append(pairs[i][i in stated])
        stated.add(i)
    return lay_out(tokens, pieces, rng)


def encode_facts(tokenizer: Tokenizer, facts: list[Fact]) -> list[tuple[list[int], list[int]]]:
    """Tokens of each fact's statement and exchange."""
    encoded = tokenizer.encode_batch([text for fact in facts for text in (fact.statement, fact.exchange)])
    ids = [e.ids for e in encoded]
    return list(zip(ids[::2], ids[1::2], strict=True))


class Windows:
    """Window number i of ``tokens``: ``length`` + 1 tokens, in half of the windows with facts planted.

    Each epoch cuts the token file into windows from a random offset and deals them in random order.
    """

    def __init__(self, tokens: np.ndarray, tokenizer: Tokenizer, length: int, seed: int) -> None:
        self.tokens, self.tokenizer, self.length, self.seed = tokens, tokenizer, length, seed
        self.per_epoch = (len(tokens) - 1) // length - 1
        if self.per_epoch < 1:
            raise ValueError(f"{len(tokens)} tokens are too few for windows of {length}")
        self._epoch: tuple[int, int, np.ndarray] | None = None

    def __getitem__(self, number: int) -> np.ndarray:
        epoch, place = divmod(number, self.per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            rng = np.random.default_rng([self.seed, self.length, epoch])
            self._epoch = epoch, int(rng.integers(self.length)), rng.permutation(self.per_epoch)
        start = self._epoch[1] + int(self._epoch[2][place]) * self.length
        window = np.array(self.tokens[start : start + self.length + 1])
        rng = random.Random(f"{self.seed} {self.length} {number}")
        if rng.random() >= PLANTED_SHARE:
            return window
        count = max(1, round(rng.randint(*FACTS_PER_8K) * self.length / 8192))
        return plant(window, encode_facts(self.tokenizer, draw_facts(rng, count)), rng)


class Batches(Dataset):
    """Batch of step i for one rank, int64 [windows, length + 1]; the ranks' shares make up the whole batch."""

    def __init__(self, windows: Windows, batch: int, rank: int = 0, world: int = 1) -> None:
        if batch % world:
            raise ValueError(f"a batch of {batch} windows does not divide among {world} processes")
        self.windows, self.batch, self.share, self.rank = windows, batch, batch // world, rank

    def __getitem__(self, step: int) -> torch.Tensor:
        first = step * self.batch + self.rank * self.share
        rows = [self.windows[number] for number in range(first, first + self.share)]
        return torch.from_numpy(np.stack(rows).astype(np.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=Path, required=True, help="folder of UTF-8 .txt files")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="token file to write")
    args = parser.parse_args()
    print(f"{encode_folder(args.texts, args.tokenizer, args.out):,} tokens in {args.out}")


if __name__ == "__main__":
    main()
