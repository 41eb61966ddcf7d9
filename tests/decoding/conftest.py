"""Pairs that read and write text, byte by byte."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def text_pair(make_pair, byte_tokenizer):
    """A target and a noisy draft whose 256 tokens are bytes; token 256 is the end of text."""
    return make_pair("qwen3", vocab_size=257, tokenizer=byte_tokenizer)
