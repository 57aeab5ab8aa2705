"""Rules of blocks, and their masks where a cropped cache has dropped a part of a block."""

import pytest
import torch

from paucity.checks import InputError
from paucity.ops.patterns import is_power_of_two, is_strided, text_blocks, text_mask

SIZES = [(1, 1, 0), (63, 63, 0), (17, 40, 0), (1, 40, 3), (17, 40, 5), (33, 40, 21), (40, 40, 8), (5, 7, 30), (3, 3, 1)]


@pytest.mark.parametrize("block_size", [1, 3, 8])
@pytest.mark.parametrize(("queries", "keys", "dropped"), SIZES)
def test_a_mask_is_its_rule_token_by_token(queries, keys, dropped, block_size):
    rows, columns = text_blocks(queries, keys, block_size, dropped=dropped)
    generator = torch.Generator().manual_seed(queries)
    kept = torch.rand(2, len(rows), len(columns), generator=generator) < 0.5
    mask = text_mask(kept, queries, keys, block_size=block_size, dropped=dropped)
    lead = mask.q_len - queries
    assert lead == (keys - queries) % block_size
    by_index = {(int(r), int(c)): kept[:, a, b] for a, r in enumerate(rows) for b, c in enumerate(columns)}
    length = keys + dropped
    wanted = [
        [by_index[i // block_size, j // block_size] for j in range(dropped, length)]
        for i in range(length - queries, length)
    ]
    wanted = torch.stack([torch.stack(row) for row in wanted]).permute(2, 0, 1)
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    assert torch.equal(mask.to_dense(causal=True)[0, :, lead:], wanted & causal)


@pytest.mark.parametrize("dropped", [0, 5])
def test_blocks_outside_the_window_of_the_model_are_left_out(dropped):
    rows, columns = text_blocks(17, 40, 4, dropped=dropped)
    kept = torch.ones(len(rows), len(columns), dtype=torch.bool)
    whole, near = (text_mask(kept, 17, 40, block_size=4, dropped=dropped, window=w) for w in (None, 9))
    assert near.blocks.sum() < whole.blocks.sum()
    both = [mask.kept_pairs(mask.q_len, 40, window=9) for mask in (whole, near)]
    assert torch.equal(*both)


def test_a_block_longer_than_the_text_takes_no_more_memory():
    found, wanted = (
        text_mask(torch.ones(1, 1, dtype=torch.bool), 17, 40, block_size=size, dropped=5) for size in (1 << 40, 64)
    )
    assert found.elements is None
    assert torch.equal(found.kept_pairs(40, 40), wanted.kept_pairs(40, 40))
    assert int(found.kept_pairs(40, 40)) == 40 * 41 // 2


def test_powers_of_two():
    values = [value for value in range(-20, 70) if is_power_of_two(torch.tensor(value))]
    assert values == [0, 1, 2, 4, 8, 16, 32, 64]


def test_strides_by_head():
    kept = is_strided(torch.arange(7), 3, torch.arange(3)[:, None, None])
    assert [row.nonzero().flatten().tolist() for row in kept[:, 0]] == [[0, 3, 6], [2, 5], [1, 4]]


def test_bad_input():
    with pytest.raises(InputError, match="block_size must be at least 1, got 0"):
        text_blocks(1, 1, 0)
    with pytest.raises(InputError, match="num_queries must be in"):
        text_blocks(3, 2, 1)
    with pytest.raises(InputError, match="kept must have shape"):
        text_mask(torch.ones(2, 3, dtype=torch.bool), 8, 8, block_size=4)
    with pytest.raises(InputError, match="stride must be at least 1"):
        is_strided(torch.arange(3), 0)
