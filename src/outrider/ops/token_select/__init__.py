"""Scores to token lists: top-k and top-p by threshold search, without a sort."""

from outrider.ops.token_select.api import TokenLists, token_select, union_lists

__all__ = ["TokenLists", "token_select", "union_lists"]
