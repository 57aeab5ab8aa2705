"""Dynamic Sparse No Training: a mask is mended by swapping weights in and out, no weight changes.

Paper: Zhang et al. 2023, https://arxiv.org/abs/2310.08915, Section 3 and Algorithm 1. For each output row the expected
error is the sum of ``w E[x]`` over what is pruned. As long as it exceeds a threshold, the pruned weight with the
largest error-reducing ``w E[x] / Var[x]`` comes back and the kept weight with the lowest Wanda score among those with
an error-reducing sign goes; under N:M the one that goes is the lowest of the same group. As in the authors' code the
sign of the error may turn over (under N:M it may not). Their code leaves the MLPs alone by default; here all sites take
part. It also sums ``x`` over the tokens of a sequence, so that the threshold is next to nothing and rows swap until
they run out of cycles, which harms layers that are narrower than theirs; here ``E[x]`` is the mean over tokens.
"""

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..checks import check_bool, check_ndim, check_shape, fail
from .magnitude import magnitude_score
from .pruner import Layer, Pruner, Scope
from .statistics import InputMoments, InputNorm
from .wanda import wanda_score

_CHUNK = 2**22
"""Weights that are sorted at a time."""


class DSnoT(Pruner):
    """Options of ``dsnot``."""

    gathers: ClassVar[type[InputNorm] | None] = InputMoments
    scope: Scope = "row"
    initial: Literal["wanda", "magnitude"] = Field(default="wanda", description="the score of the mask to start from")
    max_cycles: Annotated[int, Field(ge=0, description="swaps of a row at most")] = 50
    threshold: Annotated[float, Field(ge=0, description="expected error of a row that is small enough")] = 0.1

    @model_validator(mode="after")
    def _single_weights(self) -> "DSnoT":
        if self.block is not None:
            raise fail("options", "block", "be left out with dsnot, which swaps single weights", self.block)
        return self

    def score(self, layer: Layer) -> Tensor:
        """That of the mask to start from."""
        assert layer.inputs is not None  # gathered, as asked for
        if self.initial == "magnitude":
            return magnitude_score(layer.weight)
        return wanda_score(layer.weight, layer.inputs.norm.to(layer.weight.device))

    def solve(self, layer: Layer, sparsity: float) -> Tensor:
        """See `dsnot_mask`."""
        inputs = layer.inputs
        assert isinstance(inputs, InputMoments)
        mask = self.select(self.score(layer), sparsity)
        return dsnot_mask(
            layer.weight,
            mask,
            *(each.to(mask.device) for each in (inputs.mean, inputs.variance, inputs.norm)),
            max_cycles=self.max_cycles,
            threshold=self.threshold,
            m=self.m,
        )


def dsnot_mask(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    *,
    max_cycles: int = 50,
    threshold: float = 0.1,
    m: int | None = None,
) -> Tensor:
    """A mask that keeps as many weights of every row as ``mask``, with a smaller expected error.

    Args:
        weight: ``[out, in]``, dense, any float dtype.
        mask: ``[out, in]`` bool, from any method.
        mean: ``[in]``, expected inputs.
        variance: ``[in]``, of the inputs.
        norm: ``[in]``, L2 norms of the inputs, for the Wanda score of what goes.
        max_cycles: swaps of a row at most.
        threshold: rows whose expected error is at most this are left.
        m: swap only within groups of so many consecutive inputs, as an N:M mask needs.

    Returns:
        ``[out, in]`` bool.

    Raises:
        InputError: if a shape or a type does not match.
    """
    check_ndim("dsnot_mask", "weight", weight, 2)
    check_bool("dsnot_mask", "mask", mask)
    check_shape("dsnot_mask", "mask", mask, *weight.shape)
    for name, tensor in (("mean", mean), ("variance", variance), ("norm", norm)):
        check_shape("dsnot_mask", name, tensor, weight.shape[1])
    step = max(1, _CHUNK // max(1, weight.shape[1]))
    chunks = zip(torch.split(weight.detach().float(), step), torch.split(mask, step), strict=True)
    parts = [_swap(w, kept.clone(), mean, variance, norm, max_cycles, threshold, m) for w, kept in chunks]
    return torch.cat(parts)


def _swap(
    weight: Tensor,
    mask: Tensor,
    mean: Tensor,
    variance: Tensor,
    norm: Tensor,
    max_cycles: int,
    threshold: float,
    m: int | None,
) -> Tensor:
    effect = weight * mean
    tiny = torch.finfo(torch.float32).tiny
    worth = effect / variance.clamp_min(tiny)
    cost = wanda_score(weight, norm)
    error = (effect * ~mask).sum(1)
    first_sign = error.sign()
    # Candidates by the sign of the error that they reduce: best first, after them what may not be taken.
    grow = {sign: _ranked(-sign * worth, ~mask & (sign * effect > 0)) for sign in (1, -1)}
    drop = {sign: _ranked(cost, mask & (sign * effect < 0)) for sign in (1, -1)}
    groups = cost.masked_fill(~mask, torch.inf).view(len(cost), -1, m) if m is not None else None
    taken = {
        (which, sign): torch.zeros_like(error, dtype=torch.int64) for which in ("grow", "drop") for sign in (1, -1)
    }
    active = torch.ones_like(mask[:, 0])
    rows = torch.arange(len(weight), device=weight.device)
    for _ in range(max_cycles):
        active &= error.abs() > threshold
        sign = torch.where(error > 0, 1, -1)
        back, found = _next(grow, taken, "grow", sign)
        active &= found
        if groups is None:
            out, found = _next(drop, taken, "drop", sign)
        else:
            lowest = groups[rows, back // m].min(-1)  # type: ignore[operator]
            out, found = back // m * m + lowest.indices, lowest.values < torch.inf  # type: ignore[operator]
            groups.view(len(weight), -1)[rows, out] = torch.inf  # each is asked once
        active &= found
        after = error + effect[rows, out] - effect[rows, back]
        if m is not None:
            active &= after.sign() == first_sign
        if not active.any():
            break
        mask[rows[active], back[active]] = True
        mask[rows[active], out[active]] = False
        error = torch.where(active, after, error)
    return mask


def _ranked(key: Tensor, allowed: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each row by rising key, those not allowed last, and how many are allowed."""
    return key.masked_fill(~allowed, torch.inf).argsort(1), allowed.sum(1)


def _next(
    ranked: dict[int, tuple[Tensor, Tensor]], taken: dict[tuple[str, int], Tensor], which: str, sign: Tensor
) -> tuple[Tensor, Tensor]:
    """The next candidate of each row for the sign of its error, counted as taken, and whether there is one."""
    column, found = torch.zeros_like(sign), torch.zeros_like(sign, dtype=torch.bool)
    for side, (order, count) in ranked.items():
        mine = sign == side
        at = taken[which, side]
        column = torch.where(mine, order.gather(1, at.clamp_max(order.shape[1] - 1)[:, None])[:, 0], column)
        found |= mine & (at < count)
        at += mine
    return column, found
