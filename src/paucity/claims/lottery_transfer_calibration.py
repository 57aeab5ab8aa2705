"""Claim: on other images dense models are better calibrated than their lottery tickets, and no ticket serves them all.

Paper: Misra et al. 2023, https://arxiv.org/abs/2308.14969, section 5: linear probing and visual prompting of a
ResNet-50 of ImageNet and of its tickets on eight sets of images.
"""

import copy
import time
from typing import Any

from torch import nn

from ..measure.images import Images, read_images
from ..measure.stats import mean_interval
from ..weights.iterative import Round, iterative_magnitude
from ..weights.transfer import LinearProbe, VisualPrompt
from . import CLAIMS
from .base import ClaimResult
from .tickets import Source, an_epoch, net, scores, source, trainer

NAME = "lottery-transfer-calibration"
_WAYS = ("linear_probe", "visual_prompt")
SPARSITIES = (0.5, 0.75, 0.875, 0.9375)
PROMPT_EPOCHS = 15
TARGETS = ("mnist", "digits")
EQUAL_UPSTREAM = 0.01
"""A ticket matches the dense model where its accuracy on the source is at most this much lower, over all draws."""
LOST = 0.03
"""A matching ticket is no universal reprogrammer where its prompted accuracy on a target is lower by this much."""


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train LeNet-300-100 and its tickets on Fashion-MNIST, then probe and prompt all of them on other images.

    Args:
        quick: one draw, fewer images, two tickets.
        seed: of the first draw; the others follow.
    """
    started = time.monotonic()
    seeds = [seed] if quick else list(range(seed, seed + 3))
    images = source(4096 if quick else 20_000, 5000)
    targets, absent = _targets(images, 512 if quick else 1024)
    epochs = 4
    tables = [_table(images, targets, draw, epochs=epochs, rounds=2 if quick else len(SPARSITIES)) for draw in seeds]
    pairs = [pair for table in tables for pair in _pairs(table)]
    excess = {
        way: mean_interval([pair["ticket_error"] - pair["dense_error"] for pair in pairs if pair["way"] == way])
        for way in _WAYS
    }
    calibrated = {
        way: [pair["dense_error"] < pair["ticket_error"] for pair in pairs if pair["way"] == way] for way in _WAYS
    }
    lost = [each for each in _losses(pairs) if each["lost_on_source"] <= EQUAL_UPSTREAM and each["lost"] > LOST]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"dense better calibrated than its tickets": "always", "tickets": "no universal reprogrammers"},
        measured={
            "dense_better_calibrated": {way: f"{sum(found)} of {len(found)}" for way, found in calibrated.items()},
            "ticket_less_dense_error": {way: [each.value, each.low, each.high] for way, each in excess.items()},
            "mean_calibration_error": {
                way: {
                    who: _mean([pair[f"{who}_error"] for pair in pairs if pair["way"] == way])
                    for who in ("dense", "ticket")
                }
                for way in _WAYS
            },
            "matching_tickets_that_lose_prompted": lost,
            "losses_prompted": _losses(pairs),
            "draws": tables,
        },
        holds=all((each.low or 0.0) > 0 for each in excess.values()) and bool(lost),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "source": images.name,
            "note": images.note,
            "targets": list(targets),
            "targets_left_out": absent,
            "num_train": len(images.trained),
            "epochs": epochs,
            "prompt_epochs": PROMPT_EPOCHS,
            "seeds": seeds,
            "equal_upstream": EQUAL_UPSTREAM,
            "lost": LOST,
            "holds_if": "the mean excess error of tickets is above 0 with 95 % confidence in both ways, and a ticket "
            "that matches the dense model on the source loses on a target when it is prompted",
        },
    )


def _targets(images: Source, num: int) -> tuple[dict[str, tuple[Images, Images]], list[str]]:
    """Training and test images of each target, and those that this machine does not have."""
    found, absent = {}, list[str]()
    for name in TARGETS:
        if name == images.name:
            absent.append(f"{name}: it is the source")
            continue
        try:
            trained, tested = read_images(name, "train"), read_images(name, "test")
            found[name] = trained.take(min(num, len(trained))), tested.take(min(1000, len(tested)))
        except FileNotFoundError as error:
            absent.append(f"{name}: {error}")
    if not found:
        raise FileNotFoundError(f"{NAME}: no target images: {'; '.join(absent)}")
    return found, absent


def _table(
    images: Source, targets: dict[str, tuple[Images, Images]], seed: int, *, epochs: int, rounds: int
) -> list[dict[str, Any]]:
    """A row for the dense model and for each ticket, with what it does on the source and on each target."""
    rows: list[dict[str, Any]] = []

    def transfer(model: nn.Module, done: Round) -> None:
        frozen = copy.deepcopy(model)
        row: dict[str, Any] = {"sparsity": done.sparsity, "source": done.record}
        for name, (trained, tested) in targets.items():
            classes = trained.num_classes
            probe = LinearProbe(frozen, images.shape, classes).fit(trained, epochs=60, learning_rate=0.05, seed=seed)
            prompt = VisualPrompt(frozen, images.shape, classes, border=images.shape[1] // 7)
            prompt.fit(trained, epochs=PROMPT_EPOCHS, batch_size=64, learning_rate=0.1, seed=seed)
            row[name] = {"linear_probe": scores(probe, tested), "visual_prompt": scores(prompt, tested)}
        rows.append(row)

    iterative_magnitude(
        net(images, seed=seed),
        trainer(images, epochs=epochs, seed=seed),
        sparsity=SPARSITIES[rounds - 1],
        rate=0.5,
        rewind_step=an_epoch(images) // 2,
        on_round=transfer,
    )
    return rows


def _pairs(table: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each ticket beside its dense model, for each target and way."""
    dense, *tickets = table
    return [
        {
            "target": name,
            "way": way,
            "sparsity": row["sparsity"],
            "dense_error": dense[name][way]["calibration_error"],
            "ticket_error": row[name][way]["calibration_error"],
            "lost": dense[name][way]["accuracy"] - row[name][way]["accuracy"],
            "lost_on_source": dense["source"]["accuracy"] - row["source"]["accuracy"],
        }
        for row in tickets
        for name in table[0]
        if name not in ("sparsity", "source")
        for way in _WAYS
    ]


def _losses(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy that prompted tickets lose to the dense model, mean over the draws, by target and sparsity."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for pair in pairs:
        if pair["way"] == "visual_prompt":
            groups.setdefault((pair["target"], pair["sparsity"]), []).append(pair)
    return [
        {"target": target, "sparsity": sparsity}
        | {key: _mean([pair[key] for pair in group]) for key in ("lost", "lost_on_source")}
        for (target, sparsity), group in groups.items()
    ]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
