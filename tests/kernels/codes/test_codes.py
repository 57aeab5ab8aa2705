"""Decoding and kept encodings against loops, for every twin: values, gradients, and what must not be read."""

import pytest
import torch

from paucity.checks import InputError, InputTypeError
from paucity.kernels.codes import decode_codes, encode_kept, encode_topk, op
from paucity.measure.flops import flops
from paucity.ops.formats import Codes

SIZES = [(1, 1, 1, 1), (5, 3, 7, 63), (3, 4, 9, 300), (2, 2, 1000, 256), (63, 2, 5, 17)]  # tokens, k, dict_size, d
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(n, k, size, d, dtype=torch.float32, seed=0):
    """Values with some zeros, atoms named twice, a dictionary, a bias and a row of each token."""
    gen = torch.Generator().manual_seed(seed)
    values = torch.randn(n, k, generator=gen).to(dtype)
    values[torch.rand(n, k, generator=gen) < 0.2] = 0
    indices = torch.randint(0, size, (n, k), generator=gen)
    table, bias, x = (torch.randn(*s, generator=gen).to(dtype) for s in ((size, d), (size,), (n, d)))
    return values, indices, table, bias, x


def naive_decode(values, indices, table):
    out = torch.zeros(len(values), table.shape[1], dtype=torch.float64)
    for t, row in enumerate(indices.tolist()):
        for j, atom in enumerate(row):
            out[t] += values[t, j].double() * table[atom].double()
    return out


def naive_encode(x, table, bias, indices):
    out = torch.zeros(indices.shape, dtype=torch.float64)
    for t, row in enumerate(indices.tolist()):
        for j, atom in enumerate(row):
            out[t, j] = x[t].double() @ table[atom].double() + bias[atom].double()
    return out


def close(got, expected, dtype):
    assert got.dtype == dtype
    bound = TOLERANCE[dtype]
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.detach().cpu().double() / scale, expected.detach() / scale, atol=bound, rtol=bound)


def run(function, *tensors):
    """Output and gradients to the float tensors, for a fixed gradient of the output."""
    leaves = [each.detach().clone().requires_grad_() if each.is_floating_point() else each for each in tensors]
    out = function(*leaves)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, [each for each in leaves if each.requires_grad], weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_naive_with_gradients(twin, sizes, dtype):
    values, indices, table, bias, x = inputs(*sizes, dtype)
    cases = [
        (decode_codes, naive_decode, (values, indices, table)),
        (encode_kept, naive_encode, (x, table, bias, indices)),
    ]
    for function, naive, args in cases:
        got = run(function, *(each.to(twin.device) for each in args))
        expected = run(naive, *(each.double() if each.is_floating_point() else each for each in args))
        for one, other in zip(got, expected, strict=True):
            close(one, other, dtype)


def test_leading_dimensions_strides_and_int32(twin):
    values, indices, table, bias, x = (each.to(twin.device) for each in inputs(12, 4, 9, 35))
    expected, kept = decode_codes(values, indices, table), encode_kept(x, table, bias, indices)
    wide_values, wide_indices = (each.repeat_interleave(2, dim=1)[:, ::2].view(3, 4, 4) for each in (values, indices))
    out = decode_codes(wide_values, wide_indices.int(), table.T.contiguous().T)
    assert torch.equal(out, expected.view(3, 4, 35))
    wide_x = x.repeat_interleave(2, dim=1)[:, ::2].view(3, 4, 35)
    assert torch.equal(encode_kept(wide_x, table.T.contiguous().T, bias, wide_indices.int()), kept.view(3, 4, 4))
    codes = Codes(values, indices, 9)
    torch.testing.assert_close(decode_codes(codes.values, codes.indices, table), codes.decode(table))
    torch.testing.assert_close(encode_kept(x, table, None, indices) + bias[indices], kept)


