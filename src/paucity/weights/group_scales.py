"""The scales of norms as scores of channels, trained to zero by an L1 penalty whose rate varies.

Paper: Chu et al. 2022, https://arxiv.org/abs/2306.01526, dynamic sparse training; the rate over time from the authors'
code. The scales of norms as scores: Liu et al. 2017, https://arxiv.org/abs/1708.06519.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ..checks import check_range, check_sparsity, fail
from ..ops.select import global_topk_masks
from ..training import OnStep, Step
from .structured.channels_shrink import ChannelGroup


@dataclass(frozen=True)
class VaryingRate:
    """The rate s of the scales' L1 penalty, for each channel and over the training.

    Args:
        rate: s; the gradient of a scale gets ``s sign(gamma)``.
        start: share of the training after which the rate varies, in [0, 1].
        share: share of the channels that go on with the whole rate, in [0, 1): those with the lowest scales.
        lowered: factor of the rate of the others, in [0, 1]; 1 is a constant rate.
    """

    rate: float = 1e-3
    start: float = 0.4
    share: float = 0.65
    lowered: float = 0.01

    def __post_init__(self) -> None:
        """Raise InputError for a number out of range."""
        check_range("VaryingRate", "rate", self.rate, 0)
        check_range("VaryingRate", "start", self.start, 0, 1)
        check_sparsity("VaryingRate", self.share, "share")
        check_range("VaryingRate", "lowered", self.lowered, 0, 1)

    def rates(self, scales: Mapping[str, Tensor], progress: float) -> dict[str, Tensor]:
        """The rate of every channel, by the names of ``scales`` and in their shapes.

        Args:
            scales: gamma of each norm.
            progress: share of the training that is done, in [0, 1].
        """
        if progress <= self.start or self.lowered == 1:
            return {name: torch.full_like(scale, self.rate) for name, scale in scales.items()}
        high = global_topk_masks({name: scale.detach().abs() for name, scale in scales.items()}, sparsity=self.share)
        return {name: self.rate * torch.where(mask, self.lowered, 1.0).to(scales[name]) for name, mask in high.items()}


@contextmanager
def sparse_scales(model: nn.Module, groups: Sequence[ChannelGroup], rate: VaryingRate) -> Iterator[OnStep]:
    """While the context is open, gradients of the scales of free groups get the penalty's; for ``train(on_step=...)``.

    Raises:
        InputError: if no free group has a norm with scales.
    """
    scales = {name: model.get_parameter(name) for names in scales_of(model, groups).values() for name in names}
    if not scales:
        raise fail("sparse_scales", "groups", "have norms with scales, which can be trained to zero", "none")
    now: dict[str, Tensor] = rate.rates(scales, 0.0)

    def on_step(step: Step) -> None:
        now.update(rate.rates(scales, step.index / step.total))

    def penalise(name: str, gradient: Tensor) -> Tensor:
        return gradient + now[name] * scales[name].detach().sign()

    hooks = {name: partial(penalise, name) for name in scales}
    handles = [scales[name].register_hook(hook) for name, hook in hooks.items()]  # type: ignore[no-untyped-call]
    try:
        yield on_step
    finally:
        for handle in handles:
            handle.remove()


def scales_of(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, list[str]]:
    """Name of each free group that has norms with scales to the names of these, in the order of the forward."""
    norms = {path for path, module in model.named_modules() if "Norm" in type(module).__name__}
    found = {
        group.name: [m.name for m in group.members if m.name.endswith(".weight") and m.name[: -len(".weight")] in norms]
        for group in groups
        if not group.locked
    }
    return {name: names for name, names in found.items() if names}


def scale_scores(model: nn.Module, groups: Sequence[ChannelGroup]) -> dict[str, Tensor]:
    """``|gamma|`` of the units of each free group that has scales, the largest of those of its layers."""
    units = {(group.name, m.name): (group.size, m.units) for group in groups for m in group.members if m.dim == 0}
    result: dict[str, Tensor] = {}
    for group, names in scales_of(model, groups).items():
        for name in names:
            size, unit = units[group, name]
            mine, scale = unit >= 0, model.get_parameter(name).detach().float().abs().cpu()
            score = torch.zeros(size).scatter_reduce(0, unit[mine], scale[mine], "amax")
            result[group] = torch.maximum(result[group], score) if group in result else score
    return result
