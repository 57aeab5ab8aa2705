"""1x1 convolutions with sparse weights: a sparse matrix times channels-first inputs."""

from torch import Tensor

from ...checks import InputTypeError, check_int, check_shape, check_tensor, fail
from ...ops.formats import PackedCSR
from ..dispatch import check_computable
from . import op

__all__ = ["sparse_conv1x1"]


def sparse_conv1x1(x: Tensor, weight: PackedCSR, bias: Tensor | None = None, *, stride: int = 1) -> Tensor:
    """``conv(x, weight) + bias`` with a kernel of size 1, multiplying the stored values only.

    Gradients flow to ``x``, ``bias`` and ``weight.values``, where these require them; the weight's gradient is
    computed at the stored entries only. Sums are taken in float32 (float64 for float64). A weight so dense that the
    dense product is faster runs dense, which `paucity.kernels.dispatch.dense_runs` counts.
    Paper: Elsen et al. 2019 (Fast Sparse ConvNets), https://arxiv.org/abs/1911.09723.

    Args:
        x: ``[N, in, *spatial]`` or ``[in, *spatial]``, any float dtype. Which of the two is told by the dimensions of
            the weight, as many as those of a batched input; a matrix weight ``[out, in]`` stands for two of space.
        weight: of ``[out, in]`` or ``[out, in, 1, ...]``, dtype and device of ``x``.
        bias: ``[out]``, like ``weight``, or None.
        stride: steps between the pixels taken, in every dimension of space.

    Returns:
        ``[N, out, *spatial]`` or ``[out, *spatial]``, each size of space divided by the stride and rounded up.

    Raises:
        InputError: if shapes do not match, or the weight's columns or row offsets are out of range.
        InputTypeError: if a dtype does not fit.
    """
    check_computable("sparse_conv1x1", "x", x)
    if not isinstance(weight, PackedCSR):
        raise InputTypeError(f"sparse_conv1x1: weight must be a PackedCSR, got {type(weight).__name__}.")
    batched = max(4, len(weight.shape)) if len(weight.shape) != 3 else 3
    if x.ndim not in (batched, batched - 1):
        raise fail("sparse_conv1x1", "x", f"have {batched} or {batched - 1} dimensions", f"shape {list(x.shape)}")
    check_int("sparse_conv1x1", "stride", stride)
    given = x if x.ndim == batched else x.unsqueeze(0)
    if given.shape[1] != weight.shape[1]:
        raise fail("sparse_conv1x1", "x", f"have {weight.shape[1]} channels", f"shape {list(x.shape)}")
    parts = {"weight": weight.values} if bias is None else {"weight": weight.values, "bias": bias}
    for name, tensor in parts.items():
        check_tensor("sparse_conv1x1", name, tensor)
        if tensor.dtype != x.dtype:
            raise InputTypeError(f"sparse_conv1x1: {name} must be {x.dtype}, got {tensor.dtype}.")
        if tensor.device != x.device:
            raise fail("sparse_conv1x1", name, f"be on {x.device}", tensor.device)
    if bias is not None:
        check_shape("sparse_conv1x1", "bias", bias, weight.shape[0])
    if stride > 1:
        for dim in range(2, given.ndim):
            given = given[(slice(None),) * dim + (slice(None, None, min(stride, max(1, given.shape[dim]))),)]
    flat = given.reshape(*given.shape[:2], given.shape[2:].numel())
    out: Tensor = op.run(weight.values, weight.columns, weight.row_offsets, flat, bias)
    out = out.view(given.shape[0], weight.shape[0], *given.shape[2:])
    return out if x.ndim == batched else out.squeeze(0)
