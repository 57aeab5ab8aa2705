"""Training of SharedLLM: plain language modelling of the running text, given its compressed past.

Paper: Han et al. 2024, https://arxiv.org/abs/2410.19318, Sec. 3.3, 4.1 and Table 6: the loss is that of all tokens of
the running text but the first; the cross-attention learns, and the self-attention of the upper layers that have none.
AdamW, a cosine schedule, and splits of random lengths.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor
from transformers import get_cosine_schedule_with_warmup

from ...checks import check_ndim, check_range
from ...measure.tokens import Progress

if TYPE_CHECKING:
    from .model import SharedLLM


class SharedTraining(BaseModel):
    """How to train; the defaults are the paper's for language modelling.

    Attributes:
        running_length: last tokens of a window, which the upper model reads; what is before them is the context.
        batch_size: windows of a step.
        micro_batch: windows read at a time.
        num_steps: steps; None is one pass over the windows.
        learning_rate: at the start of the cosine.
        warmup_share: share of the steps in which the rate rises to that.
        noise: standard deviation of a split's place, as a share of what is split (0.1 for instructions).
        autocast: whether the forward runs in bfloat16; weights and their updates stay as they are.
        top: whether the self-attention above the injected layers learns too.
        seed: of the order of the windows and of the noise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    running_length: int = Field(4096, ge=2)
    batch_size: int = Field(128, ge=1)
    micro_batch: int = Field(1, ge=1)
    num_steps: int | None = Field(None, ge=1)
    learning_rate: float = Field(1e-5, gt=0)
    warmup_share: float = Field(0.01, ge=0, lt=1)
    noise: float = Field(0.2, ge=0)
    autocast: bool = False
    top: bool = True
    seed: int = 0


def train(
    shared: SharedLLM, windows: Tensor, training: SharedTraining, on_progress: Progress | None = None
) -> list[float]:
    """Train in place.

    Args:
        shared: whose ``trained_parameters`` learn; everything else stays as it is.
        windows: ``[N, T]`` int64 token ids, longer than ``running_length``; they are read in a random order.
        training: how.
        on_progress: called with (steps done, steps in all).

    Returns:
        the mean loss of every step, in nats per token.

    Raises:
        InputError: if the windows are too short, or there are none.
    """
    check_ndim("train", "windows", windows, 2)
    check_range("train", "number of windows", len(windows), 1)
    check_range("train", "length of windows", windows.shape[1], training.running_length + 1)
    generator = torch.Generator().manual_seed(training.seed)
    steps = training.num_steps or -(-len(windows) // training.batch_size)
    weights = shared.trained_parameters(top=training.top)
    learns = {name: weight.requires_grad for name, weight in shared.named_parameters()}
    mode = shared.training
    optimizer = torch.optim.AdamW(weights.values(), lr=training.learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, round(steps * training.warmup_share), steps)
    shared.train()
    try:
        for name, weight in shared.named_parameters():
            weight.requires_grad_(name in weights)
        order, losses = _order(len(windows), steps * training.batch_size, generator), []
        for step, rows in enumerate(torch.split(order, training.batch_size), 1):
            losses.append(0.0)
            for part in torch.split(rows, training.micro_batch):
                loss = _loss(shared, windows[part], training, generator) * (len(part) / len(rows))
                loss.backward()  # type: ignore[no-untyped-call]
                losses[-1] += float(loss.detach())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if on_progress is not None:
                on_progress(step, steps)
    finally:
        shared.train(mode)
        for name, weight in shared.named_parameters():
            weight.requires_grad_(learns[name])
            weight.grad = None
    return losses


def _loss(shared: SharedLLM, windows: Tensor, training: SharedTraining, generator: torch.Generator) -> Tensor:
    ids = windows.to(shared.upper.device)
    context, running = ids[:, : -training.running_length], ids[:, -training.running_length :]
    noise = training.noise * torch.randn(len(shared.options.ratios), generator=generator)
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=training.autocast):
        loss: Tensor = shared(running, shared.compress(context, noise=noise.tolist()), labels=running).loss
    return loss


def _order(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """``wanted`` indices below ``count``, in random orders one after another."""
    passes = [torch.randperm(count, generator=generator) for _ in range(-(-wanted // count))]
    return torch.cat(passes)[:wanted]
