"""One call that prunes the weights of any model: `prune`, and the same as a step of a recipe."""

import time
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, get_args

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from ..checks import InputTypeError, check_choice, fail
from ..measure.tokens import evaluating
from ..models.applied import current_work
from ..models.calibration import as_batches
from ..models.load import Loaded
from ..models.packed import packed_linears
from ..models.sites import Site, find_sites
from ..ops.formats import Masks
from .dsnot import DSnoT
from .kept_sites import claim, digest
from .layerwise import Pruned, Tell, prune_layers, restore
from .magnitude import Magnitude
from .pruner import Allocation, Order, Pruner, Scope, check_pattern
from .random import Random
from .sparsegpt import SparseGPT
from .taylor import Taylor
from .wanda import Wanda

PRUNERS: dict[str, type[Pruner]] = {
    "dsnot": DSnoT,
    "magnitude": Magnitude,
    "random": Random,
    "sparsegpt": SparseGPT,
    "taylor": Taylor,
    "wanda": Wanda,
}
"""Methods that prune layer by layer."""

_DENSE_ONCE = ("owl", "cfsp", "greedy")
"""Allocations that look at the activations of the dense model."""


def options_for(method: str) -> type[BaseModel]:
    """The options of a method of `PRUNERS`."""
    check_choice("options_for", "method", method, PRUNERS)
    return PRUNERS[method]


