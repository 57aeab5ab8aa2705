"""Matching pursuit of rows, a step of which reads a row of the atoms' Gram matrix and not the dictionary."""

import torch
from torch import Tensor

from ...checks import check_shape
from ...ops.formats import Codes
from ...ops.pursuit import check_pursuit
from ..dispatch import check_computable, check_devices, without_autocast
from . import op

__all__ = ["atom_products", "matching_pursuit"]


@without_autocast
def matching_pursuit(
    x: Tensor,
    atoms: Tensor,
    k: int,
    *,
    signed: bool = False,
    tolerance: float = 0.0,
    stop_on_repeat: bool = False,
    unit: bool = True,
    products: Tensor | None = None,
) -> Codes:
    """As `paucity.ops.pursuit.matching_pursuit`, in less time and memory.

    The gradient runs back through the steps by undoing them, so that nothing of a step is kept but its atom and value.
    bfloat16 rows are chosen for by products that are rounded to bfloat16; the values are summed in float32.

    Args:
        x: ``[..., d]``.
        atoms: ``[dict_size, d]``, the dtype of ``x``; rows of norm 1 if ``unit``.
        k: steps.
        signed: choose by absolute product.
        tolerance: a row ends after a step that leaves a residual of a smaller norm.
        stop_on_repeat: a row ends after a step that takes an atom again.
        unit: refuse atoms that do not have norm 1.
        products: ``[dict_size, dict_size]``, `atom_products` of the same atoms, where many batches are coded with them;
            no gradient flows to it.
    """
    name = "matching_pursuit"
    check_computable(name, "x", x)
    check_pursuit(name, x, atoms, k, tolerance, unit)
    check_devices(name, x.device, atoms=atoms, products=products)
    if products is not None:
        check_shape(name, "products", products, len(atoms), len(atoms))
        products = products.detach().to(atoms.dtype)
    rows = x.reshape(-1, x.shape[-1])
    values, indices, _ = op.pursuit(rows, atoms, products, k, signed, float(tolerance), stop_on_repeat)
    shape = (*x.shape[:-1], k)
    return Codes(values.view(shape), indices.view(shape), len(atoms))


@without_autocast
@torch.no_grad()
def atom_products(atoms: Tensor) -> Tensor | None:
    """The products of all pairs of ``atoms [dict_size, d]``; None where `matching_pursuit` would not use them."""
    return op.atom_products(atoms)
