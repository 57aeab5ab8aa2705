"""TEAL: inputs of linear layers below a calibrated magnitude are skipped, no training.

Paper: Liu et al. 2024, https://arxiv.org/abs/2408.14690, section 4.1 (threshold) and Algorithm 1 (blockwise greedy
sparsities, `paucity.activations.apply`). Different from the official code: the threshold is the exact quantile of
``|x|`` over the calibration tokens instead of one from a histogram of ``x`` taken as symmetric around zero, and every
token is made sparse, where its perplexity evaluation leaves the first half of the tokens dense.
"""

from torch import Tensor

from ..checks import check_floating, check_sparsity, fail
from ..ops.select import num_kept, threshold_mask


def teal_threshold(samples: Tensor, *, sparsity: float) -> float:
    """The magnitude that a share ``sparsity`` of the calibration entries does not exceed.

    Args:
        samples: calibration activations of one site, any shape, any float dtype.
        sparsity: fraction of entries to drop, in [0, 1).

    Returns:
        t such that exactly ``num_kept(samples.numel(), sparsity)`` entries have ``|x| > t`` (ties at t drop more); 0 at
        sparsity 0, where nothing but exact zeros is dropped.

    Raises:
        InputError: if there are no samples, one is not finite, or the sparsity is out of range.
    """
    check_floating("teal_threshold", "samples", samples)
    check_sparsity("teal_threshold", sparsity)
    if not samples.numel():
        raise fail("teal_threshold", "samples", "hold at least one entry", f"shape {list(samples.shape)}")
    magnitude = samples.detach().flatten().float().abs()
    if not bool(magnitude.isfinite().all()):
        raise fail("teal_threshold", "samples", "be finite", "NaN or infinity")
    num_dropped = magnitude.numel() - num_kept(magnitude.numel(), sparsity)
    return float(magnitude.kthvalue(num_dropped).values) if num_dropped else 0.0


def teal_mask(x: Tensor, threshold: float) -> Tensor:
    """Keep-mask (bool) of the shape of ``x``: ``|x| > threshold``."""
    return threshold_mask(x, threshold, by_abs=True)
