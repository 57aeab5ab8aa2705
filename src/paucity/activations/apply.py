"""Calibration of sparse activations, and their installation on a model (`AppliedActivations` says what that does).

Each site has a mask of its own, as in the papers' code: q, k and v (and gate and up) see one input, each with its own
share of it. Thresholds and greedy sparsities are found on the dense model, block by block. Experts fused into one
parameter stay dense, and the state says so.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..checks import InputError, check_choice, fail
from ..models.blocks import BlockCall, UpTo, block_calls, block_path, sites_by_block
from ..models.hooks import input_samples
from ..models.load import Loaded
from ..models.sites import GROUPS, Site, find_sites, weight_view
from ..ops import budget
from .base import AppliedActivations, Setting, gate_activation
from .cats import cats_threshold
from .teal import teal_threshold
from .wina import column_norm, wina_score

_SAMPLE_ENTRIES = 2**26  # calibration activations held at once, over all sites
_MIN_SAMPLE_TOKENS = 256
_GREEDY_TOKENS = 512  # every greedy trial runs its block over these

_Fraction = Annotated[float, Field(ge=0, lt=1)]
_Step = Annotated[float, Field(gt=0, lt=1)]


class CatsOptions(BaseModel):
    """Options of ``cats``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: _Fraction = Field(default=0.5, description="fraction of gate activations dropped, in each MLP")


class TealOptions(BaseModel):
    """Options of ``teal``."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: _Fraction = Field(default=0.5, description="fraction of inputs dropped, weighted by the weights' sizes")
    allocation: Literal["uniform", "greedy"] = "greedy"
    step: _Step = Field(default=0.05, description="greedy move of a site of its block's mean size")
    selector: Literal["threshold", "topk"] = Field(default="threshold", description="calibrated, or k of each token")
    sites: tuple[str, ...] = ("linear",)


class WinaOptions(TealOptions):
    """Options of ``wina``."""

    step: _Step = Field(default=0.025, description="greedy move of a site of its block's mean size")
    selector: Literal["threshold", "topk"] = Field(default="topk", description="calibrated, or k of each token")


_INPUT_OPTIONS: dict[str, type[TealOptions]] = {"teal": TealOptions, "wina": WinaOptions}
_OPTIONS: dict[str, type[BaseModel]] = {"cats": CatsOptions, **_INPUT_OPTIONS}


def options_for(method: str) -> type[BaseModel]:
    """The options of ``cats``, ``teal`` or ``wina``, with the paper's defaults."""
    check_choice("options_for", "method", method, _OPTIONS)
    return _OPTIONS[method]


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> AppliedActivations:
    """Make the inputs of linear layers (``teal``, ``wina``) or the gated neurons (``cats``) of a model sparse.

    A greedy allocation takes about ``sites**2 * sparsity / step`` runs of each block over 512 tokens.

    Args:
        loaded: the model; it is put in eval mode.
        method: ``cats``, ``teal`` or ``wina``.
        options: of the type that `options_for` names.
        calibration: ``input_ids [1, T]`` int64; not needed for top-k with uniform allocation.

    Raises:
        InputError: if the model lacks the sites, there is no calibration where it is needed, or an activation is not
            finite. Then nothing has changed.
    """
    check_choice("apply_step", "method", method, _OPTIONS)
    given = _OPTIONS[method].model_validate(options.model_dump())
    model, notes = loaded.model.eval(), list[str]()
    if method == "cats":
        settings = _gate_settings(model, CatsOptions.model_validate(given.model_dump()).sparsity, calibration)
    else:
        chosen = _INPUT_OPTIONS[method].model_validate(given.model_dump())
        sites, notes = _linear_sites(model, chosen.sites)
        settings = _input_settings(model, method, sites, chosen, calibration)
    return AppliedActivations(model, method, settings, options=given.model_dump(mode="json"), notes=notes)


def _linear_sites(model: nn.Module, kinds: Sequence[str]) -> tuple[list[Site], list[str]]:
    """The asked sites whose module is one matrix, and a note on the experts left out."""
    found = find_sites(model, kinds)
    fused = [site for site in found if site.kind in GROUPS["experts"]]
    sites = [site for site in found if site.kind not in GROUPS["experts"]]
    named = {*GROUPS["experts"], "experts"} & set(kinds)
    odd = [site for site in sites if site.kind in ("conv", "norm") or site.kind.endswith("embedding")]
    if named or odd or not sites:
        got = ", ".join(sorted(named)) or (odd[0].name if odd else "only fused experts")
        raise fail("apply_step", "sites", "be matrices that a module of their own applies", got)
    return sites, [f"{len(fused)} stacks of experts stay dense: they are fused"] if fused else []


