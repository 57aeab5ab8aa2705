"""Pruning block after block, with what each block reads in the dense model or behind the blocks that were pruned.

In the order ``dense`` one forward over the calibration shows every block its inputs in the model as it was. The
official code of Wanda and SparseGPT takes two passes, so that a block reads what the pruned blocks before it give; that
is the order ``block``. Scope ``global`` compares scores across sites, and the gradients of Taylor's belong to the whole
model: both come from one pass through the dense model.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import fail
from ..models.blocks import UpTo, open_chain, sites_by_block
from ..models.calibration import stacked
from ..models.exact_attention import exact_attention
from ..models.hooks import capture_inputs, run_model
from ..models.sites import Site, weight_view
from ..models.visits import in_turn, visits
from ..ops.select import global_topk_masks
from .allocate import allocate
from .gradients import squared_gradients
from .kept_sites import KeptSites
from .matrices import as_matrices, from_matrices, only
from .pruner import Layer, Pruner
from .statistics import InputNorm, gather, gathering
from .wanda import Wanda

STACKED = 1024
"""Tokens of calibration that run at a time."""

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
        tell: told before every site that is not kept yet.
        keep: a folder where every finished site is kept, so that the same call goes on after a kill.
    """
    check_sites(model, sites, pruner)
    result = Pruned()
    kept = KeptSites(keep)
    with exact_attention(model), _undone_on_error(model, result):
        if pruner.needs_gradients:
            tell(0, len(sites), "gradients")
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
        done = {site for site in sites if kept.has(site)}
        if pruner.order == "block":  # a block that was pruned in part cannot be calibrated whole
            done = {site for _, group in sites_by_block(sites) if done.issuperset(group) for site in group}
        with closing(_calibrated(model, sites, done, pruner, batches)) as calibrated:
            for number, (site, inputs) in enumerate(calibrated):
                if site in done:
                    result.notes += kept.notes(site)
                    _write(model, *kept.load(model, site), result)
                    continue
                tell(number, len(sites), site.name)
                notes: list[str] = []
                solved = solve_site(model, site, pruner, inputs, sparsities[site.name], gradients, notes)
                kept.keep(*solved, notes)
                result.notes += notes
                _write(model, *solved, result)
        tell(len(sites), len(sites), "done")
    return result


@contextmanager
def _undone_on_error(model: nn.Module, result: Pruned) -> Iterator[None]:
    try:
        yield
    except BaseException:
        restore(model, result.dense)
        raise


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


def _calibrated(
    model: nn.Module, sites: Sequence[Site], done: set[Site], pruner: Pruner, batches: Sequence[Tensor]
) -> Generator[tuple[Site, list[InputNorm] | None], None, None]:
    """Each site when it is to be pruned, with what the method gathers of its inputs; without it those that are done."""
    if pruner.gathers is None or done.issuperset(sites):
        yield from ((site, None) for site in sites)
        return
    blocks = sites_by_block(sites)
    left = {path: [site for site in group if site not in done] for path, group in blocks}
    batches = stacked(batches, most=STACKED) if isinstance(model, PreTrainedModel) else batches
    steps = _block_by_block
    if pruner.order == "dense":
        steps = dense_blocks if in_turn(model, list(left), batches[0]) else _all_at_once
    with closing(steps(model, left, pruner.gathers, batches)) as blocks_of_inputs:
        for path, inputs in blocks_of_inputs:
            yield from ((site, inputs.get(site.name)) for site in dict(blocks)[path])


def dense_blocks(
    model: nn.Module,
    blocks: Mapping[str, Sequence[Site]],
    gathers: type[InputNorm],
    batches: Sequence[Tensor],
    enter: Callable[[str], None] = lambda path: None,
) -> Generator[tuple[str, dict[str, list[InputNorm]]], None, None]:
    """Each block when all batches have left it as it was, with what its sites read; then it may change.

    Args:
        model: of which the batches reach a block at a time.
        blocks: sites by the path of their block.
        gathers: the statistic of a site's inputs.
        batches: calibration.
        enter: called with a path before the first batch goes through.
    """
    sites = [site for group in blocks.values() for site in group]
    with gathering(model, sites, gathers) as found, closing(visits(model, blocks, batches)) as visited:
        for path, run in visited:
            enter(path)
            yield path, found.take(blocks[path], run)


