"""The C++ twin of the sparse and packed linears; see `reference`.

In ``csrc/kernels``: ``linear.cpp``, ``packed.cpp``, ``packed_blocks.cpp`` and ``packed_groups.cpp``.
"""

import torch
from torch import Tensor

from ...checks import fail
from ..native import DTYPES, FLOAT, INT, Pointer, function

_THRESHOLD, _TOP, _GIVEN = range(3)
_sparse_input = function("sparse_input", *[Pointer] * 6, *[INT] * 5, FLOAT, *[INT] * 3)
_sparse_output = function("sparse_output", *[Pointer] * 5, *[INT] * 6)
_packed_bits = function("packed_bits", Pointer, Pointer, INT, Pointer, Pointer, INT, Pointer, Pointer, *[INT] * 4)
_unpack_bit_rows = function("unpack_bit_rows", Pointer, INT, Pointer, Pointer, INT, Pointer, *[INT] * 5)
_packed_blocks = function("packed_blocks", *[Pointer] * 3, INT, *[Pointer] * 3, *[INT] * 6)
_unpack_block_rows = function("unpack_block_rows", *[Pointer] * 2, INT, *[Pointer] * 2, *[INT] * 6)
_packed_groups = function("packed_groups", *[Pointer] * 5, INT, INT, *[Pointer] * 3, *[INT] * 5)
_unpack_group_rows = function("unpack_group_rows", *[Pointer] * 4, INT, INT, *[Pointer] * 2, *[INT] * 5)


def sparse_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    threshold: float | None,
    k: int | None,
    max_kept: int,
) -> tuple[Tensor | None, Tensor]:
    """See `reference.sparse_input`."""
    mask = torch.empty_like(x, dtype=torch.bool)
    if norm is not None:
        norm = norm.detach().float().contiguous()
    elif threshold is not None and x.dtype == torch.bfloat16:
        threshold = float(torch.tensor(threshold, dtype=x.dtype))  # as a comparison in bfloat16 does
    mode = _TOP if threshold is None else _THRESHOLD
    return _run_input(x, weight, bias, norm, mask, mode, threshold, k, max_kept), mask


def masked_input(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, max_kept: int) -> Tensor | None:
    """See `reference.masked_input`."""
    return _run_input(x, weight, bias, None, mask, _GIVEN, None, None, max_kept)


def _run_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    mask: Tensor,
    mode: int,
    threshold: float | None,
    k: int | None,
    max_kept: int,
) -> Tensor | None:
    tokens, size = x.shape
    out = x.new_empty(tokens, weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    pitch = weight.stride(1) if size > 1 else weight.shape[0]
    sizes = (tokens, size, weight.shape[0], pitch, mode, threshold or 0.0, k or 0, max_kept, DTYPES[x.dtype])
    return None if _sparse_input(x, weight, bias, norm, out, mask, *sizes) else out


def sparse_output(x: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None, max_kept: int) -> Tensor | None:
    """See `reference.sparse_output`."""
    (tokens, size), height = x.shape, weight.shape[0]
    out = x.new_empty(tokens, height)
    bias = None if bias is None else bias.contiguous()
    pitch = weight.stride(0) if height > 1 else size
    sizes = (tokens, size, height, pitch, max_kept, DTYPES[x.dtype])
    return None if _sparse_output(x, weight, rows, bias, out, *sizes) else out


def packed_bits(x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `reference.packed_bits`."""
    (tokens, cols), rows = x.shape, bits.shape[0]
    out = x.new_empty(tokens, rows)
    values, bits, row_offsets = values.contiguous(), bits.contiguous(), _offsets(row_offsets)
    bias = None if bias is None else bias.contiguous()
    wide = row_offsets is not None and row_offsets.dtype == torch.int64
    sizes = (tokens, rows, cols, DTYPES[x.dtype])
    if _packed_bits(x, values, values.numel(), bits, row_offsets, wide, bias, out, *sizes):
        raise _bits_error(row_offsets)
    return out


def unpack_bit_rows(
    values: Tensor, bits: Tensor, row_offsets: Tensor | None, cols: int, start: int, stop: int
) -> Tensor:
    """See `reference.unpack_bit_rows`."""
    out = values.new_empty(stop - start, cols)
    values, bits, row_offsets = values.contiguous(), bits.contiguous(), _offsets(row_offsets)
    wide = row_offsets is not None and row_offsets.dtype == torch.int64
    sizes = (bits.shape[0], cols, start, stop, DTYPES[values.dtype])
    if _unpack_bit_rows(values, values.numel(), bits, row_offsets, wide, out, *sizes):
        raise _bits_error(row_offsets)
    return out


def packed_blocks(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.packed_blocks`."""
    (tokens, cols), (count, br, bc) = x.shape, values.shape
    rows = len(row_offsets) - 1
    out = x.new_empty(tokens, rows * br)
    bias = None if bias is None else bias.contiguous()
    packed = (values.contiguous(), columns.contiguous(), count, row_offsets.contiguous())
    if _packed_blocks(x, *packed, bias, out, tokens, rows, cols, br, bc, DTYPES[x.dtype]):
        raise _blocks_error()
    return out


def unpack_block_rows(values: Tensor, columns: Tensor, row_offsets: Tensor, cols: int, start: int, stop: int) -> Tensor:
    """See `reference.unpack_block_rows`."""
    count, br, bc = values.shape
    out = values.new_empty((stop - start) * br, cols)
    packed = (values.contiguous(), columns.contiguous(), count, row_offsets.contiguous())
    if _unpack_block_rows(*packed, out, cols, br, bc, start, stop, values.element_size()):
        raise _blocks_error()
    return out


def packed_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """See `reference.packed_groups`."""
    (tokens, cols), rows = x.shape, len(row_offsets) - 1
    out = x.new_empty(tokens, rows)
    bias = None if bias is None else bias.contiguous()
    codes, scales, zeros, columns = (part.contiguous() for part in (codes, scales, zeros, columns))
    packed = (codes, scales, zeros, columns, columns.dtype == torch.int32, len(codes), row_offsets.contiguous())
    if _packed_groups(x, *packed, bias, out, tokens, rows, cols, 2 * codes.shape[1], DTYPES[x.dtype]):
        raise _blocks_error()
    return out


def unpack_group_rows(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    cols: int,
    start: int,
    stop: int,
) -> Tensor:
    """See `reference.unpack_group_rows`."""
    out = scales.new_empty(stop - start, cols)
    codes, scales, zeros, columns = (part.contiguous() for part in (codes, scales, zeros, columns))
    packed = (codes, scales, zeros, columns, columns.dtype == torch.int32, len(codes), row_offsets.contiguous())
    if _unpack_group_rows(*packed, out, cols, 2 * codes.shape[1], start, stop, DTYPES[scales.dtype]):
        raise _blocks_error()
    return out


def _offsets(row_offsets: Tensor | None) -> Tensor | None:
    return None if row_offsets is None else row_offsets.contiguous()


def _bits_error(row_offsets: Tensor | None) -> Exception:
    wanted = "have as many bits in every row as it has values"
    return fail("packed_linear", "weight", wanted, "others" if row_offsets is None else "other offsets or bits")


def _blocks_error() -> Exception:
    return fail("packed_linear", "weight", "have block columns and row offsets within its sizes", "others")
