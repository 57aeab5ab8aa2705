"""Training of dictionaries by gradient: one, or many side by side on the same batches.

Many share what a batch costs before it reaches a dictionary, the order of the rows above all, so that they are compared
on equal data. A training that was killed goes on from its last checkpoint with the same batches and the same numbers.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.optim import Adam

from ..checks import check_shape, fail
from ..folder import replacing
from .base import Batch, Dictionary, Objective
from .sources import ActivationSource, Rows, as_source


class TrainOptions(BaseModel):
    """How dictionaries are trained."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    num_tokens: int = Field(default=4_000_000, ge=1, description="activations that are seen, each as often as it comes")
    batch_size: int = Field(default=4096, ge=1, description="activations of a step")
    learning_rate: float = Field(default=3e-4, gt=0, description="the highest of the schedule")
    betas: tuple[float, float] = Field(default=(0.9, 0.999), description="of Adam")
    warmup: float = Field(default=0.02, ge=0, le=1, description="share of the steps over which the rate rises")
    decay: float = Field(default=0.2, ge=0, le=1, description="share of the steps over which it falls to 0, the last")
    clip_norm: float | None = Field(default=1.0, gt=0, description="most norm of all gradients; None clips none")
    normalise: bool = Field(default=True, description="scale activations so that their mean norm is sqrt(input_size)")
    centre: bool = Field(default=True, description="start the offset at the mean of the activations")
    checkpoint_every: int = Field(default=500, ge=1, description="steps between checkpoints")


@dataclass(frozen=True)
class Progress:
    """One step, as it is told.

    Attributes:
        step: steps that are done.
        total: steps of the training.
        fvu: of each dictionary, the batch's squared error over its variance.
        l0: of each, mean entries of a code that are not 0.
        silent: of each, share of atoms without a code for as many tokens as it allows.
    """

    step: int
    total: int
    fvu: tuple[float, ...]
    l0: tuple[float, ...]
    silent: tuple[float, ...]


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

    Args:
        dictionary: what is trained; all of one ``input_size``.
        activations: ``[n, input_size]`` or a source; finite.
        options: how.
        keep: a folder for checkpoints: the same call goes on after a kill, exactly.
        on_progress: told after every step.
        **changes: fields of ``options``, by name.

    Raises:
        InputError: if sizes do not fit, activations or the loss are not finite, or a checkpoint is of other
            dictionaries.
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
        if one.needs_gradient and not source.has_gradient:
            raise fail("train", "activations", "come with gradients, which the dictionary needs", "none")
    job = _Job(each, source, options)
    if keep is not None:
        job.resume(keep)
    job.run(keep, on_progress or _silent, started)
    return Trained(job.total * options.batch_size, job.seconds, job.scale, job.history)


