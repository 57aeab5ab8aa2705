"""Activations straight from a model: texts or pictures run when the buffer asks for their rows.

Several places are read in one forward and stand side by side in a row: what crosscoders and transcoders take apart
again (`columns`), and what one training of several layers needs.
"""

from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import fail
from ..models.calibration import as_batches
from ..models.harvest import Inputs, harvest, kept_tokens, tokens_at
from ..models.places import Hook, find_hook
from .mixing import MixedSource
from .sources import ActivationSource


class Harvester:
    """Runs items through a model and gives the rows of its hooks.

    Args:
        model: run as it is, without gradients.
        hooks: places by name, see `paucity.models.places`; in this order they stand in a row.
        items: what is one forward each: ids ``[B, T]``, pixels ``[B, C, H, W]``, or a mapping of the model's arguments.
        skip_ids: token ids whose activations are left out; padding is, too.

    Attributes:
        hooks: as places.
        widths: of each hook.
        counts: rows of each item.

    Raises:
        InputError: if there are no items or hooks, one does not fit the model, they differ in rows, or no row is left.
    """

    def __init__(
        self, model: nn.Module, hooks: str | Sequence[str], items: Sequence[Inputs], *, skip_ids: Collection[int] = ()
    ) -> None:
        names = [hooks] if isinstance(hooks, str) else list(hooks)
        if not names or len(set(names)) != len(names):
            raise fail("Harvester", "hooks", "be places, each once", names)
        if not len(items):
            raise fail("Harvester", "items", "hold at least one", "none")
        self.model, self.items, self.skip_ids = model, items, frozenset(skip_ids)
        self.hooks: list[Hook] = [find_hook(model, name) for name in names]
        for item in items:
            if isinstance(item, Tensor) or "input_ids" in item:
                as_batches("Harvester", model, [item])
        self.counts = list(self._counts())
        if not sum(self.counts):
            raise fail("Harvester", "items", "hold a token that is neither padding nor special", f"{len(items)} items")
        first = next(number for number, count in enumerate(self.counts) if count)
        self.widths = [part.shape[1] for part in self.parts(first).values()]

    def parts(self, item: int) -> dict[str, Tensor]:
        """The rows of an item by hook, in the model's dtype, on its device.

        Raises:
            InputError: if hooks give different numbers of rows.
        """
        found = harvest(self.model, self.hooks, self.items[item], skip_ids=self.skip_ids)
        counts = {name: len(rows) for name, rows in found.items()}
        if len(set(counts.values())) > 1:
            raise fail("Harvester", "hooks", "give the same number of rows", f"{counts} in item {item}")
        return found

    def tokens(self, item: int) -> Inputs:
        """What of an item is read where the first hook is; see `paucity.models.harvest.tokens_at`."""
        return tokens_at(self.model, self.hooks[0], self.items[item])

    def rows(self, item: int) -> Tensor:
        """The rows of an item, all hooks side by side."""
        return torch.cat(list(self.parts(item).values()), 1)

    def _counts(self) -> Iterator[int]:
        shapes: dict[Any, int] = {}
        for number, item in enumerate(self.items):
            kept = kept_tokens(self.tokens(number), self.skip_ids)
            if kept is not None:
                yield int(kept.sum())
                continue
            parts = [("", item)] if isinstance(item, Tensor) else sorted(item.items())
            shape = tuple((name, getattr(x, "shape", None)) for name, x in parts)
            if shape not in shapes:  # pictures of one size have as many patches
                shapes[shape] = len(next(iter(self.parts(number).values())))
            yield shapes[shape]


def live_source(
    model: nn.Module,
    hooks: str | Sequence[str],
    items: Sequence[Inputs],
    *,
    skip_ids: Collection[int] = (),
    capacity: int = 65_536,
    seed: int = 0,
) -> MixedSource:
    """A stream of activations: items run in an order of the seed, and their rows mixed in a buffer.

    Args:
        model: as for `Harvester`.
        hooks: as for `Harvester`.
        items: as for `Harvester`.
        skip_ids: as for `Harvester`.
        capacity: rows of the buffer.
        seed: of the order.
    """
    harvester = Harvester(model, hooks, items, skip_ids=skip_ids)
    return MixedSource(harvester.rows, harvester.counts, sum(harvester.widths), capacity=capacity, seed=seed)


class Columns(ActivationSource):
    """Some columns of another source: one hook of several.

    Args:
        source: whose rows hold more.
        start: first column.
        stop: behind the last.
    """

    def __init__(self, source: ActivationSource, start: int, stop: int) -> None:
        if not 0 <= start < stop <= source.input_size:
            raise fail("Columns", "start and stop", f"lie within the width ({source.input_size})", (start, stop))
        self.source, self.start, self.stop, self.input_size = source, start, stop, stop - start

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`."""
        for batch in self.source.batches(batch_size, start=start):
            yield batch[:, self.start : self.stop]