def _input_settings(
    model: nn.Module, method: str, sites: Sequence[Site], options: TealOptions, calibration: Sequence[Tensor]
) -> dict[str, Setting]:
    calibrated = options.selector == "threshold"
    if not calibration and (calibrated or options.allocation == "greedy"):
        raise fail("apply_step", "calibration", f"hold at least one batch of tokens for {method}", "none")
    samples: dict[str, Tensor] = {}
    if calibrated:
        width = sum(weight_view(model, site).shape[-1] for site in sites)
        tokens = max(_MIN_SAMPLE_TOKENS, _SAMPLE_ENTRIES // width)
        samples = input_samples(model, sites, calibration, max_tokens=tokens)
        if method == "wina":
            samples = {s.name: wina_score(samples[s.name], column_norm(weight_view(model, s))) for s in sites}

    @cache
    def setting(name: str, sparsity: float) -> Setting:
        if not calibrated:
            return Setting(sparsity)
        try:
            return Setting(sparsity, teal_threshold(samples[name], sparsity=sparsity))
        except InputError as error:
            raise InputError(f"apply_step: calibration of {name} failed: {error}") from None

    shapes = {site.name: tuple(weight_view(model, site).shape) for site in sites}
    if options.allocation == "uniform":
        sparsities = budget.uniform(shapes, sparsity=options.sparsity)
    else:
        blocks = {path: [site.name for site in group] for path, group in sites_by_block(sites)}
        loss = _BlockLoss(model, method, sites, setting, calibration)
        try:
            sparsities = budget.greedy(shapes, sparsity=options.sparsity, loss=loss, groups=blocks, step=options.step)
        finally:
            loss.close()
    return {name: setting(name, sparsity) for name, sparsity in sparsities.items()}


class _BlockLoss:
    """Error of a block's output, by sparsities of its sites: the norm of the difference to the dense output."""

    def __init__(
        self,
        model: nn.Module,
        method: str,
        sites: Sequence[Site],
        setting: Callable[[str, float], Setting],
        calibration: Sequence[Tensor],
    ) -> None:
        self.model, self.method, self.setting = model, method, setting
        self.paths = {site.name: block_path(site) for site in sites}
        self.batches, left = list[Tensor](), _GREEDY_TOKENS
        for batch in calibration:
            if left > 0:
                self.batches.append(batch[:, :left])
                left -= batch.shape[1]
        self.path, self.calls, self.dense = "", list[BlockCall](), list[Tensor]()
        self.applied: AppliedActivations | None = None

    def __call__(self, sparsities: dict[str, float]) -> float:
        path = self.paths[next(iter(sparsities))]
        block = self.model.get_submodule(path)
        settings = {name: self.setting(name, sparsity) for name, sparsity in sparsities.items()}
        if self.applied is None or path != self.path:
            self.close()
            self.path, self.calls = path, block_calls(self.model, path, self.batches)
            self.dense = [call.run(block) for call in self.calls]
            self.applied = AppliedActivations(self.model, self.method, settings, skip=False)
        self.applied.change(settings)
        outputs = [call.run(block) for call in self.calls]
        errors = [(output - dense).float().norm() for output, dense in zip(outputs, self.dense, strict=True)]
        return float(torch.stack(errors).norm())

    def close(self) -> None:
        """Take the hooks off the block."""
        if self.applied is not None:
            self.applied.remove()


def _gate_settings(model: nn.Module, sparsity: float, calibration: Sequence[Tensor]) -> dict[str, Setting]:
    everywhere = find_sites(model)
    gates = [site for site in everywhere if site.kind in ("gate", "gate_up")]
    if not gates:
        kinds = ", ".join(sorted({site.kind for site in everywhere}))
        raise fail("apply_step", "model", "have gated MLPs (sites gate or gate_up) for cats", f"only {kinds}")
    activations = {site.name: gate_activation(model, site) for site in gates}
    if not calibration:
        raise fail("apply_step", "calibration", "hold at least one batch of tokens for cats", "none")
    num_tokens = sum(batch.numel() for batch in calibration)
    width = sum(weight_view(model, site).shape[0] for site in gates)
    every = -(-num_tokens // max(_MIN_SAMPLE_TOKENS, _SAMPLE_ENTRIES // width))
    rows: dict[str, list[Tensor]] = {site.name: [] for site in gates}

    def note(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda module, args, output: rows[name].append(output.detach().flatten(0, -2)[::every].clone())

    handles = [module.register_forward_hook(note(name)) for name, module in activations.items()]
    try:
        device, last = next(model.parameters()).device, UpTo(model, block_path(gates[-1]))
        with torch.no_grad():
            for batch in calibration:
                last(batch.to(device))
    finally:
        for handle in handles:
            handle.remove()
    settings = {}
    for name, parts in rows.items():
        settings[name] = Setting(sparsity, cats_threshold(torch.cat(parts), sparsity=sparsity))
    return settings
