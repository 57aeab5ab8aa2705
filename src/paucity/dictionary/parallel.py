"""What the processes of a training say to one another; with one process, nothing."""

from collections.abc import Iterable

import torch
from torch import Tensor, distributed, nn


def size() -> int:
    """Processes that train together."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Which of them this is."""
    return distributed.get_rank() if size() > 1 else 0


def spread(tensors: Iterable[Tensor]) -> None:
    """Give ``tensors`` the values that they have in the first process."""
    if size() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


def average(tensors: Iterable[Tensor]) -> None:
    """Replace ``tensors`` by their means over the processes."""
    if size() > 1:
        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor.div_(size())


def averaged(tensor: Tensor) -> Tensor:
    """``tensor``, a mean over the rows of a process, as the mean over those of all."""
    average([tensor])
    return tensor


def average_gradients(module: nn.Module) -> None:
    """Replace gradients by their means, none counting as 0 where another process has one."""
    if size() == 1:
        return
    for parameter in module.parameters():
        has = torch.tensor(parameter.grad is not None, dtype=torch.int64, device=parameter.device)
        distributed.all_reduce(has)
        if not int(has):
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        average([parameter.grad])


def lowest(tensor: Tensor) -> None:
    """Replace ``tensor`` by its least values over the processes."""
    if size() > 1:
        distributed.all_reduce(tensor, distributed.ReduceOp.MIN)
