"""Floating-point operations as executed, a multiplication and an addition counted as two.

Only products of matrices and vectors, attention and convolutions count. A zero in a dense product is multiplied and so
counted; what a kernel skips is not. Inside a compiled function (``torch.compile``) nothing is seen.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

aten = torch.ops.aten


def flops(function: Callable[[], object]) -> int:
    """FLOPs that ``function`` executes; see `flops_by_operator`."""
    return sum(flops_by_operator(function).values())


def flops_by_operator(function: Callable[[], object]) -> dict[str, int]:
    """FLOPs that ``function`` executes, by operator (``aten.mm``).

    Causal attention in one fused operator counts the visible entries alone, row by row; with a mask given as a tensor
    it counts all, as the kernels compute all. Grouped queries count once a query head. An operator from outside
    PyTorch counts by the formula given to ``torch.utils.flop_counter.register_flop_formula``.

    Warns:
        UserWarning: naming operators from outside PyTorch without a formula, which count as 0.
    """
    counter = FlopCounterMode(display=False, custom_mapping=_formulas())
    with counter, _Unknown(set(counter.flop_registry)) as unknown:
        function()
    if unknown.names:
        text = f"flops: no formula for {', '.join(sorted(unknown.names))}; counted as 0."
        warnings.warn(text, UserWarning, stacklevel=3)
    return {str(op): count for op, count in counter.get_flop_counts().get("Global", {}).items()}


def attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *, is_causal: bool = False
) -> int:
    """FLOPs of both products of attention.

    Args:
        query: shape ``[B, H, T, D]``.
        key: shape ``[B, H_kv, S, D]``.
        value: shape ``[B, H_kv, S, D_v]``.
        is_causal: whether row i sees keys 0 to i only, as in PyTorch.
    """
    rows, keys = query[-2], key[-2]
    seen = min(rows, keys)
    entries = seen * (seen + 1) // 2 + (rows - seen) * keys if is_causal else rows * keys
    return 2 * math.prod(query[:-2]) * entries * (query[-1] + value[-1])


def _fused_attention(op: Any, products: float) -> Callable[..., int]:
    """Formula of a fused attention operator, its arguments found by the names in its schema.

    Args:
        op: the operator, with ``query``, ``key`` and ``value`` among its arguments.
        products: pairs of products done: 1 forward, 2.5 backward (scores again, then four gradients).
    """
    names = [argument.name for argument in op.default._schema.arguments]

    def formula(*args: Any, out_shape: Any = None, **options: Any) -> int:
        given = dict(zip(names, args, strict=False)) | options
        causal = bool(given.get("is_causal", False))
        return int(products * attention_flops(given["query"], given["key"], given["value"], is_causal=causal))

    return formula


def _grouped_mm_flops(a: tuple[int, ...], b: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Rows of ``a`` shared out over the matrices of ``b``: each row meets one of them."""
    rows = math.prod(a) // (a[0] if len(a) == 3 and len(b) == 2 else 1)
    return 2 * rows * b[-1]


def _formulas() -> dict[Any, Callable[..., int]]:
    """Formulas that PyTorch lacks, or that ignore the causal half there."""
    found: dict[Any, Callable[..., int]] = {
        aten.mv: lambda a, b, **_: 2 * math.prod(a),
        aten.addmv: lambda c, a, b, **_: 2 * math.prod(a),
        aten.dot: lambda a, b, **_: 2 * math.prod(a),
        aten.vdot: lambda a, b, **_: 2 * math.prod(a),
        aten.addbmm: lambda c, a, b, **_: 2 * math.prod(a) * b[-1],
        aten._addmm_activation: lambda c, a, b, **_: 2 * math.prod(a) * b[-1],
    }
    for suffix in ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention"):
        name = f"_scaled_dot_product_{suffix}"
        found[getattr(aten, name)] = _fused_attention(getattr(aten, name), 1)
        found[getattr(aten, f"{name}_backward")] = _fused_attention(getattr(aten, f"{name}_backward"), 2.5)
    for namespace, name in ((aten, "_grouped_mm"), (torch.ops.transformers, "grouped_mm_fallback")):
        if hasattr(namespace, name):  # present from some version on, or once a mixture of experts was loaded
            found[getattr(namespace, name)] = _grouped_mm_flops
    return found


class _Unknown(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the names of operators from outside PyTorch that have no formula and run as one piece."""

    def __init__(self, known: set[Any]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.known = known
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if isinstance(func, torch._ops.OpOverload):
            ours = func.namespace in ("aten", "prim", "prims", "inductor", "profiler")
            if not ours and func._overloadpacket not in self.known and not func._can_decompose():
                self.names.add(str(func._overloadpacket))
        result: Tensor = func(*args, **(kwargs or {}))
        return result
