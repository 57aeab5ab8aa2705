"""Budgets: how much stays in each of several parts that together must lose a given fraction.

An allocator takes ``shapes`` (name to the shape of a weight, in model order) and the overall ``sparsity``, and returns
name to sparsity. The returned values lie in [0, 1) and their mean, weighted by the number of entries, is ``sparsity``
to float accuracy; where that cannot be, an InputError says so. Rounding to whole entries is left to `select.num_kept`.
"""

import itertools
import math
from collections.abc import Callable, Collection, Mapping

import numpy as np
import torch
from torch import Tensor

from ..checks import check_floating, check_int, check_range, check_sparsity, did_you_mean, fail

Shapes = Mapping[str, tuple[int, ...]]


def uniform(shapes: Shapes, *, sparsity: float) -> dict[str, float]:
    """The same sparsity everywhere."""
    return dict.fromkeys(_sizes("uniform", shapes, sparsity), sparsity)


def uniform_plus(
    shapes: Shapes, *, sparsity: float, first: str | None = None, last: str | None = None, last_density: float = 0.2
) -> dict[str, float]:
    """Uniform, except that the first convolution stays dense and the last fully connected layer keeps ``last_density``.

    Paper: Gale et al. 2019, https://arxiv.org/abs/1902.09574: the last layer is at most 80 % sparse.

    Args:
        shapes: see the module.
        sparsity: see the module.
        first: the name to keep dense; by default the first of at least 4 dimensions (a two-dimensional convolution;
            stacked experts and one-dimensional convolutions look alike with 3 and must be named), none where there is
            none.
        last: the name to hold at ``last_density`` or more; by default the last of 2 dimensions, none where there is
            none.
        last_density: in [0, 1].

    Raises:
        InputError: if a name is unknown, or the other layers would have to lose everything.
    """
    sizes = _sizes("uniform_plus", shapes, sparsity)
    check_range("uniform_plus", "last_density", last_density, 0, 1)
    _check_names("uniform_plus", "first", [] if first is None else [first], sizes)
    _check_names("uniform_plus", "last", [] if last is None else [last], sizes)
    first = first or next((name for name, shape in shapes.items() if len(shape) >= 4), None)
    last = last or next((name for name, shape in reversed(list(shapes.items())) if len(shape) == 2), None)
    if sparsity == 0:
        return dict.fromkeys(sizes, 0.0)
    kept = (1 - sparsity) * sum(sizes.values())
    fixed = {} if first is None else {first: 1.0}
    density = _rest(sizes, fixed, kept)
    if last is not None and last not in fixed and density < last_density:
        fixed[last] = last_density
        density = _rest(sizes, fixed, kept)
    if density <= 0:
        raise fail("uniform_plus", "sparsity", f"be reachable with {', '.join(fixed)} kept denser", sparsity)
    return {name: 1 - fixed.get(name, density) for name in sizes}


def erk(shapes: Shapes, *, sparsity: float) -> dict[str, float]:
    """Erdos-Renyi-Kernel: density proportional to ``sum(shape) / prod(shape)``, so that small layers stay denser.

    Layers that would need more than all their weights stay dense and the others take the difference.
    Paper: Evci et al. 2020 (RigL), https://arxiv.org/abs/1911.11134, Section 3 (1). Two-dimensional shapes get plain
    Erdos-Renyi, Mocanu et al. 2018, https://arxiv.org/abs/1707.04780.

    Examples:
        >>> erk({"small": (10, 10), "large": (100, 100)}, sparsity=0.8)["small"]
        0.0
    """
    sizes = _sizes("erk", shapes, sparsity)
    if sparsity == 0:
        return dict.fromkeys(sizes, 0.0)
    kept = _fill(
        [math.log(sum(shape)) for shape in shapes.values()], list(sizes.values()), (1 - sparsity) * sum(sizes.values())
    )
    return {name: max(0.0, 1 - count / size) for (name, size), count in zip(sizes.items(), kept, strict=True)}