class AppliedWeights:
    """Pruned weights in force on a model, with the dense ones kept beside them.

    Args:
        model: the pruned model.
        masks: what was kept.
        dense: the weights before pruning by parameter name.
        state: method, options and notes.
    """

    def __init__(self, model: nn.Module, masks: Masks, dense: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.model, self.masks = model, masks
        self._dense, self._state = dense, state

    def remove(self) -> None:
        """Write the dense weights back, exactly; what training changed since is lost."""
        restore(self.model, self._dense)
        self._dense = {}

    def density(self) -> dict[str, float]:
        """Share of nonzeros that each pruned parameter has now; of one that was packed since, what its mask keeps."""
        packed = {f"{path}.weight" for path in packed_linears(self.model)}
        layers = self.masks.sparsity().layers
        if rest := {name: mask for name, mask in self.masks.items() if name not in packed}:
            layers |= Masks(rest).achieved_in(self.model).layers
        return {name: 1 - sparsity for name, sparsity in layers.items()}

    def reset(self) -> None:
        """Nothing to reset: the density of weights is static."""

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "sparsity", "calibration_tokens", "notes"}``; the masks themselves are in `masks`."""
        return self._state


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: Iterable[Any]) -> AppliedWeights:
    """Prune ``loaded.model`` in place as `prune` does, keeping the dense weights for `AppliedWeights.remove`.

    Raises:
        InputError: as `prune`.
    """
    given = options_for(method).model_validate(options.model_dump())
    assert isinstance(given, Pruner)
    work, started = current_work(), time.monotonic()

    def tell(done: int, total: int, site: str) -> None:
        left = f", about {(time.monotonic() - started) / done * (total - done):.0f} s left" if done else ""
        work.tell(f"{method}: {done} of {total} weights{left}")

    return prune_applied(loaded, method, given, calibration, work.folder, tell)


def prune(
    loaded: Loaded | nn.Module,
    method: str | Pruner,
    *,
    sparsity: float | None = None,
    scope: Scope | None = None,
    n: int | None = None,
    m: int | None = None,
    block: tuple[int, int] | None = None,
    sites: Collection[str] = ("linear",),
    allocation: Allocation = "uniform",
    order: Order = "dense",
    calibration: Iterable[Any] = (),
    keep: str | Path | None = None,
    on_progress: Tell | None = None,
) -> Masks:
    """Set the lowest-scored weights of a model to zero, in place.

    Args:
        loaded: the model, any module.
        method: one of `PRUNERS`, or one of their options (``SparseGPT(sparsity=0.6, damping=0.1)``), which then hold
            all that follows up to ``order``.
        sparsity: fraction removed, in [0, 1); 0.5 if neither it nor n and m are given.
        scope: what competes: an output ``row`` (the default of Wanda and DSnoT), a ``layer`` (one parameter, or one
            expert's matrix of a stack; the default of the others), or ``global``: all sites together.
        n: keep n of every m consecutive inputs (of a convolution: input channels); with m, and then neither a scope
            nor an allocation applies.
        m: see n.
        block: (rows, columns) of the blocks that stay or go as one; (1, 16) are groups of a row.
        sites: kinds or groups of `paucity.models.sites`.
        allocation: sparsity of each site: ``uniform``, ``erk`` by shape, ``owl`` by the share of outliers among the
            Wanda scores of its block in the dense model, ``cfsp`` by the angle through which the block turns its hidden
            states, ``greedy`` by the measured error of the block's output.
        order: ``dense`` calibrates each block in the dense model, ``block`` behind the pruned ones before it.
        calibration: a list or a DataLoader: ``input_ids [1, T]`` int64 of a language model, inputs of any other, or
            mappings and pairs as `paucity.models.calibration.as_batches` takes them. Needed by ``wanda``,
            ``sparsegpt``, ``dsnot``, ``taylor``, ``owl``, ``cfsp`` and ``greedy``.
        keep: a folder where finished sites are kept, so that the same call on the same dense weights goes on where a
            killed one was; each job has its own.
        on_progress: called with blocks done, blocks in all, and the block.

    Returns:
        The masks by parameter name, in the parameters' own layout.

    Raises:
        InputError: if an argument is out of range, the pattern does not divide a site's size, the model has no such
            site, there is no calibration where it is needed or it does not fit the model, or an activation is not
            finite (the module is named), or ``keep`` is the folder of another job. Then the weights are as before.
    """
    target = loaded if isinstance(loaded, Loaded) else Loaded(loaded, None, type(loaded).__name__)
    folder = None if keep is None else Path(keep)
    if isinstance(method, Pruner):
        given, others = (sparsity, scope, n, m, block), (tuple(sites), allocation, order)
        if any(value is not None for value in given) or others != (("linear",), "uniform", "dense"):
            raise fail("prune", "method", "hold the other options itself", "both")
        return prune_applied(target, type(method).__name__.lower(), method, calibration, folder, on_progress).masks
    if not isinstance(method, str):
        raise InputTypeError(f"prune: method must be a name or its options, got {type(method).__name__}.")
    check_choice("prune", "method", method, PRUNERS)
    scope = scope or PRUNERS[method].model_fields["scope"].default
    check_pattern("prune", sparsity, scope, n, m, block, allocation)
    check_choice("prune", "order", order, get_args(Order))
    PRUNERS[method].check_scope("prune", scope, order)
    options = PRUNERS[method](
        sparsity=sparsity, scope=scope, n=n, m=m, block=block, sites=tuple(sites), allocation=allocation, order=order
    )
    return prune_applied(target, method, options, calibration, folder, on_progress).masks


def is_calibrated(pruner: Pruner) -> bool:
    """Whether a method needs calibration."""
    return pruner.gathers is not None or pruner.needs_gradients or pruner.allocation in _DENSE_ONCE


def prune_applied(
    loaded: Loaded, name: str, pruner: Pruner, calibration: Iterable[Any], keep: Path | None, tell: Tell | None
) -> AppliedWeights:
    """`prune` by a method of that ``name`` with its options, with all that is known of it."""
    model = loaded.model
    sites = find_sites(model, pruner.sites)
    calibrated = is_calibrated(pruner)
    batches: list[Any] = []
    if calibrated:
        batches = as_batches("prune", model, calibration)
        if not batches:
            raise fail("prune", "calibration", f"hold at least one batch of tokens for {name}", "none")
        if not pruner.needs_gradients:
            batches = [batch[0] if isinstance(batch, tuple) else batch for batch in batches]
    if keep is not None:
        claim(keep, _job(model, name, pruner, batches))
    with evaluating(model):
        pruned = prune_layers(model, sites, pruner, batches, tell=tell or _silent, keep=keep)
    masks = Masks(pruned.masks, nominal=pruner.target)
    return AppliedWeights(model, masks, pruned.dense, _state(name, pruner, masks, sites, batches, pruned))


def _job(model: nn.Module, name: str, pruner: Pruner, batches: list[Any]) -> dict[str, Any]:
    """What tells a pruning from all others."""
    flat = [part for batch in batches for part in (batch if isinstance(batch, tuple) else (batch,))]
    return {
        "method": name,
        "options": pruner.model_dump(mode="json"),
        "calibration": digest(flat),
        "parameters": [name for name, _ in model.named_parameters()],
        "weights": digest(model.parameters()),
    }


def _state(
    name: str, pruner: Pruner, masks: Masks, sites: list[Site], batches: list[Any], pruned: Pruned
) -> dict[str, Any]:
    notes = list(dict.fromkeys(pruned.notes))
    notes += [f"{site.name} is also the output head's: both lose the same weights" for site in sites if site.tied]
    return {
        "method": name,
        "options": pruner.model_dump(mode="json"),
        "sparsity": masks.sparsity().achieved,
        "calibration_tokens": sum(_tokens(batch) for batch in batches),
        "notes": notes,
    }


def _tokens(batch: Any) -> int:
    inputs: Tensor = batch[0] if isinstance(batch, tuple) else batch
    return len(inputs) if torch.is_floating_point(inputs) else inputs.numel()


def _silent(done: int, total: int, what: str) -> None:
    """Progress that nobody watches."""
