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


def element_mask(q_len, kv_len, q_block, k_block, seed, heads=(2, 3)):
    """A mask with full, empty and partly kept blocks."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(*heads, -(-q_len // q_block), -(-kv_len // k_block), generator=generator) * 2.4 - 0.7
    wide = share.repeat_interleave(q_block, 2).repeat_interleave(k_block, 3)[:, :, :q_len, :kv_len]
    return torch.rand(*heads, q_len, kv_len, generator=generator) < wide


LENGTHS = (st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 5), st.integers(0, 99))


@FEW
@given(*LENGTHS)
def test_exact_round_trip(q_len, kv_len, q_block, k_block, seed):
    dense = element_mask(q_len, kv_len, q_block, k_block, seed)
    exact = BlockMask.from_dense(dense, q_block=q_block, k_block=k_block, exact=True)
    assert torch.equal(exact.to_dense(), dense)
    assert torch.equal(exact.blocks, BlockMask.from_dense(dense, q_block=q_block, k_block=k_block).blocks)
    partial = torch.full_like(exact.blocks, -1, dtype=torch.int32) if exact.partial is None else exact.partial
    number = 0
    for b, h, i, j in exact.blocks.new_ones(exact.blocks.shape).nonzero().tolist():
        part = dense[b, h, i * q_block : (i + 1) * q_block, j * k_block : (j + 1) * k_block]
        assert exact.blocks[b, h, i, j] == part.any()
        split = bool(part.any()) and not bool(part.all())
        assert partial[b, h, i, j] == (number if split else -1)
        number += split
    assert (exact.elements is None) == (number == 0)
    assert number == 0 or len(exact.elements) == number


@FEW
@given(*LENGTHS, st.sampled_from([(2, 3), (1, 3), (2, 1)]))
def test_partial_blocks_in_algebra(q_len, kv_len, q_block, k_block, seed, heads):
    left = element_mask(q_len, kv_len, q_block, k_block, seed)
    right = element_mask(q_len, kv_len, q_block, k_block, seed + 1, heads)
    sizes = {"q_block": q_block, "k_block": k_block}
    for exact in (True, False):
        a = BlockMask.from_dense(left, **sizes, exact=True)
        b = BlockMask.from_dense(right, **sizes, exact=exact)
        for ours, theirs in ((a & b, a.to_dense() & b.to_dense()), (b | a, a.to_dense() | b.to_dense())):
            assert torch.equal(ours.to_dense(), theirs)
            # As little as can be: no block that keeps nothing, none partial that is full.
            again = BlockMask.from_dense(theirs, **sizes, exact=True)
            assert torch.equal(ours.blocks, again.blocks)
            assert (ours.partial is None) == (again.partial is None)
            assert ours.partial is None or torch.equal(ours.partial >= 0, again.partial >= 0)


@FEW
@given(*LENGTHS, st.booleans(), st.none() | st.integers(1, 9), st.sampled_from([None, 1, 2]), st.booleans())
def test_kept_pairs_match_loops(q_len, kv_len, q_block, k_block, seed, causal, window, rows, exact):
    for heads in ((2, 3), (1, 1)):
        dense = element_mask(q_len, kv_len, q_block, k_block, seed, heads)
        mask = BlockMask.from_dense(dense, q_block=q_block, k_block=k_block, exact=exact)
        padding = None
        if rows is not None:
            padding = torch.rand(rows, kv_len, generator=torch.Generator().manual_seed(seed)) < 0.6
        batch = max(heads[0], rows or 1)
        expected = torch.zeros(batch, heads[1], dtype=torch.int64)
        kept, offset = mask.to_dense(), kv_len - q_len
        for b in range(batch):
            real = None if padding is None else padding[b % rows].tolist()
            for h, i, j in kept[b % heads[0]].nonzero().tolist():
                at = i + offset
                if (causal and j > at) or (window is not None and j <= at - window):
                    continue
                if real is None or (real[j] and (at < 0 or real[at])):
                    expected[b, h] += 1
        ours = mask.kept_pairs(q_len, kv_len, padding=padding, window=window, causal=causal)
        assert ours.dtype == torch.int64
        assert torch.equal(ours, expected)
        if padding is None and window is None and expected.any():
            every = naive_dense(BlockMask(torch.ones_like(mask.blocks), q_block, k_block, q_len, kv_len), causal)
            assert torch.allclose(mask.density(causal=causal), expected / every.sum((2, 3)))


def test_partial_blocks_move_and_print():
    mask = torch.ones(1, 1, 7, 9, dtype=torch.bool).tril(2)
    exact = BlockMask.from_dense(mask, q_block=4, k_block=4, exact=True)
    assert repr(exact) == "BlockMask([1, 1], 7x9 in 4x4, 0.833 of the blocks, 4 partial)"
    assert exact.density().item() == 1
    moved = exact.to("meta")
    assert {x.device.type for x in (moved.blocks, moved.partial, moved.elements)} == {"meta"}
    # A block that is not kept stays out, whatever its elements say.
    left_out = BlockMask(torch.zeros_like(exact.blocks), 4, 4, 7, 9, exact.partial, exact.elements)
    assert not left_out.to_dense().any()
    assert left_out.kept_pairs(7, 9).item() == 0


def test_bad_partial_blocks():
    blocks = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    partial, elements = torch.zeros(1, 1, 2, 2, dtype=torch.int32), torch.ones(1, 4, 4, dtype=torch.bool)
    with pytest.raises(InputError, match="elements must be given together with partial"):
        BlockMask(blocks, 4, 4, 8, 8, partial)
    with pytest.raises(InputTypeError, match=r"partial must be torch\.int32, got torch\.int64"):
        BlockMask(blocks, 4, 4, 8, 8, partial.long(), elements)
    with pytest.raises(InputError, match=r"partial must have shape \[1, 1, 2, 2\], got \[1, 1, 2, 1\]"):
        BlockMask(blocks, 4, 4, 8, 8, partial[..., :1], elements)
    with pytest.raises(InputTypeError, match="elements must be bool"):
        BlockMask(blocks, 4, 4, 8, 8, partial, elements.int())
    with pytest.raises(InputError, match=r"elements must have shape \[any, 4, 4\], got \[1, 4, 3\]"):
        BlockMask(blocks, 4, 4, 8, 8, partial, elements[..., :3])
    with pytest.raises(InputError, match="pattern must be for 7 queries and 8 keys"):
        BlockMask(blocks, 4, 4, 8, 8).kept_pairs(7, 8)


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
