"""Depthwise convolution by PyTorch, summed in float32 (float64 for float64) and rounded once."""

import torch
import torch.nn.functional as F
from torch import Tensor


def depthwise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """``[N, C, H, W], [C, 1, kh, kw], [C] -> [N, C, H', W']``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    added = None if bias is None else bias.to(wide)
    out = F.conv2d(x.to(wide), weight.to(wide), added, stride, padding, groups=x.shape[1])
    return out.to(x.dtype).contiguous()
