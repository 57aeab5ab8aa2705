"""The C++ twin; see csrc/kernels/pursuit.cpp."""

import torch
from torch import Tensor

from ..native import DTYPES, FLOAT, INT, Pointer, function
from . import reference

_pursuit = function("pursuit", *[Pointer] * 7, FLOAT, *[INT] * 7)
_ROWS = 4096  # whose products with all atoms are held at a time
_MOST = 2 << 30  # bytes of a Gram matrix

backward = reference.backward


def pursue(
    x: Tensor, atoms: Tensor, products: Tensor | None, k: int, signed: bool, tolerance: float, stop_on_repeat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As there, for float32 and bfloat16, by the Gram matrix where it is there or saves more than it costs."""
    (n, d), m = x.shape, len(atoms)
    if products is None and n * (k - 1) > m:
        products = atom_products(atoms)
    if products is None and k > 1:
        return reference.pursue(x, atoms, None, k, signed, tolerance, stop_on_repeat)
    x, atoms = x.contiguous(), atoms.contiguous()
    products = atoms if products is None else products.contiguous()  # a single step reads none
    values, indices = x.new_empty(n, k), x.new_empty(n, k, dtype=torch.int32)
    residual = torch.empty_like(x)
    sizes = (m, d, k, signed, stop_on_repeat, DTYPES[x.dtype])
    for start in range(0, n, _ROWS):
        part = slice(start, start + _ROWS)
        rows = x[part]
        outs = (values[part], indices[part], residual[part])
        _pursuit(rows, atoms, products, rows @ atoms.T, *outs, tolerance, len(rows), *sizes)
    return values, indices, residual


def atom_products(atoms: Tensor) -> Tensor | None:
    """``[dict_size, dict_size]``, or None where it would not fit."""
    return atoms @ atoms.T if len(atoms) ** 2 * atoms.element_size() <= _MOST else None
