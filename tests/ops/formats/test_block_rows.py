"""Weights packed by blocks against loops, and what they refuse."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save

from paucity.checks import InputError, InputTypeError
from paucity.ops.formats import PackedBlocks


def sparse_blocks(rows, cols, block, density, seed, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, cols, generator=gen) < density
    weight = torch.randn(rows * block[0], cols * block[1], generator=gen)
    return weight.to(dtype) * kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 4), st.integers(0, 5), st.integers(1, 4), st.integers(1, 5), st.sampled_from([0.0, 0.5, 1.0]))
def test_round_trip_and_layout(rows, cols, br, bc, density):
    weight = sparse_blocks(rows, cols, (br, bc), density, seed=rows + cols)
    packed = PackedBlocks.from_tensors(load(save(PackedBlocks.pack(weight, (br, bc)).tensors())))
    assert torch.equal(packed.unpack(), weight)
    assert packed.block == (br, bc)
    at = 0
    for row in range(rows):  # the layout, by loops
        assert int(packed.row_offsets[row]) == at
        for col in range(cols):
            block = weight[row * br : (row + 1) * br, col * bc : (col + 1) * bc]
            assert bool(packed.mask()[row, col]) == bool((block != 0).any())
            if (block != 0).any():
                assert torch.equal(packed.values[at], block)
                assert int(packed.columns[at]) == col
                at += 1
    assert int(packed.row_offsets[-1]) == at == len(packed.values)


def test_special_values_size_and_repr():
    weight = torch.zeros(4, 6, dtype=torch.bfloat16)
    weight[2, 3:5] = torch.tensor([float("nan"), -0.0])
    packed = PackedBlocks.pack(weight, (2, 3))
    back = packed.unpack()
    assert back[2, 3].isnan()
    assert back[2, 4].signbit()
    assert packed.nbytes == 6 * 2 + 4 + 3 * 4
    assert packed.compression == pytest.approx(48 / 28)
    assert repr(packed) == "PackedBlocks(2x3, [4, 6] bfloat16, 1 blocks, 1.71x smaller)"
    assert not PackedBlocks.pack(weight.float().requires_grad_(), (1, 1)).values.requires_grad
    assert torch.equal(packed.to("cpu").mask(), packed.mask())


def test_bad_input():
    weight = torch.ones(4, 6)
    for block in ((3, 3), (2, 4)):
        with pytest.raises(InputError, match=r"block must divide the (rows|columns) of weight"):
            PackedBlocks.pack(weight, block)
    with pytest.raises(InputError, match="block must have 2 sizes"):
        PackedBlocks.pack(weight, (2,))
    with pytest.raises(InputError, match="weight must have 2 dimensions"):
        PackedBlocks.pack(torch.ones(2, 2, 2), (1, 1))
    with pytest.raises(InputTypeError, match="weight must be floating point"):
        PackedBlocks.pack(weight.int(), (2, 3))
    tensors = PackedBlocks.pack(weight, (2, 3)).tensors()
    for name, wrong in (
        ("values", torch.ones(4, 2, 4)),
        ("values", torch.ones(3, 2, 3)),
        ("columns", torch.tensor([0, 1, 1, 0], dtype=torch.int32)),
        ("columns", torch.tensor([0, 1, 0, 2], dtype=torch.int32)),
        ("columns", torch.tensor([-1, 1, 0, 1], dtype=torch.int32)),
        ("columns", torch.tensor([0, 1, 0, 1])),
        ("row_offsets", torch.tensor([0, 3, 2], dtype=torch.int32)),
        ("row_offsets", torch.tensor([1, 2, 4], dtype=torch.int32)),
        ("row_offsets", torch.tensor([0, 4], dtype=torch.int32)),
        ("shape", torch.tensor([4, 3])),
        ("shape", torch.tensor([4, 8])),
    ):
        with pytest.raises(InputError, match=r"PackedBlocks.* must"):
            PackedBlocks.from_tensors({**tensors, name: wrong})
    with pytest.raises(InputError, match="got none named shape"):
        PackedBlocks.from_tensors({name: tensors[name] for name in ("values", "columns", "row_offsets")})
