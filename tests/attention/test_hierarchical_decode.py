"""HiP while decoding: the search against a loop down the tree, and its reuse."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import HierarchicalDecode, Prompt

from .cached import grow, listed, random_layer


def policy(**options):
    sizes = {"k": 4, "k_block": 2, "window_size": 6, "num_sinks": 1, "refresh_every": 3, "min_length": 0}
    return HierarchicalDecode(**sizes | options)


def naive(query, keys, k, k_block, window_size, num_sinks):
    """The keys that the queries ``[G, D]`` of a list ``[T, D]`` read, by the paper's search."""
    length = len(keys)
    near = max(0, length - window_size)
    far = min(num_sinks, near)
    always = {*range(far), *range(near, length)}
    if near <= num_sinks + k:
        return set(range(length))
    blocks = -(-(near - far) // k_block)
    count = k // k_block
    edges = [blocks * i // count for i in range(count + 1)]
    parts = [(edges[i], edges[i + 1] - edges[i]) for i in range(count)]
    while max(size for _, size in parts) > 1:
        halves = []
        for start, size in parts:
            halves += [(start, size // 2), (start + size // 2, size - size // 2)]
        halves = [half for half in halves if half[1]]

        def score(half):
            first = far + (half[0] + half[1] // 2) * k_block
            rows = keys[min(first, near - 1) : min(first + k_block, near)]
            return float((query @ rows.T).max())

        parts = sorted(sorted(halves, key=lambda half: -score(half))[:count])
    found = {far + start * k_block + i for start, size in parts if size for i in range(k_block)}
    return always | {key for key in found if key < near}


@pytest.mark.parametrize("lengths", [(41, 27), (40, 40), (12, 5), (1, 1)])
@pytest.mark.parametrize("group", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"k": 6, "k_block": 1, "window_size": 9}, {"window_size": 1, "num_sinks": 0}])
def test_select_matches_naive(lengths, group, options):
    layer, first = random_layer(lengths)
    query = torch.randn(2, 2 * group, 1, 8)
    made, cached = policy(**options), layer.cached(first)
    pages = made.select(query, cached, Prompt())
    assert pages.page_size == 1
    sizes = (made.k, made.k_block, made.window_size, made.num_sinks)
    for b, length in enumerate(lengths):
        for h in range(2):
            mine = query[b, group * h : group * h + group, 0]
            found = listed(pages.numbers[b, h])
            assert len(found) == len(set(found))
            wanted = naive(mine, cached.keys()[b, h, :length], *sizes)
            if made.window_size >= 2 * group:
                assert set(found) == wanted
            else:  # the search keeps the last queries' own places
                assert {*range(max(0, length - made.window_size), length)} <= set(found) <= set(range(length))


def test_what_was_found_holds_and_no_key_falls_between():
    layer, first = random_layer([40])
    read = []
    for step in range(7):
        grow(layer, step)
        pages = policy().select(torch.randn(1, 4, 1, 8), layer.cached(first), Prompt())
        read.append([set(listed(row)) for row in pages.numbers[0]])
    for step in range(7):
        since = step // 3 * 3
        for now, then in zip(read[step], read[since], strict=True):
            assert now == then | set(range(41 + since, 41 + step))
    assert read[0][0] - set(range(34, 48)) != read[3][0] - set(range(34, 48))


def test_bad_input():
    with pytest.raises(ValidationError, match=r"k must be a multiple of k_block \(2\), got 5"):
        policy(k=5)
