"""Sparse codes by proximal gradient: step towards less error, then shrink or cut.

Each minimises ``||x - a D||^2 / 2 + penalty(a)`` over rows ``a`` by ``a <- prox(a + mu (x - a D) D^T)`` with the step
``mu = 1 / ||D||^2`` (ISTA); FISTA extrapolates between steps (Beck & Teboulle 2009). The penalty is the shrink's:
``lambda |a|_1`` for `soft_threshold`, ``lambda |a|_0`` for `hard_threshold`, and CEL0, the tightest continuous
relaxation of the latter (Soubies et al. 2015, https://arxiv.org/abs/1412.4220), for `cel0_threshold`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import InputTypeError, check_choice, check_floating, check_int, check_range, check_shape, fail
from .formats import Codes

Shrink = Callable[[Tensor, float, float], Tensor]


def soft_threshold(u: Tensor, penalty: float, step: float = 1.0) -> Tensor:
    """``sign(u) max(|u| - step * penalty, 0)``: the prox of the l1 norm."""
    return u.sign() * (u.abs() - step * penalty).clamp_min(0)


def hard_threshold(u: Tensor, penalty: float, step: float = 1.0) -> Tensor:
    """``u`` where ``|u| > sqrt(2 step penalty)``, else 0: the prox of the number of nonzeros."""
    return torch.where(u.abs() > (2 * step * penalty) ** 0.5, u, 0)


def cel0_threshold(u: Tensor, penalty: float, step: float = 1.0) -> Tensor:
    """The prox of CEL0 for an atom of norm 1: between soft and hard.

    ``sign(u) min(|u|, max(|u| - step sqrt(2 penalty), 0) / (1 - step))`` for ``step < 1``, else `hard_threshold`.
    """
    if step >= 1:
        return hard_threshold(u, penalty, step)
    size = u.abs()
    raised = (size - step * (2 * penalty) ** 0.5).clamp_min(0) / (1 - step)
    return u.sign() * torch.minimum(size, raised)


SHRINKS: dict[str, Shrink] = {"soft": soft_threshold, "hard": hard_threshold, "cel0": cel0_threshold}


@torch.no_grad()
def proximal_codes(
    x: Tensor,
    atoms: Tensor,
    penalty: float,
    *,
    shrink: str = "soft",
    accelerate: bool = False,
    num_steps: int = 200,
    tolerance: float = 1e-5,
    start: Tensor | None = None,
    nonnegative: bool = False,
) -> Codes:
    """Codes by ISTA, or by FISTA where ``accelerate``; no gradient flows.

    Args:
        x: ``[..., d]``, float.
        atoms: ``[dict_size, d]``, the dtype of ``x``; of norm 1 for CEL0.
        penalty: ``lambda``, at least 0.
        shrink: ``soft`` (l1), ``hard`` (l0) or ``cel0``.
        accelerate: FISTA; it is defined for convex penalties only, so for ``soft``.
        num_steps: most steps.
        tolerance: stop once a step changes no entry by more than this times the largest entry.
        start: ``[..., dict_size]``, the first codes; zeros if not given. It matters for ``hard`` and ``cel0``.
        nonnegative: cut negative entries off in every step.

    Returns:
        Codes with as many slots as the densest row has nonzeros (at least 1), atoms ascending.

    Raises:
        InputError: if a shape, a number or a choice does not fit.
        InputTypeError: if a dtype does not fit.
    """
    name = "proximal_codes"
    _check(name, x, atoms, penalty, shrink, accelerate, num_steps, tolerance)
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, table = x.reshape(-1, x.shape[-1]).to(wide), atoms.to(wide)
    cut, step = SHRINKS[shrink], 1 / float(torch.linalg.matrix_norm(table, 2).square().clamp_min(1e-12))
    codes = rows.new_zeros(len(rows), len(table))
    if start is not None:
        check_shape(name, "start", start, *x.shape[:-1], len(atoms))
        codes = start.reshape(-1, len(atoms)).to(wide)
    gram, target = table @ table.T, rows @ table.T
    ahead, momentum = codes, 1.0
    for _ in range(num_steps):
        moved = cut(ahead + step * (target - ahead @ gram), penalty, step)
        moved = moved.clamp_min(0) if nonnegative else moved
        change, largest = float((moved - codes).abs().max()), float(moved.abs().max())
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2 if accelerate else 1.0
        ahead = moved + ((momentum - 1) / following) * (moved - codes) if accelerate else moved
        codes, momentum = moved, following
        if change <= tolerance * largest:
            break
    most = max(1, int((codes != 0).sum(1).max()))
    return Codes.from_dense(codes.to(x.dtype).view(*x.shape[:-1], len(atoms)), most)


def _check(
    name: str, x: Tensor, atoms: Tensor, penalty: float, shrink: str, accelerate: bool, steps: int, tolerance: float
) -> None:
    check_floating(name, "x", x)
    if x.ndim == 0 or not x.numel():
        raise fail(name, "x", "hold at least one row", f"shape {list(x.shape)}")
    check_shape(name, "atoms", atoms, None, x.shape[-1])
    check_int(name, "the number of atoms", len(atoms))
    if atoms.dtype != x.dtype:
        raise InputTypeError(f"{name}: atoms must be {x.dtype} like x, got {atoms.dtype}.")
    check_range(name, "penalty", penalty, 0)
    check_choice(name, "shrink", shrink, SHRINKS)
    check_int(name, "num_steps", steps)
    check_range(name, "tolerance", tolerance, 0)
    if accelerate and shrink != "soft":
        raise fail(name, "accelerate", "be False for a penalty that is not convex", f"True with {shrink}")
