"""Hyperplane codes and their Gray order, by loops."""

import itertools

import pytest
import torch

from paucity.checks import InputError, InputTypeError
from paucity.ops.hashing import gray_rank, hyperplane_codes, random_hyperplanes


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("shape", "planes"), [((5,), 1), ((1, 5), 7), ((2, 3, 9, 5), 7), ((0, 5), 3), ((4, 5), 62)])
def test_codes_say_the_side_of_each_plane(shape, planes):
    x, normals = drawn(0, *shape), drawn(1, 5, planes)
    codes = hyperplane_codes(x, normals)
    assert codes.shape == shape[:-1]
    rows = x.reshape(-1, 5).double()
    side = [[float(row @ normals[:, i].double()) > 0 for i in range(planes)] for row in rows]
    assert codes.flatten().tolist() == [sum(2**i for i in range(planes) if bits[i]) for bits in side]


def test_codes_know_angles_not_lengths():
    x = drawn(2, 500, 16)
    planes = random_hyperplanes(16, 40, generator=torch.Generator().manual_seed(3))
    assert torch.equal(hyperplane_codes(x, planes), hyperplane_codes(x * 8.0, planes))
    assert torch.equal(hyperplane_codes(-x, planes), 2**40 - 1 - hyperplane_codes(x, planes))
    turned = torch.nn.functional.normalize(x, dim=-1) * 3**0.5
    turned = turned + torch.nn.functional.normalize(
        drawn(4, 500, 16) - (drawn(4, 500, 16) * x).sum(-1, keepdim=True) * x / x.square().sum(-1, keepdim=True), dim=-1
    )
    differ = hyperplane_codes(x, planes) ^ hyperplane_codes(turned, planes)
    share = sum(bin(code).count("1") for code in differ.tolist()) / (500 * 40)
    assert share == pytest.approx(1 / 6, abs=0.02)  # 30 degrees of 180


@pytest.mark.parametrize("bits", [1, 2, 7, 11])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int64])
def test_neighbours_in_gray_order_differ_in_one_bit(bits, dtype):
    rank = gray_rank(torch.arange(2**bits, dtype=dtype))
    assert rank.dtype == dtype
    assert sorted(rank.tolist()) == list(range(2**bits))
    order = rank.argsort().tolist()
    assert all(bin(a ^ b).count("1") == 1 for a, b in itertools.pairwise(order))


def test_ranks_of_long_codes():
    ranks = [0, 1, 2**61 + 12345, 2**62 - 1]
    assert gray_rank(torch.tensor([r ^ (r >> 1) for r in ranks])).tolist() == ranks


def test_planes_follow_the_generator():
    one, same, other = (random_hyperplanes(6, 4, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_bad_input():
    generator = torch.Generator()
    with pytest.raises(InputError, match=r"num_planes must be in \[1, 62\], got 63"):
        random_hyperplanes(4, 63, generator=generator)
    with pytest.raises(InputError, match=r"planes must have shape \[3, any\], got \[4, 2\]"):
        hyperplane_codes(torch.ones(2, 3), torch.ones(4, 2))
    with pytest.raises(InputTypeError, match=r"codes must be integers, got torch\.float32"):
        gray_rank(torch.ones(2))
