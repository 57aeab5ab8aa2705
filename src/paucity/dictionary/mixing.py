"""A buffer that mixes rows of many texts: fill it, shuffle it, give half of it away, fill it again.

What is in the buffer follows from the seed and the number of rows in each item, so that the books are kept without
reading an item: a stream that starts later comes to its place without running the model, and reads again only the items
of which something is left in the buffer there.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ..checks import check_int, check_shape, fail
from .sources import ActivationSource

Read = Callable[[int], Tensor]


class MixedSource(ActivationSource):
    """Rows of items, each item read when it is needed; in every pass over the items their order is another.

    Args:
        read: gives the rows ``[counts[item], input_size]`` of an item, the same at every call.
        counts: rows of each item.
        input_size: width of a row.
        capacity: rows that the buffer holds when it is full, at least 2 and at most those of one pass. When half of it
            was given, memory holds up to twice as many, and one item more.
        seed: of the order of items and of all shuffles.
    """

    def __init__(
        self, read: Read, counts: Sequence[int], input_size: int, *, capacity: int = 65_536, seed: int = 0
    ) -> None:
        check_int("MixedSource", "capacity", capacity, 2)
        check_int("MixedSource", "input_size", input_size)
        if sum(counts) < 1:
            raise fail(
                "MixedSource", "counts", "hold at least one row (the buffer stays empty)", f"{len(counts)} items"
            )
        self.read, self.counts, self.input_size = read, list(counts), input_size
        self._first: Tensor | None = None
        self.capacity, self.seed = min(capacity, max(2, sum(counts))), seed

    def batches(self, batch_size: int, *, start: int = 0) -> Iterator[Tensor]:
        """See `ActivationSource.batches`; rows do not depend on ``batch_size``, only where they are cut does."""
        check_int("MixedSource", "batch_size", batch_size)
        check_int("MixedSource", "start", start, 0)
        rows = self._rows(start * batch_size)
        held = next(rows)
        while True:
            while len(held) < batch_size:
                held = torch.cat([held, next(rows)])
            yield held[:batch_size]
            held = held[batch_size:]

    def sample(self, count: int) -> Tensor:
        """See `ActivationSource.sample`; the first buffer is kept for the training that mostly follows."""
        check_int("MixedSource", "count", count)
        books = _Books(self.counts, self.capacity, self.seed)
        books.fill()
        first = self._values(books.held)
        self._first = first
        rows = next(self.batches(count))
        self._first = first
        return rows

    def _rows(self, start: int) -> Iterator[Tensor]:
        """The stream of rows from the one with the number ``start``, in pieces of half a buffer."""
        books = _Books(self.counts, self.capacity, self.seed)
        at = 0
        while at + books.fill() <= start:
            at += books.take()[0].shape[1]
        values = self._values(books.held) if at or self._first is None else self._first
        self._first = None
        while True:
            given, order = books.take()
            half = given.shape[1]
            # Both are copies: nothing keeps the whole buffer while its first half is used up.
            first, values = values[order[max(0, start - at) : half]], values[order[half:]]
            yield first
            del first
            at += half
            books.fill()
            values = self._values(books.held, values)

    def _values(self, ids: Tensor, before: Tensor | None = None) -> Tensor:
        """The rows ``ids [2, n]`` (turn, row), the first of which are ``before``; each item is read once."""
        known = 0 if before is None else len(before)
        order = known + torch.argsort(ids[0, known:], stable=True)
        turns, counts = torch.unique_consecutive(ids[0, order], return_counts=True)
        found: Tensor | None = None
        for turn, mine in zip(turns.tolist(), torch.split(order, counts.tolist()), strict=False):
            value = self._checked(item_at(turn, len(self.counts), self.seed))
            if found is None:
                found = value.new_empty(ids.shape[1], self.input_size)
                if before is not None:
                    found[:known] = before
            found[mine] = value[ids[1, mine]]
        found = before if found is None else found
        assert found is not None, "a buffer that was filled holds rows"
        return found

    def _checked(self, item: int) -> Tensor:
        value = self.read(item).cpu()
        check_shape("MixedSource", f"activations of item {item}", value, self.counts[item], self.input_size)
        if not bool(value.isfinite().all()):
            raise fail("MixedSource", "activations", "be finite", f"NaN or infinity in item {item}")
        return value


class _Books:
    """Which rows are in the buffer: ``held [2, n]`` int64, the turn of an item and the row in it."""

    def __init__(self, counts: list[int], capacity: int, seed: int) -> None:
        self.counts, self.capacity, self.seed = counts, capacity, seed
        self.held = torch.empty(2, 0, dtype=torch.int64)
        self.turn = self.shuffles = 0

    def fill(self) -> int:
        """Take up items until the buffer is full, behind what is in it; how many rows the next `take` will give."""
        size, first, taken = self.held.shape[1], self.turn, list[int]()
        while size < self.capacity:
            taken.append(self.counts[item_at(self.turn, len(self.counts), self.seed)])
            size, self.turn = size + taken[-1], self.turn + 1
        counts = torch.tensor(taken, dtype=torch.int64)
        turns = torch.arange(first, self.turn).repeat_interleave(counts)
        rows = torch.arange(len(turns)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
        self.held = torch.cat([self.held, torch.stack([turns, rows])], 1)
        return size // 2

    def take(self) -> tuple[Tensor, Tensor]:
        """Shuffle, and give away the first half of the rows; with them the order that shuffled."""
        size = self.held.shape[1]
        order = torch.randperm(size, generator=_generator(self.seed, 2 * self.shuffles + 1))
        given, self.held = self.held[:, order[: size // 2]], self.held[:, order[size // 2 :]]
        self.shuffles += 1
        return given, order


def item_at(turn: int, count: int, seed: int) -> int:
    """The item that has the turn ``turn`` when all ``count`` are taken in a new order again and again."""
    return _pass(turn // count, count, seed)[turn % count]


@lru_cache(maxsize=8)
def _pass(number: int, count: int, seed: int) -> list[int]:
    order: list[int] = torch.randperm(count, generator=_generator(seed, 2 * number)).tolist()
    return order


def _generator(seed: int, number: int) -> torch.Generator:
    return torch.Generator().manual_seed((1_000_003 * seed + number) % 2**63)
