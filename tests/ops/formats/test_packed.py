"""Packed weights against loops, at odd sizes and every zeros pattern, and what they refuse."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save

from paucity.checks import InputError, InputTypeError
from paucity.ops.formats import PackedBitmask, PackedNM, pack_bits, unpack_bits

FEW = settings(derandomize=True, deadline=None, max_examples=30)
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def sparse_nm(rows, groups, n, m, seed, dtype=torch.float32):
    """Up to ``n`` nonzeros a group, by loops; also fewer and none."""
    gen = torch.Generator().manual_seed(seed)
    weight = torch.zeros(rows, groups * m, dtype=dtype)
    for row in range(rows):
        for group in range(groups):
            count = int(torch.randint(0, n + 1, (), generator=gen))
            for place in torch.randperm(m, generator=gen)[:count].tolist():
                weight[row, group * m + place] = torch.randn((), generator=gen).to(dtype) + 3
    return weight


def naive_nm(weight, n, m):
    """Nonzeros of each group, filled up with the lowest other places; the values by place, and a bit for each."""
    values, bits = [], []
    for row in weight.tolist():
        kept = []
        for start in range(0, len(row), m):
            ranked = sorted(range(m), key=lambda place: row[start + place] == 0)[:n]
            kept += [start + place for place in sorted(ranked)]
        values.append([row[col] for col in kept])
        bits.append([sum((first + bit in kept) << bit for bit in range(8)) for first in range(0, len(row), 8)])
    return torch.tensor(values).to(weight.dtype), torch.tensor(bits, dtype=torch.uint8)


@pytest.mark.parametrize(("n", "m", "groups"), [(2, 4, 3), (1, 1, 3), (1, 3, 5), (3, 5, 3), (15, 16, 1), (16, 16, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_nm_matches_naive(n, m, groups, dtype):
    weight = sparse_nm(3, groups, n, m, seed=n, dtype=dtype)
    packed, (values, bits) = PackedNM.pack(weight, n, m), naive_nm(weight, n, m)
    assert torch.equal(packed.values, values)
    assert torch.equal(packed.bits, bits)
    assert torch.equal(packed.unpack(), weight)
    assert packed.shape == weight.shape
    assert packed.nbytes == values.numel() * weight.element_size() + bits.numel()


def test_nm_size():
    assert PackedNM.pack(torch.zeros(4, 64, dtype=torch.bfloat16), 2, 4).compression == pytest.approx(64 / 36)


@FEW
@given(st.integers(1, 16), st.data())
def test_nm_round_trip(m, data):
    n, rows, groups = data.draw(st.integers(1, m)), data.draw(st.integers(0, 3)), data.draw(st.integers(0, 5))
    weight = sparse_nm(rows, groups, n, m, seed=data.draw(st.integers(0, 99)))
    packed = PackedNM.from_tensors(load(save(PackedNM.pack(weight, n, m).tensors())))
    assert torch.equal(packed.unpack(), weight)
    assert (packed.n, packed.m) == (n, m)


def test_nm_experts_special_values_and_order():
    weight = torch.stack([sparse_nm(2, 3, 2, 4, seed=seed) for seed in range(3)])
    packed = PackedNM.pack(weight, 2, 4)
    assert torch.equal(packed.unpack(), weight)
    assert packed.columns().diff(dim=-1).gt(0).all()
    weight = torch.tensor([[float("nan"), -0.0, float("-inf"), -0.0]])
    back = PackedNM.pack(weight, 3, 4).unpack()  # one place is filled up with a -0.0
    assert torch.equal(back.nan_to_num(7.0), torch.tensor([[7.0, 0.0, torch.finfo(torch.float32).min, 0.0]]))
    assert not back[0, [1, 3]].signbit().any()
    assert "2:4, [1, 4] float32, 1.78x smaller" in repr(PackedNM.pack(weight, 2, 4))


def test_nm_bad_input():
    weight = torch.zeros(2, 3, 8)
    weight[1, 0, 4:7] = weight[1, 2] = 1
    with pytest.raises(
        InputError, match=r"at most 2 nonzeros in every 4 columns, got 3 in row \[1, 0\], columns 4 to 7"
    ):
        PackedNM.pack(weight, 2, 4)
    for n, m in ((3, 2), (0, 4), (2, 17)):
        with pytest.raises(InputError, match=r"PackedNM\.pack: [nm] must be"):
            PackedNM.pack(weight, n, m)
    with pytest.raises(InputError, match=r"m must divide the columns of weight \(8\), got 3"):
        PackedNM.pack(weight, 2, 3)
    with pytest.raises(InputTypeError, match=r"weight must be floating point, got torch\.int64"):
        PackedNM.pack(weight.long(), 2, 4)
    with pytest.raises(InputError, match="at least 2 dimension"):
        PackedNM.pack(torch.zeros(4), 2, 4)
    tensors = PackedNM.pack(torch.zeros(1, 8), 2, 4).tensors()
    wrong_parts = (
        ("bits", torch.full((1, 2), 0b101_0011, dtype=torch.uint8)),
        ("bits", torch.full((1, 1), 3, dtype=torch.int8)),
        ("nm", torch.tensor([3, 4])),
    )
    for name, wrong in wrong_parts:
        with pytest.raises(InputError, match=r"PackedNM(\.from_tensors)?: (bits|n) must"):
            PackedNM.from_tensors({**tensors, name: wrong})
    for groups in (0b0011_0001, 0b0011_0111):
        with pytest.raises(InputError, match="bits must have 2 set in every group of 4"):
            PackedNM.from_tensors({**tensors, "bits": torch.tensor([[groups]], dtype=torch.uint8)})
    with pytest.raises(InputError, match="got none named nm"):
        PackedNM.from_tensors({"values": tensors["values"], "bits": tensors["bits"]})


@FEW
@given(st.integers(0, 4), st.integers(0, 20), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from(DTYPES))
def test_bitmask_round_trip(rows, cols, density, dtype):
    gen = torch.Generator().manual_seed(cols)
    weight = torch.randn(rows, cols, generator=gen).add(4).where(torch.rand(rows, cols, generator=gen) < density, 0)
    weight = weight.to(dtype)
    packed = PackedBitmask.from_tensors(load(save(PackedBitmask.pack(weight).tensors())))
    assert torch.equal(packed.unpack(), weight)
    assert packed.unpack().dtype == dtype
    assert torch.equal(packed.mask(), weight != 0)
    for row in range(rows):  # the layout, by loops
        start, end = packed.row_offsets[row : row + 2].tolist()
        assert packed.values[start:end].tolist() == [value for value in weight[row].tolist() if value]
        for col in range(cols):
            assert (int(packed.bits[row, col // 8]) >> col % 8) % 2 == (weight[row, col] != 0)


def test_bitmask_shapes_and_size():
    weight = torch.zeros(2, 3, 9)
    weight[1, 2, 8], weight[0, 0, 0] = float("nan"), -0.0
    packed = PackedBitmask.pack(weight)
    back = packed.unpack()
    assert back.shape == weight.shape
    assert back[1, 2, 8].isnan()
    assert not back[0, 0, 0].signbit()
    assert packed.nbytes == 4 + 6 * 2 + 7 * 4
    assert packed.compression == pytest.approx(54 * 4 / 44)
    assert "[2, 3, 9] float32, 1 values" in repr(packed)
    assert torch.equal(PackedBitmask.pack(torch.ones(5)).unpack(), torch.ones(5))
    assert PackedBitmask.pack(torch.ones(8, 64)).compression < 1


def test_bitmask_bad_input():
    with pytest.raises(InputTypeError, match="weight must be floating point"):
        PackedBitmask.pack(torch.zeros(2, 2, dtype=torch.int8))
    tensors = PackedBitmask.pack(torch.eye(3)).tensors()
    for name, wrong in (
        ("values", torch.ones(2)),
        ("bits", torch.zeros(3, 2, dtype=torch.uint8)),
        ("bits", torch.zeros(3, 1, dtype=torch.int64)),
        ("row_offsets", torch.tensor([0, 1, 1, 3])),
        ("shape", torch.tensor([3, 9])),
    ):
        with pytest.raises(InputError, match=r"must"):
            PackedBitmask.from_tensors({**tensors, name: wrong})


def test_bits():
    mask = torch.tensor([[True, False, True] + [False] * 5 + [True]])
    assert pack_bits(mask).tolist() == [[5, 1]]
    assert torch.equal(unpack_bits(pack_bits(mask), 9), mask)
    with pytest.raises(InputError, match=r"packed must have shape \[1, 3\], got \[1, 2\]"):
        unpack_bits(pack_bits(mask), 17)
