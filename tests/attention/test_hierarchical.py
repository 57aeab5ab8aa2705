"""The choice of hierarchical by plain loops; its budget, its cost, its options."""

from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import Hierarchical, Prompt
from paucity.kernels.tree import reference, tree_select


def naive(query, key, policy, window=None, sinks=None):
    """The lists of one head: the paper, by loops."""
    tq, tk, lists = len(query), len(key), []
    sinks = policy.num_sinks if sinks is None else sinks
    for block in range((tk - tq) // policy.q_block, -(-tk // policy.q_block)):
        rows = [i for i in range(tk - tq, tk) if i // policy.q_block == block]
        oldest = max(0, rows[0] - (window or tk) + 1)
        near = max(oldest, rows[0] - policy.window_size + 1)
        far = max(oldest, min(sinks, near))
        blocks = [range(i, min(i + policy.k_block, near)) for i in range(far, near, policy.k_block)]
        scorers, budget = rows[:: -policy.query_stride], policy.k // policy.k_block

        def score(half, scorers=scorers):
            middle = half[len(half) // 2]
            seen = [float(query[i - tk + tq] @ key[j]) for i in scorers for j in middle if j > i - (window or tk + 1)]
            return max(seen, default=-torch.inf)

        segments = [blocks]
        if len(blocks) <= budget:
            segments = [[one] for one in blocks]
        else:
            edges = [j * len(blocks) // budget for j in range(budget + 1)]
            segments = [blocks[a:b] for a, b in pairwise(edges)]
        while any(len(segment) > 1 for segment in segments):
            halves = [half for s in segments for half in (s[: len(s) // 2], s[len(s) // 2 :]) if half]
            best = sorted(range(len(halves)), key=lambda i: (-score(halves[i]), i))[:budget]
            segments = [halves[i] for i in sorted(best)]
        found = [j for segment in segments for j in segment[0]]
        lists.append([*range(oldest, far), *found, *range(near, rows[-1] + 1)])
    return lists


def whole_numbers(*shape, seed):
    """Products of these are exact in every dtype, and many are equal."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


CASES = [
    (63, 63, {"k": 8, "q_block": 8, "window_size": 4, "num_sinks": 1, "query_stride": 1}, None),
    (17, 130, {"k": 12, "q_block": 16, "k_block": 3, "window_size": 5, "num_sinks": 0}, None),
    (101, 333, {"k": 32, "window_size": 20}, 150),
    (1, 301, {"k": 16, "window_size": 1, "num_sinks": 0}, None),
    (200, 200, {"k": 4, "k_block": 1, "q_block": 50, "window_size": 9, "query_stride": 7}, 101),
    (5, 5, {}, 3),
]


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize(("tq", "tk", "options", "window"), CASES)
def test_matches_loops(monkeypatch, kernels, tq, tk, options, window):
    monkeypatch.setenv("PAUCITY_KERNELS", kernels)
    monkeypatch.setattr(reference, "BOUND", 1)  # one block of queries at a time
    policy = Hierarchical(**options)
    for seed in range(2):
        query, key = whole_numbers(1, 4, tq, 6, seed=seed), whole_numbers(1, 2, tk, 6, seed=seed + 9)
        pattern = policy.select(query, key, Prompt(window=window, dropped=seed))
        for head in range(4):
            lists = naive(query[0, head], key[0, head // 2], policy, window, max(0, policy.num_sinks - seed))
            got = pattern.positions[0, head].tolist()
            assert [[j for j in row if j >= 0] for row in got] == lists
            assert all(row == sorted(row) for row in got)
            assert pattern.counts[0, head].tolist() == [len(row) for row in lists]


@pytest.mark.parametrize("length", [700, 701])
def test_budget_is_what_it_says(length):
    policy = Hierarchical(k=64, window_size=32, num_sinks=3)
    query, key = torch.randn(1, 2, length, 16), torch.randn(1, 2, length, 16)
    pattern = policy.select(query, key, Prompt())
    for block, row in enumerate(pattern.positions[0, 0].tolist()):
        start, stop = block * 32, min(length, block * 32 + 32)
        kept, near = {j for j in row if j >= 0}, max(0, start - 31)
        assert len(kept) == int(pattern.counts[0, 0, block])
        assert set(range(min(3, stop))) | set(range(near, stop)) <= kept
        searched = len(kept) - len(set(range(min(3, near))) | set(range(near, stop)))
        assert min(64, max(0, near - 3)) - 1 <= searched <= 64


def test_a_key_like_the_queries_is_found_wherever_its_neighbours_resemble_it():
    """Attention that is local, as the paper assumes: what the tree finds are the best keys."""
    position = torch.arange(2048)
    for peak in (40, 777, 1500):
        key = torch.exp(-(((position - peak) / 150.0) ** 2))[None, None, :, None].expand(1, 1, -1, 4)
        row = Hierarchical(k=32, window_size=16).select(torch.ones(1, 1, 32, 4), key, Prompt()).positions[0, 0, 0]
        assert set(range(peak - 12, peak + 12)) <= set(row.tolist())


def test_work_grows_with_the_logarithm(monkeypatch):
    """Keys scored for the last block: 2 * k for each halving of a segment."""
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    scored, score = [], reference._score
    monkeypatch.setattr(reference, "_score", lambda *x: scored.append(x[3].numel()) or score(*x))
    for length, levels in ((16 + 256, 2), (16 + 1024, 4), (16 + 4096, 6)):
        scored.clear()
        options = {"k": 64, "q_block": 16, "k_block": 2, "window_size": 1}
        tree_select(torch.randn(1, 1, 16, 4), torch.randn(1, 1, length, 4), **options)
        assert len(scored) in (levels, levels + 1)
        assert set(scored) == {2 * 64}


@pytest.mark.parametrize(
    "options", [{"k": 0}, {"k": 511}, {"k_block": 0}, {"window_size": 0}, {"num_sinks": -1}, {"query_stride": 0}]
)
def test_bad_options(options):
    with pytest.raises(ValidationError):
        Hierarchical(**options)
