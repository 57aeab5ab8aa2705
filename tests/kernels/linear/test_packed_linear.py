"""Packed linears against the product with the unpacked weight in float64, for every twin."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck

from paucity.checks import InputError, InputTypeError
from paucity.kernels import dispatch, native
from paucity.kernels.linear import packed_linear, packed_op
from paucity.measure.flops import flops
from paucity.ops.formats import PackedBitmask, PackedBlocks, PackedNM
from paucity.ops.select import nm_mask

TOLERANCE = {torch.float32: {"atol": 1e-4, "rtol": 1e-5}, torch.bfloat16: {"atol": 2e-2, "rtol": 1e-2}}


def nm(n, m):
    def pack(weight):
        return PackedNM.pack(weight * nm_mask(weight.abs(), n=n, m=m), n, m)

    return pack


def bitmask(density):
    def pack(weight):
        gen = torch.Generator().manual_seed(2)
        kept = torch.rand(weight.shape, generator=gen) < density
        kept[::3] = False  # empty rows
        return PackedBitmask.pack(weight * kept)

    return pack


def blocks(br, bc):
    def pack(weight):
        gen = torch.Generator().manual_seed(2)
        kept = torch.rand(weight.shape[0] // br, weight.shape[1] // bc, generator=gen) < 0.5
        kept[::3] = False
        return PackedBlocks.pack(weight * kept.repeat_interleave(br, 0).repeat_interleave(bc, 1), (br, bc))

    return pack


CASES = [  # packing, in, out
    (nm(2, 4), 1000, 7),
    (nm(1, 3), 63, 5),
    (nm(3, 7), 98, 9),
    (nm(16, 16), 16, 1),
    (nm(5, 16), 160, 3),
    (bitmask(0.5), 1000, 10),
    (bitmask(0.05), 63, 9),
    (bitmask(1.0), 65, 5),
    (bitmask(0.0), 1, 4),
    (blocks(1, 16), 1008, 6),
    (blocks(1, 1), 63, 5),
    (blocks(1, 40), 80, 4),
    (blocks(4, 16), 64, 20),
    (blocks(3, 7), 63, 12),
    (blocks(8, 33), 99, 16),
    (blocks(6, 32), 96, 18),
]
ids = [f"{index}" for index in range(len(CASES))]


def problem(pack, size, out, tokens, dtype=torch.float32, device="cpu"):
    gen = torch.Generator().manual_seed(size + tokens)
    x, weight, bias = (torch.randn(shape, generator=gen) for shape in ((tokens, size), (out, size), (out,)))
    packed = pack(weight)
    packed = dataclasses.replace(packed, values=packed.values.to(dtype)).to(device)
    return x.to(dtype).to(device), packed, bias.to(dtype).to(device)


def dense(x, packed, bias=None):
    out = x.cpu().double() @ packed.unpack().cpu().double().t()
    return out if bias is None else out + bias.cpu().double()


def close(actual, expected):
    torch.testing.assert_close(actual.cpu().double(), expected, **TOLERANCE[actual.dtype])


@pytest.mark.parametrize(("pack", "size", "out"), CASES, ids=ids)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_dense(twin, pack, size, out, dtype):
    tokens = (1, 3) if twin.name == "triton" else (1, 2, 3, 7, 16, 17)
    for count in tokens:
        x, packed, bias = problem(pack, size, out, count, dtype, twin.device)
        close(packed_linear(x, packed, bias), dense(x, packed, bias))
        close(packed_linear(x, packed), dense(x, packed))


@pytest.mark.parametrize("pack", [nm(2, 4), bitmask(0.5), blocks(2, 16)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_many_tokens_in_chunks(twin, pack, dtype, monkeypatch):
    monkeypatch.setattr(packed_op, "CHUNK_BYTES", 64 * 4 * 6)
    x, packed, bias = problem(pack, 64, 22, 20, dtype, twin.device)
    close(packed_linear(x.view(4, 5, 64), packed, bias).view(20, 22), dense(x, packed, bias))
    assert packed_linear(x[:0], packed).shape == (0, 22)


def test_zeros_are_not_read_and_outputs_are_written(twin):
    for pack in (nm(2, 4), bitmask(0.5), blocks(2, 16)):
        x, packed, _ = problem(pack, 64, 12, 2, device=twin.device)
        poisoned = torch.full((packed.values.numel() + 128,), float("nan"), device=twin.device)
        inside = poisoned[64 : 64 + packed.values.numel()].view(packed.values.shape)
        inside.copy_(packed.values)
        for _ in range(3):  # freed NaN may become an output
            torch.full((2, 12), float("nan"), device=twin.device)
            close(packed_linear(x, dataclasses.replace(packed, values=inside)), dense(x, packed))
    x, packed, _ = problem(nm(2, 4), 64, 12, 2, device=twin.device)
    strided = torch.randn(2, 128, device=twin.device)[:, ::2]
    spread = torch.stack((packed.values, packed.values), -1)[..., 0]
    close(packed_linear(strided, dataclasses.replace(packed, values=spread)), dense(strided, packed))


def test_int64_offsets(twin):
    x, packed, _ = problem(bitmask(0.5), 64, 12, 2, device=twin.device)
    wide = dataclasses.replace(packed, row_offsets=packed.row_offsets.long())
    assert torch.equal(packed_linear(x, wide), packed_linear(x, packed))


@pytest.mark.usefixtures("native_twin")
@pytest.mark.parametrize("pack", [nm(2, 4), bitmask(0.5), blocks(1, 16), blocks(4, 32)])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_do_not_change_a_bit(pack, dtype):
    results, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append([packed_linear(*problem(pack, 320, 100, tokens, dtype)) for tokens in (1, 5)])
    torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("tokens", [3, 20])
def test_gradients(twin, tokens, monkeypatch):
    monkeypatch.setattr(packed_op, "CHUNK_BYTES", 64 * 4 * 6)
    for pack in (nm(2, 4), bitmask(0.5), blocks(2, 16)):
        x, packed, bias = problem(pack, 64, 22, tokens, device=twin.device)
        x.requires_grad_(), bias.requires_grad_()
        direction = torch.randn(tokens, 22, device=twin.device)
        ours = torch.autograd.grad(packed_linear(x, packed, bias), (x, bias), direction)
        expected = torch.autograd.grad(F.linear(x, packed.unpack(), bias), (x, bias), direction)
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-5)


def test_gradcheck(monkeypatch):
    monkeypatch.setenv("PAUCITY_KERNELS", "reference")
    for pack in (nm(2, 4), bitmask(0.5), blocks(2, 4)):
        x, packed, bias = problem(pack, 8, 6, 3, torch.float64)
        assert torch.autograd.gradcheck(
            lambda x, b, p=packed: packed_linear(x, p, b), (x.requires_grad_(), bias.requires_grad_())
        )


def test_operators_are_well_formed():
    x, packed, bias = problem(nm(2, 4), 16, 6, 2)
    x.requires_grad_(), bias.requires_grad_()
    opcheck(packed_op.packed_bits, (x, packed.values, packed.bits, None, bias))
    opcheck(packed_op.unpack_bit_rows, (packed.values, packed.bits, None, 16, 1, 5))
    packed = problem(bitmask(0.5), 16, 6, 2)[1]
    opcheck(packed_op.packed_bits, (x, packed.values, packed.bits, packed.row_offsets, None))
    packed = problem(blocks(2, 4), 16, 6, 2)[1]
    opcheck(packed_op.packed_blocks, (x, packed.values, packed.columns, packed.row_offsets, bias))
    opcheck(packed_op.unpack_block_rows, (packed.values, packed.columns, packed.row_offsets, 16, 1, 3))


def test_compiles(twin):
    x, packed, bias = problem(nm(2, 4), 16, 6, 2, device=twin.device)
    grid = problem(blocks(2, 4), 16, 6, 2, device=twin.device)[1]

    def both(x):
        return packed_linear(x, packed, bias) + packed_linear(x, grid)

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))


def test_flops():
    x, packed, bias = problem(nm(2, 4), 16, 6, 2)
    assert flops(lambda: packed_linear(x, packed, bias)) == 2 * 2 * 16 * 6
    x, packed, bias = problem(blocks(2, 4), 16, 6, 20)
    assert flops(lambda: packed_linear(x[:2], packed, bias)) == 2 * 2 * packed.values.numel()
    assert flops(lambda: packed_linear(x, packed, bias)) == 2 * 20 * 16 * 6


@pytest.mark.skipif(native.library() is None, reason="the native library was not built")
def test_narrow_blocks_are_unpacked_for_fewer_tokens(monkeypatch):
    for dtype, most in packed_op.NARROW_TOKENS.items():
        x, packed, _ = problem(blocks(4, 4), 64, 20, most + 1, dtype)
        wide = problem(blocks(4, 16), 64, 20, most + 1, dtype)[1]
        monkeypatch.setenv("PAUCITY_KERNELS", "auto")
        with dispatch.dense_runs() as reasons:
            close(packed_linear(x, packed), dense(x, packed))
            close(packed_linear(x[:most], packed), dense(x[:most], packed))
            close(packed_linear(x, wide), dense(x, wide))
        assert dict(reasons) == {f"packed linear ran dense: more than {most} tokens and blocks of 4 columns": 1}
        assert flops(lambda x=x, packed=packed: packed_linear(x, packed)) == 2 * x.numel() * 20
        monkeypatch.setenv("PAUCITY_KERNELS", "native")
        with dispatch.dense_runs() as reasons:
            close(packed_linear(x, packed), dense(x, packed))
        assert not reasons


def test_parts_that_contradict_each_other(twin):
    if twin.name != "native":
        pytest.skip("the reference and Triton trust what from_tensors has checked; memory is not at stake there")
    for tokens in (1, 20):
        x, packed, _ = problem(bitmask(0.5), 64, 12, tokens)
        full, empty = torch.full_like(packed.bits, 255), torch.zeros_like(packed.bits)
        beyond = packed.row_offsets + 10_000
        for change in (
            {"bits": full},
            {"bits": empty},
            {"row_offsets": beyond},
            {"row_offsets": packed.row_offsets.flip(0)},
        ):
            with pytest.raises(InputError, match="packed_linear: weight must have as many bits in every row"):
                packed_linear(x, dataclasses.replace(packed, **change))
        x, packed, _ = problem(blocks(2, 16), 64, 12, tokens)
        for change in (
            {"columns": packed.columns + 4},
            {"columns": packed.columns - 4},
            {"row_offsets": packed.row_offsets + 1000},
            {"row_offsets": -packed.row_offsets - 1},
        ):
            with pytest.raises(InputError, match="packed_linear: weight must have block columns and row offsets"):
                packed_linear(x, dataclasses.replace(packed, **change))


def test_bad_input():
    x, packed, bias = problem(nm(2, 4), 16, 6, 2)
    with pytest.raises(
        InputTypeError, match="weight must be PackedNM, PackedBitmask, PackedBlocks or PackedGroups, got Ten"
    ):
        packed_linear(x, packed.unpack())
    with pytest.raises(InputError, match=r"weight must have 2 dimensions, got shape \[1, 6, 16\]"):
        packed_linear(x, PackedNM.pack(packed.unpack()[None], 2, 4))
    with pytest.raises(InputError, match=r"x must have shape \[\.\.\., 16\], got \[2, 15\]"):
        packed_linear(x[:, :15], packed)
    with pytest.raises(InputTypeError, match="x must have the dtype of weight"):
        packed_linear(x.bfloat16(), packed)
    with pytest.raises(InputError, match=r"bias must have shape \[6\], got \[5\]"):
        packed_linear(x, packed, bias[:5])
