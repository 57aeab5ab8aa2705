"""Which cached keys a decode step reads, and what it costs to choose them: sparse attention as the cost model sees it.

Paper: Sadhukhan et al. 2025 (Kinetics), https://arxiv.org/abs/2506.05333, "Sparse test-time scaling": with a budget of
``B`` keys the cost of attention grows with ``B L_out`` instead of ``L_out^2``; block top-k, the paper's own tractable
method, adds the search over one mean key a block. (The paper counts no search for its oracle; `METHODS` does, as
somebody has to look at the keys.)
"""

from collections.abc import Callable, Iterator

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ..checks import check_choice, check_int, fail


class Reading(BaseModel):
    """One way of reading a cache, per query head group and layer.

    Exactly one of ``num_keys`` and ``density`` is given. Where a step sees no more than ``num_keys`` it reads them all
    and chooses nothing.

    Attributes:
        name: for tables.
        num_keys: keys that a step reads, its own and forced ones included.
        density: share of the visible keys that a step reads.
        search_bytes: bytes that choosing reads, as a share of the visible keys' (their values not counted).
        search_flops: products that choosing does, as a share of those of all queries with all visible keys.
        search_every: steps that use one choice.
        dense_layers: layers that read everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    name: str
    num_keys: int | None = Field(None, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    search_bytes: float = Field(0.0, ge=0)
    search_flops: float = Field(0.0, ge=0)
    search_every: int = Field(1, ge=1)
    dense_layers: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _one_budget(self) -> "Reading":
        if (self.num_keys is None) == (self.density is None):
            raise fail("Reading", "num_keys", "be given or density, one of both", f"{self.num_keys}, {self.density}")
        return self

    def keys(self, first: int, last: int, window: int | None = None) -> float:
        """Keys read by the steps that see ``first`` to ``last`` keys (or ``window`` at most), all together."""
        return sum(count * read for count, _, read in self._steps(first, last, window))

    def searched(self, first: int, last: int, window: int | None = None) -> float:
        """Visible keys that those steps choose among, all together, a choice for several steps once."""
        steps = self._steps(first, last, window)
        return sum(count * seen for count, seen, read in steps if read < seen) / self.search_every

    def choices(self, first: int, last: int, window: int | None = None) -> float:
        """Steps among those that choose; none where nothing is searched."""
        if not self.search_bytes and not self.search_flops:
            return 0.0
        return sum(count for count, seen, read in self._steps(first, last, window) if read < seen) / self.search_every

    def _steps(self, first: int, last: int, window: int | None) -> Iterator[tuple[int, float, float]]:
        """Runs of steps as (how many, mean of keys seen, mean of keys read)."""
        cuts = sorted({cut for cut in (window, self.num_keys) if cut is not None and first <= cut < last})
        for low, high in zip([first, *(cut + 1 for cut in cuts)], [*cuts, last], strict=True):
            seen = (low + high) / 2 if window is None or high <= window else float(window)
            read = seen * self.density if self.density is not None else min(seen, float(self.num_keys or 0))
            yield high - low + 1, seen, read


def block_topk(num_keys: int, *, block_size: int = 16) -> Reading:
    """Kinetics' own: the blocks of keys whose mean looks most like the query, averaged over the heads of a group.

    Args:
        num_keys: keys read, the newest block included.
        block_size: keys in a block; its mean is what the search reads.
    """
    check_int("block_topk", "num_keys", num_keys)
    check_int("block_topk", "block_size", block_size)
    return Reading(name="block_topk", num_keys=num_keys, search_bytes=1 / block_size, search_flops=1 / block_size)


def _window(num_keys: int) -> Reading:
    return Reading(name="window", num_keys=num_keys)


def _quest(num_keys: int) -> Reading:
    return Reading(name="quest", num_keys=num_keys, search_bytes=2 / 16, search_flops=2 / 16, dense_layers=2)


def _double_sparsity(num_keys: int) -> Reading:
    return Reading(name="double_sparsity", num_keys=num_keys, search_bytes=1 / 16, search_flops=1 / 4, dense_layers=2)


def _oracle(num_keys: int) -> Reading:
    return Reading(name="oracle_topk", num_keys=num_keys, search_bytes=1.0, search_flops=1.0)


METHODS: dict[str, Callable[[int], Reading]] = {
    "block_topk": block_topk,
    "double_sparsity": _double_sparsity,
    "oracle_topk": _oracle,
    "quest": _quest,
    "window": _window,
}
"""Readings by name, made from a budget of keys: ``block_topk`` (blocks of 16), ``double_sparsity`` (a quarter of the
channels in 4 bits, two dense layers), ``oracle_topk`` (every key is looked at), ``quest`` (minimum and maximum of pages
of 16, two dense layers), ``window`` (newest keys and sinks; nothing is searched). Others are `Reading` objects."""


def reading(method: str, num_keys: int) -> Reading:
    """One of `METHODS` with a budget.

    Raises:
        InputError: if the method is unknown or the budget is below 1.
    """
    check_choice("reading", "method", method, METHODS)
    check_int("reading", "num_keys", num_keys)
    return METHODS[method](num_keys)
