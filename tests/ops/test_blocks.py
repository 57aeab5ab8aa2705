"""Blocks of a text, by loops."""

import math

import pytest
import torch

from paucity.checks import InputError
from paucity.ops import blocks
from paucity.ops.blocks import (
    block_lengths,
    block_mask,
    cover_mask,
    diagonal_blocks,
    grouped_products,
    pool_blocks,
    soft_capped,
    visible_blocks,
)

sizes = pytest.mark.parametrize(("start", "length"), [(0, 1), (0, 16), (0, 17), (5, 3), (5, 30), (16, 9), (15, 1)])


@sizes
@pytest.mark.parametrize("reduce", ["mean", "sum", "amax", "amin"])
def test_pooled_over_the_tokens_that_are_there(start, length, reduce):
    x = torch.randn(2, 3, length, 4, generator=torch.Generator().manual_seed(length))
    found = pool_blocks(x, 8, start=start, reduce=reduce)
    first, last = start // 8, (start + length - 1) // 8
    assert found.shape == (2, 3, last - first + 1, 4)
    lengths = block_lengths(length, 8, start=start)
    for block in range(first, last + 1):
        rows = [t - start for t in range(start, start + length) if t // 8 == block]
        wanted = getattr(x[:, :, rows], reduce)(2)
        torch.testing.assert_close(found[:, :, block - first], wanted)
        assert lengths[block - first] == len(rows)


def test_pooling_keeps_float64_and_widens_bfloat16():
    assert pool_blocks(torch.ones(3, 2, dtype=torch.float64), 2).dtype == torch.float64
    assert pool_blocks(torch.ones(3, 2, dtype=torch.bfloat16), 2).dtype == torch.float32


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (17, 17), (5, 30), (16, 48), (3, 9)])
@pytest.mark.parametrize("window", [None, 1, 7])
def test_visible_blocks_have_a_visible_pair(tq, tk, window):
    found = visible_blocks(tq, tk, 8, 4, window=window)
    first = (tk - tq) // 8
    wanted = torch.zeros_like(found)
    for i in range(tk - tq, tk):
        for j in range(tk):
            if j <= i and (window is None or j > i - window):
                wanted[i // 8 - first, j // 4] = True
    assert torch.equal(found, wanted)
    mask = block_mask(found[None, None], tq, tk, q_block=8, k_block=4)
    assert mask.q_len == tq + (tk - tq) % 8


@pytest.mark.parametrize(("tq", "tk"), [(1, 1), (17, 17), (5, 30), (16, 48), (3, 9)])
@pytest.mark.parametrize(("q_block", "k_block"), [(8, 4), (4, 8), (6, 4)])
def test_diagonal_blocks_hold_a_position_of_their_row(tq, tk, q_block, k_block):
    found = diagonal_blocks(tq, tk, q_block, k_block)
    first = (tk - tq) // q_block
    wanted = torch.zeros(-(-tk // q_block) - first, -(-tk // k_block), dtype=torch.bool)
    for i in range(first * q_block, tk):
        wanted[i // q_block - first, i // k_block] = True
    assert torch.equal(found, wanted)


def test_grouped_products_are_those_of_repeated_keys():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 6, 5, 4, generator=generator), torch.randn(2, 3, 7, 4, generator=generator)
    wanted = query @ key.repeat_interleave(2, 1).mT
    torch.testing.assert_close(grouped_products(query, key), wanted)
    torch.testing.assert_close(grouped_products(query.transpose(2, 3).contiguous().mT, key), wanted)
    assert grouped_products(query[:0], key[:0]).shape == (0, 6, 5, 7)
    with pytest.raises(InputError, match="heads of key must divide"):
        grouped_products(query[:, :5], key)
    with pytest.raises(InputError, match="key must have shape"):
        grouped_products(query, key[..., :3])


def test_soft_caps_bound_and_barely_change_what_is_small():
    logits = torch.tensor([-1e9, -3.0, 0.0, 1e-3, 1e9], dtype=torch.float64)
    assert soft_capped(logits, None) is logits
    wanted = torch.tensor([2 * math.tanh(x / 2) for x in logits.tolist()], dtype=torch.float64)
    torch.testing.assert_close(soft_capped(logits, 2.0), wanted)
    soft_capped(logits.requires_grad_(), 2.0).sum().backward()
    torch.testing.assert_close(logits.grad, 1 - (wanted / 2) ** 2)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9, 0.999])
def test_cover_mask_is_the_fewest_that_hold_the_share(share):
    mass = torch.randint(0, 9, (4, 3, 12), generator=torch.Generator().manual_seed(0)).float()
    forced = torch.arange(12) == 5
    for pinned in (None, forced):
        found = cover_mask(mass, share, forced=pinned)
        for row, kept in zip(mass.view(-1, 12).tolist(), found.view(-1, 12), strict=True):
            chosen = [] if pinned is None else [5]
            held = sum(row[j] for j in chosen)
            for j in sorted(set(range(12)) - set(chosen), key=lambda j: (-row[j], j)):
                if held >= share * sum(row):
                    break
                chosen.append(j)
                held += row[j]
            assert kept.nonzero().flatten().tolist() == sorted(chosen)


def test_cover_mask_at_its_ends():
    mass = torch.tensor([[1.0, 0.0, 1e-30], [0.0, 0.0, 0.0]])
    assert cover_mask(mass, 1.0).all()
    assert cover_mask(mass, 0.9).tolist() == [[True, False, False], [False, False, False]]
    with pytest.raises(InputError, match="share must be"):
        cover_mask(mass, 0.0)
    with pytest.raises(InputError, match="share must be"):
        cover_mask(mass, 1.1)


def test_bad_input():
    with pytest.raises(InputError, match="reduce must be one of"):
        pool_blocks(torch.ones(3, 2), 2, reduce="median")
    with pytest.raises(InputError, match="block_size must be"):
        pool_blocks(torch.ones(3, 2), 0)
    with pytest.raises(InputError, match="blocks must have 4 dimensions"):
        block_mask(torch.ones(2, 2, dtype=torch.bool), 8, 8, q_block=4, k_block=4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduce", ["mean", "sum", "amax", "amin"])
def test_pooling_a_few_blocks_at_a_time_is_pooling(dtype, reduce, monkeypatch):
    x = torch.randn(2, 3, 45, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    monkeypatch.setattr(blocks, "_AT_ONCE", 300)
    found = pool_blocks(x, 8, start=5, reduce=reduce)
    torch.testing.assert_close(found, pool_blocks(x.float(), 8, start=5, reduce=reduce))


@pytest.mark.parametrize("start", [0, 3])
def test_a_block_longer_than_the_text_takes_no_more_memory(start):
    x = torch.randn(1, 2, 5, 4)
    torch.testing.assert_close(pool_blocks(x, 1 << 40, start=start)[..., 0, :], x.mean(-2))
