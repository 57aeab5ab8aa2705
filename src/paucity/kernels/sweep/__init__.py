"""Optimal brain surgeon over a block of inputs."""

from torch import Tensor

from ...checks import check_bool, check_divides, check_ndim, check_nm, check_shape, fail
from ..dispatch import check_devices
from . import op

__all__ = ["column_sweep"]


def column_sweep(
    weight: Tensor, factor: Tensor, mask: Tensor | None = None, *, n: int | None = None, m: int | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Remove weights input by input; the inputs behind make up for what is removed.

    For input ``i``: ``error_i = removed_i / U_ii``, and each input ``j > i`` loses ``error_i U_ij``. What ``mask`` says
    stays, or ``n`` of every ``m`` inputs: those with the highest ``(w_i / U_ii)^2`` when their group is reached, of
    equal ones the first, and with both only of those that the mask names. No gradient flows.
    Paper: Frantar and Alistarh 2023 (SparseGPT), https://arxiv.org/abs/2301.00774, Algorithm 1.

    Args:
        weight: ``[cols, rows]`` float32 or float64: transposed, so that an input is contiguous.
        factor: ``[cols, cols]`` of the same dtype, ``U``, upper triangular with a diagonal without zeros.
        mask: ``[cols, rows]`` bool, True stays.
        n: entries kept of a group.
        m: inputs of a group; divides ``cols``.

    Returns:
        ``(weight, mask, errors)``, each ``[cols, rows]``, new; inputs outside the block lose ``errors`` times the
        factor's further columns.

    Raises:
        InputError: if shapes, dtypes or devices do not fit, or neither mask nor n and m are given.
    """
    name = "column_sweep"
    check_ndim(name, "weight", weight, 2)
    check_shape(name, "factor", factor, weight.shape[0], weight.shape[0])
    check_devices(name, weight.device, factor=factor, mask=mask)
    if factor.dtype != weight.dtype:
        raise fail(name, "factor", f"have dtype {weight.dtype}", factor.dtype)
    if mask is None and (n is None or m is None):
        raise fail(name, "mask or n and m", "be given", "neither")
    if mask is not None:
        check_bool(name, "mask", mask)
        check_shape(name, "mask", mask, *weight.shape)
    if n is not None and m is not None:
        check_nm(name, n, m)
        check_divides(name, "m", m, weight.shape[0], "the inputs of weight")
    swept, kept, errors = op.column_sweep(weight.detach(), factor.detach(), mask, n or 0, m or 0)
    return swept, kept, errors
