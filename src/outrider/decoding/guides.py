"""Who makes a round's lists: of given tokens the draft, scored as in generation, or a rival inside the target's forward; in
generation a rival for each row, the draft's lists being the runner's own business."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from outrider.decoding.scoring import score
from outrider.guidance.rivals import InForward, Rival, Rows, as_selection
from outrider.guidance.selectors.base import Selector
from outrider.models import KVCache, LanguageModel
from outrider.models.quantization import dequantize
from outrider.models.quantized_keys import QuantizedKeys
from outrider.ops import TokenLists
from outrider.types import Lists, Selection

OBSERVED = 256  # tokens of a document whose queries a rival sees at a time


class Drafted:
    """The draft over given tokens behind documents, its queries kept: it reads densely, so no method changes them, and a
    second method over the same tokens finds its rows in the cache as well."""

    def __init__(self, draft: LanguageModel, cache: KVCache) -> None:
        self.draft, self.cache = draft, cache
        self._rounds: dict[int, tuple[Tensor, tuple[Tensor, ...]]] = {}  # by position: tokens, and their queries by layer

    def queries(self, part: Tensor, position: int) -> tuple[Tensor, ...]:
        """Of a round's tokens [B, T] behind `position` cached ones: by layer [B, T, Hq, D]. Their rows are in the cache."""
        tokens, queries = self._rounds.get(position, (None, ()))
        if tokens is None or not torch.equal(tokens, part):
            for later in [known for known in self._rounds if known >= position]:
                del self._rounds[later]  # their rows are written over, or follow other tokens
            queries = self.draft.forward(part, self.cache, record_queries=True, logits=False).queries
            self._rounds[position] = part, queries
        return queries


class FromDraft:
    """Lists from the draft's scores of a round."""

    def __init__(self, selector: Selector, drafted: Drafted, bits: int | None) -> None:
        self._selector, self._drafted, self._bits = selector, drafted, bits
        self._draft, self._cache = drafted.draft, drafted.cache
        self._quantized: QuantizedKeys | None = None

    def touched(self, rows: int) -> list[float]:
        """Bytes read so far in order to choose, by row: none, beside the keys that are scored."""
        return [0.0] * rows

    def lists(self, part: Tensor, lengths: Tensor, cached: int, *, sparse: bool) -> Selection | None:
        """Run the draft over the round's tokens [B, T] behind `cached` ones; its lists, unless the round is dense."""
        queries = self._drafted.queries(part, cached)
        if not sparse:
            return None
        layers = self._selector.draft_layers
        if self._bits is not None and self._quantized is None:
            self._quantized = QuantizedKeys(self._draft, layers, self._bits, len(lengths), self._cache.capacity)
            self._quantized.fill(self._cache)
        given = self._draft, self._cache, queries, lengths, layers
        return self._selector.select(score(*given, per_query=self._selector.per_query, quantized=self._quantized))


class InTarget:
    """Lists that a rival makes inside the target's forward."""

    def __init__(self, rival: Rival, target: LanguageModel, cache: KVCache) -> None:
        self._rival, self._target, self._cache = rival, target, cache

    def touched(self, rows: int) -> list[float]:
        """Bytes read so far in order to choose, less those of listed rows that were left unread, by row."""
        return torch.as_tensor(self._rival.touched - self._rival.spared).expand(rows).tolist()

    def lists(self, part: Tensor, lengths: Tensor, cached: int, *, sparse: bool) -> InForward | None:
        """For a round of tokens [B, T] behind `cached` ones."""
        return _in_forward(self._rival, part, self._target, self._cache, cached, lengths) if sparse else None


