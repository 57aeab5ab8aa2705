"""Training of dictionaries by gradient: one, or many side by side on the same batches.

Many share what a batch costs before it reaches a dictionary, the order of the rows above all, so that they are compared
on equal data. A training that was killed goes on from its last checkpoint with the same batches and the same numbers.
Where `torch.distributed` is set up, the processes train together (see `train`).
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from torch.optim import Adam

from ..checks import check_shape, fail
from . import parallel
from .base import Batch, Dictionary, Objective, Progress
from .checkpoint import resume, save
from .sources import ActivationSource, Rows, as_source


class TrainOptions(BaseModel):
    """How dictionaries are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    num_tokens: int = Field(default=4_000_000, ge=1, description="activations that are seen, each as often as it comes")
    batch_size: int = Field(default=4096, ge=1, description="activations of a step, of all processes")
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="of products; weights stay float32"
    )
    learning_rate: float = Field(default=3e-4, gt=0, description="the highest of the schedule")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of Adam")
    warmup: float = Field(default=0.02, ge=0, le=1, description="share of the steps over which the rate rises")
    decay: float = Field(default=0.2, ge=0, le=1, description="share of the steps over which it falls to 0, the last")
    clip_norm: float | None = Field(default=1.0, gt=0, description="most norm of all gradients; None clips none")
    normalise: bool = Field(default=True, description="scale activations so that their mean norm is sqrt(input_size)")
    centre: bool = Field(default=True, description="start the offset at the mean of the activations")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints")


@dataclass
class Trained:
    """A training that is done.

    Attributes:
        num_tokens: activations that were seen.
        seconds: wall time, of all parts of a training that was resumed.
        scale: factor on the activations while training; it is folded into the dictionaries afterwards.
        history: what was told, about a hundred times.
    """

    num_tokens: int
    seconds: float
    scale: float
    history: list[Progress] = field(default_factory=list)


Tell = Callable[[Progress], object]
Gradients = Callable[[Tensor], Tensor]


def learning_rate_at(step: int, total: int, warmup: float, decay: float) -> float:
    """Factor of the learning rate: up in a straight line, level, down in a straight line."""
    rise, fall = max(1, round(total * warmup)), max(1, round(total * decay))
    return min(1.0, (step + 1) / rise, (total - step) / fall)


def train(
    dictionary: Dictionary | Sequence[Dictionary],
    activations: Tensor | ActivationSource,
    *,
    options: TrainOptions | None = None,
    keep: Path | None = None,
    on_progress: Tell | None = None,
    **changes: Any,
) -> Trained:
    """Train one dictionary in place, or many on the same batches.

    A dictionary that was trained or read before goes on from where it is, whatever the scale of the activations was:
    its offset stays, its thresholds and biases are brought into the unit of this training. The optimizer starts anew.

    Several processes train the same dictionaries where `torch.distributed` has a group: each calls this with
    dictionaries of the same settings and a source of its own, from which it takes its part of every batch. Gradients
    and what rules estimate are averaged; all end with the same dictionaries. The first process writes checkpoints.

    Args:
        dictionary: what is trained; all of one ``input_size``.
        activations: ``[n, input_size]`` or a source; finite.
        options: how.
        keep: a folder for checkpoints: the same call goes on after a kill, exactly.
        on_progress: told after every step.
        **changes: fields of ``options``, by name.

    Raises:
        InputError: if sizes do not fit, activations or the loss are not finite, or a checkpoint is of other
            dictionaries, or the batch is not a multiple of the processes.
    """
    started = time.monotonic()
    each = [dictionary] if isinstance(dictionary, Dictionary) else list(dictionary)
    options = TrainOptions.model_validate((options or TrainOptions()).model_dump() | changes)
    source = as_source(activations)
    if not each:
        raise fail("train", "dictionary", "hold at least one", "none")
    for one in each:
        if one.input_size != source.input_size:
            raise fail("train", "activations", f"be {one.input_size} wide like the dictionary", source.input_size)
        wide = getattr(one, "output_size", one.input_size)
        if wide != (source.output_size or source.input_size):
            got = source.output_size or source.input_size
            raise fail("train", "activations", f"come with targets {wide} wide, like the dictionary's", got)
        at = (one.atoms.dtype, one.atoms.device)
        if at[0] not in (torch.float32, torch.float64) or at != (each[0].atoms.dtype, each[0].atoms.device):
            raise fail("train", "dictionary", "be float32 or float64, and all alike and on one device", at)
        if one.needs_gradient and not source.has_gradient:
            raise fail("train", "activations", "come with gradients, which the dictionary needs", "none")
    if options.batch_size % parallel.size():
        raise fail("train", "batch_size", f"be a multiple of the {parallel.size()} processes", options.batch_size)
    job = Training(each, source, options)
    if keep is not None:
        resume(job, keep)
    job.run(keep, on_progress or _silent, started)
    return Trained(job.total * options.batch_size, job.seconds, job.scale, job.history)


