"""Block masks against loops over elements, against FlexAttention's own lists, and what they refuse."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.nn.attention.flex_attention import BlockMask as FlexBlockMask

from paucity.checks import InputError, InputTypeError
from paucity.ops.formats import BlockMask

FEW = settings(derandomize=True, deadline=None, max_examples=40)
SIZES = [(1, 1, 1, 1), (8, 8, 4, 2), (7, 13, 3, 4), (13, 7, 4, 3), (5, 5, 9, 9), (1, 10, 4, 4), (6, 9, 1, 5)]


def random_mask(q_len, kv_len, q_block, k_block, heads=(2, 3), seed=0):
    shape = (*heads, -(-q_len // q_block), -(-kv_len // k_block))
    blocks = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.4
    return BlockMask(blocks, q_block, k_block, q_len, kv_len)


def naive_dense(mask, causal):
    out = torch.zeros(*mask.blocks.shape[:2], mask.q_len, mask.kv_len, dtype=torch.bool)
    for b, h, i, j in out.new_ones(out.shape).nonzero().tolist():
        sees = not causal or j <= i + mask.kv_len - mask.q_len
        out[b, h, i, j] = sees and mask.blocks[b, h, i // mask.q_block, j // mask.k_block]
    return out


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("causal", [False, True])
def test_dense_and_density_match_loops(sizes, causal):
    mask = random_mask(*sizes)
    dense = naive_dense(mask, causal)
    every = naive_dense(BlockMask(torch.ones_like(mask.blocks), *sizes[2:], *sizes[:2]), causal)
    assert torch.equal(mask.to_dense(causal=causal), dense)
    assert torch.allclose(mask.density(causal=causal), dense.sum((2, 3)) / every.sum((2, 3)))
    assert mask.density(causal=causal).shape == (2, 3)


@pytest.mark.parametrize("sizes", SIZES)
def test_causal_keeps_just_what_is_needed(sizes):
    q_len, kv_len, q_block, k_block = sizes
    mask = BlockMask.causal(q_len, kv_len, q_block=q_block, k_block=k_block)
    seen = torch.ones(1, 1, q_len, kv_len, dtype=torch.bool).tril(kv_len - q_len)
    assert torch.equal(mask.blocks, BlockMask.from_dense(seen, q_block=q_block, k_block=k_block).blocks)
    assert torch.equal(mask.to_dense(causal=True), seen)
    assert mask.density().item() == 1


@FEW
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))
def test_round_trips(q_len, kv_len, q_block, k_block, seed):
    mask = random_mask(q_len, kv_len, q_block, k_block, seed=seed)
    assert torch.equal(BlockMask.from_dense(mask.to_dense(), q_block=q_block, k_block=k_block).blocks, mask.blocks)
    sizes = {"q_block": q_block, "k_block": k_block, "q_len": q_len, "kv_len": kv_len}
    count, index = mask.kv_num_blocks, mask.kv_indices
    assert count.dtype == index.dtype == torch.int32
    for number, ids, row in zip(count.flatten(), index.flatten(0, 2), mask.blocks.flatten(0, 2), strict=True):
        assert ids[:number].tolist() == [block for block, kept in enumerate(row.tolist()) if kept]
    for width in (index.shape[-1], int(count.max())):
        assert torch.equal(BlockMask.from_lists(count, index[..., :width], **sizes).blocks, mask.blocks)
    one = torch.rand(1, 2, q_len, kv_len, generator=torch.Generator().manual_seed(seed)) < 0.1
    kept = BlockMask.from_dense(one, q_block=q_block, k_block=k_block)
    for b, h, qi, ki in kept.blocks.new_ones(kept.blocks.shape).nonzero().tolist():
        part = one[b, h, qi * q_block : (qi + 1) * q_block, ki * k_block : (ki + 1) * k_block]
        assert kept.blocks[b, h, qi, ki] == part.any()


def test_lists_are_flex_attentions():
    mask = random_mask(12, 20, 4, 4)
    flex = FlexBlockMask.from_kv_blocks(mask.kv_num_blocks, mask.kv_indices, BLOCK_SIZE=(4, 4), seq_lengths=(12, 20))
    assert torch.equal(flex.to_dense().bool(), mask.blocks)
    assert torch.equal(flex.q_num_blocks, mask.blocks.sum(-2, dtype=torch.int32))


def test_algebra_broadcasts():
    mask, causal = random_mask(7, 13, 3, 4), BlockMask.causal(7, 13, q_block=3, k_block=4)
    assert torch.equal((causal & mask).blocks, mask.blocks & causal.blocks)
    assert torch.equal((mask | causal).to_dense(), mask.to_dense() | causal.to_dense())
    assert (mask & causal).kv_len == 13
    assert repr(causal) == "BlockMask([1, 1], 7x13 in 3x4, 0.833 of the blocks)"
    with pytest.raises(InputError, match="other must have the batch, heads, blocks and lengths"):
        mask & random_mask(7, 13, 3, 4, heads=(2, 2))
    with pytest.raises(InputError, match="other must have"):
        mask | BlockMask.causal(7, 12, q_block=3, k_block=4)
    with pytest.raises(TypeError):
        mask & mask.blocks


def test_bad_input():
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    with pytest.raises(InputError, match=r"blocks must have shape \[any, any, 3, 2\], got \[1, 1, 2, 2\]"):
        BlockMask(blocks, 4, 4, 9, 8)
    with pytest.raises(InputTypeError, match="blocks must be bool"):
        BlockMask(blocks.float(), 4, 4, 8, 8)
    with pytest.raises(InputError, match="mask must have 4 dimensions"):
        BlockMask.from_dense(blocks[0], q_block=2, k_block=2)
    with pytest.raises(InputError, match="q_block must be at least 1, got 0"):
        BlockMask.causal(4, q_block=0, k_block=2)
    sizes = {"q_block": 4, "k_block": 4, "q_len": 4, "kv_len": 8}
    for count, index in ((2, [0, 2]), (2, [-1, 0]), (3, [0, 1]), (-1, [0, 1])):
        with pytest.raises(InputError, match=r"BlockMask\.from_lists: kv_"):
            BlockMask.from_lists(torch.tensor([[[count]]]), torch.tensor([[[index]]]), **sizes)
