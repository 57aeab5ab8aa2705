"""Where the activations of a training come from: rows in an order that a seed fixes, so that it goes on exactly.

A source gives batches without end. Which rows a batch holds depends on the source's seed and the number of the batch
alone; `ActivationSource.batches` may therefore start anywhere.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from ..checks import InputTypeError, check_floating, check_int, check_ndim, check_shape, fail


@dataclass(frozen=True, eq=False)
class Rows:
    """A batch of activations ``x [n, input_size]``, and what comes with them where it is asked for.

    Attributes:
        x: activations.
        gradient: of a model's loss to them.
        target: ``[n, output_size]``, what is to be reconstructed of them if not they themselves.
    """

    x: Tensor
    gradient: Tensor | None = None
    target: Tensor | None = None


class ActivationSource(ABC):
    """Activations ``[n, input_size]``, batch after batch.

    Attributes:
        input_size: width of an activation.
        has_gradient: whether `rows` come with gradients.
        output_size: width of the targets that `rows` come with; None where they have none.
    """

    input_size: int
    has_gradient: bool = False
    output_size: int | None = None

    @abstractmethod
    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[Tensor]:
        """Batches ``[batch_size, input_size]`` without end, from the one with the number ``start``."""

    def rows(self, batch_size: int, *, start: int = 0) -> Iterator[Rows]:
        """`batches` with all that comes with them."""
        yield from map(Rows, self.batches(batch_size, start=start))

    def sample(self, count: int) -> Tensor:
        """``[count, input_size]``, the first rows of the stream."""
        return next(self.batches(count))


class TensorSource(ActivationSource):
    """Rows that are in memory, in another order in every epoch; the rows that do not fill a batch come in the next one.

    Args:
        activations: ``[n, input_size]``, any float dtype, finite.
        gradients: of a model's loss to them, like ``activations``; None gives none.
        seed: of the order.
    """

    def __init__(self, activations: Tensor, *, gradients: Tensor | None = None, seed: int = 0) -> None:
        check_ndim("TensorSource", "activations", activations, 2)
        check_floating("TensorSource", "activations", activations)
        if not activations.numel():
            raise fail("TensorSource", "activations", "hold at least one row", f"shape {list(activations.shape)}")
        if not bool(activations.isfinite().all()):
            raise fail("TensorSource", "activations", "be finite", "NaN or infinity")
        if gradients is not None:
            check_shape("TensorSource", "gradients", gradients, *activations.shape)
            if not bool(gradients.isfinite().all()):
                raise fail("TensorSource", "gradients", "be finite", "NaN or infinity")
        self.activations, self.seed, self.input_size = activations, seed, activations.shape[1]
        self.gradients, self.has_gradient = gradients, gradients is not None

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`."""
        yield from (rows.x for rows in self.rows(batch_size, start=start))

    def rows(self, batch_size: int, *, start: int = 0) -> Iterator[Rows]:
        """See `ActivationSource.rows`."""
        check_int("TensorSource", "batch_size", batch_size)
        check_int("TensorSource", "start", start, 0)
        count, at = len(self.activations), start * batch_size
        while True:
            rows = torch.arange(at, at + batch_size)
            epochs, places = rows // count, rows % count
            found = torch.empty(batch_size, dtype=torch.int64)
            for epoch in sorted(set(epochs.tolist())):
                mine = epochs == epoch
                found[mine] = _order(count, 1_000_003 * self.seed + epoch)[places[mine]]
            found = found.to(self.activations.device)
            yield Rows(self.activations[found], None if self.gradients is None else self.gradients[found])
            at += batch_size


def as_source(activations: object) -> ActivationSource:
    """A source as it is, a tensor ``[n, input_size]`` as one.

    Raises:
        InputTypeError: if it is neither.
    """
    if isinstance(activations, ActivationSource):
        return activations
    if isinstance(activations, Tensor):
        return TensorSource(activations)
    raise InputTypeError(f"fit: activations must be a tensor or an ActivationSource, got {type(activations).__name__}.")


@lru_cache(maxsize=3)
def _order(count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed % 2**63))
