"""Pruning of a model's weights in place: sites, scores, patterns and allocation put together.

Wanda follows the official code: a block is calibrated with all earlier blocks already pruned, every site of a block
before any of that block is pruned. Two cases compare scores across blocks, so that they come from one pass through the
dense model: scope "global", and the outlier ratios of the allocation "owl". Calibrating block l runs the model up to
that block, so that L blocks cost about L/2 passes over the calibration tokens and no stored hidden states.
"""

from collections.abc import Collection, Sequence
from typing import Any, Literal, get_args

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from ..checks import check_choice, check_divides, check_nm, check_sparsity, fail
from ..models.blocks import UpTo, sites_by_block
from ..models.hooks import capture_inputs, input_norms
from ..models.load import Loaded
from ..models.sites import GROUPS, Site, find_sites, weight_view
from ..ops import budget
from ..ops.formats import Masks
from ..ops.select import global_topk_masks, nm_mask, topk_mask
from .magnitude import magnitude_score
from .wanda import wanda_score

Scope = Literal["row", "layer", "global"]
Allocation = Literal["uniform", "erk", "owl"]
_DEFAULT_SPARSITY = 0.5


class _Options(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float | None = Field(default=None, description="fraction removed, 0.5 if not given; of N:M it follows")
    scope: Scope = "layer"
    n: int | None = Field(default=None, description="entries kept of every m consecutive inputs")
    m: int | None = None
    sites: tuple[str, ...] = ("linear",)
    allocation: Allocation = "uniform"

    @model_validator(mode="after")
    def _consistent(self) -> "_Options":
        _target_sparsity("options", self.sparsity, self.scope, self.n, self.m, self.allocation)
        return self


class MagnitudeOptions(_Options):
    """Options of ``magnitude``: all weights of a layer compete."""


class WandaOptions(_Options):
    """Options of ``wanda``: the weights of an output row compete."""

    scope: Scope = "row"


_OPTIONS: dict[str, type[_Options]] = {"magnitude": MagnitudeOptions, "wanda": WandaOptions}


def options_for(method: str) -> type[BaseModel]:
    """The options of ``magnitude`` or ``wanda``, with the paper's defaults."""
    check_choice("options_for", "method", method, _OPTIONS)
    return _OPTIONS[method]


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
        _restore(self.model, self._dense)
        self._dense = {}

    def density(self) -> dict[str, float]:
        """Share of nonzeros that each pruned parameter has now."""
        layers = self.masks.achieved_in(self.model).layers
        return {name: 1 - sparsity for name, sparsity in layers.items()}

    def reset(self) -> None:
        """Nothing to reset: the density of weights is static."""

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "sparsity", "calibration_tokens", "notes"}``; the masks themselves are in `masks`."""
        return self._state


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> AppliedWeights:
    """Prune ``loaded.model`` in place as `prune` does, keeping the dense weights for `AppliedWeights.remove`.

    Raises:
        InputError: as `prune`.
    """
    check_choice("apply_step", "method", method, _OPTIONS)
    given = _OPTIONS[method].model_validate(options.model_dump())
    return _prune(loaded, method, given, calibration)


def prune(
    loaded: Loaded,
    score: Literal["magnitude", "wanda"],
    *,
    sparsity: float | None = None,
    scope: Scope | None = None,
    n: int | None = None,
    m: int | None = None,
    sites: Collection[str] = ("linear",),
    allocation: Allocation = "uniform",
    calibration: Sequence[Tensor] = (),
) -> Masks:
    """Set the lowest-scored weights of a model to zero, in place; the model is put in eval mode where it is calibrated.

    Args:
        loaded: the model.
        score: ``magnitude`` or ``wanda``.
        sparsity: fraction removed, in [0, 1); 0.5 if neither it nor n and m are given.
        scope: what competes: an output ``row`` (Wanda's default), a ``layer`` (one parameter, or one expert's matrix of
            a stack; magnitude's default), or ``global``: all sites together.
        n: keep n of every m consecutive inputs (of a convolution: input channels); with m, and then neither a scope
            nor an allocation applies.
        m: see n.
        sites: kinds or groups of `paucity.models.sites`.
        allocation: sparsity of each site: ``uniform``, ``erk`` by shape, or ``owl`` by the share of outliers among the
            Wanda scores of its block in the dense model.
        calibration: ``input_ids [1, T]`` int64; needed by ``wanda`` and ``owl``.

    Returns:
        The masks by parameter name, in the parameters' own layout.

    Raises:
        InputError: if an argument is out of range, m does not divide a site's input size, the model has no such site,
            there is no calibration where it is needed, or an activation is not finite. Then the weights are as before.
    """
    check_choice("prune", "score", score, _OPTIONS)
    scope = scope or _OPTIONS[score].model_fields["scope"].default
    _target_sparsity("prune", sparsity, scope, n, m, allocation)
    options = _OPTIONS[score](sparsity=sparsity, scope=scope, n=n, m=m, sites=tuple(sites), allocation=allocation)
    return _prune(loaded, score, options, calibration).masks


def _target_sparsity(
    function: str, sparsity: float | None, scope: str, n: int | None, m: int | None, allocation: str
) -> float:
    check_choice(function, "scope", scope, get_args(Scope))
    check_choice(function, "allocation", allocation, get_args(Allocation))
    if sparsity is not None:
        check_sparsity(function, sparsity)
    if (n is None) != (m is None):
        raise fail(function, "n and m", "be given together", f"n={n}, m={m}")
    if allocation != "uniform" and (scope == "global" or n is not None):
        raise fail(function, "allocation", "be uniform with scope global and with N:M", allocation)
    if n is None or m is None:
        return _DEFAULT_SPARSITY if sparsity is None else sparsity
    check_nm(function, n, m)
    if sparsity is not None and abs(sparsity - (1 - n / m)) > 1e-9:
        raise fail(function, "sparsity", f"be left out or equal 1 - n/m ({1 - n / m:g})", sparsity)
    return 1 - n / m


@torch.no_grad()
def _prune(loaded: Loaded, method: str, options: _Options, calibration: Sequence[Tensor]) -> AppliedWeights:
    model, scope, n, m = loaded.model, options.scope, options.n, options.m
    target = _target_sparsity("prune", options.sparsity, scope, n, m, options.allocation)
    sites = find_sites(model, options.sites)
    _check_sites(model, sites, m)
    calibrated = method == "wanda" or options.allocation == "owl"
    if calibrated:
        if not calibration:
            raise fail("prune", "calibration", f"hold at least one batch of tokens for {method}", "none")
        with capture_inputs(model, sites, lambda *_: None):
            model.eval()  # opening the hooks raises for a site that cannot be calibrated, before anything is changed
    notes: list[str] = []
    dense: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}

    def keep(site: Site, rows: Tensor) -> None:
        view, parameter = weight_view(model, site), model.get_parameter(site.name)
        kept = _unrows(site, rows, view)
        transposed = (view.shape, view.stride()) != (parameter.shape, parameter.stride())
        masks[site.name] = kept.mT.contiguous() if transposed else kept
        dense[site.name] = parameter.detach().clone()
        parameter.masked_fill_(~masks[site.name], 0)

    try:
        whole = input_norms(model, sites, calibration) if options.allocation == "owl" else {}
        sparsities = _allocate(model, sites, target, options.allocation, whole, notes)
        if scope == "global" and n is None:
            norms = input_norms(model, sites, calibration) if method == "wanda" else {}
            scores = {site.name: _score(method, model, site, norms, notes) for site in sites}
            kept = global_topk_masks(scores, sparsity=target)
            for site in sites:
                keep(site, kept[site.name])
        else:
            for block, group in sites_by_block(sites):
                norms = input_norms(UpTo(model, block), group, calibration) if method == "wanda" else {}
                for site in group:
                    rows = _score(method, model, site, norms, notes)
                    keep(site, _select(site, model, rows, options, sparsities[site.name]))
    except BaseException:
        _restore(model, dense)
        raise
    result = Masks(masks, nominal=target)
    state = {
        "method": method,
        "options": options.model_dump(mode="json"),
        "sparsity": result.sparsity().achieved,
        "calibration_tokens": sum(batch.numel() for batch in calibration) if calibrated else 0,
        "notes": list(dict.fromkeys(notes)),
    }
    return AppliedWeights(model, result, dense, state)


def _select(site: Site, model: nn.Module, rows: Tensor, options: _Options, sparsity: float) -> Tensor:
    """Keep-mask of score rows ``[rows, in]``."""
    if options.n is not None and options.m is not None:
        return nm_mask(rows, n=options.n, m=options.m)
    if options.scope == "row":
        return topk_mask(rows, sparsity=sparsity)
    experts = len(weight_view(model, site)) if site.kind in GROUPS["experts"] else 1
    return topk_mask(rows.reshape(experts, -1), sparsity=sparsity).view_as(rows)


def _check_sites(model: nn.Module, sites: Sequence[Site], m: int | None) -> None:
    for site in sites:
        view = weight_view(model, site)
        if view.ndim < 2:
            raise fail("prune", "sites", "be weight matrices", f"{site.name} with shape {list(view.shape)}")
        if m is not None:
            size = view.shape[1] if site.kind == "conv" else view.shape[-1]
            check_divides("prune", "m", m, size, f"the input size of {site.name}")


def _allocate(
    model: nn.Module,
    sites: Sequence[Site],
    target: float,
    allocation: str,
    norms: dict[str, Tensor],
    notes: list[str],
) -> dict[str, float]:
    shapes = {site.name: tuple(weight_view(model, site).shape) for site in sites}
    if allocation == "erk":
        return budget.erk(shapes, sparsity=target)
    if allocation == "owl":
        ratios: dict[str, float] = {}
        for _, group in sites_by_block(sites):
            scores = [_score("wanda", model, site, norms, notes).flatten() for site in group]
            ratios |= dict.fromkeys((site.name for site in group), budget.outlier_ratio(torch.cat(scores)))
        return budget.owl(shapes, sparsity=target, outlier_ratio=ratios)
    return dict.fromkeys(shapes, target)


def _score(method: str, model: nn.Module, site: Site, norms: dict[str, Tensor], notes: list[str]) -> Tensor:
    """Scores as rows of competing inputs: ``[rows, in]``."""
    weight = weight_view(model, site)
    if method == "magnitude":
        return _rows(site, magnitude_score(weight))
    norm = norms[site.name]
    if not bool(norm.isfinite().all()):
        raise fail("prune", "calibration", "give finite activations", f"NaN or infinity at the input of {site.module}")
    unseen = norm.amax(-1, keepdim=True) == 0
    if bool(unseen.any()):
        what = f"{int(unseen.sum())} experts" if norm.ndim == 2 else "the layer"
        notes.append(f"{site.name}: {what} got nothing but zeros in calibration and went by magnitude")
    norm = norm.masked_fill(unseen, 1)
    if site.kind != "conv":
        return _rows(site, wanda_score(weight, norm))
    # A convolution in g groups is a stack of g matrices, each place of the kernel a row of its own.
    channels_last = weight.movedim(1, -1)
    stack = channels_last.reshape(norm.numel() // weight.shape[1], -1, weight.shape[1])
    return wanda_score(stack, norm.view(stack.shape[0], -1)).reshape(len(weight), -1)


def _rows(site: Site, scores: Tensor) -> Tensor:
    """``[..., in]`` to ``[rows, in]``; for a convolution ``[out, in, *kernel]`` to ``[out, kernel * in]``."""
    return scores.movedim(1, -1).flatten(1) if site.kind == "conv" else scores.flatten(0, -2)


def _unrows(site: Site, rows: Tensor, weight: Tensor) -> Tensor:
    """The inverse of `_rows`, in the shape of ``weight``."""
    if site.kind == "conv":
        return rows.reshape(weight.movedim(1, -1).shape).movedim(-1, 1).contiguous()
    return rows.reshape(weight.shape)


@torch.no_grad()
def _restore(model: nn.Module, dense: dict[str, Tensor]) -> None:
    for name, weight in dense.items():
        model.get_parameter(name).copy_(weight)
