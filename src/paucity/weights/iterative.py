"""Iterative magnitude pruning: train, remove the smallest weights, go back, train again.

Papers: Frankle & Carbin 2018, https://arxiv.org/abs/1803.03635, section 1 (the lottery ticket: the weights go back to
their initial values); Frankle et al. 2019, https://arxiv.org/abs/1912.05671, Algorithm 2 (they go back to step k of the
training, without which large networks have no winning tickets); Renda et al. 2020, https://arxiv.org/abs/2003.02389,
section 2 (only the learning rate goes back, or nothing does: fine-tuning); Han et al. 2015,
https://arxiv.org/abs/1506.02626. Round r keeps ``(1 - rate)^r`` of the weights, ranked by magnitude after training
among those that are left. Everything that is not masked (biases, norms, running means) goes back with the weights.

Not implemented: stopping early by a validation loss, and carrying the optimizer's state to step k, where every training
starts anew.
"""

import math
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ..checks import InputTypeError, check_choice, check_int, check_range, fail
from ..models.sites import Site, find_sites
from ..ops.formats import Masks
from ..ops.select import global_topk_mask, global_topk_masks
from .magnitude import magnitude_score
from .ticket_folder import TicketFolder

Rewind = Literal["weights", "learning_rate", "none"]
Scope = Literal["global", "layer"]


@dataclass(frozen=True)
class Phase:
    """What a training function is to do.

    Attributes:
        round: 0 is the dense training.
        masks: entries to keep at 0, through ``masks.install``; None in the dense training.
        start: the first step to take, whose learning rate is that of this step in the whole schedule.
        stop: the step to stop before; None goes to the end of the schedule.
        fine_tune: take the steps from ``start`` at the learning rate that the schedule ends with.
    """

    round: int
    masks: Masks | None
    start: int = 0
    stop: int | None = None
    fine_tune: bool = False


TrainFn = Callable[[nn.Module, Phase], Mapping[str, float] | None]
"""Trains a model in place and returns the numbers to record, such as its accuracy; the same phase, the same result."""


@dataclass(frozen=True)
class Round:
    """One training and what it trained.

    Attributes:
        index: 0 is the dense training.
        sparsity: nominal, of the weights considered.
        masks: what was kept.
        record: what the training function returned.
        seconds: the training took.
        empty: masked parameters of which nothing is left.
    """

    index: int
    sparsity: float
    masks: Masks
    record: dict[str, float]
    seconds: float
    empty: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tickets:
    """The rounds of iterative pruning, and the weights that they went back to.

    Attributes:
        rounds: dense first.
        rewound: state of the dense model at ``rewind_step``, on the CPU.
        rewind_step: k.
    """

    rounds: tuple[Round, ...]
    rewound: dict[str, Tensor]
    rewind_step: int

    @property
    def masks(self) -> Masks:
        """Those of the last round."""
        return self.rounds[-1].masks

    def ticket(self, model: nn.Module, masks: Masks | None = None) -> Masks:
        """Make ``model`` the ticket before its training: the rewound weights with ``masks``, the last if not given."""
        chosen = self.masks if masks is None else masks
        model.load_state_dict(self.rewound)
        chosen.apply_(model)
        return chosen

    def to_json(self) -> list[dict[str, Any]]:
        """A row for each round."""
        return [
            {
                "round": each.index,
                "sparsity": each.sparsity,
                "achieved": each.masks.sparsity().achieved,
                "record": each.record,
                "seconds": each.seconds,
                "empty": list(each.empty),
            }
            for each in self.rounds
        ]


def round_sparsities(sparsity: float, *, rate: float = 0.2, rounds: int | None = None) -> list[float]:
    """The sparsity of each round after the dense one: ``1 - (1 - rate)^r``, and ``sparsity`` itself in the last.

    Args:
        sparsity: final, in (0, 1).
        rate: share of what is left that a round removes, in (0, 1); the last may remove less.
        rounds: how many; the rate then follows from it. One is one-shot pruning.

    Examples:
        >>> [round(s, 3) for s in round_sparsities(0.5)]
        [0.2, 0.36, 0.488, 0.5]
    """
    check_range("round_sparsities", "sparsity", sparsity, 0, 1, open_low=True, open_high=True)
    if rounds is not None:
        check_int("round_sparsities", "rounds", rounds)
        return [*(1 - (1 - sparsity) ** (r / rounds) for r in range(1, rounds)), sparsity]
    check_range("round_sparsities", "rate", rate, 0, 1, open_low=True, open_high=True)
    count = math.ceil(math.log(1 - sparsity) / math.log(1 - rate) - 1e-9)
    return [*(1 - (1 - rate) ** r for r in range(1, count)), sparsity]


