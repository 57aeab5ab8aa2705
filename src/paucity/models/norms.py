"""Statistics of batch norms measured anew: what a network saw in training no longer holds once it has been pruned."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..checks import fail


@torch.no_grad()
def recalibrate_norms(model: nn.Module, batches: Sequence[Tensor]) -> Callable[[], None]:
    """Set running means and variances of batch norms to the averages over ``batches``; everything else stays.

    Dropout is off and the other modules are in eval mode. The numbers of batches tracked are as before.

    Args:
        model: changed in place where it has batch norms that track statistics.
        batches: inputs of the model; a batch of few images gives a poor variance.

    Returns:
        What brings the old statistics back.

    Raises:
        InputError: if there are no batches.
    """
    if not len(batches):
        raise fail("recalibrate_norms", "batches", "hold at least one batch", "none")
    norms = [
        m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None
    ]
    before = [{name: value.clone() for name, value in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in model.modules()]

    def undo() -> None:
        for norm, values in zip(norms, before, strict=True):
            for name, value in values.items():
                norm.get_buffer(name).copy_(value)

    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # the average over all batches
            norm.training = True
        for batch in batches:
            model(batch)
    except BaseException:
        undo()
        raise
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        for module, training in modes:
            module.training = training
    for norm, values in zip(norms, before, strict=True):
        if "num_batches_tracked" in values:
            norm.get_buffer("num_batches_tracked").copy_(values["num_batches_tracked"])
    return undo
