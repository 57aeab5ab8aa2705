"""Compressed sparse rows against the dense matrix, and what they refuse."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save

from paucity.checks import InputError, InputTypeError
from paucity.ops.formats import PackedCSR

FEW = settings(derandomize=True, deadline=None, max_examples=30)


def sparse(rows, cols, seed, density=0.4, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=gen) + 3
    return (weight * (torch.rand(rows, cols, generator=gen) < density)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_matches_loop(dtype):
    weight = sparse(5, 9, seed=0, dtype=dtype)
    weight[2] = 0
    packed = PackedCSR.pack(weight)
    values, columns, offsets = [], [], [0]
    for row in weight.tolist():
        values += [value for value in row if value]
        columns += [column for column, value in enumerate(row) if value]
        offsets.append(len(values))
    assert packed.values.tolist() == values
    assert packed.columns.tolist() == columns
    assert packed.row_offsets.tolist() == offsets
    assert (packed.values.dtype, packed.columns.dtype, packed.row_offsets.dtype) == (dtype, torch.int32, torch.int32)
    assert packed.nbytes == len(values) * (weight.element_size() + 4) + 6 * 4
    assert packed.compression == pytest.approx(weight.nbytes / packed.nbytes)
    assert packed.density == len(values) / 45
    assert packed.rows().tolist() == [row for row in range(5) for _ in range(offsets[row + 1] - offsets[row])]


@FEW
@given(st.integers(0, 5), st.integers(0, 9), st.integers(0, 2), st.sampled_from([0.0, 0.1, 0.7, 1.0]))
def test_round_trips(rows, cols, ones, density):
    weight = sparse(rows, cols, seed=rows + cols, density=density).view(rows, cols, *[1] * ones)
    packed = PackedCSR.from_tensors(load(save(PackedCSR.pack(weight).tensors())))
    assert torch.equal(packed.unpack(), weight)
    assert packed.shape == weight.shape
    turned = packed.transpose()
    assert torch.equal(turned.unpack(), weight.transpose(0, 1))
    PackedCSR.from_tensors(turned.tensors())  # columns ascend
    assert torch.equal(turned.transpose().unpack(), weight)


def test_special_values_and_repr():
    back = PackedCSR.pack(torch.tensor([[float("nan"), -0.0, float("inf"), 1.0]])).unpack()
    assert torch.equal(back.nan_to_num(7.0, 8.0), torch.tensor([[7.0, 0.0, 8.0, 1.0]]))
    assert not back[0, 1].signbit()
    weight = torch.zeros(4, 10, 1, 1)
    weight[0, 3] = 1
    assert repr(PackedCSR.pack(weight)) == "PackedCSR([4, 10, 1, 1] float32, 1 values, 5.71x smaller)"
    assert PackedCSR.pack(torch.zeros(0, 3)).compression == 1.0
    assert torch.equal(PackedCSR.pack(weight).to("cpu").unpack(), weight)


def test_gradients_flow_to_values():
    packed = PackedCSR.pack(sparse(3, 4, seed=1, dtype=torch.float64))
    values = packed.values.clone().requires_grad_()
    parts = (packed.columns, packed.row_offsets, packed.shape)
    assert torch.autograd.gradcheck(lambda v: PackedCSR(v, *parts).unpack(), values)
    assert torch.autograd.gradcheck(lambda v: PackedCSR(v, *parts).transpose().unpack(), values)
    assert not PackedCSR(values, *parts).tensors()["values"].requires_grad


def test_bad_input():
    packed = PackedCSR.pack(sparse(3, 4, seed=2, density=0.8))
    with pytest.raises(InputError, match=r"weight must have the shape \[out, in\] or \[out, in, 1, ...\]"):
        PackedCSR.pack(torch.zeros(3, 4, 3, 3))
    with pytest.raises(InputError, match=r"got shape \[3\]"):
        PackedCSR.pack(torch.zeros(3))
    with pytest.raises(InputTypeError, match="weight must be floating point"):
        PackedCSR.pack(torch.zeros(3, 4, dtype=torch.int64))
    with pytest.raises(InputTypeError, match=r"columns must be torch.int32, got torch.int64"):
        PackedCSR(packed.values, packed.columns.long(), packed.row_offsets, packed.shape)
    with pytest.raises(InputError, match=r"row_offsets must have shape \[4\], got \[3\]"):
        PackedCSR(packed.values, packed.columns, packed.row_offsets[1:], packed.shape)
    with pytest.raises(InputError, match="columns must have shape"):
        PackedCSR(packed.values, packed.columns[1:], packed.row_offsets, packed.shape)
    tensors = packed.tensors()
    with pytest.raises(InputError, match=r"tensors must hold .* got none named columns"):
        PackedCSR.from_tensors({name: tensor for name, tensor in tensors.items() if name != "columns"})
    with pytest.raises(InputError, match="row_offsets must ascend from 0"):
        PackedCSR.from_tensors({**tensors, "row_offsets": tensors["row_offsets"].flip(0)})
    for columns in (tensors["columns"].flip(0), tensors["columns"] + 4, tensors["columns"] - 4):
        with pytest.raises(InputError, match="columns must ascend below 4 in each row"):
            PackedCSR.from_tensors({**tensors, "columns": columns})
