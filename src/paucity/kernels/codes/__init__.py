"""Sparse codes over a dictionary: decode rows, and encode at kept entries only, reading no other atom."""

import torch
from torch import Tensor

from ...checks import InputTypeError, check_shape, check_tensor, fail
from ..dispatch import check_computable, check_devices
from . import op

__all__ = ["decode_codes", "encode_kept"]


def decode_codes(values: Tensor, indices: Tensor, dictionary: Tensor) -> Tensor:
    """Weighted sum of the atoms that each code names: ``out = sum_j values_j * dictionary[indices_j]``.

    A slot with value 0 is padding: its atom is not read and adds nothing. An atom named twice counts twice. All
    gradients are deterministic; that of ``dictionary`` is dense, and atoms that no code names get 0. Sums are taken in
    float32 (float64 for float64) and rounded once. The fields of a `paucity.ops.formats.Codes` fit:
    ``decode_codes(codes.values, codes.indices, dictionary)``.

    Args:
        values: ``[..., k]``, any float dtype.
        indices: ``[..., k]``, int32 or int64, each in ``[0, dict_size)``.
        dictionary: ``[dict_size, d]``, dtype and device of ``values``.

    Returns:
        ``[..., d]``, dtype of ``values``.

    Raises:
        InputError: if shapes do not match or an index is out of range (on a GPU the check waits for the indices).
        InputTypeError: if a dtype does not fit.
    """
    check_computable("decode_codes", "values", values)
    _check("decode_codes", values, indices, "dictionary", dictionary)
    check_shape("decode_codes", "indices", indices, *values.shape)
    k = values.shape[-1]
    out: Tensor = op.gather_sum(_rows(values, k), _rows(indices, k), dictionary)
    return out.view(*values.shape[:-1], dictionary.shape[1])


def encode_kept(x: Tensor, weight: Tensor, bias: Tensor | None, indices: Tensor) -> Tensor:
    """Pre-activations of an encoder at kept entries only: ``out_j = x . weight[indices_j] + bias[indices_j]``.

    With the indices that a selector chose (without gradient), gradients flow through the kept entries alone, and no
    product with the whole dictionary is done in either direction. Sums are taken in float32 (float64 for float64).

    Args:
        x: ``[..., d]``, any float dtype.
        weight: ``[dict_size, d]``, dtype and device of ``x``.
        bias: ``[dict_size]``, like ``weight``, or None.
        indices: ``[..., k]``, int32 or int64, each in ``[0, dict_size)``; leading sizes of ``x``.

    Returns:
        ``[..., k]``, dtype of ``x``.

    Raises:
        InputError: if shapes do not match or an index is out of range (on a GPU the check waits for the indices).
        InputTypeError: if a dtype does not fit.
    """
    check_computable("encode_kept", "x", x)
    _check("encode_kept", x, indices, "weight", weight)
    check_shape("encode_kept", "x", x, *x.shape[:-1], weight.shape[1])
    if bias is not None:
        check_shape("encode_kept", "bias", bias, weight.shape[0])
        if bias.dtype != x.dtype:
            raise InputTypeError(f"encode_kept: bias must be {x.dtype}, got {bias.dtype}.")
        check_devices("encode_kept", x.device, bias=bias)
    if indices.ndim == 0:
        raise fail("encode_kept", "indices", "have at least 1 dimension", "shape []")
    check_shape("encode_kept", "indices", indices, *x.shape[:-1], None)
    out: Tensor = op.gather_dot(_rows(x, x.shape[-1]), _rows(indices, indices.shape[-1]), weight, bias)
    return out.view(indices.shape)


def _rows(tensor: Tensor, last: int) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), last)


def _check(function: str, like: Tensor, indices: Tensor, name: str, table: Tensor) -> None:
    if like.ndim == 0:
        raise fail(function, "the first argument", "have at least 1 dimension", "shape []")
    check_tensor(function, "indices", indices)
    if indices.dtype not in (torch.int32, torch.int64):
        raise InputTypeError(f"{function}: indices must be torch.int32 or torch.int64, got {indices.dtype}.")
    check_shape(function, name, table, None, None)
    if table.dtype != like.dtype:
        raise InputTypeError(f"{function}: {name} must be {like.dtype}, got {table.dtype}.")
    for argument, tensor in (("indices", indices), (name, table)):
        if tensor.device != like.device:
            raise fail(function, argument, f"be on {like.device}", tensor.device)
