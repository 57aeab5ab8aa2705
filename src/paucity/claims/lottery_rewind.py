"""Claim: iterative pruning that rewinds to early in training finds subnetworks that train better than its controls.

Paper: Frankle et al. 2019, https://arxiv.org/abs/1912.05671, section 4: tickets against random pruning and random
reinitialisation, at the extreme sparsities of each network.
"""

import time

from ..weights.iterative import Tickets, iterative_magnitude
from ..weights.ticket_controls import train_control
from . import CLAIMS
from .base import ClaimResult
from .tickets import Source, an_epoch, net, source, trainer

NAME = "lottery-rewind"
SPARSITY = 0.95
ROUNDS = 5
CONTROLS = ("random_mask", "reinitialised")


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Find tickets in LeNet-300-100; train them, random masks, new weights and a mask of one round equally long.

    Args:
        quick: one draw, fewer images and rounds.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    seeds = [seed] if quick else list(range(seed, seed + 3))
    images = source(4096 if quick else 20_000, 5000)
    epochs, rounds = 4, 3 if quick else ROUNDS
    draws = [_draw(images, draw, epochs=epochs, rounds=rounds) for draw in seeds]
    found = {name: [draw[name] for draw in draws] for name in draws[0]}
    margins = {
        control: [ticket - other for ticket, other in zip(found["ticket"], found[control], strict=True)]
        for control in CONTROLS
    }
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"rewound tickets": "match the dense net", "random pruning, reinitialisation": "do not"},
        measured={"accuracy": found, "ticket_less_control": margins},
        holds=all(min(values) > 0 for values in margins.values()),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "images": images.name,
            "note": images.note,
            "num_train": len(images.trained),
            "sparsity": SPARSITY,
            "rounds": rounds,
            "epochs": epochs,
            "rewind_epochs": 0.5,
            "seeds": seeds,
            "holds_if": "the ticket is better than both controls in every draw",
        },
    )


def _draw(images: Source, seed: int, *, epochs: int, rounds: int) -> dict[str, float]:
    """Accuracy of the dense net, the ticket, its controls and one-shot pruning, from one initialisation."""
    train = trainer(images, epochs=epochs, seed=seed)

    def search(rounds: int) -> Tickets:
        model, step = net(images, seed=seed), an_epoch(images) // 2
        return iterative_magnitude(model, train, sparsity=SPARSITY, rounds=rounds, rewind_step=step)

    tickets = search(rounds)
    records = {"dense": tickets.rounds[0].record, "ticket": tickets.rounds[-1].record}
    for control in CONTROLS:
        model = net(images, seed=seed)
        records[control] = train_control(model, tickets, train, control=control, seed=seed)  # type: ignore[arg-type]
    records["one_shot"] = search(1).rounds[-1].record
    return {name: record["accuracy"] for name, record in records.items()}