def outlier_ratio(score: Tensor, *, multiple: float = 5.0) -> float:
    """The fraction of entries above ``multiple`` times the mean score: the layerwise outlier distribution at one layer.

    Paper: Yin et al. 2023 (OWL), https://arxiv.org/abs/2310.05175, Section 3, with Wanda's score and M = 5.

    Args:
        score: any shape, float, non-negative; for a transformer block the scores of all its matrices, flattened into
            one.
        multiple: M.

    Raises:
        InputError: if ``score`` is empty or its mean is not finite.

    Examples:
        >>> outlier_ratio(torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 99.0]))
        0.125
    """
    check_floating("outlier_ratio", "score", score)
    check_range("outlier_ratio", "multiple", multiple, 0, open_low=True)
    mean = float(score.detach().mean(dtype=torch.float64))
    if not math.isfinite(mean):
        raise fail("outlier_ratio", "score", "have a finite mean", mean)
    return int((score.detach().double() > multiple * mean).sum()) / score.numel()


def owl(
    shapes: Shapes, *, sparsity: float, outlier_ratio: Mapping[str, float], spread: float = 0.08
) -> dict[str, float]:
    """Outlier-weighed layer-wise sparsity: the more outliers, the denser.

    Paper: Yin et al. 2023, https://arxiv.org/abs/2310.05175, Section 3. The ratios are mapped linearly to densities
    over a range of ``2 * spread`` and shifted to the overall density; the paper centres plain layer averages (its
    layers are equal blocks), here the centre is weighted by size. With skewed ratios a layer can therefore lie further
    than ``spread`` from ``sparsity``, as in the authors' code. All ratios equal gives `uniform`.

    Args:
        shapes: see the module.
        sparsity: see the module.
        outlier_ratio: name to `outlier_ratio`, for exactly the names of ``shapes``; in the paper all matrices of a
            transformer block share that of the block.
        spread: lambda, in [0, 0.5].

    Raises:
        InputError: if the names differ, or a layer would leave [0, 1).
    """
    sizes = _sizes("owl", shapes, sparsity)
    check_range("owl", "spread", spread, 0, 0.5)
    _check_names("owl", "outlier_ratio", outlier_ratio, sizes)
    for name in sizes:
        if name not in outlier_ratio:
            raise fail("owl", "outlier_ratio", "have an entry for every shape", f"none for {name}")
        check_range("owl", f"outlier_ratio of {name}", outlier_ratio[name], 0)
    low, high = min(outlier_ratio.values()), max(outlier_ratio.values())
    if low == high:
        return dict.fromkeys(sizes, sparsity)
    raised = {name: 2 * spread * (outlier_ratio[name] - low) / (high - low) for name in sizes}
    centre = sum(raised[name] * size for name, size in sizes.items()) / sum(sizes.values())
    result = {name: sparsity + centre - raised[name] for name in sizes}
    if not all(0 <= value < 1 for value in result.values()):
        span = f"{min(result.values()):.4g} to {max(result.values()):.4g}"
        raise fail("owl", "spread", f"keep all layers in [0, 1) at sparsity {sparsity}", f"{spread} ({span})")
    return result


def greedy(
    shapes: Shapes,
    *,
    sparsity: float,
    loss: Callable[[dict[str, float]], float],
    groups: Mapping[str, Collection[str]] | None = None,
    step: float = 0.05,
    ceiling: float = 0.99,
) -> dict[str, float]:
    """In each group, take sparsity step by step from the member whose loss is lowest after its step.

    Paper: Liu et al. 2024 (TEAL), https://arxiv.org/abs/2408.14690, Algorithm 1, with a transformer block as group, the
    seven matrices as members and the error of the block's output as loss; WINA, https://arxiv.org/abs/2505.19427, uses
    step 0.025. As there, a step is inversely proportional to a member's size, so that every move removes equally much:
    a member of the group's mean size moves by ``step`` (the authors' code scales to the size of the query matrix
    instead). Unlike there, the last move is cut to meet the target and no member passes ``ceiling``.

    Args:
        shapes: see the module.
        sparsity: reached in every group.
        loss: called with name to sparsity of all members of one group; lower is better. About
            ``members**2 * sparsity / step`` calls a group.
        groups: group name to its members; together all of ``shapes``, each once. By default one group.
        step: of a member of mean size, in (0, 1).
        ceiling: the highest sparsity of a member, in [sparsity, 1).

    Raises:
        InputError: if the groups do not partition ``shapes`` or ``loss`` returns NaN.
    """
    sizes = _sizes("greedy", shapes, sparsity)
    check_range("greedy", "step", step, 0, 1, open_low=True, open_high=True)
    check_range("greedy", "ceiling", ceiling, sparsity, 1, open_high=True)
    members = [list(names) for names in groups.values() if names] if groups is not None else [list(sizes)]
    _check_names("greedy", "groups", [name for names in members for name in names], sizes)
    if sorted(name for names in members for name in names) != sorted(sizes):
        raise fail("greedy", "groups", "hold every shape exactly once", groups)
    result: dict[str, float] = {}
    for names in members:
        result |= _greedy_group({name: sizes[name] for name in names}, sparsity, loss, step, ceiling)
    return {name: result[name] for name in sizes}


