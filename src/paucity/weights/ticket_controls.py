"""What a lottery ticket is compared with: the same training of other masks, and of other weights.

Papers: Frankle & Carbin 2018, https://arxiv.org/abs/1803.03635, section 2 (random reinitialisation); random masks of
equal density in every layer follow Su et al. 2020, https://arxiv.org/abs/2009.11094, who ask whether a ticket is more
than its layers' densities.
"""

import hashlib
from typing import Literal

import torch
from torch import nn

from ..checks import check_choice, fail
from ..ops.formats import Masks
from .iterative import Phase, Tickets, TrainFn, run_phase


def random_masks(masks: Masks, *, seed: int) -> Masks:
    """The control: as many entries kept in every parameter as ``masks`` keep there, drawn at random."""
    generator, drawn = torch.Generator().manual_seed(seed), {}
    for name, mask in masks.items():
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        drawn[name] = mask.flatten()[order].view(mask.shape)
    return Masks(drawn, nominal=masks.nominal)


def reinitialise(model: nn.Module, *, seed: int) -> None:
    """Draw all parameters anew, by the ``reset_parameters`` of the modules that own them.

    The numbers are none that ``torch.manual_seed(seed)`` gives, from which the model itself may have been drawn.

    Raises:
        InputError: if a module owns parameters and has no such method; then nothing has changed.
    """
    owners = [(name, module) for name, module in model.named_modules() if any(True for _ in module.parameters(False))]
    for name, module in owners:
        if not callable(getattr(module, "reset_parameters", None)):
            raise fail("reinitialise", "model", "hold only modules with reset_parameters", name or type(model).__name__)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(int.from_bytes(hashlib.sha256(f"reinitialise {seed}".encode()).digest()[:7]))
        for _, module in owners:
            module.reset_parameters()  # type: ignore[operator]


def train_control(
    model: nn.Module,
    tickets: Tickets,
    train: TrainFn,
    *,
    control: Literal["ticket", "random_mask", "reinitialised"],
    index: int = -1,
    seed: int = 0,
) -> dict[str, float]:
    """Train what a ticket is to be compared with, in place, as long as the ticket was trained.

    Args:
        model: of the tickets' architecture.
        tickets: what `iterative_magnitude` found.
        train: the same training.
        control: ``ticket`` is the ticket itself; ``random_mask`` has the rewound weights under `random_masks`;
            ``reinitialised`` has the ticket's masks over weights drawn anew, trained from step 0.
        index: of the round.
        seed: of what is drawn.

    Returns:
        What ``train`` recorded.
    """
    check_choice("train_control", "control", control, ("ticket", "random_mask", "reinitialised"))
    chosen = tickets.rounds[index]
    masks = random_masks(chosen.masks, seed=seed) if control == "random_mask" else chosen.masks
    tickets.ticket(model, masks)
    start = tickets.rewind_step
    if control == "reinitialised":
        reinitialise(model, seed=seed)
        masks.apply_(model)
        start = 0
    return run_phase(model, train, Phase(chosen.index, masks, start))[0]
