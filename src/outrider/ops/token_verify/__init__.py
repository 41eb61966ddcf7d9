"""Speculative sampling: accept a prefix of the drafted tokens, then emit one recovered or bonus token."""

from outrider.ops.token_verify.api import Verified, token_verify

__all__ = ["Verified", "token_verify"]
