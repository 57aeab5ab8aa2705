"""Where the layers of a network look, as something that a smaller network can learn from it.

Paper: Zagoruyko & Komodakis 2016, https://arxiv.org/abs/1612.03928, attention maps with p = 2 over the channels; with a
weight for each group of layers: Chu et al. 2022, https://arxiv.org/abs/2306.01526.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_ndim, fail
from ..measure.tokens import evaluating
from ..training import Loss


def attention_map(features: Tensor) -> Tensor:
    """Where a layer looks: ``[B, C, H, W] -> [B, H * W]``, the mean square over channels, each row of norm 1."""
    check_ndim("attention_map", "features", features, 4)
    return F.normalize(features.square().mean(1).flatten(1))


@contextmanager
def attention_loss(student: nn.Module, teacher: nn.Module, layers: Mapping[str, float], task: Loss) -> Iterator[Loss]:
    """A loss for ``train(loss=...)``: the task's, and the distance of the attention maps, while the context is open.

    ``task + sum_l beta_l ||A_teacher - A_student||^2``, the mean over the images, each distance in [0, 4]. The authors
    take the mean over the places in its stead, with beta of 1000 or more: on their maps of 13 to 76 places a side that
    is a beta of 0.2 to 6 here.

    Args:
        student: the pruned network.
        teacher: the dense one, with modules of the same names; run in eval mode without gradients.
        layers: paths of modules that put out maps ``[B, C, H, W]``, to their weight beta.
        task: of ``(student, pixels, labels)``.

    Raises:
        InputError: if a path is in neither network, or a module puts out something else.
    """
    maps: dict[tuple[str, bool], Tensor] = {}

    def note(key: tuple[str, bool], module: Any, args: Any, out: Any) -> None:
        maps[key] = attention_map(out.clone())  # what comes next may write in place

    handles = []
    for path in layers:
        for network, is_teacher in ((student, False), (teacher, True)):
            try:
                handles.append(network.get_submodule(path).register_forward_hook(partial(note, (path, is_teacher))))
            except AttributeError:
                raise fail("attention_loss", "layers", "be modules of both networks", path) from None

    def loss(model: nn.Module, pixels: Tensor, labels: Tensor) -> Tensor:
        total = task(model, pixels, labels)
        with evaluating(teacher):
            teacher(pixels)
        for path, beta in layers.items():
            total = total + beta * (maps[path, True] - maps[path, False]).square().sum(1).mean()
        maps.clear()
        return total

    try:
        yield loss
    finally:
        for handle in handles:
            handle.remove()