class ByRow:
    """A rival for each slot of a batch, none of which knows of the others."""

    def __init__(self, rival: Rival, target: LanguageModel, cache: KVCache) -> None:
        self._rival, self._target, self._cache = rival, target, cache
        self._begun: dict[int, Rival] = {}

    def begin(self, row: int, document: list[int]) -> None:
        """Row `row` holds these tokens in the cache; its rounds choose for themselves from now on."""
        self._begun[row] = begin(self._rival, self._target, self._cache.rows(row, row + 1), torch.tensor([document]))

    def move(self, source: int, row: int) -> None:
        """A sequence changes its row."""
        self._begun[row] = self._begun.pop(source)

    def touched(self, rows: int) -> list[float]:
        """Bytes read so far in order to choose, less those of listed rows that were left unread, by row."""
        return [float(self._begun[row].touched - self._begun[row].spared) for row in range(rows)]

    def lists(self, tokens: Tensor, running: int) -> RowsInForward:
        """For a round of `tokens` [B, T], of whose rows the last ones may be idle."""
        lengths = self._cache.lengths[: len(tokens)].clone()
        parts = []
        for row, length in enumerate(lengths[:running].tolist()):
            one = slice(row, row + 1)
            cache = self._cache.rows(row, row + 1)
            parts.append(_in_forward(self._begun[row], tokens[one], self._target, cache, length, lengths[one]))
        return RowsInForward(parts, lengths)


class RowsInForward(Lists):
    """The lists of a batch's round; those of each row are made by its own rival. Idle rows, the last ones, have none."""

    def __init__(self, parts: list[InForward], lengths: Tensor) -> None:
        self._parts, self._lengths = parts, lengths
        self._made: dict[int, TokenLists] = {}

    def of(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """Like `InForward.of`."""
        found = [part.of(layer, queries[row : row + 1]) for row, part in enumerate(self._parts)]
        rows = [(indices, counts) for indices, counts in found if indices is not None and counts is not None]
        if not rows:
            return None, None
        width, idle = max(indices.shape[-1] for indices, _ in rows), len(self._lengths) - len(rows)
        indices = torch.cat([pad(one, (0, width - one.shape[-1]), value=-1) for one, _ in rows])
        counts = torch.cat([one for _, one in rows])
        indices, counts = pad(indices, (0, 0, 0, 0, 0, idle), value=-1), pad(counts, (0, 0, 0, idle))
        self._made[layer] = TokenLists(indices, counts)
        return indices, counts

    def attended(self, layer: int, queries: Tensor, output: Tensor) -> Tensor:
        """Like `InForward.attended`."""
        given = [(part, slice(row, row + 1)) for row, part in enumerate(self._parts)]
        rows = [part.attended(layer, queries[one], output[one]) for part, one in given]
        return torch.cat([*rows, output[len(rows) :]])

    @property
    def made(self) -> Selection | None:
        """Like `InForward.made`."""
        return as_selection(self._made, self._lengths)


def begin(rival: Rival, target: LanguageModel, cache: KVCache, documents: Tensor) -> Rival:
    """A copy of `rival` that has seen documents [B, S], which are cached; its state is theirs."""
    begun = replace(rival, touched=0.0, spared=0.0)
    end = documents.shape[1]
    begun.begin(cached_keys(target, cache, end), cache.lengths.clone())
    begun.read(documents.to(cache.device), torch.zeros_like(cache.lengths))
    start = 0 if rival.window is None else max(end - rival.window, 0)
    cache.truncate(start)
    for part in documents[:, start:].split(OBSERVED, dim=1) if start < end else ():  # once more, for its queries
        queries = target.forward(part, cache, record_queries=True, logits=False).queries
        begun.observe(queries, cached_keys(target, cache, start + part.shape[1]), start)
        cache.advance(part.shape[1])
        start += part.shape[1]
    return begun


def _in_forward(rival: Rival, tokens: Tensor, target: LanguageModel, cache: KVCache, length: int, lengths: Tensor) -> InForward:
    """A round of `tokens` [B, T] behind `length` cached ones, which are `lengths` [B] on the device."""
    stop = length + tokens.shape[1]
    return InForward(
        rival, tokens.to(cache.device), cached_keys(target, cache, stop), cached_values(target, cache, stop), lengths
    )


def cached_keys(target: LanguageModel, cache: KVCache, stop: int) -> Rows:
    """keys(layer) [B, stop, Hkv, D], as attention reads them."""
    return lambda layer: dequantize(cache.keys(layer, stop), cache.key_scales[layer], target.spec.dtype)


def cached_values(target: LanguageModel, cache: KVCache, stop: int) -> Rows:
    """values(layer), like `cached_keys`."""
    return lambda layer: dequantize(cache.values(layer, stop), cache.value_scales[layer], target.spec.dtype)
