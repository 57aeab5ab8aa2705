"""Neighbourhoods by loops, as blocks of tiles, and the count of tiles."""

import itertools
import math

import pytest
import torch

from paucity.checks import InputError
from paucity.ops.neighbourhood import (
    Axis,
    axis_pairs,
    count_tile_pairs,
    grid_axes,
    neighbourhood_mask,
    tiled_neighbourhood,
)
from paucity.ops.tile_speedup import best_tiles, factorings, simulate_speedup

CASES = [  # shape, window, stride, dilation, causal, tile of queries, tile of keys
    ((1,), (1,), (1,), (1,), (False,), (4,), (4,)),
    ((13,), (5,), (2,), (1,), (False,), (4,), (3,)),
    ((13,), (4,), (3,), (2,), (True,), (4,), (2,)),
    ((5,), (4,), (4,), (7,), (False,), (2,), (2,)),
    ((5, 7), (3, 4), (1, 2), (1, 2), (False, True), (2, 2), (2, 4)),
    ((3, 5, 4), (2, 3, 9), (1, 3, 1), (1, 2, 1), (True, False, False), (1, 2, 2), (2, 2, 1)),
    ((8, 8), (4, 4), (4, 4), (1, 1), (False, False), (4, 4), (4, 4)),
]


def along(length, window, stride, dilation, causal):
    """The rules of the paper for one dimension: which keys each position sees."""
    seen = [set() for _ in range(length)]
    for group in range(min(dilation, length)):
        place = list(range(group, length, dilation))
        size = len(place)
        for i in range(size):
            if causal:
                leader = min((i // stride) * stride + stride - 1, size - 1)
                start, end = max(leader - window + 1, 0), i + 1
            else:
                leader = min((i // stride) * stride + stride // 2, size - 1)
                start = max(leader - window // 2, 0)
                start = max(size - window, 0) if start + window > size else start
                end = min(start + window, size)
            seen[place[i]] = {place[j] for j in range(start, end)}
    return seen


def naive(shape, *options):
    axes = [along(*axis) for axis in zip(shape, *options, strict=True)]
    cells = list(itertools.product(*map(range, shape)))
    return torch.tensor(
        [[all(k in axis[q] for axis, q, k in zip(axes, a, b, strict=True)) for b in cells] for a in cells]
    )


@pytest.mark.parametrize("case", CASES)
def test_mask_and_tiles_are_the_rules(case):
    shape, window, stride, dilation, causal, q_tile, k_tile = case
    wanted = naive(shape, window, stride, dilation, causal)
    assert wanted.diagonal().all()
    assert torch.equal(neighbourhood_mask(shape, window, stride=stride, dilation=dilation, causal=causal), wanted)
    tiled = tiled_neighbourhood(grid_axes("test", shape, window, stride, dilation, causal), q_tile, k_tile)
    assert torch.equal(tiled.query_order[tiled.query_slot], torch.arange(math.prod(shape)))
    rows = tiled.pattern.to_dense()[0, 0][tiled.query_slot]
    real = tiled.key_order >= 0
    assert not rows[:, ~real].any()
    found = torch.zeros_like(wanted)
    found[:, tiled.key_order[real]] = rows[:, real]
    assert torch.equal(found, wanted)
    bound = simulate_speedup(
        shape, window, stride=stride, dilation=dilation, causal=causal, q_tile=q_tile, k_tile=k_tile
    )
    dense = -(-wanted[0].numel() // math.prod(q_tile)) * -(-wanted[0].numel() // math.prod(k_tile))
    assert bound.flops == pytest.approx(wanted.numel() / int(wanted.sum()))
    assert bound.tiles == pytest.approx(dense / int(tiled.pattern.blocks.sum()))
    partial = 0 if tiled.pattern.partial is None else int((tiled.pattern.partial >= 0).sum())
    assert bound.masked == pytest.approx(partial / int(tiled.pattern.blocks.sum()))


def test_blocked_attention_is_perfectly_block_sparse_and_a_sliding_window_is_not():
    blocked = simulate_speedup((16, 16), 4, stride=4, q_tile=(4, 4), k_tile=(4, 4))
    assert (blocked.flops, blocked.tiles, blocked.masked, blocked.perfect) == (16, 16, 0, True)
    # Windows of 6 tokens begin at multiples of 2, and of tiles of 2 tokens, 3 fit.
    assert simulate_speedup((16,), 6, stride=2, q_tile=(2,), k_tile=(2,)).perfect
    sliding = simulate_speedup((16, 16), 4, q_tile=(4, 4), k_tile=(4, 4))
    assert not sliding.perfect
    assert sliding.tiles < sliding.flops


def test_best_tiles_are_the_best_of_all():
    axes = grid_axes("test", (12, 20), (4, 10), (1, 5))
    every = itertools.product(factorings(8, 2), factorings(16, 2))
    bounds = {
        both: simulate_speedup((12, 20), (4, 10), stride=(1, 5), q_tile=both[0], k_tile=both[1]) for both in every
    }
    chosen = best_tiles(axes, 8, 16)
    assert bounds[chosen].tiles == max(bound.tiles for bound in bounds.values())
    assert all(math.prod(tile) == block for tile, block in zip(chosen, (8, 16), strict=True))


def test_long_lines_need_no_square_mask():
    tiled = tiled_neighbourhood(grid_axes("test", (50_000,), 1000, 100), (100,), (100,))
    # Windows of 1000 around the middle of 100: 450 keys before the first of these, so that they cut two tiles.
    assert int(tiled.pattern.blocks[0, 0, 250].sum()) == 11
    assert len(tiled.pattern.elements) < 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape": ()}, "shape must have 1 to 3 dimensions"),
        ({"shape": (4, 0)}, "shape must be"),
        ({"window_size": (3, 3, 3)}, "window_size must have 2 values, like shape"),
        ({"stride": 4}, r"stride must be at most window_size \(3\), got 4"),
        ({"dilation": 0}, "dilation must be"),
        ({"causal": (True,)}, "causal must have 2 values"),
        ({"causal": (1, 0)}, "causal must be True or False"),
        ({"q_tile": (4,)}, "q_tile must have 2 sizes"),
    ],
)
def test_bad_input(options, message):
    given = {"shape": (4, 4), "window_size": 3, "q_tile": (2, 2), "k_tile": (2, 2)} | options
    with pytest.raises((InputError, TypeError), match=message):
        simulate_speedup(given.pop("shape"), given.pop("window_size"), **given)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("q_tile", "k_tile"), [(1, 1), (4, 3), (3, 8)])
def test_tiles_are_counted_without_maps(causal, q_tile, k_tile):
    for length, stride, dilation in itertools.product((1, 7, 20), (1, 3, 5), (1, 3)):
        axis = Axis(length, 5, stride, dilation, causal)
        pairs = axis_pairs(axis, q_tile, k_tile)
        whole = pairs.some & pairs.every
        assert count_tile_pairs(axis, q_tile, k_tile) == (int(pairs.some.sum()), int(whole.sum()))


def test_tiles_are_chosen_for_a_dimension_longer_than_any_map():
    shape, window = (2, 200_000), (2, 64)
    q_tile, k_tile = best_tiles(grid_axes("test", shape, window, window))
    assert simulate_speedup(shape, window, stride=window, q_tile=q_tile, k_tile=k_tile).perfect
