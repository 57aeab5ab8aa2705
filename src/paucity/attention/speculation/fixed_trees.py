"""Trees that do not look at where prompt tokens gain: what a dynamic sparse tree is compared with."""

import torch
from torch import Tensor

from ...checks import check_int
from .candidates import Path, TreeState, best_paths, check_accept
from .sparse_tree import DynamicTree, evaluate


def static_tree(accept: Tensor, size: int, *, num_ensemble: int = 1) -> DynamicTree:
    """The most probable candidates, each with all prompt tokens; arguments as in `dynamic_tree`."""
    accept, count = _checked("static_tree", accept, size, num_ensemble)
    depths = range(len(accept) + 1)
    return _with_all(accept, [tuple(path for path, _ in best_paths(accept, depth, count)) for depth in depths])


def full_tree(accept: Tensor, size: int, *, num_ensemble: int = 1) -> DynamicTree:
    """The ``w`` likeliest guesses behind every candidate, as large a ``w`` as fits, each with all prompt tokens.

    Where not even one guess at every distance fits, the chain of the likeliest is as long as fits.
    """
    accept, count = _checked("full_tree", accept, size, num_ensemble)
    depth = len(accept)
    widths = [w for w in range(1, accept.shape[1] + 1) if sum(w**d for d in range(depth + 1)) <= count]
    width = max(widths, default=1)
    depth = depth if widths else count - 1
    states = []
    for most in range(len(accept) + 1):
        level, paths = [()], [()]  # type: list[Path], list[Path]
        for _ in range(min(most, depth)):
            level = [(*path, rank) for path in level for rank in range(width)]
            paths += level
        states.append(tuple(paths))
    return _with_all(accept, states)


def random_tree(accept: Tensor, size: int, *, num_ensemble: int = 1, seed: int = 0) -> DynamicTree:
    """Candidates and places of prompt tokens drawn at random, one prompt token for each candidate on average."""
    accept, _ = _checked("random_tree", accept, size, num_ensemble)
    generator = torch.Generator().manual_seed(seed)
    states = []
    for depth in range(len(accept) + 1):
        paths: list[Path] = [()]
        open_ends: list[Path] = [(rank,) for rank in range(accept.shape[1])] if depth else []
        for _ in range(size // (1 + num_ensemble) - 1):
            if not open_ends:
                break
            path = open_ends.pop(int(torch.randint(len(open_ends), (), generator=generator)))
            paths.append(path)
            if len(path) < depth:
                open_ends += [(*path, rank) for rank in range(accept.shape[1])]
        prompts = [0] * len(paths)
        for _ in range((size - len(paths)) // num_ensemble):
            room = [node for node, placed in enumerate(prompts) if placed < len(accept)]
            if not room:
                break
            prompts[room[int(torch.randint(len(room), (), generator=generator))]] += 1
        order = sorted(range(len(paths)), key=lambda node: (len(paths[node]), paths[node]))
        states.append(TreeState(tuple(paths[i] for i in order), tuple(prompts[i] for i in order)))
    return DynamicTree(tuple(states), evaluate(accept, states)[0])


def _checked(name: str, accept: Tensor, size: int, num_ensemble: int) -> tuple[Tensor, int]:
    """The table, and how many candidates with all prompt tokens fit."""
    accept = check_accept(name, accept)
    check_int(name, "num_ensemble", num_ensemble)
    each = 1 + num_ensemble * len(accept)
    check_int(name, "size", size, each)
    return accept, size // each


def _with_all(accept: Tensor, paths: list[tuple[Path, ...]]) -> DynamicTree:
    states = tuple(TreeState(found, (len(accept),) * len(found)) for found in paths)
    return DynamicTree(states, evaluate(accept, states)[0])
