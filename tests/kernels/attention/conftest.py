"""Inputs and masks that the tests of attention share."""

import pytest
import torch


def _inputs(tq, tk, *, heads=4, group_heads=2, batch=2, dim=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((heads, tq), (group_heads, tk), (group_heads, tk))
    return [torch.randn(batch, *shape, dim, generator=generator).to(dtype) for shape in shapes]


def _left_padding(tk, *pads):
    return torch.arange(tk) >= torch.tensor(pads).unsqueeze(-1)


@pytest.fixture
def inputs():
    """``inputs(tq, tk)``: query, key and value of 2 rows, 4 heads that share 2 key heads."""
    return _inputs


@pytest.fixture
def left_padding():
    """``left_padding(tk, *pads)``: bool, one row for each number of keys that are padding."""
    return _left_padding
