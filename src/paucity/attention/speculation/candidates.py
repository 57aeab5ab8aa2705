"""Candidates of a token tree: the most probable ones, their chances, and prompt tokens where they gain most."""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ...checks import check_ndim, fail

Path = tuple[int, ...]


@dataclass(frozen=True)
class TreeState:
    """The tree of a state: candidates by the ranks of their guesses, the root ``()`` first, parents before children.

    Attributes:
        paths: the candidates.
        prompts: how many prompt tokens each of them carries.
    """

    paths: tuple[Path, ...]
    prompts: tuple[int, ...]

    def size(self, num_ensemble: int = 1) -> int:
        """Tokens of a forward pass, with so many embeddings for each prompt token."""
        return len(self.paths) + num_ensemble * sum(self.prompts)


def best_paths(accept: Tensor, depth: int, count: int) -> list[tuple[Path, float]]:
    """The ``count`` most probable candidates at most ``depth`` deep, with ``P``; the root first, the best next.

    Args:
        accept: ``[m, K]`` chances of the guesses by distance and rank, falling with the rank.
        depth: of the deepest candidate.
        count: candidates, the root included; there may be fewer.
    """
    rows = accept[:depth].tolist()
    found: list[tuple[Path, float]] = []
    waiting: list[tuple[float, Path]] = [(-1.0, ())]
    while waiting and len(found) < count:
        minus, path = heapq.heappop(waiting)
        found.append((path, -minus))
        if len(path) < len(rows):
            heapq.heappush(waiting, (minus * rows[len(path)][0], (*path, 0)))
        if path and path[-1] + 1 < len(rows[0]) and rows[len(path) - 1][path[-1]] > 0:
            row = rows[len(path) - 1]
            heapq.heappush(waiting, (minus * row[path[-1] + 1] / row[path[-1]], (*path[:-1], path[-1] + 1)))
    return found


def last_accepted(paths: Sequence[tuple[Path, float]]) -> list[float]:
    """``q``: the chance of each candidate to be the last that is right."""
    last = dict(paths)
    for path, chance in paths:
        if path:
            last[path[:-1]] -= chance
    return [max(0.0, last[path]) for path, _ in paths]


def place_prompts(last: Sequence[float], worth: Sequence[float], count: int) -> list[int]:
    """How many prompt tokens each candidate carries, ``count`` in all, each put where it gains most.

    Args:
        last: chance of each candidate to be the last that is right.
        worth: of the states ``0 .. m``.
        count: prompt tokens.
    """
    gains = [worth[k + 1] - worth[k] for k in range(len(worth) - 1)]
    placed = [0] * len(last)
    waiting = [(-chance * gains[0], node) for node, chance in enumerate(last)] if gains else []
    heapq.heapify(waiting)
    for _ in range(count):
        if not waiting:
            break
        minus, node = heapq.heappop(waiting)
        if minus >= 0:
            break
        placed[node] += 1
        if placed[node] < len(gains):
            heapq.heappush(waiting, (-last[node] * gains[placed[node]], node))
    return placed


def check_accept(name: str, accept: Tensor) -> Tensor:
    """``accept`` as float64 with ranks in falling order; InputError unless it is a table ``[m, K]`` of chances."""
    check_ndim(name, "accept", accept, 2)
    accept = accept.detach().double().cpu()
    if not accept.numel() or bool((accept < 0).any()) or bool((accept.sum(1) > 1 + 1e-6).any()):
        raise fail(name, "accept", "hold chances that add up to at most 1 at every distance", accept.tolist())
    return accept.sort(dim=1, descending=True).values
