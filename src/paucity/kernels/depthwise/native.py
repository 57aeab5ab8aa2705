"""The C++ twin; see csrc/kernels/depthwise.cpp."""

import torch
from torch import Tensor

from ..native import DTYPES, INT, Pointer, function

_depthwise = function("depthwise", *[Pointer] * 4, *[INT] * 9)


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """As in the reference, for float32 and bfloat16."""
    batch, channels, height, width = x.shape
    kernel_height, kernel_width = weight.shape[2:]
    rows = (height + 2 * padding - kernel_height) // stride + 1
    out = x.new_empty(batch, channels, rows, (width + 2 * padding - kernel_width) // stride + 1)
    sizes = (batch, channels, height, width, kernel_height, kernel_width, stride, padding, DTYPES[x.dtype])
    added = None if bias is None else bias.contiguous()
    _depthwise(x.contiguous(), weight.to(torch.float32).contiguous(), added, out, *sizes)
    return out
