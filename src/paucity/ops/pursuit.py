"""Greedy codes: atom after atom, each chosen by its product with what is left of a row.

Rows are coded for themselves; atoms have norm 1. Matching pursuit takes the product as the value and may take an atom
again (Mallat & Zhang 1993); orthogonal matching pursuit solves for all values after each choice (Pati et al. 1993),
with a Cholesky factor that grows by a row (Rubinstein et al. 2008, "Efficient Implementation of the K-SVD Algorithm
using Batch Orthogonal Matching Pursuit").
"""

import torch
from torch import Tensor

from ..checks import InputTypeError, check_floating, check_int, check_range, check_shape, fail
from .formats import Codes


def matching_pursuit(
    x: Tensor,
    atoms: Tensor,
    k: int,
    *,
    signed: bool = False,
    tolerance: float = 0.0,
    stop_on_repeat: bool = False,
    unit: bool = True,
) -> Codes:
    """Codes by matching pursuit: the atom with the largest product with the residual, ``k`` times.

    Choices have no gradient, values have: each is the product of its atom with a residual that depends on the earlier
    ones. Sums run in float32 (float64 for float64). `paucity.kernels.pursuit` computes the same faster.

    Args:
        x: ``[..., d]``, any float dtype.
        atoms: ``[dict_size, d]``, rows of norm 1, the dtype of ``x``.
        k: steps, at least 1.
        signed: choose by absolute product; else a row ends where no product is positive.
        tolerance: a row ends after a step that leaves a residual of a smaller norm.
        stop_on_repeat: a row ends after a step that takes an atom again.
        unit: refuse atoms that do not have norm 1. With others the value is still the product, so that a step lowers
            the error only where its atom's squared norm is below 2.

    Returns:
        Codes ``[..., k]`` in the order of the choices (indices int32); slots after a row's end have value 0.

    Raises:
        InputError: if shapes do not fit, atoms do not have norm 1, or a number is out of range.
        InputTypeError: if a dtype does not fit.
    """
    check_pursuit("matching_pursuit", x, atoms, k, tolerance, unit)
    rows = x.reshape(-1, x.shape[-1])
    values, indices, _ = pursue(rows, atoms, k, signed, tolerance, stop_on_repeat)
    shape = (*x.shape[:-1], k)
    return Codes(values.view(shape), indices.view(shape), len(atoms))


