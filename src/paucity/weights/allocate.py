"""How sparse each site shall be, by the allocators of `paucity.ops.budget`.

``owl`` takes the share of outliers among the scores of a block, ``cfsp`` the angle by which a block turns its hidden
states, ``greedy`` the error of the block's output as measured; the others look at shapes alone.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from ..checks import fail
from ..models.blocks import block_calls, sites_by_block
from ..models.sites import Site, weight_view
from ..ops import budget
from ..ops.budget_blocks import by_importance
from .matrices import from_matrices
from .pruner import Pruner
from .structured.cfsp import coarse_importance
from .structured.influence import gather

Scores = Callable[[Sequence[Site]], Mapping[str, Tensor]]
"""Scores ``[matrices, rows, cols]`` of some sites of the dense model."""

_GREEDY_BATCHES = 4
_GREEDY_STEP = 0.05


def allocate(
    model: nn.Module, sites: Sequence[Site], pruner: Pruner, batches: Sequence[Tensor], scores: Scores
) -> dict[str, float]:
    """Sparsity by name of the site, ``pruner.target`` overall.

    Args:
        model: dense.
        sites: all that are pruned.
        pruner: says which allocation.
        batches: calibration; may be empty where the allocation looks at shapes alone.
        scores: of the method, for ``greedy``; of Wanda, for ``owl``.
    """
    shapes = {site.name: tuple(weight_view(model, site).shape) for site in sites}
    target = pruner.target
    if pruner.allocation == "erk":
        return budget.erk(shapes, sparsity=target)
    if pruner.allocation == "owl":
        ratios: dict[str, float] = {}
        for _, group in sites_by_block(sites):
            found = torch.cat([score.flatten() for score in scores(group).values()])
            ratios |= dict.fromkeys((site.name for site in group), budget.outlier_ratio(found))
        return budget.owl(shapes, sparsity=target, outlier_ratio=ratios)
    if pruner.allocation == "cfsp":
        if outside := next((site.name for site in sites if site.layer is None), None):
            raise fail("prune", "allocation", "be another one for sites outside the blocks", f"cfsp for {outside}")
        angular = coarse_importance(gather(model, sites[:1], batches).angular)
        importance = {site.name: angular[site.layer] for site in sites if site.layer is not None}
        return by_importance(shapes, sparsity=target, importance=importance)
    if pruner.allocation == "greedy":
        return _greedy(model, sites, pruner, batches, scores, shapes)
    return dict.fromkeys(shapes, target)


@torch.no_grad()
def _greedy(
    model: nn.Module,
    sites: Sequence[Site],
    pruner: Pruner,
    batches: Sequence[Tensor],
    scores: Scores,
    shapes: budget.Shapes,
) -> dict[str, float]:
    """`budget.greedy` within each block, by the squared error of the block's output on a few batches."""
    result: dict[str, float] = {}
    for path, group in sites_by_block(sites):
        block, found = model.get_submodule(path), scores(group)
        calls = block_calls(model, path, batches[:_GREEDY_BATCHES])
        outputs = [call.run(block) for call in calls]
        dense = {site.name: model.get_parameter(site.name).detach().clone() for site in group}

        def loss(sparsities: dict[str, float]) -> float:
            try:
                for site in group:  # noqa: B023 - called within the loop
                    mask = from_matrices(model, site, pruner.select(found[site.name], sparsities[site.name]))  # noqa: B023
                    model.get_parameter(site.name).masked_fill_(~mask, 0)
                pairs = zip(calls, outputs, strict=True)  # noqa: B023
                return sum(float((call.run(block) - output).float().square().mean()) for call, output in pairs)  # noqa: B023
            finally:
                for name, weight in dense.items():  # noqa: B023
                    model.get_parameter(name).copy_(weight)

        members = {site.name: shapes[site.name] for site in group}
        result |= budget.greedy(members, sparsity=pruner.target, loss=loss, step=_GREEDY_STEP)
    return result