class Training:
    """Dictionaries on their way.

    Args:
        each: what is trained.
        source: of the activations.
        options: how.
    """

    def __init__(self, each: list[Dictionary], source: ActivationSource, options: TrainOptions) -> None:
        self.each, self.source, self.options = each, source, options
        self.total = math.ceil(options.num_tokens / options.batch_size)
        self.step, self.seconds, self.scale = 0, 0.0, 1.0
        self.history: list[Progress] = []
        self.device, self.dtype = each[0].atoms.device, each[0].atoms.dtype
        self.silent = [torch.zeros(one.dict_size, dtype=torch.int64, device=self.device) for one in each]
        self.optimizers = [
            Adam(list(one.parameters()), lr=options.learning_rate, betas=options.betas, fused=True) for one in each
        ]
        self.part = options.batch_size // parallel.size()
        fit = torch.tensor([one.is_fit for one in each], dtype=torch.int64, device=self.device)
        parallel.spread([fit, *(value for one in each for value in one.state_dict().values())])
        for one, is_fit in zip(each, fit.tolist(), strict=True):
            one.is_fit = bool(is_fit)
        sampled = next(source.rows(max(self.part, 1024)))
        first = self._checked(sampled.x)
        if options.normalise:
            norm = parallel.averaged(first.to(self.device, self.dtype).norm(dim=1).mean())
            self.scale = math.sqrt(first.shape[1]) / max(float(norm), 1e-12)
        self._start(first if sampled.target is None else sampled.target)

    @torch.no_grad()
    def _start(self, first: Tensor) -> None:
        """What is fit already comes into the training's unit; of the others offsets are put at the mean."""
        mean = parallel.averaged((first.to(self.device, self.dtype) * self.scale).mean(0))
        for one in self.each:
            if one.is_fit:
                one.rescale(self.scale)
            elif self.options.centre:
                one.start_at(mean)

    def run(self, keep: Path | None, tell: Tell, started: float) -> None:
        """From the step where the job is to its end; then the scale is folded into the dictionaries."""
        before = self.seconds
        every = max(1, self.total // 100)
        batches = self.source.rows(self.part, start=self.step)
        for one in self.each:
            one.train()
        while self.step < self.total:
            progress = self.take(next(batches))
            self.seconds = before + time.monotonic() - started
            if self.step % every == 0 or self.step == self.total:
                self.history.append(progress)
            tell(progress)
            if keep is not None and (self.step % self.options.checkpoint_every == 0 or self.step == self.total):
                save(self, keep)
        for one in self.each:
            one.eval()
            one.rescale(1 / self.scale)
            one.is_fit = True

    def _checked(self, x: Tensor) -> Tensor:
        check_shape("train", "activations", x, None, self.source.input_size)
        if not bool(x.isfinite().all()):
            raise fail("train", "activations", "be finite", f"NaN or infinity in batch {self.step}")
        return x

    def _checked_target(self, target: Tensor) -> Tensor:
        check_shape("train", "targets", target, None, self.source.output_size)
        if not bool(target.isfinite().all()):
            raise fail("train", "targets", "be finite", f"NaN or infinity in batch {self.step}")
        return target

    def take(self, rows: Rows) -> Progress:
        """One step with the next ``rows`` (of this process)."""
        factor = learning_rate_at(self.step, self.total, self.options.warmup, self.options.decay)
        x = self._checked(rows.x).to(self.device, self.dtype) * self.scale
        gradient = None if rows.gradient is None else rows.gradient.to(x) / self.scale  # of the scaled activations
        target = x if rows.target is None else self._checked_target(rows.target).to(x) * self.scale
        variance = float((target - target.mean(0)).square().sum(1).mean())
        found = [
            self._descend(one, Batch(x, target, silent, self.step, self.total, gradient), optimizer, factor)
            for one, silent, optimizer in zip(self.each, self.silent, self.optimizers, strict=True)
        ]
        self.step += 1
        return Progress(
            self.step,
            self.total,
            tuple(
                float((one.reconstruction.detach() - target).square().sum(1).mean()) / max(variance, 1e-12)
                for one in found
            ),
            tuple(float(one.codes.l0().float().mean()) for one in found),
            tuple(
                float((silent >= _patience(one)).float().mean())
                for silent, one in zip(self.silent, self.each, strict=True)
            ),
        )

    def _descend(self, one: Dictionary, batch: Batch, optimizer: Adam, factor: float) -> Objective:
        with torch.autocast(batch.x.device.type, torch.bfloat16, enabled=self.options.precision == "bfloat16"):
            objective = one.objective(batch)
        if not bool((loss := objective.loss.detach()).isfinite()):
            raise fail("train", "learning_rate", "keep the loss finite", f"{float(loss)} at step {self.step}")
        optimizer.zero_grad(set_to_none=True)
        objective.loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            parallel.average_gradients(one)
            one.before_step()
            if self.options.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(one.parameters(), self.options.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * factor
            optimizer.step()
            one.after_step()
            parallel.average([buffer for buffer in one.buffers() if buffer.is_floating_point()])
            used = objective.codes.indices[objective.codes.values != 0]
            batch.silent.add_(len(batch.x) * parallel.size())
            batch.silent[used.long()] = 0
            parallel.lowest(batch.silent)
        return objective


def _patience(one: Dictionary) -> int:
    return int(getattr(one, "silent_after", 10_000_000))


def _silent(progress: Progress) -> None:
    """Progress that nobody watches."""