def _all_at_once(
    model: nn.Module, blocks: Mapping[str, Sequence[Site]], gathers: type[InputNorm], batches: Sequence[Tensor]
) -> Generator[tuple[str, dict[str, list[InputNorm]]], None, None]:
    """The same of a model whose blocks cannot wait for each other, as some run again: all statistics are held."""
    sites = [site for group in blocks.values() for site in group]
    inputs = gather(model, sites, gathers, _run_all(model, sites, batches))
    yield from ((path, {site.name: inputs[site.name] for site in group}) for path, group in blocks.items())


def _block_by_block(
    model: nn.Module, blocks: Mapping[str, Sequence[Site]], gathers: type[InputNorm], batches: Sequence[Tensor]
) -> Generator[tuple[str, dict[str, list[InputNorm]]], None, None]:
    """Each block with what its sites read behind those that were pruned, while none of it is."""
    paths, chain = [path for path, group in blocks.items() if group], None
    for path, group in blocks.items():
        if not group:  # done, and written when it is its turn
            yield path, {}
            continue
        if path == paths[0]:
            chain = open_chain(model, paths, batches)
        run = _run_all(UpTo(model, path), group, batches) if chain is None else chain.peek(path)
        yield path, gather(model, group, gathers, run)
        if chain is not None:
            chain.advance(path)


def solve_site(
    model: nn.Module,
    site: Site,
    pruner: Pruner,
    inputs: list[InputNorm] | None,
    sparsity: float,
    gradients: dict[str, Tensor],
    notes: list[str],
) -> tuple[Site, Tensor, Tensor | None]:
    """The site, its mask, and its new weight where the method changes what stays; nothing is written."""
    layers = _layers(model, site, inputs, gradients)
    together = pruner.scope == "layer" and type(pruner).solve is Pruner.solve
    if pruner.m is None and site.kind == "conv" and together:
        scores = torch.stack([pruner.score(layer) for layer in layers])  # groups of a convolution are one layer
        mask = pruner.select(scores, sparsity)
    else:
        mask = torch.stack([pruner.solve(layer, sparsity) for layer in layers])
    notes += _notes(site, layers)
    mask, parameter = from_matrices(model, site, mask), model.get_parameter(site.name)
    if not pruner.updates:
        return site, mask, None
    weight = torch.stack([layer.weight for layer in layers]).to(parameter.dtype)
    return site, mask & (parameter != 0), from_matrices(model, site, weight)  # what was zero before stays zero


def restore(model: nn.Module, dense: dict[str, Tensor]) -> None:
    """Write weights back by name, exactly."""
    with torch.no_grad():
        for name, weight in dense.items():
            model.get_parameter(name).copy_(weight)


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
        inputs = gather(model, sites, pruner.gathers, _run_all(model, sites, batches))
    scores = {}
    for site in sites:
        layers = _layers(model, site, inputs.get(site.name), gradients)
        scores[site.name] = torch.stack([pruner.score(layer) for layer in layers])
        notes += _notes(site, layers)
    return scores


def _run_all(model: nn.Module, sites: Sequence[Site], batches: Sequence[Tensor]) -> Iterator[None]:
    device = next(model.parameters()).device
    for batch in batches:
        run_model(model, sites, batch.to(device))
        yield


def _layers(model: nn.Module, site: Site, inputs: list[InputNorm] | None, gradients: dict[str, Tensor]) -> list[Layer]:
    matrices = as_matrices(model, site).float()
    if matrices.data_ptr() == weight_view(model, site).data_ptr():
        matrices = matrices.clone()
    gradient = as_matrices(model, site, gradients[site.name]) if site.name in gradients else None
    return [
        Layer(
            weight,
            site.name if len(matrices) == 1 else f"{site.name}[{index}]",
            None if inputs is None else inputs[index],
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
    before = parameter.numel() - int(parameter.count_nonzero())
    if before > parameter.numel() // 100:
        result.notes.append(
            f"{site.name}: {before / parameter.numel():.0%} of it was zero before; zeros stay and count as removed"
        )
    result.masks[site.name] = mask
    result.dense[site.name] = parameter.detach().clone()
    parameter.copy_(only(parameter if weight is None else weight, mask))
