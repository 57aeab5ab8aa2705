"""Budgets by how much each part does, with names and shapes as in `paucity.ops.budget`."""

import math
from collections.abc import Mapping

from ..checks import check_range, fail
from .budget import Shapes, _check_names, _sizes

_ROOM = 1.05
"""The densest part keeps this much less than all where the others would have to make up for it."""


def by_importance(
    shapes: Shapes, *, sparsity: float, importance: Mapping[str, float], sharpness: float = 1.0
) -> dict[str, float]:
    """Density in proportion to a sigmoid of the importance: the more a part does, the denser.

    ``density_l = (1 - sparsity) * s_l / mean(s)``, ``s_l = sigmoid(sharpness * (importance_l - mean(importance)))``.
    Paper: Wang et al. 2024 (CFSP), https://arxiv.org/abs/2409.13199, the coarse-grained step. As in the authors' code,
    values that would keep more than everything are drawn towards their mean first. There all parts are equal blocks;
    here the means are weighted by size.

    Args:
        shapes: see `paucity.ops.budget`.
        sparsity: see there.
        importance: name to importance, for exactly the names of ``shapes``, in a unit in which 1 is much.
        sharpness: 0 gives the same sparsity everywhere.

    Raises:
        InputError: if the names differ, or a value is not finite.

    Examples:
        >>> by_importance({"a": (1,), "b": (1,)}, sparsity=0.5, importance={"a": 1.0, "b": 1.0})
        {'a': 0.5, 'b': 0.5}
    """
    sizes = _sizes("by_importance", shapes, sparsity)
    check_range("by_importance", "sharpness", sharpness, 0)
    _check_names("by_importance", "importance", importance, sizes)
    for name in sizes:
        if name not in importance:
            raise fail("by_importance", "importance", "have an entry for every shape", f"none for {name}")
        check_range("by_importance", f"importance of {name}", importance[name], -math.inf, math.inf, open_high=True)
    if sparsity == 0:
        return dict.fromkeys(sizes, 0.0)
    total = sum(sizes.values())
    centre = sum(importance[name] * size for name, size in sizes.items()) / total
    share = {name: _sigmoid(sharpness * (importance[name] - centre)) for name in sizes}
    mean = sum(share[name] * size for name, size in sizes.items()) / total
    highest = max(share.values())
    if highest / mean * (1 - sparsity) >= 1:
        scale = mean * (1 / (1 - sparsity) - 1) / (highest - mean) / _ROOM
        share = {name: mean + (value - mean) * scale for name, value in share.items()}
    return {
        name: min(max(1 - (1 - sparsity) * value / mean, 0.0), math.nextafter(1, 0)) for name, value in share.items()
    }


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
