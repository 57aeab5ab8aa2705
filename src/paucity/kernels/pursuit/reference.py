"""What matching pursuit computes: the residual is multiplied with all atoms in every step; and its gradient."""

import torch
from torch import Tensor

from ...ops import pursuit


@torch.no_grad()
def pursue(
    x: Tensor, atoms: Tensor, products: Tensor | None, k: int, signed: bool, tolerance: float, stop_on_repeat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """See `paucity.ops.pursuit.pursue`; ``products`` are not used."""
    return pursuit.pursue(x, atoms, k, signed, tolerance, stop_on_repeat)


def atom_products(atoms: Tensor) -> Tensor | None:
    """None: they are not used."""
    return None


def backward(
    grad_values: Tensor, grad_residual: Tensor, values: Tensor, indices: Tensor, residual: Tensor, atoms: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` and ``atoms``, from the last step to the first, each of which is undone.

    With ``r' = r - v d`` and ``v = r . d`` of a step, and the gradient ``g'`` of ``r'``: ``h = grad_v - d . g'``,
    ``grad_d = h r - v g'`` and ``g = g' + h d``.
    """
    wide = torch.promote_types(values.dtype, torch.float32)
    left, back, table = residual.to(wide, copy=True), grad_residual.to(wide, copy=True), atoms.to(wide)
    grad_atoms = torch.zeros_like(table)
    # Slots are filled from the front: steps that no row took are left out.
    for step in reversed(range(int((values != 0).any(0).sum()))):
        value, index = values[:, step : step + 1].to(wide), indices[:, step].long()
        used = value != 0
        atom = table[index]
        left += value * atom
        rise = torch.where(used, grad_values[:, step : step + 1] - (atom * back).sum(1, keepdim=True), 0)
        grad_atoms.index_add_(0, index, rise * left - value * back)
        back += rise * atom
    return back.to(values.dtype), grad_atoms.to(atoms.dtype)