def test_unread_atoms_and_padding_may_be_nan(twin):
    values, indices, table, bias, x = inputs(6, 3, 8, 21)
    indices = indices % 7
    values[:, 1], indices[:, 1] = 0, 7  # padding names an atom that nothing else names
    values[2] = 0
    spoilt = table.clone()
    spoilt[7] = float("nan")
    out = decode_codes(*(each.to(twin.device) for each in (values, indices, spoilt)))
    assert torch.equal(out.cpu()[2], torch.zeros(21))
    close(out, naive_decode(values, indices, table.double()), torch.float32)
    _, d_values, d_table = run(decode_codes, *(each.to(twin.device) for each in (values, indices, spoilt)))
    assert d_values[:, [0, 2]].isfinite().all()
    assert (d_table[7] == 0).all()
    grad = torch.full((6, 21), float("inf"), device=twin.device)  # times a value of 0 it would be NaN
    padding = torch.zeros(6, 3, device=twin.device)
    assert (op.scatter_outer(padding, indices.to(twin.device), grad, 8) == 0).all()
    kept = encode_kept(*(each.to(twin.device) for each in (x, spoilt, bias, indices)))
    assert kept[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("sizes", [(0, 3, 5, 4), (4, 0, 5, 4), (4, 3, 5, 0), (0, 0, 5, 4)])
def test_nothing_to_add(twin, sizes):
    values, indices, table, bias, x = (each.to(twin.device) for each in inputs(*sizes))
    out, d_values, d_table = run(decode_codes, values, indices, table)
    assert out.shape == (sizes[0], sizes[3])
    assert d_values.shape == values.shape
    assert torch.equal(out, torch.zeros_like(out))
    assert torch.equal(d_table, torch.zeros_like(table))
    assert torch.equal(encode_kept(x, table, bias, indices), (x[:, :1].sum() + bias)[indices] * (sizes[3] == 0))


@pytest.mark.parametrize("name", ["gather_sum", "gather_dot", "scatter_outer", "gather_sum_backward"])
def test_operators_check_and_compile(twin, name):
    values, indices, table, bias, x = (each.to(twin.device) for each in inputs(4, 3, 5, 19))
    args = {
        "gather_sum": (values, indices, table),
        "gather_dot": (x, indices, table, bias),
        "scatter_outer": (values, indices, x, 5),
        "gather_sum_backward": (values, indices, table, x),
    }[name]
    args = tuple(each.requires_grad_() if torch.is_tensor(each) and each.is_floating_point() else each for each in args)
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh memory
    torch.library.opcheck(getattr(torch.ops.paucity, name).default, args)
    compiled = torch.compile(getattr(op, name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), getattr(op, name)(*args))


def test_gradients_of_gradients(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    values, indices, table, bias, x = (
        each.double().requires_grad_() if each.is_floating_point() else each for each in inputs(3, 2, 4, 3, seed=1)
    )
    values = (values.detach() + 3).requires_grad_()  # a value of exactly 0 is skipped, which no difference quotient is
    for function, args in ((decode_codes, (values, indices, table)), (encode_kept, (x, table, bias, indices))):
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.usefixtures("native_twin")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(threads, dtype):
    values, indices, table, bias, x = inputs(40, 5, 33, 300, dtype)
    indices[:, 0] = 7  # one atom that all tokens name
    got = *run(decode_codes, values, indices, table), *run(encode_kept, x, table, bias, indices)
    torch.set_num_threads(1)
    alone = *run(decode_codes, values, indices, table), *run(encode_kept, x, table, bias, indices)
    assert all(torch.equal(one, other) for one, other in zip(got, alone, strict=True))


def test_flops_are_those_of_named_atoms():
    values, indices, table, bias, x = inputs(6, 3, 50, 8)
    assert flops(lambda: decode_codes(values, indices, table)) == 2 * 6 * 3 * 8
    assert flops(lambda: encode_kept(x, table, bias, indices)) == 2 * 6 * 3 * 8
    assert flops(lambda: run(decode_codes, values, indices, table)) == 3 * 2 * 6 * 3 * 8


def test_bad_input(twin):
    values, indices, table, bias, x = (each.to(twin.device) for each in inputs(4, 3, 5, 6))
    for wrong in (-1, 5, 2**32):
        at = indices.clone()
        at[3, 2] = wrong
        with pytest.raises(InputError, match=rf"decode_codes: indices must be in \[0, 5\), got {wrong}"):
            decode_codes(values, at, table)
        with pytest.raises(InputError, match=rf"encode_kept: indices must be in \[0, 5\), got {wrong}"):
            encode_kept(x, table, bias, at)
        with pytest.raises(InputError, match="indices must be in"):
            op.scatter_outer(values, at, x, 5)
    with pytest.raises(InputError, match=r"indices must have shape \[4, 3\], got \[4, 2\]"):
        decode_codes(values, indices[:, :2], table)
    with pytest.raises(InputError, match=r"dictionary must have shape \[any, any\], got \[5\]"):
        decode_codes(values, indices, bias)
    with pytest.raises(InputError, match=r"x must have shape \[4, 6\], got \[4, 5\]"):
        encode_kept(x[:, :5], table, bias, indices)
    with pytest.raises(InputError, match=r"bias must have shape \[5\], got \[4\]"):
        encode_kept(x, table, bias[:4], indices)
    with pytest.raises(InputError, match=r"indices must have shape \[4, any\], got \[3, 3\]"):
        encode_kept(x, table, bias, indices[:3])
    for wrong in (indices.short(), values):
        with pytest.raises(InputTypeError, match=r"indices must be torch.int32 or torch.int64"):
            decode_codes(values, wrong, table)
    with pytest.raises(InputTypeError, match=r"dictionary must be torch.float32, got torch.float64"):
        decode_codes(values, indices, table.double())
    with pytest.raises(InputTypeError, match=r"bias must be torch.float32, got torch.float64"):
        encode_kept(x, table, bias.double(), indices)
    with pytest.raises(InputTypeError, match="values must be floating point"):
        decode_codes(indices, indices, table)


def highest(x, table, bias, k, by_abs):
    """Positions by the rule of float64 sums, best first."""
    scores = x.double() @ table.double().T + (0 if bias is None else bias.double())
    return (scores.abs() if by_abs else scores).topk(k).indices, scores


@pytest.mark.parametrize("by_abs", [False, True])
@pytest.mark.parametrize("kind", ["random", "crowded", "few atoms", "far from 0"])
def test_the_highest_are_those_of_exact_products(kind, by_abs):
    generator = torch.Generator().manual_seed(0)
    x, table = torch.randn(70, 96, generator=generator), torch.randn(2048, 96, generator=generator)
    bias, k = torch.randn(2048, generator=generator), 8
    if kind == "crowded":  # atoms that bfloat16 cannot tell apart
        table = table[:1] + 1e-4 * table
        bias = bias * 1e-4
    elif kind == "few atoms":
        table, bias = table[:9], bias[:9]
    elif kind == "far from 0":
        x, bias = x + 30, None
    values, indices = encode_topk(x, table, bias, k, by_abs=by_abs)
    expected, scores = highest(x, table, bias, k, by_abs)
    assert indices.dtype == torch.int32
    got = scores.gather(1, indices.long())
    torch.testing.assert_close(values.double(), got, atol=1e-3, rtol=1e-5)
    wanted = scores.gather(1, expected)
    torch.testing.assert_close(got.abs() if by_abs else got, wanted.abs() if by_abs else wanted, atol=2e-4, rtol=1e-5)
    assert all(len(set(row)) == k for row in indices.tolist())
    if kind in ("random", "few atoms"):
        assert torch.equal(indices.long(), expected)


def test_highest_with_gradients_leading_sizes_and_autocast():
    generator = torch.Generator().manual_seed(1)
    x, table, bias = (torch.randn(*s, generator=generator) for s in ((3, 5, 40), (1000, 40), (1000,)))
    x, table, bias = (each.requires_grad_() for each in (x, table, bias))
    values, indices = encode_topk(x, table, bias, 4)
    assert values.shape == indices.shape == (3, 5, 4)
    got = torch.autograd.grad(values.square().sum(), (x, table, bias))
    dense = (x @ table.T + bias).gather(-1, indices.long())
    for one, other in zip(got, torch.autograd.grad(dense.square().sum(), (x, table, bias)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        again, same = encode_topk(x, table, bias, 4)
    assert again.dtype == torch.float32
    assert torch.equal(again, values)
    assert torch.equal(same, indices)


def test_rows_that_rounding_leaves_open_are_computed_exactly(monkeypatch):
    """Among equal atoms the lower positions win, in rows of NaN and infinity nothing is lost."""
    table = torch.ones(4096, 32)
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    x[4], x[5, 0] = float("nan"), float("inf")
    _, indices = encode_topk(x[:4], table, None, 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]] * 4
    values, indices = encode_topk(x, table, None, 5)
    assert values[4].isnan().all()
    assert values[5].isinf().all()
    assert ((indices >= 0) & (indices < 4096)).all()
    assert encode_topk(x[:0], table, None, 5)[0].shape == (0, 5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_chosen_among_as_they_are(dtype):
    generator = torch.Generator().manual_seed(3)
    x, table = torch.randn(6, 16, generator=generator).to(dtype), torch.randn(700, 16, generator=generator).to(dtype)
    values, indices = encode_topk(x, table, None, 3)
    assert values.dtype == dtype
    assert torch.equal(indices.long(), (x @ table.T).topk(3).indices)


def test_bad_input_to_the_highest():
    x, table, bias = torch.randn(2, 4), torch.randn(8, 4), torch.randn(8)
    with pytest.raises(InputError, match="k must be in"):
        encode_topk(x, table, bias, 9)
    with pytest.raises(InputError, match="x must have shape"):
        encode_topk(x[:, :3], table, bias, 2)
    with pytest.raises(InputError, match="bias must have shape"):
        encode_topk(x, table, bias[:7], 2)
    with pytest.raises(InputTypeError, match=r"weight must be torch\.float32"):
        encode_topk(x, table.double(), bias, 2)
