"""The tiles against loops over every query and key."""

import math

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels.attention import attention_recall, sparse_attention
from paucity.ops.formats.block import BlockMask
from paucity.ops.formats.stripes import KeyLists, Window


def inputs(tq, tk, *, heads=4, group_heads=2, batch=2, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, tq), (group_heads, tk), (group_heads, tk))
    return [torch.randn(batch, *shape, 8, generator=generator).to(dtype) for shape in shapes]


def left_padding(tk, *pads):
    return torch.arange(tk) >= torch.tensor(pads).unsqueeze(-1)


def naive(query, key, value, sees, *, softcap=None, padding=None, window=None):
    """``sees(b, h, i, j)`` by positions of queries and keys."""
    batch, heads, tq, dim = query.shape
    tk, group = key.shape[2], heads // key.shape[1]
    out, kept = torch.zeros(batch, heads, tq, value.shape[-1], dtype=query.dtype), torch.zeros(batch, heads)
    for b in range(batch):
        for h in range(heads):
            for row in range(tq):
                i = row + tk - tq
                seen = [
                    j
                    for j in range(i + 1)
                    if (padding is None or padding[b, j]) and (window is None or j > i - window) and sees(b, h, i, j)
                ]
                if not seen:
                    continue
                kept[b, h] += len(seen) if padding is None or padding[b, i] else 0
                logits = key[b, h // group, seen] @ query[b, h, row] / math.sqrt(dim)
                logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
                out[b, h, row] = logits.softmax(0) @ value[b, h // group, seen]
    return out, kept


def window_sees(sinks, size, padding):
    def sees(b, h, i, j):
        rank = j if padding is None else int(padding[b, :j].sum())
        return j > i - size or rank < sinks

    return sees


def lists_sees(mask, q_block, offset):
    heads = mask.shape[1]
    return lambda b, h, i, j: bool(mask[b % len(mask), h * heads // 4, (i - offset) // q_block, j])


CASES = [  # queries, keys, padding, the model's own window, soft cap
    (1, 1, None, None, None),
    (63, 63, (0, 5), None, None),
    (1, 130, None, None, 2.0),
    (65, 65, None, None, None),
    (31, 50, (9, 23), 12, None),
    (40, 40, None, 7, None),
    (40, 40, (40, 0), None, 1.5),
]


@pytest.mark.parametrize(("tq", "tk", "pads", "own", "softcap"), CASES)
@pytest.mark.parametrize(("sinks", "size", "q_block"), [(0, 1, 16), (3, 9, 16), (5, 30, 7), (4, 1000, 32)])
def test_window_matches_naive(tq, tk, pads, own, softcap, sinks, size, q_block):
    query, key, value = inputs(tq, tk)
    padding = left_padding(tk, *pads) if pads else None
    pattern = Window(size, sinks, q_block)
    common = {"padding": padding, "window": own}
    expected, kept = naive(query, key, value, window_sees(sinks, size, padding), softcap=softcap, **common)
    torch.testing.assert_close(
        sparse_attention(query, key, value, pattern, softcap=softcap, **common), expected, atol=1e-5, rtol=1e-5
    )
    assert torch.equal(pattern.kept_pairs(tq, tk, **common).expand(2, 4), kept.long())
    seen = pattern.visible(tq, tk, **common).expand(2, 4, -1, -1)
    if padding is not None:
        seen = seen & padding[:, None, tk - tq :, None]
    assert torch.equal(seen.sum((-1, -2)), kept.long())


@pytest.mark.parametrize(("tq", "tk", "pads", "own", "softcap"), CASES)
@pytest.mark.parametrize(("rows", "heads", "q_block"), [(2, 4, 16), (1, 2, 7), (2, 1, 64)])
def test_lists_match_naive(tq, tk, pads, own, softcap, rows, heads, q_block):
    query, key, value = inputs(tq, tk)
    padding = left_padding(tk, *pads) if pads else None
    mask = torch.rand(rows, heads, -(-tq // q_block), tk, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[0, 0, 0] = False  # nothing at all
    lists = KeyLists.from_mask(mask, q_block=q_block)
    common = {"padding": padding, "window": own}
    expected, kept = naive(query, key, value, lists_sees(mask, q_block, tk - tq), softcap=softcap, **common)
    out = sparse_attention(query, key, value, lists, softcap=softcap, **common)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    counted = lists.kept_pairs(tq, tk, **common).repeat_interleave(4 // heads, dim=1).expand(2, 4)
    assert torch.equal(counted, kept.long())
    assert torch.equal(lists.visible(tq, tk)[..., 0, :], mask[:, :, 0] & (torch.arange(tk) <= tk - tq))


def test_block_mask_is_its_keys():
    query, key, value = inputs(33, 45)
    blocks = torch.rand(2, 4, 3, 6, generator=torch.Generator().manual_seed(2)) < 0.5
    expected, _ = naive(query, key, value, lists_sees(blocks.repeat_interleave(8, dim=-1)[..., :45], 16, 12))
    out = sparse_attention(query, key, value, BlockMask(blocks, 16, 8, 33, 45))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_cropped_cache_keeps_only_the_sinks_that_are_left():
    query, key, value = inputs(6, 20)
    dropped = torch.tensor([1, 7])
    out = sparse_attention(query, key, value, Window(4, 3, 4, dropped))
    expected, _ = naive(query, key, value, lambda b, h, i, j: j > i - 4 or j < max(0, 3 - int(dropped[b])))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pattern", [Window(2, 1, 3), KeyLists.from_mask(torch.ones(1, 1, 2, 5).bool(), q_block=3)])
def test_gradients_and_rows_that_see_nothing(pattern):
    query, key, value = (x[..., :3].double().requires_grad_() for x in inputs(5, 5, batch=1))
    padding = left_padding(5, 2)

    def run(*args):
        return sparse_attention(*args, pattern, padding=padding, softcap=3.0)

    out = run(query, key, value)
    assert (out[:, :, :2] == 0).all()
    assert out.isfinite().all()
    assert torch.autograd.gradcheck(run, (query, key, value))


def test_full_pattern_is_sdpa_also_in_bfloat16():
    query, key, value = inputs(65, 65)
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(sparse_attention(query, key, value, Window(65)), expected, atol=1e-5, rtol=1e-5)
    low = sparse_attention(*(x.bfloat16() for x in (query, key, value)), Window(65))
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), expected, atol=4e-2, rtol=4e-2)


def test_recall_is_the_mass_kept():
    query, key, _ = inputs(9, 12)
    padding = left_padding(12, 0, 5)
    assert torch.allclose(attention_recall(query, key, Window(12), padding=padding), torch.ones(2, 4))
    weights, _ = naive(query, key, torch.eye(12).expand(2, 2, 12, 12), lambda *_: True, padding=padding)
    seen = Window(4, 1).visible(9, 12, padding=padding)
    mass = (weights * seen).sum(-1) * padding[:, None, 3:]
    expected = mass.sum(-1) / padding[:, 3:].sum(-1, keepdim=True)
    torch.testing.assert_close(attention_recall(query, key, Window(4, 1), padding=padding), expected)


def test_bad_input():
    query, key, value = inputs(8, 8)
    with pytest.raises(InputError, match="query must be at most as long as key"):
        sparse_attention(query, key[:, :, :4], value[:, :, :4], Window(4))
    with pytest.raises(InputError, match="a multiple of 3 heads, got 4"):
        sparse_attention(query, key[:, [0, 0, 1]], value[:, [0, 0, 1]], Window(4))
    with pytest.raises(InputError, match=r"pattern must fit 2 rows, 4 heads and 2 blocks of queries, got \[1, 1, 3\]"):
        sparse_attention(query, key, value, KeyLists.from_mask(torch.ones(1, 1, 3, 8).bool(), q_block=4))
    with pytest.raises(InputError, match="pattern must be for 8 queries and 8 keys"):
        sparse_attention(query, key, value, BlockMask.causal(9, q_block=4, k_block=4))
    with pytest.raises(InputError, match="window must be at least 1"):
        sparse_attention(query, key, value, Window(4), window=0)
