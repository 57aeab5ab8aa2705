"""Linears with groups in 4 bits against the product with the unpacked weight in float64, for every twin."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from paucity.checks import InputError, InputTypeError
from paucity.kernels.linear import packed_linear, packed_op
from paucity.measure.flops import flops
from paucity.ops.formats import PackedGroups

# Results are about 20. The unpacked weights are rounded to bfloat16; those of a kernel need not be.
TOLERANCE = {torch.float32: {"atol": 1e-4, "rtol": 1e-5}, torch.bfloat16: {"atol": 0.12, "rtol": 1e-2}}
CASES = [(16, 1008, 7), (16, 16, 1), (2, 62, 5), (6, 66, 4), (32, 160, 9), (48, 144, 3), (22, 88, 6), (16, 688, 5)]


def problem(size, cols, out, tokens, dtype=torch.float32, device="cpu"):
    gen = torch.Generator().manual_seed(cols + tokens)
    x, weight, bias = (torch.randn(shape, generator=gen) for shape in ((tokens, cols), (out, cols), (out,)))
    kept = torch.rand(out, cols // size, generator=gen) < 0.5
    kept[2::3] = False  # empty rows
    packed = PackedGroups.pack((weight * kept.repeat_interleave(size, 1)).to(dtype), size)
    return x.to(dtype).to(device), packed.to(device), bias.to(dtype).to(device)


def dense(x, packed, bias=None):
    out = x.cpu().double() @ packed.unpack().cpu().double().t()
    return out if bias is None else out + bias.cpu().double()


def close(actual, expected):
    torch.testing.assert_close(actual.cpu().double(), expected, **TOLERANCE[actual.dtype])


def parts(packed):
    return packed.codes, packed.scales, packed.zeros, packed.columns, packed.row_offsets


@pytest.mark.parametrize(("size", "cols", "out"), CASES)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_dense(twin, size, cols, out, dtype):
    for tokens in (1, 3) if twin.name == "triton" else (1, 2, 3, 5, 8, 11, 16, 17):
        x, packed, bias = problem(size, cols, out, tokens, dtype, twin.device)
        close(packed_linear(x, packed, bias), dense(x, packed, bias))
        wide = dataclasses.replace(packed, columns=packed.columns.int())
        assert torch.equal(packed_linear(x, wide), packed_linear(x, packed))


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_unpacks_bit_for_bit(twin, dtype):
    for size, cols, out in CASES:
        _, packed, _ = problem(size, cols, out, 1, dtype, twin.device)
        rows = packed_op.unpack_group_rows(*parts(packed), cols, 0, out)
        if twin.name == "triton" and dtype == torch.bfloat16:  # the interpreter cuts off where a GPU rounds
            torch.testing.assert_close(rows, packed.unpack(), rtol=2**-7, atol=0)
        else:
            assert torch.equal(rows, packed.unpack())
        assert torch.equal(packed_op.unpack_group_rows(*parts(packed), cols, out // 2, out), rows[out // 2 :])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_tokens_in_chunks(twin, dtype, monkeypatch):
    monkeypatch.setattr(packed_op, "CHUNK_BYTES", 64 * 4 * 6)
    x, packed, bias = problem(16, 64, 22, 20, dtype, twin.device)
    close(packed_linear(x.view(4, 5, 64), packed, bias).view(20, 22), dense(x, packed, bias))
    assert packed_linear(x[:0], packed).shape == (0, 22)


def test_what_is_not_stored_is_not_read(twin):
    for size in (16, 6):
        x, packed, _ = problem(size, size * 8, 12, 2, device=twin.device)
        absent = ~packed.mask().any(0).repeat_interleave(size)
        expected = dense(x, packed)
        around = torch.full((len(packed.scales) + 64,), float("nan"), device=twin.device)
        around[32:-32] = packed.scales
        x[:, absent] = float("nan")
        poisoned = dataclasses.replace(packed, scales=around[32:-32])
        for _ in range(3):  # freed NaN may become an output
            torch.full((2, 12), float("nan"), device=twin.device)
            close(packed_linear(x, poisoned), expected)
    x, packed, _ = problem(16, 64, 12, 2, device=twin.device)
    strided = torch.randn(2, 128, device=twin.device)[:, ::2]
    spread = {name: torch.stack((part, part), -1)[..., 0] for name, part in packed.tensors().items() if name != "shape"}
    close(packed_linear(strided, dataclasses.replace(packed, **spread)), dense(strided, packed))


@pytest.mark.usefixtures("native_twin")
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_do_not_change_a_bit(dtype):
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([packed_linear(*problem(16, 320, 100, tokens, dtype)) for tokens in (1, 2, 5)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("tokens", [3, 20])
def test_gradients(twin, tokens, monkeypatch):
    monkeypatch.setattr(packed_op, "CHUNK_BYTES", 64 * 4 * 6)
    x, packed, bias = problem(16, 64, 22, tokens, device=twin.device)
    x.requires_grad_(), bias.requires_grad_()
    direction = torch.randn(tokens, 22, device=twin.device)
    ours = torch.autograd.grad(packed_linear(x, packed, bias), (x, bias), direction)
    expected = torch.autograd.grad(F.linear(x, packed.unpack(), bias), (x, bias), direction)
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    x, packed, bias = problem(4, 8, 6, 3, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, b: packed_linear(x, packed, b), (x.requires_grad_(), bias.requires_grad_())
    )


def test_operators_are_well_formed():
    x, packed, bias = problem(4, 16, 6, 2)
    x.requires_grad_(), bias.requires_grad_()
    opcheck(packed_op.packed_groups, (x, *parts(packed), bias))
    opcheck(packed_op.packed_groups, (x, *parts(packed), None))
    opcheck(packed_op.unpack_group_rows, (*parts(packed), 16, 1, 5))


def test_compiles(twin):
    x, packed, bias = problem(16, 32, 6, 2, device=twin.device)

    def linear(x):
        return packed_linear(x, packed, bias)

    torch.testing.assert_close(torch.compile(linear, fullgraph=True, backend="aot_eager")(x), linear(x))


def test_flops():
    x, packed, bias = problem(16, 64, 6, 20)
    assert flops(lambda: packed_linear(x[:2], packed, bias)) == 2 * 2 * 16 * len(packed.codes)
    assert flops(lambda: packed_linear(x, packed, bias)) == 2 * 20 * 64 * 6


def test_parts_that_contradict_each_other(twin):
    if twin.name == "reference":
        pytest.skip("the reference trusts what from_tensors has checked; memory is not at stake there")
    for size in (16, 6):
        for tokens in (1, 20):
            x, packed, _ = problem(size, 4 * size, 12, tokens, device=twin.device)
            for change in (
                {"columns": packed.columns + 4},
                {"columns": packed.columns - 4},
                {"columns": packed.columns.int() + 2**20},
                {"row_offsets": packed.row_offsets + 1000},
                {"row_offsets": -packed.row_offsets - 1},
            ):
                with pytest.raises(InputError, match="packed_linear: weight must have block columns and row offsets"):
                    packed_linear(x, dataclasses.replace(packed, **change))


def test_bad_input():
    x, packed, bias = problem(16, 64, 6, 2)
    with pytest.raises(InputError, match=r"x must have shape \[\.\.\., 64\], got \[2, 60\]"):
        packed_linear(x[:, :60], packed)
    with pytest.raises(InputTypeError, match="x must have the dtype of weight"):
        packed_linear(x.bfloat16(), packed)
    with pytest.raises(InputError, match=r"bias must have shape \[6\], got \[5\]"):
        packed_linear(x, packed, bias[:5])
