"""The operators ``paucity::pursuit`` and ``paucity::pursuit_backward`` on rows."""

from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch


def _twin(tensor: Tensor) -> ModuleType:
    return dispatch.module("matching pursuit", tensor, __package__)


@torch.library.custom_op("paucity::pursuit", mutates_args=())
def pursuit(
    x: Tensor, atoms: Tensor, products: Tensor | None, k: int, signed: bool, tolerance: float, stop_on_repeat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``[n, d], [m, d], [m, m] -> [n, k], [n, k], [n, d]``; see `reference.pursue`."""
    values, indices, residual = _twin(x).pursue(x, atoms, products, k, signed, tolerance, stop_on_repeat)
    return values, indices, residual


@torch.library.custom_op("paucity::pursuit_backward", mutates_args=())
def pursuit_backward(
    grad_values: Tensor, grad_residual: Tensor, values: Tensor, indices: Tensor, residual: Tensor, atoms: Tensor
) -> tuple[Tensor, Tensor]:
    """``-> [n, d], [m, d]``; see `reference.backward`."""
    x, table = _twin(values).backward(grad_values, grad_residual, values, indices, residual, atoms)
    return x, table


def atom_products(atoms: Tensor) -> Tensor | None:
    """See the twins."""
    products: Tensor | None = _twin(atoms).atom_products(atoms)
    return products


@pursuit.register_fake
def _(
    x: Tensor, atoms: Tensor, products: Tensor | None, k: int, signed: bool, tolerance: float, stop_on_repeat: bool
) -> tuple[Tensor, Tensor, Tensor]:
    indices = x.new_empty(x.shape[0], k, dtype=torch.int32)
    return x.new_empty(x.shape[0], k), indices, torch.empty_like(x, memory_format=torch.contiguous_format)


@pursuit_backward.register_fake
def _(
    grad_values: Tensor, grad_residual: Tensor, values: Tensor, indices: Tensor, residual: Tensor, atoms: Tensor
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(residual), torch.empty_like(atoms)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    values, indices, residual = output
    ctx.mark_non_differentiable(indices)
    ctx.save_for_backward(values, indices, residual, inputs[1])


def _backward(ctx: Any, grad_values: Tensor, _: Tensor, grad_residual: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, residual, atoms = ctx.saved_tensors
    x, table = pursuit_backward(grad_values, grad_residual, values, indices, residual, atoms)
    return x, table, None, None, None, None, None


pursuit.register_autograd(_backward, setup_context=_keep)


@register_flop_formula(torch.ops.paucity.pursuit, get_raw=True)  # type: ignore[untyped-decorator]
def _flops(x: Tensor, atoms: Tensor, products: Tensor | None, k: int, *_: Any, **__: Any) -> int:
    first = 2 * x.shape[0] * atoms.numel()
    return first * k if products is None else first + 2 * x.shape[0] * (k - 1) * len(atoms)


@register_flop_formula(torch.ops.paucity.pursuit_backward, get_raw=True)  # type: ignore[untyped-decorator]
def _backward_flops(grad_values: Tensor, grad_residual: Tensor, *_: Any, **__: Any) -> int:
    return 10 * grad_values.numel() * grad_residual.shape[1]