def zipf(num: int, *, total: int, exponent: float = 1.0, shift: float = 0.0, limit: int | None = None) -> list[int]:
    """Integer budgets ``m_i`` proportional to ``1 / (i + shift) ** exponent``, i = 1 ... num, that sum to ``total``.

    Rounded by largest remainder, ties to the lower i; never increasing. What exceeds ``limit`` goes to the others.
    Used for feature budgets by Ayonrinde 2024, https://arxiv.org/abs/2411.02124.

    Args:
        num: how many budgets.
        total: their sum, at least 0.
        exponent: 0 is uniform.
        shift: more than -1.
        limit: the largest budget allowed.

    Raises:
        InputError: if ``num`` budgets of ``limit`` do not hold ``total``.

    Examples:
        >>> zipf(4, total=25)
        [12, 6, 4, 3]
    """
    check_int("zipf", "num", num)
    check_int("zipf", "total", total, 0)
    limit = total if limit is None else limit
    check_int("zipf", "limit", limit, math.ceil(total / num))
    check_range("zipf", "exponent", exponent, 0)
    check_range("zipf", "shift", shift, -1, open_low=True)
    if total == 0:
        return [0] * num
    shares = _fill([-exponent * math.log(i + shift) for i in range(1, num + 1)], [limit] * num, total)
    result = [min(math.floor(share), limit) for share in shares]
    order = sorted(range(num), key=lambda i: (result[i] >= limit, result[i] - shares[i]))
    for i in order[: total - sum(result)]:
        result[i] += 1
    return result


def _fill(log_weights: list[float], caps: list[int], total: float) -> list[float]:
    """``total`` shared out in proportion to the weights; what a share has over its cap goes to the others."""
    order = sorted(range(len(caps)), key=lambda i: math.log(caps[i]) - log_weights[i])
    open_weight = list(itertools.accumulate((log_weights[i] for i in reversed(order)), np.logaddexp))[::-1]
    shares = [float(cap) for cap in caps]
    for position, i in enumerate(order):
        if total * math.exp(log_weights[i] - open_weight[position]) < caps[i]:
            for j in order[position:]:
                shares[j] = total * math.exp(log_weights[j] - open_weight[position])
            break
        total -= caps[i]
    return shares


def _greedy_group(
    sizes: dict[str, int], sparsity: float, loss: Callable[[dict[str, float]], float], step: float, ceiling: float
) -> dict[str, float]:
    removed = dict.fromkeys(sizes, 0.0)
    target = sparsity * sum(sizes.values())
    move = step * sum(sizes.values()) / len(sizes)
    while (left := target - sum(removed.values())) > 1e-9 * target:
        trials = {}
        for name, size in sizes.items():
            amount = min(move, left, ceiling * size - removed[name])
            if amount > 1e-9 * size:
                trial = removed | {name: removed[name] + amount}
                value = float(loss({key: count / sizes[key] for key, count in trial.items()}))
                if math.isnan(value):
                    raise fail("greedy", "loss", "return a number", value)
                trials[name] = value, trial
        if not trials:
            break
        removed = min(trials.values(), key=lambda pair: pair[0])[1]
    return {name: count / sizes[name] for name, count in removed.items()}


def _rest(sizes: dict[str, int], fixed: dict[str, float], kept: float) -> float:
    """The density of what is not fixed, for ``kept`` entries in all; -1 where everything is fixed."""
    size = sum(size for name, size in sizes.items() if name not in fixed)
    return (kept - sum(sizes[name] * density for name, density in fixed.items())) / size if size else -1.0


def _sizes(function: str, shapes: Shapes, sparsity: float) -> dict[str, int]:
    check_sparsity(function, sparsity)
    if not shapes:
        raise fail(function, "shapes", "have at least one entry", "none")
    for name, shape in shapes.items():
        if not shape or any(size < 1 for size in shape):
            raise fail(function, f"shape of {name}", "have only sizes of at least 1", tuple(shape))
    return {name: math.prod(shape) for name, shape in shapes.items()}


def _check_names(function: str, argument: str, names: Collection[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            raise fail(function, argument, "name only entries of shapes", f"{name}{did_you_mean(name, known)}")
