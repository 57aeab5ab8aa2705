"""Claim: group channel pruning removes two thirds of a detector's parameters at little loss of precision.

Paper: Chu et al. 2022, https://arxiv.org/abs/2306.01526: YOLOv4 on PASCAL VOC, parameters -64.7 %, FLOPs -34.9 %. Here
it is a detector of two scales, trained from scratch for a few minutes on canvases with articles of Fashion-MNIST; the
sparse rate is ten times as high, as the training is short. Every arm has the same parameters, up to the last channel,
and is trained the same number of steps; what each stage brings is measured by leaving it out.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from statistics import mean

import torch
from torch import Tensor, nn

from ..measure.flops import flops
from ..measure.tokens import evaluating
from ..training import train
from ..weights.attention_maps import attention_loss
from ..weights.group_channel import at_parameters, by_measured_loss, divide, group_thresholds, last_norms
from ..weights.group_scales import VaryingRate, scale_scores, sparse_scales
from ..weights.structured.channels_groups import channel_groups
from ..weights.structured.channels_shrink import shrink_channels
from . import CLAIMS
from .base import ClaimResult
from .detection import DetectionLoss, Detector, mean_average_precision, scenes

NAME = "group-channel-pruning"
PARAMETERS = 1 - 0.647
RATE = 1e-2
LITTLE = 0.03
"""Of mean average precision, in [0, 1], that may be lost on average."""
PARTS = ("backbone", "neck")
_BATCH, _SEARCHED = 50, 100

Choose = Callable[[float], dict[str, Tensor]]


def run(*, quick: bool, seed: int = 0) -> ClaimResult:
    """Train, prune and distil in every arm, for several seeds.

    Args:
        quick: fewer canvases, epochs and seeds.
        seed: of the first run; the others follow.

    Raises:
        FileNotFoundError: if ``PAUCITY_DATA`` does not hold Fashion-MNIST; the error names its public address.
    """
    started = time.monotonic()
    count, epochs, seeds = (800, (4, 2), 2) if quick else (2000, (5, 2), 3)
    runs = [_arms(count, *epochs, seed=seed + index) for index in range(seeds)]
    precision = {arm: [each[arm][0] for each in runs] for arm in runs[0]}
    average = {arm: mean(values) for arm, values in precision.items()}
    left = {arm: mean(each[arm][1] for each in runs) for arm in runs[0]}
    work = {arm: mean(each[arm][2] for each in runs) for arm in runs[0]}
    whole = average["all three"]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"YOLOv4 on PASCAL VOC": {"parameters": -0.647, "FLOPs": -0.349}},
        measured={
            "mAP@0.5": precision,
            "mean mAP@0.5": average,
            "parameters": {arm: share - 1 for arm, share in left.items()},
            "FLOPs": {arm: share - 1 for arm, share in work.items()},
            "better than": {
                arm: whole - average[arm] for arm in ("one threshold", "constant rate", "without distilling")
            },
        },
        holds=whole >= average["dense"] - LITTLE and whole >= average["one threshold"],
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": "detector of two scales, width 16",
            "data": "articles of Fashion-MNIST on canvases of 40x40",
            "canvases": count,
            "epochs": {"sparse training": epochs[0], "after pruning": epochs[1], "dense": sum(epochs)},
            "seeds": [seed + index for index in range(seeds)],
            "rate": RATE,
            "parameters left": PARAMETERS,
            "least loss that counts": LITTLE,
        },
    )


def _arms(count: int, sparse: int, tuned: int, *, seed: int) -> dict[str, tuple[float, float, float]]:
    """Name of an arm to its mAP, and its parameters and FLOPs as shares of the dense detector's."""
    known, unknown = scenes("train", count, seed=seed), scenes("test", 500, seed=seed)
    task = DetectionLoss(known)
    fit = partial(train, images=known.images, batch_size=_BATCH, learning_rate=0.1, seed=seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        start = Detector()
    picture = known.images.pixels[:1]
    groups = channel_groups(start, known.images.pixels[:2])

    def measured(model: nn.Module) -> tuple[float, float, float]:
        shares = [_size(model) / _size(start), _work(model, picture) / _work(start, picture)]
        return mean_average_precision(model, unknown), shares[0], shares[1]

    def sparse_trained(rate: VaryingRate) -> nn.Module:
        model = deepcopy(start)
        with sparse_scales(model, groups, rate) as on_step:
            fit(model, epochs=sparse, on_step=on_step, loss=task)
        return model

    def pruned(teacher: nn.Module, choose: Choose, *, distil: bool) -> tuple[float, float, float]:
        kept = at_parameters(teacher, groups, choose, parameters=PARAMETERS)
        student = shrink_channels(teacher, groups, kept)
        layers = dict.fromkeys(last_norms(teacher, groups, divide(teacher, groups, parts=PARTS)), 1.0)
        with attention_loss(student, teacher, layers if distil else {}, task) as loss:
            fit(student, epochs=tuned, loss=loss)
        return measured(student)

    dense = deepcopy(start)
    fit(dense, epochs=sparse + tuned, loss=task)
    varying, constant = sparse_trained(VaryingRate(RATE)), sparse_trained(VaryingRate(RATE, lowered=1.0))
    searched = known.images.take(min(_SEARCHED, len(known.images)))

    def loss_of(model: nn.Module) -> float:
        return float(task(model, searched.pixels, searched.labels))

    def by_group(model: nn.Module) -> Choose:
        division = divide(model, groups, parts=PARTS)
        return by_measured_loss(model, groups, division, parameters=PARAMETERS, loss=loss_of)

    searched_once = by_group(varying)
    everything = {"all": list(scale_scores(varying, groups))}
    return {
        "dense": measured(dense),
        "all three": pruned(varying, searched_once, distil=True),
        "one threshold": pruned(
            varying, lambda amount: group_thresholds(varying, groups, everything, {"all": amount}), distil=True
        ),
        "constant rate": pruned(constant, by_group(constant), distil=True),
        "without distilling": pruned(varying, searched_once, distil=False),
    }


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _work(model: nn.Module, picture: Tensor) -> int:
    with evaluating(model):
        return flops(lambda: model(picture))
