"""What others have prompts read, each against the published algorithm written out in loops, in fp64 and on tiny tensors."""

from __future__ import annotations

from contextlib import nullcontext
from math import ceil, exp

import pytest
import torch

from outrider.guidance.prefill_rivals import Prompt, TokenSparse, VerticalSlash, sparse_layers, token_sparse, vertical_slash
from outrider.guidance.prefill_rivals.spec_prefill import kept_chunks, token_importance

SCALE = 0.4


def drawn(t, *, hq=4, hkv=2, d=8, b=1, seed=0, dtype=torch.float64):
    """Queries [B, T, Hq, D], keys and values [B, T, Hkv, D]."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (b, t, hq, d), (b, t, hkv, d), (b, t, hkv, d)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).mul(1.5).to(dtype) for shape in shapes]


def prompt(keys, values, **changes):
    given = {"layers": (0,), "scales": (SCALE,), "keys": lambda layer: keys, "values": lambda layer: values}
    return Prompt(**(given | {"stage": lambda name: nullcontext()} | changes))


def probabilities(queries, keys, head, query, among=None):
    """{token: probability} of one query of one head over the tokens up to itself, of `among` if given."""
    kv = head // (queries.shape[1] // keys.shape[1])
    seen = [token for token in range(query + 1) if among is None or token in among]
    logits = [
        SCALE * sum(a * b for a, b in zip(queries[query, head].tolist(), keys[token, kv].tolist(), strict=True))
        for token in seen
    ]
    top = max(logits)
    weights = [exp(logit - top) for logit in logits]
    return {token: weight / sum(weights) for token, weight in zip(seen, weights, strict=True)}


def attended(queries, keys, values, head, query, among=None):
    kv = head // (queries.shape[1] // keys.shape[1])
    return sum(share * values[token, kv] for token, share in probabilities(queries, keys, head, query, among).items())


class TestTokenSparse:
    @pytest.mark.parametrize("t, keep", [(160, 0.85), (160, 0.5), (131, 1.0), (50, 0.1)])
    def test_it_is_what_was_published(self, t, keep):
        queries, keys, values = drawn(t, d=4)
        found = TokenSparse(prompt(keys, values), (0,), keep).prompt_attention(0, queries)[0]
        q, k, v = queries[0], keys[0], values[0]
        before = max(t - 128, 0)
        number = max(ceil(keep * t), min(t, 128))
        for head in range(4):
            mass = [0.0] * before
            for query in range(before, t):
                for token, share in probabilities(q, k, head, query).items():
                    if token < before:
                        mass[token] += share
            smooth = [sum(mass[max(i - 3, 0) : i + 4]) / 7 for i in range(before)]
            best = sorted(range(before), key=lambda i: -smooth[i])[: number - (t - before)]
            kept = {*best, *range(before, t)}
            assert len(kept) == number
            for query in (*range(0, t, 7), *sorted(kept)[:5], t - 1):
                wanted = attended(q, k, v, head, query, kept) if query in kept else torch.zeros(4).double()
                torch.testing.assert_close(found[query, head], wanted, rtol=1e-9, atol=1e-12)

    def test_everything_kept_is_dense_and_other_layers_are_left_alone(self):
        queries, keys, values = drawn(140, b=2)
        method = TokenSparse(prompt(keys, values), (0, 2), 1.0)
        assert method.prompt_attention(1, queries) is None
        dense = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (queries, keys, values)), is_causal=True, scale=SCALE, enable_gqa=True
        )
        torch.testing.assert_close(method.prompt_attention(0, queries), dense.transpose(1, 2), rtol=1e-9, atol=1e-12)

    def test_what_a_head_leaves_out_is_not_read_and_what_comes_later_not_seen(self):
        queries, keys, values = drawn(12)
        kept = torch.tensor([[[0, 3, 4, 9], [1, 3, 5, 11], [2, 3, 8, 10], [0, 6, 8, 10]]])
        given = {"scale": SCALE}
        clean = token_sparse.attention_among(queries, keys, values, kept, **given)
        for kv, unread in ((0, (2, 6, 7, 8, 10)), (1, (1, 4, 5, 7, 9, 11))):
            for x in (keys, values):
                x[:, unread, kv] = torch.nan
        for head, tokens in enumerate(kept[0].tolist()):
            queries[:, [token for token in range(12) if token not in tokens], head] = torch.nan
        assert torch.equal(token_sparse.attention_among(queries, keys, values, kept, **given), clean)
        zero = clean[0].abs().sum(-1) == 0  # [T, Hq]
        assert all(
            sorted({*range(12)} - {*tokens}) == zero[:, head].nonzero()[:, 0].tolist()
            for head, tokens in enumerate(kept[0].tolist())
        )
        keys[:, 8:], values[:, 8:] = 1.0, 1.0
        assert torch.equal(token_sparse.attention_among(queries, keys, values, kept, **given)[:, :8], clean[:, :8])

    def test_budgets(self):
        queries, keys, values = drawn(300)
        scores = token_sparse.last_queries_scores(queries, keys, scale=SCALE)
        assert scores.shape == (1, 4, 300) and not scores[..., 172:].any()
        for keep, number in ((0.1, 128), (0.5, 150), (0.501, 151), (1.0, 300)):
            method = TokenSparse(prompt(keys, values), (0,), keep)
            kept = token_sparse.best_tokens(scores, method.count(300), 128)
            assert method.count(300) == number and kept.shape == (1, 4, number)
            assert bool((kept.diff() > 0).all()) and kept[..., -128:].eq(torch.arange(172, 300)).all()
            assert method.mean_count(300) == number
        assert TokenSparse(prompt(keys, values, layers=(0, 1, 4)), (1,), 0.5).mean_count(300) == (300 + 150 + 300) / 3

    def test_layers_at_or_below_the_median_drift_are_sparse(self):
        drift = torch.tensor([0.9, 0.2, 0.5, 0.1, 0.4])
        assert sparse_layers(drift, (0, 1, 2, 3, 4)) == (1, 3, 4)
        assert sparse_layers(drift, (0, 1, 2, 3)) == (1, 3)
        assert sparse_layers(drift, (0, 2)) == (2,), "layers without full attention do not count"


class TestVerticalSlash:
    def oracle(self, queries, keys, block, keep):
        """For each head and block the set of tokens that are read, by pairs in sets, as the docstring has it."""
        t, heads = queries.shape[:2]
        blocks = ceil(t / block)
        budget = keep * sum(i * block for i in range(blocks))
        for head in range(heads):
            columns, slashes = [0.0] * t, [0.0] * t
            for query in range(max(t - 64, 0), t):
                for token, share in probabilities(queries, keys, head, query).items():
                    columns[token] += share
                    slashes[query - token] += share
            wide = {j: sum(s * max(0, 1 - abs(o - j * block) / block) for o, s in enumerate(slashes)) for j in range(1, blocks)}
            near = [j for j in wide if any(abs(o - j * block) < block for o in range(100))]
            read = set()
            for j in near + sorted({*wide} - {*near}, key=lambda j: -wide[j]):
                more = {(i, token) for i in range(j, blocks) for token in range((i - j) * block, (i - j + 1) * block)}
                if len(read) + len(more) > 6096 / 7096 * budget:
                    break
                read |= more
            for token in [*range(min(30, t)), *sorted(range(30, t), key=lambda token: -columns[token])]:
                more = {(i, token) for i in range(token // block + 1, blocks)} - read
                if len(read) + len(more) > budget:
                    break
                read |= more
            yield [sorted(token for i, token in read if i == at) for at in range(blocks)]

    @pytest.mark.parametrize(
        "t, block, keep", [(150, 16, 0.5), (150, 16, 0.85), (300, 16, 0.6), (90, 8, 0.3), (97, 8, 1.0), (40, 64, 0.5)]
    )
    def test_it_is_what_was_published(self, t, block, keep):
        queries, keys, values = drawn(t, seed=t, d=4)
        method = VerticalSlash(prompt(keys, values), block, keep)
        indices, counts = method.of(0, queries)
        assert indices.dtype == counts.dtype == torch.int32
        listed = 0.0
        for head, wanted in enumerate(self.oracle(queries[0], keys[0], block, keep)):
            for at, tokens in enumerate(wanted):
                count = int(counts[0, at, head])
                assert indices[0, at, head, :count].tolist() == tokens
                assert (indices[0, at, head, count:] == -1).all()
                assert all(token < at * block for token in tokens)
                listed += count / 4
        assert float(method.listed) == pytest.approx(listed)
        assert listed <= keep * method.before(0, t) + 1e-9

    def test_slashes_and_columns_are_found(self):
        """A token that all look at, and a distance at which all look back."""
        t, d = 1000, 16
        keys = torch.zeros(1, t, 1, d)
        queries = torch.zeros(1, t, 1, d)
        keys[0, 77, 0, 0], queries[..., 0] = 20.0, 20.0
        columns, slashes = vertical_slash.estimate(queries, keys, scale=SCALE)
        assert int(columns.argmax()) == 77 and float(columns[0, 0, 77]) == pytest.approx(64)
        angles = torch.arange(t)[:, None] * torch.linspace(0.1, 3.0, d // 2)
        turned = torch.cat([angles.cos(), angles.sin()], -1)[None, :, None] * 6
        columns, slashes = vertical_slash.estimate(turned.roll(150, 1), turned, scale=SCALE)
        assert int(slashes.argmax()) == 150
        pattern = vertical_slash.choose(columns, slashes, block=50, keep=0.35)
        assert pattern.slashes[0, 0].nonzero()[:, 0].tolist() == [1, 2, 3], "the two that hold the nearest 100, then the best"

    @pytest.mark.parametrize("entries", [1, 5000, 2**24])
    def test_lists_made_a_few_at_a_time_are_the_same(self, monkeypatch, entries):
        queries, keys, _ = drawn(150, b=2)
        pattern = vertical_slash.choose(*vertical_slash.estimate(queries, keys, scale=SCALE), block=16, keep=0.5)
        wanted = pattern.lists()
        monkeypatch.setattr(vertical_slash, "ENTRIES", entries)
        found = pattern.lists()
        assert torch.equal(found.indices, wanted.indices) and torch.equal(found.counts, wanted.counts)


class TestSpecPrefill:
    @pytest.mark.parametrize("s, keep", [(100, 0.5), (96, 0.3), (129, 1.0), (20, 0.1), (200, 0.01)])
    def test_it_is_what_was_published(self, s, keep):
        generator = torch.Generator().manual_seed(s)
        masses = [torch.rand(1, 3, 2, s, generator=generator, dtype=torch.float64) for _ in range(2)]
        found = token_importance(masses)[0]
        for token in range(s):
            steps = []
            for query in range(3):
                rows = [mass[0, query, head].tolist() for mass in masses for head in range(2)]
                steps.append(max(sum(row[max(token - 6, 0) : token + 7]) / 13 for row in rows))
            assert float(found[token]) == pytest.approx(sum(steps) / 3)
        chunks = [found[start : start + 32].mean().item() for start in range(0, s, 32)]
        number = ceil(keep * len(chunks))
        best = sorted(range(len(chunks) - 1), key=lambda i: -chunks[i])[: number - 1]
        wanted = [token for token in range(s) if token // 32 in {*best, len(chunks) - 1}]
        assert kept_chunks(found[None], keep)[0].tolist() == wanted

    def test_rows_of_a_batch_keep_their_own_chunks(self):
        importance = torch.zeros(2, 128)
        importance[0, 40], importance[1, 5] = 1.0, 1.0
        kept = kept_chunks(importance, 0.5)
        assert kept[0].tolist() == [*range(32, 64), *range(96, 128)] and kept[1].tolist() == [*range(32), *range(96, 128)]


def test_kernels_take_what_the_methods_give_them():
    """By Triton's interpreter (or on a GPU): the same lists and the same attention as by the reference."""
    from outrider.ops import chunk_attention

    queries, keys, values = drawn(150, d=16, dtype=torch.float32)
    if torch.cuda.is_available():
        queries, keys, values = queries.cuda(), keys.cuda(), values.cuda()
    found = {}
    for backend in ("reference", "triton"):
        given = prompt(keys, values, backend=backend)
        sparse = TokenSparse(given, (0,), 0.95).prompt_attention(0, queries)
        lists = VerticalSlash(given, 16, 0.5).of(0, queries)
        start = torch.zeros(1, dtype=torch.int64, device=queries.device)
        attention = chunk_attention(queries, keys, values, *lists, start, block=16, scale=SCALE, backend=backend)
        found[backend] = sparse, attention
    for ours, wanted in zip(found["triton"], found["reference"], strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
