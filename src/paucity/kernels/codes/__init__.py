"""Sparse codes over a dictionary: decode rows, and encode at kept entries only, reading no other atom."""

import torch
from torch import Tensor

from ...checks import InputTypeError, check_int, check_shape, check_tensor, fail
from ..dispatch import check_computable, check_devices, without_autocast
from . import op
from .choose import choose

__all__ = ["decode_codes", "encode_kept", "encode_topk"]


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
    _check_encoder("encode_kept", x, weight, bias)
    _check("encode_kept", x, indices, "weight", weight)
    if indices.ndim == 0:
        raise fail("encode_kept", "indices", "have at least 1 dimension", "shape []")
    check_shape("encode_kept", "indices", indices, *x.shape[:-1], None)
    out: Tensor = op.gather_dot(_rows(x, x.shape[-1]), _rows(indices, indices.shape[-1]), weight, bias)
    return out.view(indices.shape)


@without_autocast
def encode_topk(
    x: Tensor, weight: Tensor, bias: Tensor | None, k: int, *, by_abs: bool = False
) -> tuple[Tensor, Tensor]:
    """The ``k`` highest pre-activations ``x . weight_j + bias_j`` of each row, as `paucity.kernels.select.topk` ranks.

    Float32 is chosen among at the speed of bfloat16 products where the machine has them; the result is that of float32
    (see `paucity.kernels.codes.choose`). Gradients flow through the kept entries alone.

    Args:
        x: ``[..., d]``, any float dtype.
        weight: ``[dict_size, d]``, dtype and device of ``x``.
        bias: ``[dict_size]``, like ``weight``, or None.
        k: entries of a row, at most ``dict_size``.
        by_abs: rank by absolute value; the values come back with their sign.

    Returns:
        values ``[..., k]`` (dtype of ``x``) and indices ``[..., k]`` (int32), best first.

    Raises:
        InputError: if shapes do not match or ``k`` is not in ``[1, dict_size]``.
        InputTypeError: if a dtype does not fit.
    """
    _check_encoder("encode_topk", x, weight, bias)
    check_int("encode_topk", "k", k, 1, weight.shape[0])
    rows = _rows(x, x.shape[-1])
    with torch.no_grad():
        indices = choose(rows.detach(), weight.detach(), None if bias is None else bias.detach(), k, by_abs)
    values: Tensor = op.gather_dot(rows, indices, weight, bias)
    shape = (*x.shape[:-1], k)
    return values.view(shape), indices.view(shape)


def _rows(tensor: Tensor, last: int) -> Tensor:
    return tensor.reshape(tensor.shape[:-1].numel(), last)


def _check_encoder(function: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_computable(function, "x", x)
    check_shape(function, "weight", weight, None, None)
    if x.ndim == 0:
        raise fail(function, "x", "have at least 1 dimension", "shape []")
    check_shape(function, "x", x, *x.shape[:-1], weight.shape[1])
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputTypeError(f"{function}: {name} must be {x.dtype}, got {tensor.dtype}.")
    check_devices(function, x.device, weight=weight, bias=bias)
    if bias is not None:
        check_shape(function, "bias", bias, weight.shape[0])


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
