"""Codes against loops, with gradients, and what they refuse."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from paucity.checks import InputError, InputTypeError
from paucity.ops.formats import Codes

FEW = settings(derandomize=True, deadline=None, max_examples=30)


def random_codes(shape=(2, 3), k=4, dict_size=7, dtype=torch.float64, index=torch.int64):
    gen = torch.Generator().manual_seed(k)
    values = torch.randn(*shape, k, generator=gen, dtype=torch.float64).to(dtype)
    return Codes(values, torch.randint(dict_size, (*shape, k), generator=gen).to(index), dict_size)


def naive_dense(codes):
    dense = torch.zeros(*codes.values.shape[:-1], codes.dict_size, dtype=codes.values.dtype)
    for place in torch.ones(codes.values.shape).nonzero().tolist():
        dense[(*place[:-1], int(codes.indices[tuple(place)]))] += codes.values[tuple(place)]
    return dense


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize(("shape", "k"), [((), 3), ((2, 3), 9), ((5,), 1), ((2,), 0), ((0, 2), 3)])
def test_dense_and_decode_match_loops(shape, k, index):
    codes, dictionary = random_codes(shape, k, index=index), torch.randn(7, 5, dtype=torch.float64)
    dense = naive_dense(codes)
    assert torch.allclose(codes.to_dense(), dense)
    assert torch.allclose(codes.decode(dictionary), dense @ dictionary)
    assert codes.decode(dictionary).shape == (*shape, 5)
    size = (codes.values.shape[:-1].numel(), codes.k)
    rows = zip(codes.values.reshape(size).tolist(), codes.indices.reshape(size).tolist(), strict=True)
    named = [len({atom for value, atom in zip(*row, strict=True) if value}) for row in rows]
    assert codes.l0().flatten().tolist() == named


@FEW
@given(st.integers(0, 4), st.integers(1, 9), st.floats(0, 1), st.integers(0, 3))
def test_from_dense_round_trip(rows, dict_size, density, spare):
    gen = torch.Generator().manual_seed(dict_size)
    x = torch.randn(rows, dict_size, generator=gen).where(torch.rand(rows, dict_size, generator=gen) < density, 0)
    most = max((sum(value != 0 for value in row) for row in x.tolist()), default=0)
    codes, wide = Codes.from_dense(x), Codes.from_dense(x, k=most + spare)
    assert (codes.k, wide.k) == (most, most + spare)
    assert torch.equal(codes.to_dense(), x)
    assert torch.equal(wide.to_dense(), x)
    assert torch.equal(wide.l0(), (x != 0).sum(-1))
    assert torch.equal(Codes.concat([codes, wide]).to_dense(), torch.cat([x, x]))


def test_signs_order_and_padding():
    codes = Codes.from_dense(torch.tensor([[0.0, -5.0, 0.0, 2.0], [-1.0, 0.0, 0.0, 0.0]]))
    assert codes.values.tolist() == [[-5.0, 2.0], [-1.0, 0.0]]
    assert codes.indices.tolist() == [[1, 3], [0, 0]]
    assert Codes(torch.tensor([1.0, -3.0]), torch.tensor([2, 2]), 3).to_dense().tolist() == [0.0, 0.0, -2.0]


def test_gradients():
    codes, dictionary = random_codes(), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    codes.indices[0, 0, :2] = 3  # an atom twice in a row
    values = codes.values.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v, d: Codes(v, codes.indices, 7).decode(d), (values, dictionary))
    assert torch.autograd.gradcheck(lambda v: Codes(v, codes.indices, 7).to_dense(), (values,))
    x = torch.tensor([[0.0, 2.0, -1.0], [0.0, 0.0, 4.0]], requires_grad=True)
    Codes.from_dense(x).values.square().sum().backward()
    assert torch.equal(x.grad, 2 * x)
    empty = Codes(values[..., :0], codes.indices[..., :0], 7).decode(dictionary)
    assert torch.equal(torch.autograd.grad(empty.sum(), dictionary)[0], torch.zeros_like(dictionary))


def test_indexing_to_and_repr():
    codes = random_codes((4, 3))
    dense = codes.to_dense()
    for key in (1, -1, slice(1, 3), (0, 2), (Ellipsis, 0), (slice(None), 1), torch.tensor([2, 0]), dense[:, :, 0] > 0):
        whole = (*key, slice(None)) if isinstance(key, tuple) else key
        assert torch.equal(codes[key].to_dense(), dense[whole])
    assert torch.equal(torch.stack([row.to_dense() for row in codes]), dense)
    with pytest.raises(IndexError, match=r"key must index leading dimensions \[4, 3\]"):
        codes[0, 0, 0]
    half = codes.to(dtype=torch.bfloat16)
    assert half.values.dtype == torch.bfloat16
    assert half.indices.dtype == torch.int64
    assert repr(half) == "Codes([4, 3], k=4, dict_size=7, bfloat16)"


def test_bad_input():
    values, indices = torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"indices must have shape \[2, 3\], got \[2, 2\]"):
        Codes(values, indices[:, :2], 5)
    for wrong in (5, -1):
        with pytest.raises(InputError, match=rf"indices must be in \[0, 5\), got {wrong}"):
            Codes(values, torch.where(torch.eye(2, 3) > 0, wrong, indices), 5)
    with pytest.raises(InputTypeError, match=r"indices must be torch.int64 or torch.int32, got torch.int16"):
        Codes(values, indices.short(), 5)
    with pytest.raises(InputTypeError, match="values must be floating point"):
        Codes(indices, indices, 5)
    with pytest.raises(InputError, match=r"k must be at least the nonzeros of every row \(3\), got 2"):
        Codes.from_dense(values, k=2)
    codes = Codes(values, indices, 5)
    with pytest.raises(InputError, match=r"dictionary must have shape \[5, any\], got \[4, 2\]"):
        codes.decode(torch.ones(4, 2))
    with pytest.raises(InputTypeError, match=r"dictionary must be torch.float32 like the values"):
        codes.decode(torch.ones(5, 2).half())
    for other, found in (([], "none"), ([codes, Codes(values, indices, 6)], "6"), ([codes, codes[0]], r"\[3\]")):
        with pytest.raises(InputError, match=f"Codes.concat: .*, got {found}"):
            Codes.concat(other)
    with pytest.raises(InputError, match="dim must be"):
        Codes.concat([codes], dim=1)


def test_an_atom_that_is_named_twice_counts_once():
    values = torch.tensor([[1.0, 2.0, 0.0, 3.0], [0.0, 0.0, 0.0, 0.0], [1.0, -1.0, 1.0, 1.0]])
    indices = torch.tensor([[2, 2, 2, 0], [1, 1, 1, 1], [3, 3, 3, 3]])
    assert Codes(values, indices, 4).l0().tolist() == [2, 0, 1]
    assert Codes(values[:, :0], indices[:, :0], 4).l0().tolist() == [0, 0, 0]
