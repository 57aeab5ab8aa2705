"""Weights packed by groups in 4 bits against loops, and what they refuse."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save

from paucity.checks import InputError, InputTypeError
from paucity.ops.formats import PackedGroups


def sparse_groups(rows, cols, size, density, seed, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    kept = torch.rand(rows, cols, generator=gen) < density
    return torch.randn(rows, cols * size, generator=gen).to(dtype) * kept.repeat_interleave(size, 1)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(
    st.integers(0, 4),
    st.integers(0, 5),
    st.sampled_from([2, 6, 16]),
    st.sampled_from([0.0, 0.5, 1.0]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)
def test_layout_and_meaning(rows, cols, size, density, dtype):
    weight = sparse_groups(rows, cols, size, density, seed=rows + cols, dtype=dtype)
    packed = PackedGroups.from_tensors(load(save(PackedGroups.pack(weight, size).tensors())))
    back, at = packed.unpack(), 0
    assert back.dtype == dtype
    assert packed.group_size == size
    for row in range(rows):  # the layout, by loops
        assert int(packed.row_offsets[row]) == at
        for col in range(cols):
            group = weight[row, col * size : (col + 1) * size]
            found = back[row, col * size : (col + 1) * size]
            assert bool(packed.mask()[row, col]) == bool((group != 0).any())
            if not (group != 0).any():
                assert not found.any()
                continue
            assert int(packed.columns[at]) == col
            scale, zero = packed.scales[at], int(packed.zeros[at])
            for i in range(size):
                number = int(packed.codes[at, i // 2]) >> 4 * (i % 2) & 15
                assert found[i] == ((number - zero) * scale.to(torch.promote_types(dtype, torch.float32))).to(dtype)
            # half a step, for the zero point another half; the scale and the result are rounded to the dtype
            assert (found - group).abs().max() <= scale * 1.01 + group.abs().max() * 16 * torch.finfo(dtype).eps
            at += 1
    assert int(packed.row_offsets[-1]) == at == len(packed.codes)


def test_what_is_on_the_grid_comes_back():
    weight = torch.zeros(3, 32)
    weight[0, :16] = torch.arange(16.0) - 5
    weight[1, 16:] = torch.arange(16.0) * 0.25
    weight[2, :16] = -torch.arange(16.0)
    packed = PackedGroups.pack(weight)
    assert torch.equal(packed.unpack(), weight)
    assert packed.zeros.tolist() == [5, 0, 15]
    assert packed.columns.tolist() == [0, 1, 0]
    assert packed.columns.dtype == torch.int16
    assert PackedGroups.pack(torch.ones(1, 2 * 40_000), 2).columns.dtype == torch.int32


def test_extremes_size_and_repr():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        weight = torch.zeros(2, 16, dtype=dtype)
        weight[0, 3] = torch.finfo(dtype).smallest_normal / 8
        weight[1, 0], weight[1, 1] = torch.finfo(dtype).max, torch.finfo(dtype).min
        packed = PackedGroups.pack(weight)
        assert packed.unpack()[:, 2:].isfinite().all()
        assert len(packed.codes) == 2
    weight = torch.zeros(4, 64, dtype=torch.bfloat16)
    weight[2, 16:32] = torch.randn(16)
    packed = PackedGroups.pack(weight)
    assert packed.nbytes == 8 + 2 + 1 + 2 + 5 * 4
    assert packed.compression == pytest.approx(512 / 33)
    assert repr(packed) == "PackedGroups(16 x 4 bits, [4, 64] bfloat16, 1 groups, 15.52x smaller)"
    assert not PackedGroups.pack(weight.float().requires_grad_()).scales.requires_grad
    assert torch.equal(packed.to("cpu").unpack(), packed.unpack())


def test_bad_input():
    weight = torch.ones(4, 12)
    for size, wanted in ((8, "divide the columns of weight"), (3, "be even"), (0, "be")):
        with pytest.raises(InputError, match=f"group_size must {wanted}"):
            PackedGroups.pack(weight, size)
    with pytest.raises(InputError, match="bits must be 4, got 3"):
        PackedGroups.pack(weight, 4, bits=3)
    with pytest.raises(InputError, match="weight must have 2 dimensions"):
        PackedGroups.pack(torch.ones(2, 2, 16))
    with pytest.raises(InputTypeError, match="weight must be floating point"):
        PackedGroups.pack(weight.int(), 4)
    with pytest.raises(InputError, match="weight must be finite"):
        PackedGroups.pack(weight * float("inf"), 4)
    tensors = PackedGroups.pack(weight[:2], 6).tensors()
    for name, wrong in (
        ("codes", torch.zeros(4, 4, dtype=torch.uint8)),
        ("codes", torch.zeros(3, 3, dtype=torch.uint8)),
        ("codes", torch.zeros(4, 3, dtype=torch.int8)),
        ("scales", torch.ones(3)),
        ("scales", torch.ones(4, dtype=torch.int32)),
        ("scales", torch.full((4,), float("nan"))),
        ("zeros", torch.full((4,), 16, dtype=torch.uint8)),
        ("zeros", torch.zeros(4)),
        ("columns", torch.tensor([0, 1, 1, 0], dtype=torch.int16)),
        ("columns", torch.tensor([0, 1, 0, 2], dtype=torch.int16)),
        ("columns", torch.tensor([-1, 1, 0, 1], dtype=torch.int32)),
        ("columns", torch.tensor([0, 1, 0, 1])),
        ("row_offsets", torch.tensor([0, 5, 4], dtype=torch.int32)),
        ("row_offsets", torch.tensor([1, 2, 4], dtype=torch.int32)),
        ("row_offsets", torch.tensor([0, 4], dtype=torch.int32)),
        ("shape", torch.tensor([2, 16])),
        ("shape", torch.tensor([3, 12])),
    ):
        with pytest.raises(InputError, match=r"PackedGroups.* must"):
            PackedGroups.from_tensors({**tensors, name: wrong})
    with pytest.raises(InputError, match="got none named shape"):
        PackedGroups.from_tensors({name: part for name, part in tensors.items() if name != "shape"})
