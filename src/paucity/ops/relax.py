"""Relaxations: how a gradient passes through a choice.

`ste` and `sr_ste` are for a mask that is given; `gumbel_topk` draws the choice and `smooth_step` softens a threshold.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_bool, check_floating, check_int, check_range, check_shape, fail
from .select import topk_mask


def ste(weight: Tensor, mask: Tensor) -> Tensor:
    """``weight`` where ``mask``, else 0; the gradient passes straight through, also to the removed entries.

    Paper: Bengio et al. 2013, https://arxiv.org/abs/1308.3432.

    Args:
        weight: any shape, float.
        mask: bool, same shape.
    """
    return _straight_through("ste", weight, mask, 0.0)


def sr_ste(weight: Tensor, mask: Tensor, *, decay: float = 2e-4) -> Tensor:
    """Sparse-refined straight-through: as `ste`, and removed entries decay, so that masks settle.

    The gradient is ``g + decay * (1 - mask) * weight``. Paper: Zhou et al. 2021, https://arxiv.org/abs/2102.04010.

    Args:
        weight: any shape, float.
        mask: bool, same shape.
        decay: lambda, at least 0; it acts once for each backward pass, whatever the scale of the loss.

    Raises:
        InputError: if shapes differ or ``decay`` is negative.
    """
    check_range("sr_ste", "decay", decay, 0)
    return _straight_through("sr_ste", weight, mask, float(decay))


def gumbel_topk(
    logits: Tensor,
    *,
    k: int = 1,
    temperature: float = 1.0,
    hard: bool = False,
    dim: int = -1,
    generator: torch.Generator | None = None,
) -> Tensor:
    """A relaxed random subset of ``k`` entries a row, drawn without replacement in proportion to ``softmax(logits)``.

    Adds Gumbel noise and sums ``k`` successive softmaxes, each of which takes what the earlier ones left. ``k=1`` is
    Gumbel-softmax (Jang et al. 2016, https://arxiv.org/abs/1611.01144); ``k > 1`` is Xie & Ermon 2019,
    https://arxiv.org/abs/1901.10517.

    Args:
        logits: any shape, float; -inf is never drawn.
        k: how many.
        temperature: towards 0 the result is the subset itself.
        hard: return the subset (exactly 0 or 1), with the gradient of the relaxed one.
        dim: the dimension drawn from.
        generator: on the device of ``logits``; the global one by default.

    Returns:
        Weights of at least 0 that sum to ``k`` along ``dim``, with the shape and dtype of ``logits``. With ``k > 1`` a
        relaxed weight can lie above 1, as in the paper.

    Raises:
        InputError: if a row has fewer than ``k`` finite logits, or a NaN or +inf among them.
    """
    check_floating("gumbel_topk", "logits", logits)
    if not logits.ndim:
        raise fail("gumbel_topk", "logits", "have at least 1 dimension", "a scalar")
    check_int("gumbel_topk", "dim", dim, -logits.ndim, logits.ndim - 1)
    check_int("gumbel_topk", "k", k, 1, logits.shape[dim])
    check_range("gumbel_topk", "temperature", temperature, 0, open_low=True)
    finite = logits.isfinite()
    if not (finite | logits.isneginf()).all() or (finite.sum(dim) < k).any():
        raise fail("gumbel_topk", "logits", f"be finite or -inf, with at least {k} finite in a row", "others")
    wide = torch.promote_types(logits.dtype, torch.float32)
    exponential = torch.empty_like(logits, dtype=wide).exponential_(generator=generator)
    keys = logits.to(wide) - exponential.clamp_min(torch.finfo(wide).tiny).log()
    left, soft = keys, torch.zeros_like(keys)
    for draw in range(k):
        scaled = left / temperature
        soft = soft + scaled.softmax(dim)
        if draw + 1 < k:
            left = left + _log_not_drawn(scaled, dim)
    if hard:
        soft = topk_mask(keys, k=k, dim=dim) + (soft - soft.detach())
    return soft.to(logits.dtype)


def smooth_step(x: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Smooth-step: exactly 0 below ``-gamma / 2``, exactly 1 above ``gamma / 2``, a cubic between.

    The cubic is ``-2 / gamma^3 x^3 + 3 / (2 gamma) x + 1/2``; value and gradient are continuous, the gradient outside
    is 0. Paper: Hazimeh et al. 2020, https://arxiv.org/abs/2002.07772.

    Examples:
        >>> smooth_step(torch.tensor([-0.5, 0.0, 0.25, 2.0]))
        tensor([0.0000, 0.5000, 0.8438, 1.0000])
    """
    check_floating("smooth_step", "x", x)
    check_range("smooth_step", "gamma", gamma, 0, open_low=True)
    unit = (x / gamma).clamp(-0.5, 0.5)
    return 0.5 + unit * (1.5 - 2 * unit**2)


class _StraightThrough(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, decay: float) -> Tensor:
        return weight.masked_fill(~mask, 0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        weight, mask, ctx.decay = inputs
        if ctx.decay:
            ctx.save_for_backward(weight, mask)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad,) = grads
        if ctx.decay:
            weight, mask = ctx.saved_tensors
            grad = grad + ctx.decay * weight.masked_fill(mask, 0)
        return grad, None, None


def _straight_through(function: str, weight: Tensor, mask: Tensor, decay: float) -> Tensor:
    check_floating(function, "weight", weight)
    check_bool(function, "mask", mask)
    check_shape(function, "mask", mask, *weight.shape)
    result: Tensor = _StraightThrough.apply(weight, mask, decay)  # type: ignore[no-untyped-call]
    return result


def _log_not_drawn(scaled: Tensor, dim: int) -> Tensor:
    """``log(1 - softmax(scaled))``; at the largest entry from the others, since 1 - p loses all digits near p = 1."""
    largest = scaled.argmax(dim, keepdim=True)
    is_largest = torch.zeros_like(scaled, dtype=torch.bool).scatter(dim, largest, True)
    rest = scaled.masked_fill(is_largest, -torch.inf).logsumexp(dim, keepdim=True) - scaled.logsumexp(dim, keepdim=True)
    prob = scaled.softmax(dim).masked_fill(is_largest, 0)
    return torch.where(is_largest, rest, torch.log1p(-prob))
