"""Training of image classifiers: enough to have something to prune, and to train on what pruning left."""

import functools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Optimizer

from .checks import InputTypeError, check_choice, check_int, check_range, fail
from .measure.images import Images, logits_of
from .measure.tokens import evaluating
from .ops.formats import Masks

LearningRates = Literal["cosine", "one_cycle", "constant"]


@dataclass(frozen=True)
class Step:
    """What is known right before a step of training.

    Attributes:
        index: steps of the whole training that are done.
        total: steps of the whole training.
        model: in training mode.
        optimizer: that takes the step.
    """

    index: int
    total: int
    model: nn.Module
    optimizer: Optimizer


@dataclass(frozen=True)
class History:
    """A training that is done.

    Attributes:
        losses: mean loss of each step's batch, in nats.
        seconds: wall time.
        num_steps: steps of the whole training, of which ``len(losses)`` were taken.
    """

    losses: list[float]
    seconds: float
    num_steps: int


OnStep = Callable[[Step], object]
Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]


def learning_rate_at(step: int, total: int, schedule: LearningRates = "cosine") -> float:
    """Factor of the learning rate at a step of ``total``, in (0, 1].

    ``cosine`` rises over the first twentieth in a straight line and falls to 0 on half a cosine; ``one_cycle`` rises
    over the first three tenths; ``constant`` is 1.
    """
    check_choice("learning_rate_at", "schedule", schedule, get_args(LearningRates))
    if schedule == "constant":
        return 1.0
    rise = max(1, round(total * (0.05 if schedule == "cosine" else 0.3)))
    if step < rise:
        return (step + 1) / rise
    return (1 + math.cos(math.pi * (step - rise) / max(1, total - rise))) / 2


