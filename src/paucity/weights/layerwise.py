"""Pruning block by block: each block is calibrated behind the pruned ones before it, all its sites at once.

That is the order of Wanda's and SparseGPT's official code. Scope ``global`` compares scores across blocks, and the
gradients of Taylor's belong to the whole model: both come from one pass through the dense model.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checks import fail
from ..models.blocks import Rerun, Walk, open_chain, sites_by_block
from ..models.hooks import capture_inputs
from ..models.sites import Site, weight_view
from ..ops.select import global_topk_masks
from .allocate import allocate
from .gradients import squared_gradients
from .kept_blocks import KeptBlocks
from .matrices import as_matrices, from_matrices
from .pruner import Layer, Pruner
from .statistics import InputNorm, gather
from .wanda import Wanda

Tell = Callable[[int, int, str], None]
"""Called with what is done, how much there is, and what is being done."""


@dataclass
class Pruned:
    """What pruning a model gave.

    Attributes:
        masks: by parameter, bool in its layout.
        dense: the weights before, by parameter; empty where they were not kept.
        notes: what the user should know.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    dense: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


@torch.no_grad()
def prune_layers(
    model: nn.Module,
    sites: Sequence[Site],
    pruner: Pruner,
    batches: Sequence[Tensor],
    *,
    tell: Tell,
    keep: Path | None = None,
) -> Pruned:
    """Prune ``sites`` of ``model`` in place; what fails leaves all weights as they were.

    Args:
        model: in eval mode.
        sites: what is pruned, in the order of the model.
        pruner: how.
        batches: calibration, checked; empty where nothing is calibrated.
        tell: told after every block.
        keep: a folder where every finished block is kept, so that the same call goes on after a kill.
    """
    check_sites(model, sites, pruner)
    result = Pruned()
    blocks = sites_by_block(sites)
    kept = KeptBlocks(keep)
    try:
        if pruner.needs_gradients:
            tell(0, len(blocks), "gradients")
        gradients = squared_gradients(model, sites, batches) if pruner.needs_gradients else {}
        dense_scores = partial(_scores_at_once, model, pruner, batches, gradients, result.notes)
        if pruner.scope == "global" and pruner.n is None:
            scores = {name: score.flatten(0, 1) for name, score in dense_scores(sites).items()}
            for site, mask in zip(sites, global_topk_masks(scores, sparsity=pruner.target).values(), strict=True):
                _write(model, site, mask, None, result)
            return result
        ranked_by = partial(_scores_at_once, model, Wanda(), batches, {}, result.notes)
        chosen = ranked_by if pruner.allocation == "owl" else dense_scores
        sparsities = kept.sparsities(lambda: allocate(model, sites, pruner, batches, chosen))
        walk = _walk(model, [path for path, _ in blocks], batches) if pruner.gathers else None
        for done, (path, group) in enumerate(blocks):
            tell(done, len(blocks), path)
            if kept.has(done):
                for site, mask, weight in kept.load(done, model, group):
                    _write(model, site, mask, weight, result)
            else:
                solved = solve_block(model, path, group, pruner, walk, sparsities, gradients, result.notes)
                kept.keep(done, solved)
                for site, mask, weight in solved:
                    _write(model, site, mask, weight, result)
            if walk is not None and done + 1 < len(blocks):
                walk.advance(path)
        tell(len(blocks), len(blocks), "done")
    except BaseException:
        restore(model, result.dense)
        raise
    return result


def check_sites(model: nn.Module, sites: Sequence[Site], pruner: Pruner) -> None:
    """Raise InputError if a site is no matrix, does not fit the pattern, or cannot be calibrated."""
    for site in sites:
        view = weight_view(model, site)
        if view.ndim < 2:
            raise fail("prune", "sites", "be weight matrices", f"{site.name} with shape {list(view.shape)}")
        cols = view.shape[1] if site.kind == "conv" and pruner.m is not None else as_matrices(model, site).shape[2]
        pruner.check_size(site.name, as_matrices(model, site).shape[1], cols)
    if pruner.gathers is not None:
        with capture_inputs(model, sites, lambda *_: None):
            pass  # opening the hooks raises for a site that cannot be calibrated


