"""What the tables of the groups do not reach in their Triton twins: long rows, divided inputs, a GPU's compiler."""

import os
import subprocess
import sys

import pytest
import torch

from paucity.checks import InputError
from paucity.kernels import dispatch
from paucity.ops.formats import PackedBitmask, PackedBlocks, PackedCSR
from paucity.ops.select import topk_indices, topk_mask

if not dispatch.has_triton():
    pytest.skip("triton is not installed", allow_module_level=True)
if not (dispatch.interprets_triton() or torch.cuda.is_available()):
    pytest.skip("triton has neither a GPU nor its interpreter here", allow_module_level=True)

from paucity.kernels.codes import reference as codes_reference
from paucity.kernels.codes import triton as codes
from paucity.kernels.linear import reference as linear_reference
from paucity.kernels.linear import triton as linear
from paucity.kernels.linear import triton_checks
from paucity.kernels.select import reference as select_reference
from paucity.kernels.select import triton as select
from paucity.kernels.spmm import reference as spmm_reference
from paucity.kernels.spmm import triton as spmm

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def randn(*shape, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(device=DEVICE, dtype=dtype)


def poisoned(size):
    """Two rows: one of NaN, infinities and numbers, one of few different numbers with zeros of both signs."""
    x = randn(2, size)
    x[0, ::3], x[0, 4::9], x[0, 7::9] = float("nan"), float("inf"), -float("inf")
    x[1] = x[1].round() * 0.0 + x[1].round()
    x[1, 1::4] = -0.0
    return x


@pytest.mark.parametrize("by_abs", [False, True])
@pytest.mark.parametrize(("size", "k"), [(64, 64), (65, 40), (200, 1), (300, 210)])
def test_rows_of_several_chunks(monkeypatch, size, k, by_abs):
    monkeypatch.setattr(select, "_CHUNK", 64)
    x = poisoned(size)
    values, indices = select.topk(x, k, by_abs)
    assert torch.equal(indices, topk_indices(x, k, by_abs=by_abs).int())
    torch.testing.assert_close(values, x.gather(-1, indices.long()), equal_nan=True, rtol=0, atol=0)
    assert torch.equal(select.topk_mask(x, k, True), topk_mask(x, k=k, by_abs=True))
    threshold = torch.tensor([0.5, 1.0], device=DEVICE)
    for result, expected in zip(
        select.threshold_select(x, threshold, k, by_abs),
        select_reference.threshold_select(x, threshold, k, by_abs),
        strict=True,
    ):
        assert torch.equal(result, expected)


def test_statistics_of_several_chunks(monkeypatch):
    monkeypatch.setattr(select, "_CHUNK", 64)
    x = randn(3, 500) + 100.0
    for result, expected in zip(
        select.statistical_topk(x, 80, 200), select_reference.statistical_topk(x, 80, 200), strict=True
    ):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("tokens", [1, 16])
def test_inputs_divided_among_programs(tokens):
    x, weight, bias = randn(tokens, 600), randn(600, 130, seed=1).t(), randn(130, seed=2)
    mask = x.abs() > 1.5
    mask[:, 128:256] = False
    weight[:, ~mask.any(0)] = float("nan")
    expected = linear_reference.masked_input(x, weight, mask, bias, 600)
    torch.testing.assert_close(linear.masked_input(x, weight, mask, bias, 600), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [1, 3])
def test_blocks_higher_and_wider_than_a_tile(tokens):
    weight = randn(160, 288) * (torch.arange(288, device=DEVICE) >= 144)
    packed = PackedBlocks.pack(weight, (80, 144))
    x = randn(tokens, 288, seed=1)
    out = linear.packed_blocks(x, packed.values, packed.columns, packed.row_offsets, None)
    torch.testing.assert_close(out, x @ weight.t(), rtol=1e-4, atol=1e-4)
    parts = (packed.values, packed.columns, packed.row_offsets)
    assert torch.equal(linear.unpack_block_rows(*parts, 288, 1, 2), weight[80:])


def test_a_weight_is_looked_at_again_after_a_write(monkeypatch):
    packed = PackedBitmask.pack(randn(3, 20) * (randn(3, 20, seed=1) > 0))
    bits, offsets, x = packed.bits.clone(), packed.row_offsets, randn(1, 20, seed=2)
    looks = []
    unpack = triton_checks.unpack_bits
    monkeypatch.setattr(triton_checks, "unpack_bits", lambda *args: looks.append(1) or unpack(*args))
    for _ in range(3):
        linear.packed_bits(x, packed.values, bits, offsets, None)
    assert len(looks) == 1
    linear.packed_bits(x, packed.values, bits, offsets.clone(), None)
    linear.packed_bits(x, packed.values, bits, offsets, None)
    assert len(looks) == 3
    bits[0, 0] ^= 1
    with pytest.raises(InputError, match="as many bits in every row as it has values"):
        linear.packed_bits(x, packed.values, bits, offsets, None)


@needs_gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_real_sizes(dtype):
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-3, "atol": 1e-3}
    weight = randn(4096, 14336, dtype=dtype).div_(120)
    input_major = weight.t().contiguous().t()
    packed = PackedBitmask.pack(torch.where(weight > 0, weight, 0))
    blocks = PackedBlocks.pack(weight * (torch.arange(14336, device=DEVICE) // 64 % 4 == 0), (64, 64))
    for tokens in (1, 7, 16):
        x = randn(tokens, 14336, dtype=dtype, seed=tokens)
        for threshold, k in ((0.7, None), (None, 5000)):
            out, mask = linear.sparse_input(x, input_major, None, None, threshold, k, 14336)
            expected, expected_mask = linear_reference.sparse_input(x, weight, None, None, threshold, k, 14336)
            assert torch.equal(mask, expected_mask)
            torch.testing.assert_close(out, expected, **tolerance)
        rows = x[:, :4096] > 0
        expected = linear_reference.sparse_output(x, weight, rows, None, 4096)
        torch.testing.assert_close(linear.sparse_output(x, weight, rows, None, 4096), expected, **tolerance)
        parts = (packed.values, packed.bits, packed.row_offsets, None)
        torch.testing.assert_close(linear.packed_bits(x, *parts), linear_reference.packed_bits(x, *parts), **tolerance)
        parts = (blocks.values, blocks.columns, blocks.row_offsets, None)
        torch.testing.assert_close(
            linear.packed_blocks(x, *parts), linear_reference.packed_blocks(x, *parts), **tolerance
        )
    x, table = randn(2048, 2048, dtype=dtype), randn(65536, 2048, dtype=dtype).div_(45)
    scores = randn(2048, 65536, dtype=dtype, seed=1)
    values, indices = select.topk(scores, 64, by_abs=True)
    assert torch.equal(indices, topk_indices(scores, 64, by_abs=True).int())
    for name, args in {
        "gather_sum": (values, indices, table),
        "gather_dot": (x, indices, table, None),
        "scatter_outer": (values / 8, indices, x, 65536),
    }.items():
        expected = getattr(codes_reference, name)(*args)
        torch.testing.assert_close(getattr(codes, name)(*args), expected, **tolerance)
    sparse, images = PackedCSR.pack(weight[:512, :256] * (weight[:512, :256] > 0.01)), randn(8, 256, 3136, dtype=dtype)
    args = (sparse.values, sparse.columns, sparse.row_offsets, images, None)
    torch.testing.assert_close(spmm.spmm(*args), spmm_reference.spmm(*args), **tolerance)


def launch_all(dtype):
    """Launch every kernel, in each of its forms."""
    x, bias, norm = randn(1, 256, dtype=dtype), randn(128, dtype=dtype), randn(256).abs()
    weight = randn(128, 256, dtype=dtype)
    bits = PackedBitmask.pack(weight * (weight > 0))
    blocks = PackedBlocks.pack(weight, (32, 32))
    by_bits, by_blocks = (bits.values, bits.bits, bits.row_offsets), (blocks.values, blocks.columns, blocks.row_offsets)
    for tokens in (1, 5):
        rows, input_major = x.expand(tokens, -1).contiguous(), weight.t().contiguous().t()
        linear.sparse_input(rows, input_major, bias, norm, 0.5, None, 256)
        linear.sparse_input(rows, input_major, None, None, None, 100, 256)
        linear.sparse_output(rows, weight, rows[:, :128] > 0, bias, 128)
        linear.packed_bits(rows, *by_bits, bias)
        linear.packed_blocks(rows, *by_blocks, None)
    linear.unpack_bit_rows(*by_bits, 256, 3, 7)
    linear.unpack_block_rows(*by_blocks, 256, 1, 2)
    select.topk(x, 9, by_abs=True)
    select.threshold_select(x, randn(1), 9, by_abs=False)
    select.statistical_topk(x, 9, 40)
    at = torch.tensor([[3, 1, 3]], device=DEVICE)
    codes.gather_sum(x[:, :3], at, weight)
    codes.gather_dot(x, at, weight, bias)
    codes.scatter_outer(x[:, :3], at, x, 128)
    sparse = PackedCSR.pack(weight * (weight > 1))
    parts, images = (sparse.columns, sparse.row_offsets), weight.expand(2, -1, -1)
    spmm.spmm(sparse.values, *parts, images.transpose(1, 2), bias)
    spmm.spmm_transposed(sparse.values, *parts, images, 256)
    spmm.sddmm(*parts, images, images.transpose(1, 2))


def test_every_kernel_compiles_for_a_gpu(tmp_path):
    """The interpreter takes what the compiler does not; the compiler needs no GPU."""
    settings = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", COMPILE, __file__], env=os.environ | settings, check=True, timeout=300)


COMPILE = """
import importlib.util, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

class Hopper:
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))

compile_and_launch = JITFunction.run
JITFunction.run = lambda self, *args, warmup, **options: compile_and_launch(self, *args, warmup=True, **options)
driver.set_active(Hopper())
torch.Tensor.new_empty = torch.Tensor.new_zeros  # nothing is launched that would fill it
torch.cuda.is_available = lambda: True
spec = importlib.util.spec_from_file_location("twins", sys.argv[1])
twins = importlib.util.module_from_spec(spec)
spec.loader.exec_module(twins)
twins.DEVICE = "cpu"
twins.launch_all(torch.bfloat16)
"""
