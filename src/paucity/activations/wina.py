"""WINA: each token keeps the inputs with the largest magnitude times weight-column norm, no training.

Paper: Chen et al. 2025, https://arxiv.org/abs/2505.19427, Eq. 4 and Algorithm 1. Not implemented: the rotation that
makes weight matrices column-orthogonal (section 3.3), under which the error bound is optimal and after which the
official code takes every column norm but those of k and gate as one; here the norms of the weights as they are count
at every site. Different from the official code: the top K of each token, as the paper has it, where the code's
evaluation compares with a calibrated threshold (``selector: threshold`` does that); and every token is made sparse,
where the code leaves 1 % dense.
"""

import torch
from torch import Tensor

from ..checks import check_floating, check_ndim, check_shape
from ..ops.select import topk_mask


def column_norm(weight: Tensor) -> Tensor:
    """L2 norm of each weight column, ``[out, in]`` to ``[in]`` float32, detached."""
    check_ndim("column_norm", "weight", weight, 2)
    norm: Tensor = torch.linalg.vector_norm(weight.detach(), dim=0, dtype=torch.float32)
    return norm


def wina_score(x: Tensor, weight_norm: Tensor) -> Tensor:
    """Importance ``|x_j| * ||W[:, j]||_2``; higher is kept.

    Args:
        x: ``[..., in]``, any float dtype.
        weight_norm: ``[in]``, from `column_norm`.

    Returns:
        ``[..., in]`` float32, detached.

    Raises:
        InputError: if a shape or a type does not match.
    """
    check_floating("wina_score", "x", x)
    check_shape("wina_score", "weight_norm", weight_norm, x.shape[-1])
    return x.detach().float().abs() * weight_norm.detach().float()


def wina_mask(x: Tensor, weight_norm: Tensor, *, sparsity: float) -> Tensor:
    """Keep-mask ``[..., in]`` (bool): the same number of inputs for every token."""
    return topk_mask(wina_score(x, weight_norm), sparsity=sparsity, dim=-1)
