"""Sparse and packed linears in plain PyTorch, on any device and for every float dtype: what each twin computes.

Every twin module (``reference``, ``native``, ``triton``) has the functions of this one with these signatures. Shapes:
``x [T, in]``, ``weight [out, in]``, ``bias [out]`` or None, results ``[T, out]`` in the dtype of ``x``, accumulated in
float32 (float64 stays float64). The callers (``op``, ``packed_op``) have checked shapes and dtypes; they give the
native and the Triton twin 1 to 16 tokens (packed: 0 to 16), contiguous ``x``, and for `sparse_input` and `masked_input`
a weight that is stored input-major (``stride(0) == 1``, ``stride(1) >= out``), for `sparse_output` one with
``stride(1) == 1``.
"""

import torch
from torch import Tensor

from ...ops.formats.groups import dequantize_groups
from ...ops.formats.packed import unpack_bits
from ...ops.select import topk_mask


def select_inputs(x: Tensor, norm: Tensor | None, threshold: float | None, k: int | None) -> Tensor:
    """Mask ``[T, in]``: ``|x_j| * norm_j > threshold``, or the ``k`` highest of a token.

    Ties go to the lower position, NaN comes last (and is not above any threshold). With a norm, scores are float32
    (float64 stays); without one they have the dtype of ``x``, to which the threshold is rounded.
    """
    score = x.detach().abs()
    if norm is not None:
        score = score.to(_wide(x)) * norm.detach().to(_wide(x))
    return score > threshold if threshold is not None else topk_mask(score, k=k)


def sparse_input(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    norm: Tensor | None,
    threshold: float | None,
    k: int | None,
    max_kept: int,
) -> tuple[Tensor | None, Tensor]:
    """The product over the selected inputs, and their mask ``[T, in]``.

    Args:
        x: ``[T, in]``.
        weight: ``[out, in]``; a column that no token keeps is not read.
        bias: ``[out]``.
        norm: ``[in]`` float32, or None for ones.
        threshold: see `select_inputs`; exactly one of this and k is given.
        k: see `select_inputs`.
        max_kept: if more columns than this are kept by any token, a twin may leave the product to the caller, who runs
            dense: the first of the pair is None then. Only the mask counts.
    """
    mask = select_inputs(x, norm, threshold, k)
    return masked_input(x, weight, mask, bias, max_kept), mask


def masked_input(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None, max_kept: int) -> Tensor | None:
    """The product over the inputs that ``mask`` (bool ``[T, in]``) keeps; None as in `sparse_input`."""
    kept = mask.any(0)
    return _product(x.masked_fill(~mask, 0)[:, kept], weight[:, kept], bias)


def sparse_output(x: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None, max_kept: int) -> Tensor | None:
    """The outputs that ``rows`` (bool ``[T, out]``) keeps, 0 elsewhere.

    A row of ``weight`` that no token keeps is not read. ``max_kept`` counts rows; see `sparse_input`.
    """
    kept = rows.any(0)
    out = x.new_zeros(x.shape[0], weight.shape[0])
    out[:, kept] = _product(x, weight[kept], None if bias is None else bias[kept])
    return out.masked_fill(~rows, 0)


def packed_bits(x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """The product with a weight of one bit per entry (N:M and bitmask alike).

    Args:
        x: ``[T, in]``.
        values: the entries whose bit is set, row after row; flattened, of the dtype of ``x``.
        bits: uint8 ``[out, ceil(in / 8)]``, as `pack_bits` lays them.
        row_offsets: int32 or int64 ``[out + 1]``, where the values of a row start; None where all have equally many.
        bias: ``[out]``.

    Raises:
        InputError: if offsets or the number of bits in a row do not fit the values.
    """
    return _product(x, unpack_bit_rows(values, bits, row_offsets, x.shape[1], 0, bits.shape[0]), bias)


def unpack_bit_rows(
    values: Tensor, bits: Tensor, row_offsets: Tensor | None, cols: int, start: int, stop: int
) -> Tensor:
    """Rows ``start`` to ``stop`` of the dense weight of `packed_bits`: ``[stop - start, cols]``."""
    if row_offsets is None:
        per_row = values.numel() // max(1, bits.shape[0])
        first, last = start * per_row, stop * per_row
    else:
        first, last = int(row_offsets[start]), int(row_offsets[stop])
    mask = unpack_bits(bits[start:stop], cols)
    return values.new_zeros(mask.shape).masked_scatter_(mask, values.flatten()[first:last])


def packed_blocks(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """The product with a weight of dense blocks.

    Args:
        x: ``[T, in]``.
        values: ``[num_blocks, br, bc]``, rows of blocks after each other.
        columns: int32 ``[num_blocks]``, the block column of each block, ascending in a row.
        row_offsets: int32 ``[out / br + 1]``, where the blocks of a row start.
        bias: ``[out]``.

    Raises:
        InputError: if a block column or an offset is out of range.
    """
    return _product(x, unpack_block_rows(values, columns, row_offsets, x.shape[1], 0, len(row_offsets) - 1), bias)


def unpack_block_rows(values: Tensor, columns: Tensor, row_offsets: Tensor, cols: int, start: int, stop: int) -> Tensor:
    """Block rows ``start`` to ``stop`` of the dense weight of `packed_blocks`: ``[(stop - start) * br, cols]``."""
    br, bc = values.shape[1:]
    first, last = int(row_offsets[start]), int(row_offsets[stop])
    grid = values.new_zeros(stop - start, cols // bc, br, bc)
    row = torch.repeat_interleave(row_offsets[start : stop + 1].diff().long())
    grid[row, columns[first:last].long()] = values[first:last]
    return grid.transpose(1, 2).reshape((stop - start) * br, cols)


def packed_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """The product with a weight of groups in 4 bits, each weight rounded to the dtype of ``x``.

    A twin may leave that rounding out, which makes its result more exact.

    Args:
        x: ``[T, in]``.
        codes: uint8 ``[num_groups, group_size / 2]``; this and the next four as in `PackedGroups`.
        scales: ``[num_groups]`` of the dtype of ``x``.
        zeros: uint8 ``[num_groups]``.
        columns: int16 or int32 ``[num_groups]``.
        row_offsets: int32 ``[out + 1]``.
        bias: ``[out]``.

    Raises:
        InputError: if a group's column or an offset is out of range.
    """
    rows = len(row_offsets) - 1
    return _product(x, unpack_group_rows(codes, scales, zeros, columns, row_offsets, x.shape[1], 0, rows), bias)


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
    """Rows ``start`` to ``stop`` of the dense weight of `packed_groups`: ``[stop - start, cols]``."""
    part = slice(int(row_offsets[start]), int(row_offsets[stop]))
    groups = dequantize_groups(codes[part], scales[part], zeros[part])
    grid = groups.new_zeros(stop - start, cols // groups.shape[1], groups.shape[1])
    row = torch.repeat_interleave(row_offsets[start : stop + 1].diff().long())
    grid[row, columns[part].long()] = groups
    return grid.view(stop - start, cols)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = _wide(x)
    out = x.to(wide) @ weight.to(wide).t()
    return (out if bias is None else out + bias.to(wide)).to(x.dtype)