def pursue(
    x: Tensor, atoms: Tensor, k: int, signed: bool, tolerance: float, stop_on_repeat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """`matching_pursuit` of rows ``[n, d]``: values ``[n, k]``, indices ``[n, k]`` int32, residuals ``[n, d]``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    left, table = x.to(wide), atoms.to(wide)
    alive = torch.ones(len(x), dtype=torch.bool, device=x.device)
    chosen = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    values: list[Tensor] = []
    for step in range(k):
        with torch.no_grad():
            product = left @ table.T
            best, index = (product.abs() if signed else product).max(1)
            alive = alive & (best > 0)
            chosen[:, step] = index
        atom = table[index]
        value = (left * atom).sum(1) * alive
        value = value if signed else value.relu()  # a product at rounding's size may turn
        left = left - value.unsqueeze(1) * atom
        values.append(value)
        with torch.no_grad():
            alive = alive & (value != 0) & (left.norm(dim=1) >= tolerance)
            if stop_on_repeat:
                alive = alive & ~(chosen[:, :step] == index.unsqueeze(1)).any(1)
    found = torch.stack(values, 1)
    return found.to(x.dtype), chosen.masked_fill(found == 0, 0).int(), left.to(x.dtype)


@torch.no_grad()
def orthogonal_matching_pursuit(x: Tensor, atoms: Tensor, k: int, *, tolerance: float = 0.0) -> Codes:
    """Codes by orthogonal matching pursuit: after each choice, the values of least squares on all atoms chosen.

    Values have either sign; no gradient flows. A row also ends where nothing but rounding is left, or where its next
    atom lies in the span of those it has.

    Args:
        x: ``[..., d]``, any float dtype.
        atoms: ``[dict_size, d]``, rows of norm 1, the dtype of ``x``.
        k: steps, at most ``min(dict_size, d)``.
        tolerance: a row ends once its residual's norm is at most this.

    Returns:
        Codes ``[..., k]`` in the order of the choices; slots after a row's end have value 0.

    Raises:
        InputError: if shapes do not fit, atoms do not have norm 1, or a number is out of range.
        InputTypeError: if a dtype does not fit.
    """
    name = "orthogonal_matching_pursuit"
    check_pursuit(name, x, atoms, k, tolerance)
    check_int(name, "k", k, 1, min(atoms.shape))
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, table = x.reshape(-1, x.shape[-1]).to(wide), atoms.to(wide)
    count, tiny = len(rows), 100 * torch.finfo(wide).eps
    left, alive = rows, torch.ones(count, dtype=torch.bool, device=x.device)
    chosen = torch.zeros(count, k, dtype=torch.int64, device=x.device)
    factor = torch.eye(k, dtype=wide, device=x.device).repeat(count, 1, 1)
    first, values = rows.new_zeros(count, k), rows.new_zeros(count, k)
    enough = (tiny * rows.norm(dim=1)).clamp_min(tolerance)
    for step in range(k):
        product = (left @ table.T).abs()
        product.scatter_(1, chosen[:, :step], -1.0)
        best, index = product.max(1)
        atom, before = table[index], chosen[:, :step]
        alive = alive & (best > 0) & (left.norm(dim=1) > enough)
        if step:
            cross = (table[before] @ atom.unsqueeze(2)).squeeze(2)
            row = torch.linalg.solve_triangular(factor[:, :step, :step], cross.unsqueeze(2), upper=False).squeeze(2)
            beyond = 1 - row.square().sum(1)
            alive = alive & (beyond > tiny)
            factor[:, step, :step] = torch.where(alive.unsqueeze(1), row, 0)
            factor[:, step, step] = torch.where(alive, beyond, 1).sqrt()
        chosen[:, step] = index
        first[:, step] = (rows * atom).sum(1) * alive
        part = factor[:, : step + 1, : step + 1]
        solved = torch.cholesky_solve(first[:, : step + 1].unsqueeze(2), part).squeeze(2)
        values[:, : step + 1] = torch.where(alive.unsqueeze(1), solved, values[:, : step + 1])
        made = (values[:, : step + 1].unsqueeze(1) @ table[chosen[:, : step + 1]]).squeeze(1)
        left = rows - made
        if not bool(alive.any()):
            break
    indices = chosen.masked_fill(values == 0, 0).int()
    shape = (*x.shape[:-1], k)
    return Codes(values.to(x.dtype).view(shape), indices.view(shape), len(atoms))


def check_pursuit(function: str, x: Tensor, atoms: Tensor, k: int, tolerance: float, unit: bool = True) -> None:
    """Raise unless ``x [..., d]`` can be coded in ``k`` steps with ``atoms [dict_size, d]``, of norm 1 if ``unit``."""
    check_floating(function, "x", x)
    if x.ndim == 0:
        raise fail(function, "x", "have at least 1 dimension", "a scalar")
    check_shape(function, "atoms", atoms, None, x.shape[-1])
    check_int(function, "the number of atoms", len(atoms))
    if atoms.dtype != x.dtype:
        raise InputTypeError(f"{function}: atoms must be {x.dtype} like x, got {atoms.dtype}.")
    check_int(function, "k", k)
    check_range(function, "tolerance", tolerance, 0)
    if not unit:
        return
    norms = atoms.detach().norm(dim=1, dtype=torch.promote_types(atoms.dtype, torch.float32))
    slack = 0.02 if atoms.element_size() == 2 else 1e-3
    low, high = (float(end) for end in norms.aminmax())
    if not (abs(low - 1) <= slack and abs(high - 1) <= slack):
        raise fail(function, "atoms", "have norm 1", f"norms from {low:g} to {high:g}")
