"""The two trainings of GQSA: a weight in groups whose numbers, scales and zero points can be trained, blocks, scales.

Paper: Zeng et al. 2024, https://arxiv.org/abs/2412.17560, section 3: BQPO and E2E-OQP. Both are the stages of
EfficientQAT (Chen et al. 2024, https://arxiv.org/abs/2407.11062) on groups of which some are absent.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_map

from ..checks import fail
from ..models.blocks import BlockCall
from ..ops.formats.groups import PackedGroups, group_range

_LAST = 0.05  # share of the learning rate that a cosine ends at
Tensors = Callable[[], dict[str, Tensor]]
"""Gives the weights in training by parameter name, with their graph."""


class GroupWeight(nn.Module):
    """A weight ``[rows, cols]`` as groups along its rows: ``(q - zero) * scale``, ``q`` in ``bits`` bits, or absent.

    While it is trained ``q = clamp(round(value / scale + zero), 0, 2**bits - 1)``; rounding passes gradients straight
    through. A value that is 0 at the start stays 0. The scale is rounded to the dtype it is stored in before it is
    used, so that nothing changes when it is stored.

    Args:
        matrix: ``[rows, cols]``, finite.
        kept: bool ``[rows, cols / group_size]``.
        bits: 2, 3 or 4.
    """

    def __init__(self, matrix: Tensor, kept: Tensor, bits: int) -> None:
        super().__init__()
        self.dtype, self.kept, self.bits, self.top = matrix.dtype, kept, bits, 2**bits - 1
        self.shape = matrix.shape
        groups = matrix.detach().reshape(*kept.shape, -1)[kept].to(torch.promote_types(matrix.dtype, torch.float32))
        scales, zeros = group_range(groups, bits, matrix.dtype)
        self.values: nn.Parameter | None = nn.Parameter(groups)
        self.scales = nn.Parameter(scales.to(groups.dtype))
        self.zeros = nn.Parameter(zeros.to(groups.dtype))
        self.alive = groups != 0
        self.places = kept.flatten().nonzero().squeeze(1)
        self.codes: Tensor | None = None

    def dense(self) -> Tensor:
        """``[rows, cols]`` in at least float32, differentiable in what is not frozen."""
        scales, zeros = self._scales()[:, None], self._zeros()[:, None]
        values = (self._numbers(scales, zeros) - zeros) * scales * self.alive
        grid = values.new_zeros(self.kept.numel(), values.shape[1]).index_copy(0, self.places, values)
        return grid.view(self.shape)

    @torch.no_grad()
    def freeze(self) -> None:
        """Keep the numbers and zero points as they are now, let go of the values behind them."""
        zeros = self._zeros()
        numbers = self._numbers(self._scales()[:, None], zeros[:, None])
        self.codes = torch.where(self.alive, numbers, zeros[:, None]).to(torch.uint8)
        self.values, self.zeros = None, nn.Parameter(zeros, requires_grad=False)

    @torch.no_grad()
    def packed(self) -> PackedGroups:
        """The stored form of the frozen weight, which unpacks to exactly `dense` in the dtype of the matrix."""
        if self.codes is None:
            raise RuntimeError("freeze first")
        return PackedGroups.from_codes(self.codes, self._scales().to(self.dtype), self.zeros.to(torch.uint8), self.kept)

    def _scales(self) -> Tensor:
        # float16 has too few exponents to do without subnormal scales, which PackedGroups.pack gives as well
        positive = self.scales.clamp_min(2.0**-24 if self.dtype == torch.float16 else torch.finfo(self.dtype).tiny)
        return positive + (positive.to(self.dtype).to(positive.dtype) - positive).detach()

    def _zeros(self) -> Tensor:
        return _round(self.zeros).clamp(0, self.top)

    def _numbers(self, scales: Tensor, zeros: Tensor) -> Tensor:
        if self.values is None:
            return self.codes.to(scales.dtype) if self.codes is not None else scales
        return _round(self.values / scales + zeros).clamp(0, self.top)


def tune_block(
    path: str,
    block: nn.Module,
    tensors: Tensors,
    weights: Sequence[GroupWeight],
    calls: Sequence[BlockCall],
    targets: Sequence[Tensor],
    *,
    epochs: int,
    batch_size: int,
    weight_lr: float,
    scale_lr: float,
    generator: torch.Generator,
    on_step: Callable[[], object],
) -> tuple[float, float]:
    """Train values, scales and zero points of one block towards what the dense block made of the dense model's states.

    The mean squared error is minimised with Adam and a cosine in float32, whatever the model's dtype. A training that
    ends higher than it began is undone.

    Args:
        path: of the block, for errors.
        block: not changed.
        tensors: the weights in training by parameter name within ``block``, in the parameters' own layout.
        weights: those weights.
        calls: what the block is called with, a sequence each.
        targets: ``[1, T, hidden]`` for each call.
        epochs: over the calls.
        batch_size: calls a step.
        weight_lr: of the values.
        scale_lr: of scales and zero points.
        generator: shuffles the calls.
        on_step: called after every step.

    Returns:
        Squared error over squared targets, before and after.

    Raises:
        InputError: if the error before is not finite.
    """
    base = {
        name: tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
        for name, tensor in (*block.named_parameters(), *block.named_buffers())
        if tensor.is_floating_point()
    }

    def miss(index: int, weights: dict[str, Tensor]) -> Tensor:
        args, kwargs = tree_map(_wide, (calls[index].args, calls[index].kwargs))
        output = functional_call(block, base | weights, args, kwargs)
        hidden = output[0] if isinstance(output, tuple) else output
        return F.mse_loss(hidden, targets[index].to(hidden.dtype))

    @torch.no_grad()
    def error() -> float:
        current = tensors()
        return sum(float(miss(index, current)) * targets[index].numel() for index in range(len(calls))) / energy

    energy = max(sum(float(target.float().square().sum()) for target in targets), torch.finfo(torch.float32).tiny)
    groups = [
        {"params": [weight.values for weight in weights], "lr": weight_lr},
        {"params": [part for weight in weights for part in (weight.scales, weight.zeros)], "lr": scale_lr},
    ]
    order = _order(len(calls), batch_size, epochs * math.ceil(len(calls) / batch_size), generator)
    what = f"output of {path or 'the model'}"
    return _improve(weights, groups, order, lambda index: miss(index, tensors()), error, on_step, what)


def tune_scales(
    model: nn.Module,
    tensors: Tensors,
    weights: Sequence[GroupWeight],
    batches: Sequence[Tensor],
    *,
    steps: int,
    batch_size: int,
    lr: float,
    generator: torch.Generator,
    on_step: Callable[[], object],
) -> tuple[float, float]:
    """Train the scales of all frozen weights by the language-model loss; numbers and zero points stay as they are.

    Runs in the model's dtype, the scales in float32. A training that ends higher than it began is undone.

    Args:
        model: a causal language model of transformers; not changed.
        tensors: the weights in training by parameter name.
        weights: those weights, frozen.
        batches: ``input_ids [B, T]`` on the model's device.
        steps: of Adam, with a cosine.
        batch_size: batches a step.
        lr: of the scales.
        generator: shuffles the batches.
        on_step: called after every step.

    Returns:
        Mean loss of the batches in nats a token, before and after.

    Raises:
        InputError: if the loss before is not finite.
    """
    base = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(index: int, weights: dict[str, Tensor]) -> Tensor:
        own = {name: tensor.to(base[name].dtype) for name, tensor in weights.items()}
        logits = functional_call(model, base | own, (batches[index],), {"use_cache": False}).logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batches[index][:, 1:].flatten())

    @torch.no_grad()
    def mean() -> float:
        current = tensors()
        return sum(float(loss(index, current)) for index in range(len(batches))) / len(batches)

    groups = [{"params": [weight.scales for weight in weights], "lr": lr}]
    order = _order(len(batches), batch_size, steps, generator)
    return _improve(weights, groups, order, lambda index: loss(index, tensors()), mean, on_step, "loss of the model")


def _improve(
    weights: Sequence[GroupWeight],
    groups: list[dict[str, Any]],
    order: list[list[int]],
    loss: Callable[[int], Tensor],
    measure: Callable[[], float],
    on_step: Callable[[], object],
    what: str,
) -> tuple[float, float]:
    """Adam over the steps of ``order``; what ``measure`` gives before and after, undone unless it fell."""
    before = measure()
    if not math.isfinite(before):
        raise fail("gqsa", "calibration", "give finite activations", f"NaN or infinity in the {what}")
    if not order:
        return before, before
    start = [{name: tensor.clone() for name, tensor in weight.state_dict().items()} for weight in weights]
    optimizer = torch.optim.Adam(groups)
    cosine = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: _LAST + (1 - _LAST) * (1 + math.cos(math.pi * step / len(order))) / 2
    )
    for chosen in order:
        optimizer.zero_grad()
        for index in chosen:
            torch.autograd.backward(loss(index) / len(chosen))
        optimizer.step()
        cosine.step()
        on_step()
    after = measure()
    if after < before:
        return before, after
    for weight, state in zip(weights, start, strict=True):
        weight.load_state_dict(state)
    return before, before


def _order(count: int, batch_size: int, steps: int, generator: torch.Generator) -> list[list[int]]:
    """For each step some indices below ``count``, shuffled anew each time all have been."""
    order: list[list[int]] = []
    while len(order) < steps:
        shuffled = torch.randperm(count, generator=generator).tolist()
        order += [shuffled[start : start + batch_size] for start in range(0, count, batch_size)]
    return order[:steps]


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()


def _wide(value: Any) -> Any:
    is_float = isinstance(value, Tensor) and value.is_floating_point()
    return value.to(torch.promote_types(value.dtype, torch.float32)) if is_float else value
