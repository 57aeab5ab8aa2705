"""Sparse 1x1 convolutions against loops and conv2d, for every twin."""

import pytest
import torch
import torch.nn.functional as F

from paucity.checks import InputError, InputTypeError
from paucity.kernels import dispatch
from paucity.kernels.spmm import op, sparse_conv1x1
from paucity.measure.flops import flops
from paucity.ops.formats import PackedCSR

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
SIZES = [(1, 1, 1, 1, 1), (2, 5, 7, 3, 21), (1, 63, 33, 1, 63), (1, 3, 2, 10, 100), (3, 8, 4, 1, 64), (10, 5, 3, 3, 7)]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(batch, outputs, channels, height, width, dtype=torch.float32, density=0.3):
    gen = torch.Generator().manual_seed(outputs)
    weight = torch.randn(outputs, channels, 1, 1, generator=gen)
    weight[torch.rand(outputs, channels, generator=gen) > density] = 0
    if outputs > 2:
        weight[1] = 0  # an empty row
    x = torch.randn(batch, channels, height, width, generator=gen)
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=gen).to(dtype)


def packed(weight, device="cpu", values=None):
    csr = PackedCSR.pack(weight).to(device)
    values = csr.values.clone().requires_grad_() if values is None else values
    return PackedCSR(values, csr.columns, csr.row_offsets, csr.shape)


def naive(x, weight, bias, stride):
    x = x[:, :, ::stride, ::stride]
    out = torch.zeros(len(x), len(weight), *x.shape[2:], dtype=torch.float64)
    for o, row in enumerate(weight.flatten(1)):
        for c, value in enumerate(row):
            if value != 0:
                out[:, o] += value.double() * x[:, c].double()
        out[:, o] += bias[o].double()
    return out


def close(got, expected, dtype):
    assert got.dtype == dtype
    bound = TOLERANCE[dtype]
    scale = max(1.0, float(expected.detach().abs().max())) if expected.numel() else 1.0
    torch.testing.assert_close(got.detach().cpu().double() / scale, expected.detach() / scale, atol=bound, rtol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_matches_naive_with_gradients(twin, sizes, stride, dtype):
    x, weight, bias = inputs(*sizes, dtype)
    expected = naive(x, weight, bias, stride)
    ours, added = (each.to(twin.device).requires_grad_() for each in (x, bias))
    csr = packed(weight, twin.device)
    out = sparse_conv1x1(ours, csr, added, stride=stride)
    close(out, expected, dtype)
    grad = torch.linspace(-1, 1, expected.numel(), dtype=torch.float64).view(expected.shape)
    got = torch.autograd.grad(out, (ours, csr.values, added), grad.to(twin.device, dtype))
    dense = [each.detach().double().requires_grad_() for each in (x, weight, bias)]
    F.conv2d(*dense, stride=stride).backward(grad.to(dtype).double())
    for one, other in zip(got, (dense[0].grad, dense[1].grad[weight != 0], dense[2].grad), strict=True):
        close(one, other, dtype)


def test_other_dimensions_and_strides(twin):
    x, weight, bias = (each.to(twin.device) for each in inputs(2, 5, 7, 4, 6))
    csr = PackedCSR.pack(weight)
    expected = sparse_conv1x1(x, csr, bias)
    assert torch.equal(sparse_conv1x1(x[1], csr, bias), expected[1])
    assert torch.equal(sparse_conv1x1(x, PackedCSR.pack(weight.flatten(1)), bias), expected)
    line, volume = PackedCSR.pack(weight.flatten(2)), PackedCSR.pack(weight.unsqueeze(-1))
    assert torch.equal(sparse_conv1x1(x.flatten(2), line, bias), expected.flatten(2))
    assert torch.equal(sparse_conv1x1(x[0].flatten(1), line, bias), expected[0].flatten(1))
    deep = x.unflatten(3, (2, 3))
    assert torch.equal(sparse_conv1x1(deep, volume, bias), expected.unflatten(3, (2, 3)))
    assert sparse_conv1x1(deep, volume, stride=2).shape == (2, 5, 2, 1, 2)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(sparse_conv1x1(last, csr, bias), expected)


@pytest.mark.parametrize("shape", [(0, 7, 2, 2), (2, 7, 0, 2)])
def test_no_pixels(twin, shape):
    _, weight, bias = (each.to(twin.device) for each in inputs(2, 5, 7, 1, 1))
    x, csr = torch.zeros(shape, device=twin.device, requires_grad=True), packed(weight, twin.device)
    out = sparse_conv1x1(x, csr, bias)
    assert out.shape == (shape[0], 5, *shape[2:])
    out.sum().backward()
    assert (csr.values.grad == 0).all()


def test_channels_without_weights_may_be_nan(twin):
    x, weight, bias = inputs(1, 5, 7, 3, 50)
    weight[:, 3] = 0
    x[:, 3] = float("nan")
    csr = packed(weight, twin.device)
    leaf = x.to(twin.device).requires_grad_()
    out = sparse_conv1x1(leaf, csr, bias.to(twin.device))
    if twin.name != "reference":  # which multiplies the zeros
        assert out.isfinite().all()
    grads = torch.autograd.grad(out, (leaf, csr.values), torch.ones_like(out))
    assert all(each.isfinite().all() for each in grads)
    nothing = sparse_conv1x1(leaf, PackedCSR.pack(torch.zeros(4, 7, device=twin.device)))
    assert twin.name == "reference" or torch.equal(nothing, torch.zeros_like(nothing))


def operands(twin, dtype=torch.float32):
    x, weight, bias = (each.to(twin.device, dtype) for each in inputs(2, 5, 7, 2, 9))
    csr = PackedCSR.pack(weight)
    return csr.values, csr.columns, csr.row_offsets, x.flatten(2), bias


@pytest.mark.parametrize("name", ["spmm", "spmm_transposed", "sddmm"])
def test_operators_check_and_compile(twin, name):
    values, columns, offsets, x, bias = operands(twin)
    grad = torch.randn(2, 5, 18, device=twin.device)
    args = {
        "spmm": (values, columns, offsets, x, bias),
        "spmm_transposed": (values, columns, offsets, grad, 7),
        "sddmm": (columns, offsets, grad, x),
    }[name]
    args = tuple(each.requires_grad_() if torch.is_tensor(each) and each.is_floating_point() else each for each in args)
    torch.use_deterministic_algorithms(False)  # opcheck compares fresh memory
    torch.library.opcheck(getattr(torch.ops.paucity, name).default, args)
    compiled = torch.compile(getattr(op, name), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), getattr(op, name)(*args))


