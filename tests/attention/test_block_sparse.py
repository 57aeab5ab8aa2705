"""The mask of block_sparse, by loops: the butterfly, distances and rows."""

import pytest
import torch
from pydantic import ValidationError

from paucity.attention import BlockSparse, Prompt
from paucity.checks import InputError


def elements(policy, tq, tk, dropped=0):
    mask = policy.select(torch.zeros(1, 2, tq, 4), torch.zeros(1, 1, tk, 4), Prompt(dropped=dropped))
    return mask.to_dense(causal=True)[0, 0, mask.q_len - tq :]


def butterfly(size, max_stride):
    """Pairs of blocks that some factor of a butterfly of ``size`` blocks joins."""
    joined, stride = {(i, i) for i in range(size)}, 1
    while stride <= min(max_stride, size // 2):
        joined |= {(i, i + stride) for i in range(size) if i // stride % 2 == 0}
        joined |= {(i, i - stride) for i in range(size) if i // stride % 2 == 1}
        stride *= 2
    return joined


@pytest.mark.parametrize(("tq", "tk", "dropped"), [(1, 1, 0), (63, 63, 0), (17, 130, 0), (90, 97, 22)])
@pytest.mark.parametrize("max_stride", [None, 4])
@pytest.mark.parametrize(("local", "sinks"), [(1, 0), (2, 1)])
def test_butterfly(tq, tk, dropped, max_stride, local, sinks):
    block, joined, end = 5, butterfly(64, max_stride or 64), tk + dropped

    def keeps(i, j):
        a, b = i // block, j // block
        return j <= i and ((a, b) in joined or a - b < local or b < sinks)

    policy = BlockSparse(max_stride=max_stride, local_blocks=local, sink_blocks=sinks, q_block=block)
    expected = [[keeps(i, j) for j in range(dropped, end)] for i in range(end - tq, end)]
    assert torch.equal(elements(policy, tq, tk, dropped), torch.tensor(expected))


@pytest.mark.parametrize("dropped", [0, 6])
def test_distances_and_rows_are_taken_as_given(dropped):
    distances = BlockSparse(distances=[3, 0, 1], q_block=4)
    rows = BlockSparse(rows=[[i, max(0, i - 1), max(0, i - 3), i + 1] for i in range(9)], q_block=4)
    expected = torch.tensor(
        [[j <= i and i // 4 - j // 4 in (0, 1, 3) for j in range(dropped, 33)] for i in range(20, 33)]
    )
    assert torch.equal(elements(distances, 13, 33 - dropped, dropped), expected)
    assert torch.equal(elements(rows, 13, 33 - dropped, dropped)[4:], expected[4:])


def test_a_text_with_more_blocks_than_rows_is_refused():
    policy = BlockSparse(rows=[[0], [0, 1]], q_block=4)
    assert elements(policy, 8, 8).all(-1).tolist() == [False] * 7 + [True]
    with pytest.raises(InputError, match="rows must be for the 3 blocks of the text, got 2"):
        elements(policy, 9, 9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_stride": 6}, "max_stride must be a power of two, got 6"),
        ({"distances": [1]}, "distances must have 0, the block itself"),
        ({"rows": [[0], [0]]}, "rows must have block 1 in row 1"),
        ({"distances": [0], "rows": [[0]]}, "at most one of max_stride, distances and rows must be given"),
        ({"distances": [0, -1]}, "greater than or equal to 0"),
        ({"rows": []}, "at least 1 item"),
        ({"local_blocks": 0}, "greater than or equal to 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        BlockSparse(**options)