def iterative_magnitude(
    model: nn.Module,
    train: TrainFn,
    *,
    sparsity: float,
    rate: float = 0.2,
    rounds: int | None = None,
    rewind: Rewind = "weights",
    rewind_step: int = 0,
    scope: Scope = "global",
    sites: Collection[str] = ("linear",),
    folder: str | Path | None = None,
    on_round: Callable[[nn.Module, Round], object] | None = None,
) -> Tickets:
    """Train and prune ``model`` in rounds; afterwards it is the last ticket, trained.

    Args:
        model: as it is to start; any module.
        train: called for each round, and for the first ``rewind_step`` steps.
        sparsity: of the weights considered, after the last round.
        rate: see `round_sparsities`.
        rounds: see `round_sparsities`.
        rewind: ``weights`` goes back to those of step ``rewind_step`` and trains from there; ``learning_rate`` keeps
            the weights and trains them from that step of the schedule; ``none`` keeps both (fine-tuning).
        rewind_step: k, of the dense training.
        scope: what competes: all sites together, or each ``layer`` for itself.
        sites: kinds or groups of `paucity.models.sites`, such as ``("conv", "linear")``.
        folder: made if absent. Every finished round is kept there (masks, record, and of the last one the weights),
            and a second call with the same plan goes on behind it: a kill loses the round it falls in and no more.
        on_round: called after each round with the trained model; not for the rounds read back from ``folder``.

    Raises:
        InputError: if an argument is out of range, the model has no such site, ``folder`` is of another plan, or
            training leaves a weight that is no number.
    """
    levels = round_sparsities(sparsity, rate=rate, rounds=rounds)
    check_choice("iterative_magnitude", "rewind", rewind, get_args(Rewind))
    check_choice("iterative_magnitude", "scope", scope, get_args(Scope))
    check_int("iterative_magnitude", "rewind_step", rewind_step, 0)
    if not callable(train):
        raise InputTypeError(f"iterative_magnitude: train must be callable, got {type(train).__name__}.")
    found = find_sites(model, sites)
    plan = {
        "sparsities": levels,
        "rewind": rewind,
        "rewind_step": rewind_step,
        "scope": scope,
        "shapes": {site.name: list(model.get_parameter(site.name).shape) for site in found},
    }
    store = None if folder is None else TicketFolder(Path(folder), plan)
    rewound, done = _begin(model, train, rewind_step, store)
    for index in range(len(done), len(levels) + 1):
        if index == 0:
            level, masks = 0.0, Masks(_ones(model, found), nominal=0.0)
            phase = Phase(0, None, rewind_step)
        else:
            level = levels[index - 1]
            masks = _prune(model, found, done[-1].masks, level, scope)
            if rewind == "weights":
                model.load_state_dict(rewound)
            masks.apply_(model)
            phase = Phase(index, masks, rewind_step, fine_tune=rewind == "none")
        record, seconds = run_phase(model, train, phase)
        empty = tuple(name for name, mask in masks.items() if not bool(mask.any()))
        done.append(Round(index, level, masks, record, seconds, empty))
        if store is not None:
            numbers = {"sparsity": level, "record": record, "seconds": seconds, "empty": list(empty)}
            store.keep_round(index, model, masks, numbers)
        if on_round is not None:
            on_round(model, done[-1])
    return Tickets(tuple(done), rewound, rewind_step)


def _begin(
    model: nn.Module, train: TrainFn, step: int, store: TicketFolder | None
) -> tuple[dict[str, Tensor], list[Round]]:
    """The state at the step to go back to, and the rounds that a killed call has left."""
    known = store is not None and store.read_rewound(model)
    if step and not known:
        run_phase(model, train, Phase(0, None, 0, step))
    rewound = {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}
    if store is not None and not known:
        store.keep_rewound(model)
    done = [] if store is None else store.read_rounds(model)
    return rewound, [
        Round(index, numbers["sparsity"], masks, numbers["record"], numbers["seconds"], tuple(numbers["empty"]))
        for index, (masks, numbers) in enumerate(done)
    ]


def _ones(model: nn.Module, sites: list[Site]) -> dict[str, Tensor]:
    return {site.name: torch.ones_like(model.get_parameter(site.name), dtype=torch.bool) for site in sites}


def run_phase(model: nn.Module, train: TrainFn, phase: Phase) -> tuple[dict[str, float], float]:
    """What ``train`` recorded, and the seconds it took; InputError if it left weights that are no numbers."""
    started = time.monotonic()
    record = {name: float(value) for name, value in (train(model, phase) or {}).items()}
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise fail("iterative_magnitude", "train", "leave finite weights", f"{name} in round {phase.round}")
    return record, time.monotonic() - started


def _prune(model: nn.Module, sites: list[Site], before: Masks, sparsity: float, scope: Scope) -> Masks:
    """The largest of what ``before`` keeps; what was removed stays so, as its score is below every magnitude."""
    scores = {}
    for site in sites:
        weight = model.get_parameter(site.name)
        scores[site.name] = magnitude_score(weight).masked_fill(~before[site.name].to(weight.device), -1)
    if scope == "global":
        return Masks(global_topk_masks(scores, sparsity=sparsity), nominal=sparsity)
    kept = {name: global_topk_mask(score, sparsity=sparsity) for name, score in scores.items()}
    return Masks(kept, nominal=sparsity)
