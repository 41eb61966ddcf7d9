"""Write the keys and values of new tokens behind the cached ones, in place."""

from outrider.ops.kv_append.api import kv_append

__all__ = ["kv_append"]
