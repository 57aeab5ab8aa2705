"""SparseGPT: a layer is pruned column by column, and what stays makes up for the error.

Paper: Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, Algorithm 1, with the defaults of the authors' code:
blocks of 128 columns, a damping of 1 % of the mean diagonal, Hessians in float32. A factor of the inverse Hessian is
made by one reversed Cholesky decomposition instead of three. Not implemented: quantisation in the same sweep.
"""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from ..checks import check_ndim, check_shape
from ..kernels.sweep import column_sweep
from .pruner import Layer, Pruner
from .statistics import InputGram, InputNorm


class SparseGPT(Pruner):
    """Options of ``sparsegpt``: within each block of columns all weights of a layer compete."""

    gathers: ClassVar[type[InputNorm] | None] = InputGram
    updates: ClassVar[bool] = True
    block_size: Annotated[int, Field(ge=1, description="columns whose masks are chosen at a time")] = 128
    damping: Annotated[float, Field(gt=0, description="share of the mean diagonal added to the Hessian's")] = 0.01

    def score(self, layer: Layer) -> Tensor:
        """``w^2 / [H^-1]_jj^2`` of the dense layer, as Eq. 4 ranks weights before any correction."""
        assert isinstance(layer.inputs, InputGram)
        factor, _ = layer.inputs.inverse_factor(self.damping)
        return (layer.weight / factor.diagonal()).square()

    def solve(self, layer: Layer, sparsity: float) -> Tensor:
        """See `sparsegpt_sweep`; ``layer.weight`` becomes the corrected weight, zeros in place."""
        assert isinstance(layer.inputs, InputGram)
        inputs = layer.inputs
        factor, damping = inputs.inverse_factor(self.damping)
        if damping > self.damping:
            layer.notes.append(f"{layer.name}: the Hessian was singular and damped by {damping:g} of its mean diagonal")
        if inputs.num_tokens < inputs.size:
            layer.notes.append(
                f"{layer.name}: {inputs.num_tokens} calibration tokens for {inputs.size} inputs leave the Hessian "
                "singular; it is damped, and more tokens would serve better"
            )
        if inputs.seen:
            always_0 = (inputs.squares == 0).to(layer.weight.device)  # such inputs need no weights
            layer.weight[:, always_0] = 0
        live = (layer.weight != 0).T.contiguous()
        sparse = not bool(live.all())  # zeros stay, and what columns before give them goes on as error
        unit = self.m or (self.block[1] if self.block else 1)
        step = max(1, self.block_size // unit) * unit
        mask = torch.empty_like(layer.weight, dtype=torch.bool)
        weight = layer.weight.T.contiguous()
        for start in range(0, len(weight), step):
            here = slice(start, start + step)
            block = factor[here, here]
            kept = None
            kept = live[here] if sparse else None
            if self.m is None:
                score = (weight[here] / block.diagonal()[:, None]).square().masked_fill(~live[here], -1)
                kept = self.select(score.T, sparsity).T & live[here]
            weight[here], kept, errors = column_sweep(weight[here], block, kept, n=self.n, m=self.m)
            mask[:, here] = kept.T
            weight[start + step :].addmm_(factor[here, start + step :].T, errors, alpha=-1)
        layer.weight.copy_(weight.T)
        return mask


def sparsegpt_sweep(weight: Tensor, gram: Tensor, *, sparsity: float, damping: float = 0.01) -> tuple[Tensor, Tensor]:
    """Prune a layer so that its outputs change least: Algorithm 1 of the paper.

    Args:
        weight: ``[out, in]``, any float dtype.
        gram: ``[in, in]``, ``X^T X`` over the calibration tokens; half the Hessian, whose scale does not matter.
        sparsity: fraction removed of every block of 128 columns, in [0, 1).
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        ``(weight, mask)``: the corrected weight, float32 with zeros in place, and the keep-mask, bool.

    Raises:
        InputError: if a shape does not match, or an option is out of range.
    """
    check_ndim("sparsegpt_sweep", "weight", weight, 2)
    check_shape("sparsegpt_sweep", "gram", gram, weight.shape[1], weight.shape[1])
    inputs = InputGram(weight.shape[1])
    inputs.gram, inputs.squares = gram.detach().float(), gram.detach().diagonal().double()
    inputs.num_tokens = inputs.size
    layer = Layer(weight.detach().float().clone(), "weight", inputs)
    mask = SparseGPT(sparsity=sparsity, damping=damping).solve(layer, sparsity)
    return layer.weight, mask
