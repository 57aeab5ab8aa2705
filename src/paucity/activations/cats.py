"""CATS: gate activations below a calibrated magnitude are zeroed, and their neurons skipped, no training.

Paper: Lee et al. 2024, https://arxiv.org/abs/2404.08763, sections 3 and 4. In a gated MLP
``down(act(gate(x)) * up(x))`` a zero of ``act(gate(x))`` makes a row of ``up`` and a column of ``down`` unnecessary;
the gate itself is computed in full. The paper keeps ``|a| >= t``, here ``|a| > t``: the threshold is the largest
dropped magnitude instead of the smallest kept one. Not implemented: fine-tuning after it, and the fused kernel.
"""

from torch import Tensor

from ..ops.select import threshold_mask
from .teal import teal_threshold


def cats_threshold(gates: Tensor, *, sparsity: float) -> float:
    """The quantile ``sparsity`` of ``|act(gate(x))|`` over the calibration tokens, as `teal_threshold`.

    Args:
        gates: activations after the gate's non-linearity, any shape, any float dtype.
        sparsity: fraction of gate activations to drop, in [0, 1).
    """
    return teal_threshold(gates, sparsity=sparsity)


def cats_mask(gates: Tensor, threshold: float) -> Tensor:
    """Keep-mask (bool) of the shape of ``gates``: ``|act(gate(x))| > threshold``."""
    return threshold_mask(gates, threshold, by_abs=True)
