"""Neighbourhood attention against masks, and the policy against its rules, by loops."""

import pytest
import torch
from pydantic import ValidationError
from torch.nn.functional import scaled_dot_product_attention

from paucity.attention import Neighbourhood, Prompt, neighbourhood_attention
from paucity.attention.compute import kept_pairs
from paucity.checks import InputError
from paucity.ops.neighbourhood import neighbourhood_mask


def inputs(length, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, h, length, d, generator=generator).to(dtype) for h, d in ((4, 8), (2, 8), (2, 6))]


CASES = [
    ((50,), {"window_size": 7, "stride": 3}),
    ((9, 11), {"window_size": (4, 5), "dilation": (2, 1), "causal": (True, False)}),
    ((5, 6, 7), {"window_size": (3, 2, 7), "stride": (1, 2, 5)}),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
@pytest.mark.parametrize("num_global", [0, 5])
@pytest.mark.parametrize("tile", [None, 2])
def test_equals_masked_attention(shape, options, num_global, tile):
    seen = neighbourhood_mask(shape, options["window_size"], **{k: v for k, v in options.items() if k != "window_size"})
    seen = torch.nn.functional.pad(seen, (num_global, 0, num_global, 0), value=True)
    query, key, value = (x.requires_grad_() for x in inputs(len(seen)))
    tile = None if tile is None else [tile] * len(shape)
    out = neighbourhood_attention(query, key, value, shape, tile=tile, num_global=num_global, scale=0.3, **options)
    exact = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, exact, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(exact)
    found, wanted = (torch.autograd.grad(x, (query, key, value), weight) for x in (out, exact))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 3e-2)])
def test_dtypes_and_strided_inputs(dtype, tolerance):
    query, key, value = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs(30, dtype))
    out = neighbourhood_attention(query, key, value, (5, 6), window_size=3)
    assert out.dtype == dtype
    wide = [x.double() for x in (query, key, value)]
    exact = scaled_dot_product_attention(*wide, attn_mask=neighbourhood_mask((5, 6), 3), enable_gqa=True)
    torch.testing.assert_close(out.double(), exact, atol=tolerance, rtol=tolerance)


def rule(policy, i, j):
    """Whether the token at ``i`` sees that at ``j``."""
    if j > i:
        return False
    if policy.shape is None:
        d, s, w = policy.dilation, policy.stride, policy.window_size
        return i % d == j % d and j // d > (i // d) // s * s + s - 1 - w
    total = torch.Size(policy.shape).numel()
    if not policy.start <= i < policy.start + total:
        return policy.text_window is None or i - j < policy.text_window
    if j < policy.start:
        return True
    grid = neighbourhood_mask(
        policy.shape, policy.window_size, stride=policy.stride, dilation=policy.dilation, causal=policy.causal
    )
    return bool(grid[i - policy.start, j - policy.start])


@pytest.mark.parametrize(("tq", "tk", "dropped"), [(1, 1, 0), (53, 53, 0), (17, 40, 0), (20, 31, 9)])
@pytest.mark.parametrize(
    "options",
    [
        {"window_size": 6},
        {"window_size": 6, "stride": 4},
        {"window_size": 3, "stride": 2, "dilation": 3},
        {"shape": [3, 2, 5], "start": 4, "window_size": [2, 2, 3], "stride": [1, 1, 2], "causal": [True, False, False]},
        {"shape": [4, 6], "start": 0, "window_size": 2, "dilation": [2, 1], "text_window": 5},
        {"shape": [4, 3], "start": 30, "window_size": [1, 3], "text_window": 3},
    ],
)
def test_policy_is_its_rules(options, tq, tk, dropped):
    policy = Neighbourhood(**options, q_block=8, k_block=4)
    query, key = torch.zeros(1, 2, tq, 4), torch.zeros(1, 1, tk, 4)
    pattern = policy.select(query, key, Prompt(dropped=dropped))
    lead = 0 if not hasattr(pattern, "q_len") else pattern.q_len - tq
    dense = hasattr(pattern, "to_dense")
    seen = pattern.to_dense(causal=True)[0, 0, lead:] if dense else pattern.visible(tq, tk)[0, 0]
    wanted = torch.tensor(
        [[rule(policy, i, j) for j in range(dropped, dropped + tk)] for i in range(dropped + tk - tq, dropped + tk)]
    )
    assert torch.equal(seen, wanted)
    assert int(kept_pairs(pattern, tq, tk)) == int(wanted.sum())


@pytest.mark.parametrize("options", [{"shape": [3, 2, 4], "start": 3}, {"dilation": 2}])
def test_blocks_longer_than_the_text_are_the_text(options):
    text = torch.zeros(1, 1, 40, 1)
    found, wanted = (
        Neighbourhood(window_size=2, q_block=size, k_block=size, **options).select(text[:, :, 17:], text, Prompt())
        for size in (1 << 40, 64)
    )
    assert torch.equal(found.kept_pairs(40, 40), wanted.kept_pairs(40, 40))


def test_bad_input():
    query, key, value = inputs(30)
    with pytest.raises(InputError, match="query must have 32 tokens, the grid and the global ones, got 30"):
        neighbourhood_attention(query, key, value, (5, 6), window_size=3, num_global=2)
    with pytest.raises(InputError, match="tile must have 2 sizes, like shape"):
        neighbourhood_attention(query, key, value, (5, 6), window_size=3, tile=(4,))
    for options in ({"window_size": 0}, {"window_size": 2, "stride": 3}, {"window_size": [2, 2]}, {"start": 3}):
        with pytest.raises(ValidationError):
            Neighbourhood(**options)
    with pytest.raises(ValidationError, match="window_size must have 3 values"):
        Neighbourhood(shape=[2, 2, 2], window_size=[1, 1])


def test_a_dimension_longer_than_any_mask():
    query, key, _ = inputs(64)
    options = {"window_size": 5, "stride": 3, "dilation": 2}
    short, long = (
        Neighbourhood(shape=[size], **options).select(query, key, Prompt()).to_dense(causal=True)
        for size in (100, 300_000)
    )
    assert torch.equal(short, long)
