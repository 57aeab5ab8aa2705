"""Depthwise convolutions of channels-first pictures against loops, for every twin."""

import pytest
import torch

from paucity.checks import InputError, InputTypeError
from paucity.kernels.depthwise import depthwise_conv, op
from paucity.measure.flops import flops

CASES = [
    ((2, 3, 5, 7), (3, 3), 1, 1),
    ((1, 4, 14, 14), (3, 3), 2, 1),
    ((1, 2, 9, 40), (3, 3), 2, 0),
    ((1, 2, 8, 17), (5, 5), 3, 2),
    ((2, 1, 4, 33), (2, 4), 1, 0),
    ((1, 1, 1, 1), (1, 1), 1, 0),
    ((1, 2, 4, 4), (3, 3), 1, 3),
]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape, kernel, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    sizes = (shape, (shape[1], 1, *kernel), (shape[1],))
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def naive(x, weight, bias, stride, padding):
    x, weight = x.double(), weight.double()
    rows = (x.shape[2] + 2 * padding - weight.shape[2]) // stride + 1
    columns = (x.shape[3] + 2 * padding - weight.shape[3]) // stride + 1
    out = torch.zeros(*x.shape[:2], rows, columns, dtype=torch.float64)
    if bias is not None:
        out += bias.double().view(1, -1, 1, 1)
    for y in range(rows):
        for column in range(columns):
            for i in range(weight.shape[2]):
                for j in range(weight.shape[3]):
                    at, along = y * stride + i - padding, column * stride + j - padding
                    if 0 <= at < x.shape[2] and 0 <= along < x.shape[3]:
                        out[:, :, y, column] += weight[:, 0, i, j] * x[:, :, at, along]
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("shape", "kernel", "stride", "padding"), CASES)
def test_matches_loops(twin, dtype, shape, kernel, stride, padding):
    if twin.name == "triton" or twin.device != "cpu":
        pytest.skip("there is no twin for it")
    x, weight, bias = inputs(shape, kernel, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for added in (bias, None):
        out = depthwise_conv(x, weight, added, stride=stride, padding=padding)
        expected = naive(x, weight, added, stride, padding)
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
        assert out.is_contiguous()


def test_gradients_compile_and_flops(threads):
    x, weight, bias = (tensor.double().requires_grad_() for tensor in inputs((2, 3, 5, 6), (3, 3)))
    assert torch.autograd.gradcheck(lambda *given: depthwise_conv(*given, stride=2, padding=1), (x, weight, bias))
    narrow = [tensor.detach().float() for tensor in (x, weight, bias)]
    torch.library.opcheck(op.depthwise, (*narrow, 1, 1))
    assert flops(lambda: depthwise_conv(*narrow, padding=1)) == 2 * 2 * 3 * 5 * 6 * 9


def test_any_layout_and_no_pixels():
    x, weight, bias = inputs((2, 3, 5, 6), (3, 3))
    expected = depthwise_conv(x, weight, bias, padding=1)
    turned = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(depthwise_conv(turned, weight, bias, padding=1), expected)
    assert depthwise_conv(x[:0], weight, bias).shape == (0, 3, 3, 4)


def test_bad_input():
    x, weight, bias = inputs((2, 3, 5, 6), (3, 3))
    with pytest.raises(InputError, match=r"weight must have shape \[3, 1, any, any\], got \[2, 1, 3, 3\]"):
        depthwise_conv(x, weight[:2], bias)
    with pytest.raises(InputTypeError, match=r"weight must be torch\.float32, got torch\.float64"):
        depthwise_conv(x, weight.double(), bias)
    with pytest.raises(InputError, match=r"weight must fit into the padded picture \(2\), got a kernel of 3"):
        depthwise_conv(x[:, :, :2], weight, bias)
    with pytest.raises(InputError, match="stride must be at least 1, got 0"):
        depthwise_conv(x, weight, bias, stride=0)