class _Job:
    """Dictionaries on their way."""

    def __init__(self, each: list[Dictionary], source: ActivationSource, options: TrainOptions) -> None:
        self.each, self.source, self.options = each, source, options
        self.total = math.ceil(options.num_tokens / options.batch_size)
        self.step, self.seconds, self.scale = 0, 0.0, 1.0
        self.history: list[Progress] = []
        self.silent = [torch.zeros(one.dict_size, dtype=torch.int64) for one in each]
        self.optimizers = [
            Adam(list(one.parameters()), lr=options.learning_rate, betas=options.betas, fused=True) for one in each
        ]
        sampled = next(source.rows(max(options.batch_size, 1024)))
        first = self._checked(sampled.x)
        if options.normalise:
            self.scale = math.sqrt(first.shape[1]) / max(float(first.float().norm(dim=1).mean()), 1e-12)
        if options.centre:
            self._centre(first if sampled.target is None else sampled.target)

    @torch.no_grad()
    def _centre(self, first: Tensor) -> None:
        for one in self.each:
            offset = one.offset
            if isinstance(offset, torch.nn.Parameter) and len(offset) == first.shape[1]:
                offset.copy_((first.float() * self.scale).mean(0))

    def run(self, keep: Path | None, tell: Tell, started: float) -> None:
        """From the step where the job is to its end; then the scale is folded into the dictionaries."""
        before = self.seconds
        every = max(1, self.total // 100)
        batches = self.source.rows(self.options.batch_size, start=self.step)
        for one in self.each:
            one.train()
        while self.step < self.total:
            progress = self._step(next(batches))
            self.seconds = before + time.monotonic() - started
            if self.step % every == 0 or self.step == self.total:
                self.history.append(progress)
            tell(progress)
            if keep is not None and (self.step % self.options.checkpoint_every == 0 or self.step == self.total):
                self.save(keep)
        for one in self.each:
            one.eval()
            one.rescale(1 / self.scale)

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

    def _step(self, rows: Rows) -> Progress:
        factor = learning_rate_at(self.step, self.total, self.options.warmup, self.options.decay)
        x = self._checked(rows.x).float() * self.scale
        gradient = None if rows.gradient is None else rows.gradient.float() / self.scale  # of the scaled activations
        target = x if rows.target is None else self._checked_target(rows.target).float() * self.scale
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
        objective = one.objective(batch)
        if not bool((loss := objective.loss.detach()).isfinite()):
            raise fail("train", "learning_rate", "keep the loss finite", f"{float(loss)} at step {self.step}")
        optimizer.zero_grad(set_to_none=True)
        objective.loss.backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            one.before_step()
            if self.options.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(one.parameters(), self.options.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = self.options.learning_rate * factor
            optimizer.step()
            one.after_step()
            used = objective.codes.indices[objective.codes.values != 0]
            batch.silent.add_(len(batch.x))
            batch.silent[used.long()] = 0
        return objective

    def save(self, folder: Path) -> None:
        """Write a checkpoint; the one before is there until it is whole."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors: dict[str, Tensor] = {}
        for number, (one, optimizer, silent) in enumerate(zip(self.each, self.optimizers, self.silent, strict=True)):
            tensors |= {f"{number}.silent": silent}
            tensors |= {f"{number}.dictionary.{name}": value for name, value in one.state_dict().items()}
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{number}.adam.{index}.{name}": value for name, value in state.items()}
        record = {
            "step": self.step,
            "seconds": self.seconds,
            "scale": self.scale,
            "history": [asdict(progress) for progress in self.history],
            "plan": self._plan(),
        }
        with replacing(folder / "checkpoint.safetensors") as temporary:
            held = {name: value.contiguous() for name, value in tensors.items()}
            save_file(held, temporary, {"record": json.dumps(record)})

    def resume(self, folder: Path) -> None:
        """Take up the checkpoint in ``folder``, if there is one."""
        path = folder / "checkpoint.safetensors"
        if not path.is_file():
            return
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["record"])
        if record["plan"] != self._plan():
            raise fail("train", "keep", "hold a checkpoint of the same training", f"another in {folder}")
        tensors = load_file(path)
        self.step, self.seconds, self.scale = record["step"], record["seconds"], record["scale"]
        parts = ("fvu", "l0", "silent")
        self.history = [
            Progress(entry["step"], entry["total"], *(tuple(entry[part]) for part in parts))
            for entry in record["history"]
        ]
        for number, (one, optimizer) in enumerate(zip(self.each, self.optimizers, strict=True)):
            head = f"{number}.dictionary."
            one.load_state_dict(
                {name.removeprefix(head): value for name, value in tensors.items() if name.startswith(head)}
            )
            self.silent[number] = tensors[f"{number}.silent"]
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                if name.startswith(f"{number}.adam."):
                    index, _, key = name.removeprefix(f"{number}.adam.").partition(".")
                    state.setdefault(int(index), {})[key] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})

    def _plan(self) -> dict[str, Any]:
        plan = {
            "options": self.options.model_dump(),
            "dictionaries": [[type(o).__name__, o.settings()] for o in self.each],
        }
        as_read: dict[str, Any] = json.loads(json.dumps(plan))
        return as_read


def _patience(one: Dictionary) -> int:
    return int(getattr(one, "silent_after", 10_000_000))


def _silent(progress: Progress) -> None:
    """Progress that nobody watches."""