def solve_block(
    model: nn.Module,
    path: str,
    group: Sequence[Site],
    pruner: Pruner,
    walk: Walk | None,
    sparsities: dict[str, float],
    gradients: dict[str, Tensor],
    notes: list[str],
) -> list[tuple[Site, Tensor, Tensor | None]]:
    """Of every site of a block the mask, and the new weight where the method changes what stays; nothing is written."""
    inputs: dict[str, list[InputNorm]] = {}
    if walk is not None and pruner.gathers is not None:
        inputs = gather(model, group, pruner.gathers, partial(walk.peek, path))
    solved: list[tuple[Site, Tensor, Tensor | None]] = []
    for site in group:
        layers = _layers(model, site, inputs, gradients)
        if pruner.m is None and site.kind == "conv" and not pruner.updates and pruner.scope == "layer":
            scores = torch.stack([pruner.score(layer) for layer in layers])  # groups of a convolution are one layer
            mask = pruner.select(scores, sparsities[site.name])
        else:
            mask = torch.stack([pruner.solve(layer, sparsities[site.name]) for layer in layers])
        weight = torch.stack([layer.weight for layer in layers]) if pruner.updates else None
        notes += _notes(site, layers)
        mask, parameter = from_matrices(model, site, mask), model.get_parameter(site.name)
        if weight is None:
            solved.append((site, mask, None))
        else:  # weights that were zero before stay zero
            weight = from_matrices(model, site, weight.to(parameter.dtype))
            solved.append((site, mask & (parameter != 0), weight))
    return solved


def restore(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """Write weights back by name, exactly."""
    with torch.no_grad():
        for name, weight in dense.items():
            model.get_parameter(name).copy_(weight)


def _walk(model: nn.Module, paths: list[str], batches: Sequence[Tensor]) -> Walk:
    return open_chain(model, paths, batches) or Rerun(model, batches)


def _scores_at_once(
    model: nn.Module,
    pruner: Pruner,
    batches: Sequence[Tensor],
    gradients: dict[str, Tensor],
    notes: list[str],
    sites: Sequence[Site],
) -> dict[str, Tensor]:
    """Scores ``[matrices, rows, cols]`` of ``sites`` from one pass through the model as it is."""
    inputs: dict[str, list[InputNorm]] = {}
    if pruner.gathers is not None:
        inputs = gather(model, sites, pruner.gathers, Rerun(model, batches).whole)
    scores = {}
    for site in sites:
        layers = _layers(model, site, inputs, gradients)
        scores[site.name] = torch.stack([pruner.score(layer) for layer in layers])
        notes += _notes(site, layers)
    return scores


def _layers(
    model: nn.Module, site: Site, inputs: dict[str, list[InputNorm]], gradients: dict[str, Tensor]
) -> list[Layer]:
    found = inputs.get(site.name)
    matrices = as_matrices(model, site).float()
    if matrices.data_ptr() == weight_view(model, site).data_ptr():
        matrices = matrices.clone()
    gradient = as_matrices(model, site, gradients[site.name]) if site.name in gradients else None
    return [
        Layer(
            weight,
            site.name if len(matrices) == 1 else f"{site.name}[{index}]",
            None if found is None else found[index],
            None if gradient is None else gradient[index],
        )
        for index, weight in enumerate(matrices)
    ]


def _notes(site: Site, layers: Sequence[Layer]) -> list[str]:
    unseen = sum(layer.inputs is not None and not layer.inputs.seen for layer in layers)
    notes = [note for layer in layers for note in layer.notes]
    if unseen:
        what = f"{unseen} experts" if len(layers) > 1 else "the layer"
        notes.append(f"{site.name}: {what} got nothing but zeros in calibration and went by magnitude")
    return notes


def _write(model: nn.Module, site: Site, mask: Tensor, weight: Tensor | None, result: Pruned) -> None:
    parameter = model.get_parameter(site.name)
    mask = mask if mask.shape == parameter.shape else from_matrices(model, site, mask)
    before = int((parameter == 0).sum())
    if before > parameter.numel() // 100:
        result.notes.append(
            f"{site.name}: {before / parameter.numel():.0%} of it was zero before; zeros stay and count as removed"
        )
    result.masks[site.name] = mask
    result.dense[site.name] = parameter.detach().clone()
    if weight is not None:
        parameter.copy_(weight)
    parameter.masked_fill_(~mask, 0)
