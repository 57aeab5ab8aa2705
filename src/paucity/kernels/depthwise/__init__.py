"""Depthwise convolutions of channels-first pictures, between the products of sparse 1x1 convolutions."""

from torch import Tensor

from ...checks import InputTypeError, check_int, check_ndim, check_shape, check_tensor, fail
from ..dispatch import check_computable, check_devices
from . import op

__all__ = ["depthwise_conv"]


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, stride: int = 1, padding: int = 0
) -> Tensor:
    """``F.conv2d(x, weight, bias, stride, padding, groups=C)`` with one kernel a channel, without a change of layout.

    PyTorch's own copies channels-first pictures into another layout and back. Gradients flow to all three. Sums are
    taken in float32 (float64 for float64). Paper: Elsen et al. 2019 (Fast Sparse ConvNets),
    https://arxiv.org/abs/1911.09723, whose networks keep the channels first throughout.

    Args:
        x: ``[N, C, H, W]``, any float dtype.
        weight: ``[C, 1, kh, kw]``, dtype and device of ``x``.
        bias: ``[C]``, like ``weight``, or None.
        stride: steps between the pixels taken, in both dimensions.
        padding: zeros on each side, in both dimensions.

    Returns:
        ``[N, C, (H + 2 padding - kh) // stride + 1, (W + 2 padding - kw) // stride + 1]``.

    Raises:
        InputError: if shapes do not match, or the kernel is larger than the padded picture.
        InputTypeError: if a dtype does not fit.
    """
    name = "depthwise_conv"
    check_computable(name, "x", x)
    check_ndim(name, "x", x, 4)
    check_int(name, "stride", stride)
    check_int(name, "padding", padding, 0)
    check_shape(name, "weight", weight, x.shape[1], 1, None, None)
    if bias is not None:
        check_tensor(name, "bias", bias)
        check_shape(name, "bias", bias, x.shape[1])
    for argument, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise InputTypeError(f"{name}: {argument} must be {x.dtype}, got {tensor.dtype}.")
    check_devices(name, x.device, weight=weight, bias=bias)
    for size, kernel in zip(x.shape[2:], weight.shape[2:], strict=True):
        if not 0 < kernel <= size + 2 * padding:
            wanted = f"fit into the padded picture ({size + 2 * padding})"
            raise fail(name, "weight", wanted, f"a kernel of {kernel}")
    out: Tensor = op.run(x, weight, bias, stride, padding)
    return out
