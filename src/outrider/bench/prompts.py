"""Prompts that mean nothing. Loads no torch: peers use it, too."""

from __future__ import annotations

import random


def random_prompts(context: int, batch: int, vocabulary: int, seed: int = 0) -> list[list[int]]:
    """`batch` different prompts of `context` tokens each, the same for the same seed."""
    draw = random.Random(seed)
    return [draw.choices(range(vocabulary), k=context) for _ in range(batch)]