def num_steps(num_images: int, epochs: int, batch_size: int = 128) -> int:
    """Steps of a training: an epoch leaves out the images that do not fill a batch, unless there are no others."""
    check_int("num_steps", "epochs", epochs)
    check_int("num_steps", "batch_size", batch_size)
    return epochs * max(1, num_images // batch_size)


def train(
    model: nn.Module,
    images: Images,
    *,
    epochs: int,
    batch_size: int = 128,
    learning_rate: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
    masks: Masks | None = None,
    schedule: LearningRates = "cosine",
    on_step: OnStep | None = None,
    max_steps: int | None = None,
    start_step: int = 0,
    teacher: nn.Module | None = None,
    teacher_weight: float = 0.5,
    temperature: float = 2.0,
    loss: Loss | None = None,
    shift: int = 0,
) -> History:
    """Train ``model`` in place by SGD with Nesterov momentum, and leave it in eval mode.

    The same seed gives the same weights; the caller's random numbers are left alone. ``train(max_steps=k)`` and then
    ``train(start_step=k)`` see the same batches and learning rates as one call, with the momentum cleared between.

    Args:
        model: takes ``[B, C, H, W]`` and gives logits ``[B, num_classes]``.
        images: on any device.
        epochs: passes over the images.
        batch_size: images of a step.
        learning_rate: the highest of the schedule.
        momentum: in [0, 1).
        weight_decay: of parameters of two and more dimensions; norms and biases are left alone.
        seed: of the order of the images, of shifts and of what the model draws.
        masks: entries to keep at 0, of parameters of ``model``; None trains all.
        schedule: of the learning rate, see `learning_rate_at`.
        on_step: called before each step; it may change the weights and install masks.
        max_steps: stop when this many steps of the whole training are done; None takes all.
        start_step: the first step to take.
        teacher: a classifier whose answers count as well (Hinton et al. 2015, https://arxiv.org/abs/1503.02531).
        teacher_weight: share of the teacher in the loss, in [0, 1].
        temperature: of both distributions in the teacher's share.
        loss: of ``(model, pixels, labels)``, in place of cross-entropy with ``teacher``.
        shift: each batch is moved by up to so many pixels in each direction, its border repeated.

    Raises:
        InputError: if a number is out of range, the model has nothing to train or does not know the labels, masks do
            not fit, or the loss is no longer finite.
    """
    _check_parts(model, images, masks, teacher)
    check_range("train", "learning_rate", learning_rate, 0, open_low=True)
    check_range("train", "momentum", momentum, 0, 1, open_high=True)
    check_range("train", "weight_decay", weight_decay, 0)
    check_range("train", "teacher_weight", teacher_weight, 0, 1)
    check_range("train", "temperature", temperature, 0, open_low=True)
    check_int("train", "shift", shift, 0)
    total = num_steps(len(images), epochs, batch_size)
    learning_rate_at(0, total, schedule)
    check_int("train", "start_step", start_step, 0, total)
    if max_steps is not None:
        check_int("train", "max_steps", max_steps)
    for classifier in [] if loss else [model] if teacher is None else [model, teacher]:
        _check_classes(classifier, images)
    stop = total if max_steps is None else min(max_steps, total)
    optimizer = SGD(_groups(model, weight_decay), lr=learning_rate, momentum=momentum, nesterov=momentum > 0)
    handle = None if masks is None else masks.install(optimizer, model)
    device, started, losses = next(model.parameters()).device, time.monotonic(), list[float]()
    objective = loss or _objective(teacher, teacher_weight, temperature)
    try:
        with _seeded(seed):
            model.train()
            _lay_out(model, torch.channels_last)  # convolutions on a CPU train twice as fast
            for index in range(start_step, stop):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * learning_rate_at(index, total, schedule)
                if on_step is not None:
                    on_step(Step(index, total, model, optimizer))
                pixels, labels = _batch(images, index, batch_size, seed, shift)
                value = objective(model, pixels.to(device), labels.to(device))
                losses.append(float(value.detach()))
                if not math.isfinite(losses[-1]):
                    raise fail("train", "learning_rate", "keep the loss finite", f"{losses[-1]} at step {index}")
                optimizer.zero_grad()
                value.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
    finally:
        if handle is not None:
            handle.remove()
        _lay_out(model.eval(), torch.contiguous_format)
    return History(losses, time.monotonic() - started, total)


def _check_parts(model: nn.Module, images: object, masks: object, teacher: object) -> None:
    wanted: dict[str, tuple[object, type]] = {"model": (model, nn.Module), "images": (images, Images)}
    wanted |= {"masks": (masks, Masks)} if masks is not None else {}
    wanted |= {"teacher": (teacher, nn.Module)} if teacher is not None else {}
    for name, (value, kind) in wanted.items():
        if not isinstance(value, kind):
            raise InputTypeError(f"train: {name} must be {kind.__name__}, got {type(value).__name__}.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise fail("train", "model", "have a parameter to train", "none")


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    model.to(memory_format=memory_format)  # type: ignore[call-overload]


def _check_classes(model: nn.Module, images: Images) -> None:
    num_logits = logits_of(model, Images(images.pixels[:1], torch.zeros(1, dtype=torch.int64), images.name)).shape[1]
    if num_logits < images.num_classes:
        raise fail("train", "model", f"give logits of {images.num_classes} classes", num_logits)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices, others = [p for p in trained if p.ndim >= 2], [p for p in trained if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _objective(teacher: nn.Module | None, weight: float, temperature: float) -> Loss:
    def loss(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        logits = model(pixels)
        own = F.cross_entropy(logits, labels)
        if teacher is None:
            return own
        with evaluating(teacher):
            told = F.log_softmax(teacher(pixels) / temperature, -1)
        heard = F.kl_div(F.log_softmax(logits / temperature, -1), told, log_target=True, reduction="batchmean")
        return (1 - weight) * own + weight * temperature**2 * heard

    return loss


def _batch(images: Images, index: int, batch_size: int, seed: int, shift: int) -> tuple[Tensor, Tensor]:
    """The batch of a step: it depends on the seed and the step alone."""
    an_epoch = num_steps(len(images), 1, batch_size)
    epoch, place = divmod(index, an_epoch)
    chosen = _order(len(images), 1_000_003 * seed + epoch)[place * batch_size : (place + 1) * batch_size].to(
        images.labels.device
    )
    pixels, labels = images.pixels[chosen], images.labels[chosen]
    if shift:
        generator = torch.Generator().manual_seed(1_000_003 * (seed + 1) + index)
        down, right = torch.randint(2 * shift + 1, (2,), generator=generator).tolist()
        height, width = pixels.shape[2:]
        padded = F.pad(pixels, (shift,) * 4, mode="replicate")
        pixels = padded[:, :, down : down + height, right : right + width].contiguous()
    return pixels, labels


@functools.lru_cache(maxsize=2)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield
