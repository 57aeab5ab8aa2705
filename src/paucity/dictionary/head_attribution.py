"""Which attention heads a feature is made by: features of all heads' outputs side by side, taken apart by head.

Paper: Kissane et al. 2024, "Interpreting Attention Layer Outputs with Sparse Autoencoders",
https://arxiv.org/abs/2406.17759, section 2 and appendix: a dictionary is trained on ``heads.L`` of
`paucity.models.harvest`, the concatenated outputs ``z`` before the output projection. By weights, head ``h`` has the
share ``|W_dec[i, h]| / sum_h |W_dec[i, h]|`` of feature ``i``; by activation it gives ``z_h . W_enc[i, h]`` to the
pre-activation, and a source token ``s`` of that ``A[t, s] v_s . W_enc[i, h]``. Not implemented: attribution through
earlier layers (recursive), and freezing of norms.
"""

import torch
from torch import Tensor

from ..checks import check_divides, check_ndim, check_shape


def head_weights(atoms: Tensor, heads: int) -> Tensor:
    """Share of each head in each atom, by norm.

    Args:
        atoms: ``[dict_size, heads * width]``.
        heads: number of query heads.

    Returns:
        ``[dict_size, heads]``, rows summing to 1 (to 0 for an atom of zeros), detached.
    """
    norms: Tensor = torch.linalg.vector_norm(_by_head("head_weights", "atoms", atoms.detach(), heads), dim=-1)
    return norms / norms.sum(-1, keepdim=True).clamp_min(1e-12)


def head_contributions(rows: Tensor, directions: Tensor, heads: int) -> Tensor:
    """What each head gives to the pre-activation of a feature; the bias and the centring are not among it.

    Args:
        rows: activations ``[n, heads * width]``.
        directions: rows of the encoder, ``[n, heads * width]`` or one for all.
        heads: number of query heads.

    Returns:
        ``[n, heads]``; the sum over heads is ``rows . directions``.
    """
    each = _by_head("head_contributions", "rows", rows, heads)
    along = _by_head("head_contributions", "directions", directions, heads)
    return (each * along).sum(-1)


def source_contributions(pattern: Tensor, values: Tensor, direction: Tensor) -> Tensor:
    """What each source token gives to the pre-activation of a feature through one head.

    Args:
        pattern: ``[n, S]``, the attention that each of n tokens pays to S sources.
        values: ``[S, width]`` of the head (with grouped queries those of its group), or ``[n, S, width]``.
        direction: ``[width]``, the head's part of the encoder's row.

    Returns:
        ``[n, S]``; the sum over sources is what `head_contributions` says of this head.
    """
    check_ndim("source_contributions", "pattern", pattern, 2)
    check_ndim("source_contributions", "values", values, 2, 3)
    check_shape("source_contributions", "direction", direction, values.shape[-1])
    check_shape("source_contributions", "values", values, *values.shape[:-2], pattern.shape[1], None)
    return pattern * (values @ direction)


def _by_head(function: str, argument: str, x: Tensor, heads: int) -> Tensor:
    check_ndim(function, argument, x, 1, 2)
    check_divides(function, "heads", heads, x.shape[-1], f"the width of {argument}")
    return x.reshape(*x.shape[:-1], heads, -1)
