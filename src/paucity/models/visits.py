"""One forward over all calibration batches that stops at each site, so that the site can be changed before it runs.

Every batch goes on in a coroutine of its own. When all batches that reach a site wait in front of it, its inputs are
complete: the caller may write its weight, and they go on through the new one. So one pass calibrates every site behind
all that was changed before it, and what is held meanwhile is what the waiting forwards hold: some activations of one
place, and the statistics of one site.
"""

from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Generic, Protocol, TypeVar

import torch
from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from ..checks import InputError
from .hooks import capture_inputs, run_model
from .sites import Site


class Gathered(Protocol):
    """What is gathered of the inputs of one matrix."""

    def add(self, inputs: Tensor) -> None:
        """Take in ``[tokens, in]``."""


G = TypeVar("G", bound=Gathered)


@dataclass(frozen=True)
class Door:
    """The entrance or the exit of a block, where batches wait, too."""

    path: str
    entrance: bool


def visits(
    model: nn.Module,
    sites: Sequence[Site],
    batches: Sequence[Tensor],
    make: Callable[[Site, int], list[G]],
    *,
    doors: Sequence[str] = (),
) -> Generator[tuple[Site, list[G]] | tuple[Door, None]]:
    """Run ``model`` on all ``batches`` and yield each site with its statistics when it is about to run.

    Sites that read the very same tensor share one list of statistics. A site that runs more than once is visited the
    first time. After the last site the forwards are dropped.

    Args:
        model: run as it is, without gradients.
        sites: none of them an embedding.
        batches: what the model takes: ``input_ids [B, T]`` int64 of a language model.
        make: given a site and its input size, empty statistics, one for each of its matrices.
        doors: blocks whose entrance and exit are yielded as well; then all is run to the end.

    Raises:
        InputError: if the model runs without using one of the sites.
    """
    journey = _Journey(sites, make)
    order = _order(model, sites, doors)
    device = next(model.parameters()).device
    with ExitStack() as stack:
        stack.enter_context(capture_inputs(model, sites, journey.arrive, patches=True))
        for path in doors:
            block = model.get_submodule(path)
            enter, leave = Door(path, True), Door(path, False)
            stack.callback(block.register_forward_pre_hook(lambda *_, door=enter: journey.wait(door)).remove)
            stack.callback(block.register_forward_hook(lambda *_, door=leave: journey.wait(door)).remove)
        runs = [greenlet(partial(run_model, model, sites, batch.to(device))) for batch in batches]
        stack.callback(_drop, runs)
        waiting: dict[greenlet, Site | Door | None] = {}
        moving = runs
        while True:
            for run in moving:
                place = _step(run)
                while isinstance(place, Site) and journey.is_complete(place):
                    # It reads what a site before it read, of which nothing is missing: the others need not come up.
                    yield place, journey.leave(place)
                    place = _step(run)
                waiting[run] = place
            if all(place is None for place in waiting.values()) or (not doors and len(journey.left) == len(sites)):
                break
            # Batches that pass a site by (experts of their own) wait further on until the others are there.
            here = min((place for place in waiting.values() if place is not None), key=order.__getitem__)
            if isinstance(here, Site):
                yield here, journey.leave(here)
            else:
                yield here, None
            moving = [run for run, place in waiting.items() if place == here]
    unused = [site.name for site in sites if site.name not in journey.left]
    if unused:
        raise InputError(f"prune: sites must be run by the model's forward, got {', '.join(unused)}, which are not.")


class _Journey(Generic[G]):
    """What the batches have brought to the sites."""

    def __init__(self, sites: Sequence[Site], make: Callable[[Site, int], list[G]]) -> None:
        self.make = make
        self.left: set[str] = set()
        self.leader: dict[str, str] = {}
        self.found: dict[str, list[G]] = {}
        self.last: dict[greenlet, tuple[str, Tensor, int]] = {}

    def arrive(self, site: Site, inputs: Tensor, matrix: int | None) -> None:
        """Called before a site runs, for each of its matrices in turn, in the coroutine of a batch."""
        if site.name in self.left:
            return
        me = getcurrent()
        if site.name not in self.leader:
            known = self.last.get(me)
            same = matrix is None and known is not None and _same(inputs, *known[1:])
            self.leader[site.name] = self.leader[known[0]] if known is not None and same else site.name
        if self.leader[site.name] == site.name:
            # Held, so that its address cannot become another tensor's while the next site looks at it.
            self.last[me] = site.name, inputs, inputs._version
            if site.name not in self.found:
                self.found[site.name] = self.make(site, inputs.shape[-1])
            statistics = self.found[site.name]
            if len(inputs):
                statistics[matrix or 0].add(inputs)
            if matrix is not None and matrix + 1 < len(statistics):
                return
        self.wait(site)

    def wait(self, place: Site | Door) -> None:
        """Let the other batches come up."""
        me = getcurrent()
        if me.parent is not None:
            me.parent.switch(place)

    def is_complete(self, site: Site) -> bool:
        """Whether all that ``site`` reads was gathered at another site, which is left."""
        return self.leader[site.name] in self.left

    def leave(self, site: Site) -> list[G]:
        """What was gathered for ``site``, which is left; only what the next sites may share is held on to."""
        self.left.add(site.name)
        leader = self.leader[site.name]
        self.found = {name: value for name, value in self.found.items() if name == leader or name not in self.left}
        return self.found[leader]


def _order(model: nn.Module, sites: Sequence[Site], doors: Sequence[str]) -> dict[Site | Door, tuple[int, int]]:
    """Where each place stands in the model."""
    rank = {path: number for number, (path, _) in enumerate(model.named_modules(remove_duplicate=False))}
    order: dict[Site | Door, tuple[int, int]] = {site: (rank[site.module], n) for n, site in enumerate(sites)}
    for path in doors:
        inside = [number for name, number in rank.items() if name == path or name.startswith(f"{path}.")]
        order[Door(path, True)], order[Door(path, False)] = (min(inside), -1), (max(inside), len(sites))
    return order


def _step(run: greenlet) -> "Site | Door | None":
    """Let a batch go on to the place where it waits next, None at its end."""
    with torch.no_grad():  # around each step: the mode is the thread's, not the coroutine's
        place: Site | Door | None = run.switch()
    return place


def _drop(runs: Sequence[greenlet]) -> None:
    """End what still waits; its hooks and contexts are left in order."""
    for run in runs:
        if not run.dead:
            run.throw()


def _same(inputs: Tensor, known: Tensor, version: int) -> bool:
    """Whether ``inputs`` are the memory of ``known``, unchanged since it had ``version``."""
    place = inputs.data_ptr(), inputs.shape, inputs.stride(), inputs._version
    return place == (known.data_ptr(), known.shape, known.stride(), version)
