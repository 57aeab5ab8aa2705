"""Checkpoints of a training: one safetensors file, replaced as a whole, from which the training goes on exactly."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..checks import fail
from ..folder import replacing
from . import parallel
from .base import Progress

if TYPE_CHECKING:
    from .trainer import Training


def save(training: "Training", folder: Path) -> None:
    """Write a checkpoint; the one before is there until it is whole. Only the first of several processes writes."""
    if parallel.rank():
        return
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    for number, (one, optimizer, silent) in enumerate(
        zip(training.each, training.optimizers, training.silent, strict=True)
    ):
        tensors |= {f"{number}.silent": silent}
        tensors |= {f"{number}.dictionary.{name}": value for name, value in one.state_dict().items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"{number}.adam.{index}.{name}": value for name, value in state.items()}
    record = {
        "step": training.step,
        "seconds": training.seconds,
        "scale": training.scale,
        "history": [asdict(progress) for progress in training.history],
        "plan": _plan(training),
    }
    with replacing(folder / "checkpoint.safetensors") as temporary:
        held = {name: value.contiguous() for name, value in tensors.items()}
        save_file(held, temporary, {"record": json.dumps(record)})


def resume(training: "Training", folder: Path) -> None:
    """Take up the checkpoint in ``folder``, if there is one."""
    path = folder / "checkpoint.safetensors"
    if not path.is_file():
        return
    with safe_open(path, "pt") as file:
        record = json.loads(file.metadata()["record"])
    if record["plan"] != _plan(training):
        raise fail("train", "keep", "hold a checkpoint of the same training", f"another in {folder}")
    tensors = load_file(path)
    training.step, training.seconds, training.scale = record["step"], record["seconds"], record["scale"]
    parts = ("fvu", "l0", "silent")
    training.history = [
        Progress(entry["step"], entry["total"], *(tuple(entry[part]) for part in parts)) for entry in record["history"]
    ]
    for number, (one, optimizer) in enumerate(zip(training.each, training.optimizers, strict=True)):
        head = f"{number}.dictionary."
        one.load_state_dict(
            {name.removeprefix(head): value for name, value in tensors.items() if name.startswith(head)}
        )
        training.silent[number] = tensors[f"{number}.silent"].to(training.device)
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith(f"{number}.adam."):
                index, _, key = name.removeprefix(f"{number}.adam.").partition(".")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict(optimizer.state_dict() | {"state": state})


def _plan(training: "Training") -> dict[str, Any]:
    plan = {
        "options": training.options.model_dump(),
        "dictionaries": [[type(o).__name__, o.settings()] for o in training.each],
    }
    as_read: dict[str, Any] = json.loads(json.dumps(plan))
    return as_read
