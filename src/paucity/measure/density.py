"""Achieved density, the fraction kept: of weights, and averaged over layers for reports."""

from collections.abc import Collection, Mapping

from torch import nn

from ..checks import check_range, did_you_mean, fail


def weight_density(model: nn.Module, names: Collection[str]) -> dict[str, float]:
    """Fraction of nonzero entries of each named parameter.

    Raises:
        InputError: if the model has no parameter of a name; nothing has been counted then.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for name in names:
        if name not in parameters:
            near = did_you_mean(name, parameters)
            raise fail("weight_density", "names", "be parameters of the model", f"{name}{near}")
    return {name: int(parameters[name].count_nonzero()) / max(parameters[name].numel(), 1) for name in names}


def average_density(
    density: Mapping[str, float], groups: Mapping[str, str], *, sizes: Mapping[str, int] | None = None
) -> dict[str, float]:
    """Mean density of the sites of each group, such as all layers' ``up`` projections.

    Args:
        density: kept fraction by site name.
        groups: group (kind, layer) by site name; sites that have none are left out.
        sizes: entries by site name, as weights of the mean; all alike by default.

    Returns:
        Kept fraction by group, in the order of first appearance in ``density``.

    Raises:
        InputError: if a density lies outside [0, 1], or a site has no size.
    """
    kept: dict[str, float] = {}
    total: dict[str, float] = {}
    for name, value in density.items():
        check_range("average_density", f"density of {name}", value, 0, 1)
        if sizes is not None and name not in sizes:
            raise fail("average_density", "sizes", "hold every site of density", f"none for {name}")
        if name not in groups:
            continue
        size, group = 1 if sizes is None else sizes[name], groups[name]
        kept[group] = kept.get(group, 0.0) + value * size
        total[group] = total.get(group, 0.0) + size
    return {group: kept[group] / total[group] for group in kept if total[group]}
