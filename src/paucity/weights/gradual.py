"""Gradual magnitude pruning: the smallest weights go while the network trains, many at first and few at the end.

Paper: Zhu & Gupta 2017 (To prune, or not to prune), https://arxiv.org/abs/1710.01878, Eq. 1; the schedule is
`paucity.ops.schedule.Cubic`. Fast Sparse ConvNets (Elsen et al. 2019, https://arxiv.org/abs/1911.09723) prune the 1x1
convolutions of their networks in this way. A weight once removed stays at 0 and so among the smallest: masks only
shrink. Not implemented: the authors' masked weights that keep their value outside the product and may come back.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..checks import InputTypeError, check_choice, check_sparsity, fail
from ..measure.images import Images
from ..models.applied import Applied
from ..models.load import Loaded
from ..models.sites import Site, find_sites, weight_view
from ..ops import budget
from ..ops.formats import Masks
from ..ops.schedule import Cubic, Once, Schedule
from ..ops.select import topk_mask
from ..training import History, Step, num_steps, train
from .magnitude import magnitude_score

Allocation = Literal["uniform", "erk"]


class Gradual(BaseModel):
    """Options of ``gradual``: arguments of `train_sparse`, by which the step trains the model that it prunes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sparsity: float = Field(default=0.8, ge=0, lt=1)
    sites: tuple[str, ...] = ("pointwise",)
    allocation: Allocation = "uniform"
    epochs: int = Field(default=3, ge=1)
    every: int = Field(default=10, ge=1, description="steps between two prunings")
    learning_rate: float = Field(default=0.05, gt=0)


def options_for(method: str) -> type[BaseModel]:
    """The options of ``gradual``."""
    check_choice("options_for", "method", method, ("gradual",))
    return Gradual


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> Applied:
    """Refused: this step trains on labelled images, which the recipe of an image model gives it.

    Raises:
        InputError: always.
    """
    raise fail("recipe", "steps", "not train a language model", f"{method}, which is a step of recipes with images")


class GradualPruning:
    """Prunes while `paucity.training.train` runs: pass it as ``on_step``.

    Args:
        schedule: the sparsity to have at each step; see `paucity.ops.schedule`.
        sites: kinds or groups of `paucity.models.sites`; ``pointwise`` are the 1x1 convolutions.
        allocation: of the sparsity over the sites, ``uniform`` or ``erk``.

    Attributes:
        masks: those in force; None before the first weight is removed.
    """

    def __init__(
        self, schedule: Schedule, *, sites: Collection[str] = ("pointwise",), allocation: Allocation = "uniform"
    ) -> None:
        if not callable(schedule):
            raise InputTypeError(f"GradualPruning: schedule must be a schedule, got {type(schedule).__name__}.")
        check_choice("GradualPruning", "allocation", allocation, ("uniform", "erk"))
        self.schedule, self.sites, self.allocation = schedule, tuple(sites), allocation
        self.masks: Masks | None = None
        self._sparsity = 0.0
        self._handle: RemovableHandle | None = None

    def __call__(self, step: Step) -> None:
        """Remove as many weights as the schedule has it at this step, and keep them at 0 from here on."""
        sparsity = self.schedule(step.index)
        check_sparsity("GradualPruning", sparsity, "sparsity of the schedule")
        if sparsity == self._sparsity:
            return
        if sparsity < self._sparsity:
            raise fail("GradualPruning", "schedule", "never fall", f"{sparsity} after {self._sparsity}")
        self.release()
        self.masks = magnitude_masks(
            step.model, find_sites(step.model, self.sites), sparsity=sparsity, allocation=self.allocation
        )
        self._handle = self.masks.install(step.optimizer, step.model)
        self._sparsity = sparsity

    def release(self) -> None:
        """Stop keeping the removed weights at 0."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None


@dataclass(frozen=True)
class SparseTraining:
    """What a sparse training left.

    Attributes:
        masks: of the pruned parameters.
        history: of the training.
    """

    masks: Masks
    history: History


@torch.no_grad()
def magnitude_masks(
    model: nn.Module, sites: Sequence[Site], *, sparsity: float, allocation: Allocation = "uniform"
) -> Masks:
    """Masks of the largest weights of each site, which compete within the site; ``model`` is left alone."""
    check_sparsity("magnitude_masks", sparsity)
    shapes = {site.name: tuple(weight_view(model, site).shape) for site in sites}
    each = dict.fromkeys(shapes, sparsity) if allocation == "uniform" else budget.erk(shapes, sparsity=sparsity)
    masks = {}
    for site in sites:
        parameter = model.get_parameter(site.name)
        score = magnitude_score(parameter).flatten()
        masks[site.name] = topk_mask(score, sparsity=each[site.name]).view(parameter.shape)
    return Masks(masks, nominal=sparsity)


def train_sparse(
    model: nn.Module,
    images: Images,
    *,
    sparsity: float,
    epochs: int,
    schedule: Schedule | None = None,
    sites: Collection[str] = ("pointwise",),
    allocation: Allocation = "uniform",
    every: int = 10,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    weight_decay: float = 5e-4,
    seed: int = 0,
    teacher: nn.Module | None = None,
    shift: int = 0,
) -> SparseTraining:
    """Train ``model`` in place and prune it on the way; arguments not described are those of `paucity.training.train`.

    Args:
        model: trained or not.
        images: to train on.
        sparsity: reached at the end, fraction removed of the sites' weights.
        epochs: passes over the images.
        schedule: sparsity by step; None is the paper's cubic rise between a tenth and six tenths of the training.
        sites: what is pruned.
        allocation: ``uniform`` or ``erk``.
        every: steps between two prunings of the default schedule.
        batch_size: images of a step.
        learning_rate: the highest.
        weight_decay: of matrices and kernels.
        seed: of the order of the images.
        teacher: whose answers count as well.
        shift: of the pictures.

    Raises:
        InputError: as `paucity.training.train`; if the model has no such sites; or if the schedule does not reach
            ``sparsity`` within the training.
    """
    check_sparsity("train_sparse", sparsity)
    found = find_sites(model, sites)
    total = num_steps(len(images), epochs, batch_size)
    if schedule is None:
        start = total // 10
        end = max(start + 1, total * 6 // 10)
        schedule = Cubic(sparsity=sparsity, start=start, end=end, every=every) if end < total else Once(sparsity)
    if abs(schedule(total - 1) - sparsity) > 1e-9:
        reached = f"{schedule(total - 1):g} at the last step ({total - 1})"
        raise fail("train_sparse", "schedule", f"reach the sparsity {sparsity:g} within the training", reached)
    pruning = GradualPruning(schedule, sites=sites, allocation=allocation)
    try:
        history = train(
            model,
            images,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            seed=seed,
            on_step=pruning,
            teacher=teacher,
            shift=shift,
        )
    finally:
        pruning.release()
    masks = pruning.masks or magnitude_masks(model, found, sparsity=0.0)
    return SparseTraining(masks, history)