def test_public_function_compiles(twin):
    x, weight, bias = (each.to(twin.device) for each in inputs(2, 5, 7, 4, 6))
    csr = PackedCSR.pack(weight)
    compiled = torch.compile(sparse_conv1x1, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, csr, bias, stride=2), sparse_conv1x1(x, csr, bias, stride=2))


def test_gradients_of_gradients(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    x, weight, bias = (each.double() for each in inputs(2, 3, 4, 1, 3))
    csr = packed(weight)
    leaves = [each.detach().requires_grad_() for each in (csr.values, x, bias)]

    def run(values, x, bias):
        return sparse_conv1x1(x, packed(weight, values=values), bias)

    assert torch.autograd.gradcheck(run, leaves)
    assert torch.autograd.gradgradcheck(run, leaves)


@pytest.mark.usefixtures("native_twin")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_a_bit(threads, dtype):
    x, weight, bias = inputs(3, 9, 20, 10, 33, dtype)

    def run():
        csr, leaf = packed(weight), x.clone().requires_grad_()
        out = sparse_conv1x1(leaf, csr, bias)
        return [out, *torch.autograd.grad(out, (leaf, csr.values), torch.ones_like(out))]

    got = run()
    torch.set_num_threads(1)
    assert all(torch.equal(one, other) for one, other in zip(got, run(), strict=True))


def test_dense_weights_run_dense_and_say_so(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "auto")
    x, weight, bias = inputs(2, 9, 20, 5, 7, density=0.9)
    csr = packed(weight)
    with dispatch.dense_runs() as reasons:
        out = sparse_conv1x1(x, csr, bias)
        out.sum().backward()
    assert sum(reasons.values()) == 1  # x requires no gradient
    assert all("sparse convolution ran dense" in reason for reason in reasons)
    torch.testing.assert_close(out, F.conv2d(x, weight, bias), atol=1e-5, rtol=1e-5)
    assert flops(lambda: sparse_conv1x1(x, csr, bias)) == 2 * 2 * 9 * 20 * 35
    few = PackedCSR.pack(weight * (torch.rand_like(weight) < 0.2))
    with dispatch.dense_runs() as reasons:
        sparse_conv1x1(x, few, bias)
    assert not reasons
    assert flops(lambda: sparse_conv1x1(x, few, bias)) == 2 * 2 * len(few.values) * 35


def test_bad_input(twin):
    x, weight, bias = (each.to(twin.device) for each in inputs(2, 5, 7, 4, 6))
    csr = PackedCSR.pack(weight)
    with pytest.raises(InputTypeError, match="weight must be a PackedCSR, got Tensor"):
        sparse_conv1x1(x, weight)
    with pytest.raises(InputError, match=r"x must have 4 or 3 dimensions, got shape \[7, 4\]"):
        sparse_conv1x1(x[0, :, :, 0], csr)
    with pytest.raises(InputError, match=r"x must have 7 channels, got shape \[2, 6, 4, 6\]"):
        sparse_conv1x1(x[:, 1:], csr)
    with pytest.raises(InputError, match=r"bias must have shape \[5\], got \[4\]"):
        sparse_conv1x1(x, csr, bias[:4])
    with pytest.raises(InputError, match="stride must be at least 1, got 0"):
        sparse_conv1x1(x, csr, stride=0)
    with pytest.raises(InputTypeError, match=r"weight must be torch.bfloat16, got torch.float32"):
        sparse_conv1x1(x.bfloat16(), csr)
    with pytest.raises(InputTypeError, match=r"x must be floating point"):
        sparse_conv1x1(x.int(), csr)
    for wrong in (-1, 7):
        columns = csr.columns.clone()
        columns[-1] = wrong
        with pytest.raises(InputError, match=r"weight must have ascending row offsets and columns in \[0, 7\)"):
            sparse_conv1x1(x, PackedCSR(csr.values, columns, csr.row_offsets, csr.shape))
    for at, wrong in ((0, 1), (-1, 3), (2, 10**6), (2, -4)):
        offsets = csr.row_offsets.clone()
        offsets[at] = wrong
        with pytest.raises(InputError, match="ascending row offsets"):
            sparse_conv1x1(x, PackedCSR(csr.values, csr.columns, offsets, csr.shape))
