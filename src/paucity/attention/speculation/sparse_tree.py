"""Dynamic sparse trees: which continuations to check at once, and how many prompt tokens each of them carries.

Paper: Chen et al. 2024 (PPD), https://arxiv.org/abs/2405.18628, Sec. 4. With ``p[d, r]`` the chance that the guess of
rank ``r`` at distance ``d`` is right, a candidate ``v`` with the ranks ``r_1 .. r_d`` is right with ``P(v) = prod
p[i, r_i]``, and it is the last right one with ``q(v) = P(v) - sum of P(children)``. A candidate that carries ``k``
prompt tokens, if it is the last, leaves guesses for ``k`` distances: state ``k``, with a tree of its own at most ``k``
deep. The root, the one token known already, is a candidate with ``P = 1``. Over the stationary states ``pi`` of that
chain a step gains ``R = sum_k pi_k f_k`` tokens, ``f_k = sum P(v)``, of ``n`` tokens in the tree, prompt tokens
included; the hardware-aware size maximises ``R(n) / latency(n)`` (Sec. 4.2), with the latency measured.

Candidates of a state are the most probable ones, which is optimal for their number. Prompt tokens go to candidates one
by one where they gain most, ``q(v)`` times what the next state is worth more, as the paper's removal of the least
useful does in reverse. The paper's code tries all numbers of candidates for all states; here policy iteration (Howard)
on the chain of states finds them, so that a prompt token is worth what it gains in all later steps, not in the next.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ...checks import check_int, check_range, fail
from .candidates import Path, TreeState, best_paths, check_accept, last_accepted, place_prompts


class _Way(NamedTuple):
    """Candidates with their chances to be right, and to be the last that is."""

    paths: list[tuple[Path, float]]
    last: list[float]


@dataclass(frozen=True)
class DynamicTree:
    """A tree for each state ``0 .. m``, and the tokens that it is expected to gain in a step."""

    states: tuple[TreeState, ...]
    expected: float

    @property
    def size(self) -> int:
        """Tokens of the largest tree, with one embedding for each prompt token."""
        return max(state.size() for state in self.states)


def dynamic_tree(accept: Tensor, size: int, *, num_ensemble: int = 1, max_rounds: int = 32) -> DynamicTree:
    """The tree that gains most with ``size`` tokens in a pass.

    Args:
        accept: ``[m, K]`` chances of the guesses by distance and rank, as `paucity.attention.speculation.prompt_tokens`
            measures them.
        size: tokens of a pass, at least 1.
        num_ensemble: tokens that a prompt token takes.
        max_rounds: of policy iteration; it ends when nothing changes.

    Raises:
        InputError: if ``accept`` is no such table.
    """
    accept = check_accept("dynamic_tree", accept)
    check_int("dynamic_tree", "size", size)
    check_int("dynamic_tree", "num_ensemble", num_ensemble)
    ways = [_ways(accept, depth, size) for depth in range(len(accept) + 1)]
    worth = [float(k) for k in range(len(accept) + 1)]
    states, expected = [TreeState(((),), (0,))] * len(ways), 1.0
    for _ in range(max_rounds):
        better = [_best_state(*both, worth, size, num_ensemble) for both in zip(ways, states, strict=True)]
        if better == states:
            break
        states = better
        expected, worth = evaluate(accept, states)
    return DynamicTree(tuple(states), expected)


def hardware_aware_tree(accept: Tensor, latency: Mapping[int, float], *, num_ensemble: int = 1) -> DynamicTree:
    """The `dynamic_tree` of the size that gains most tokens a second.

    Args:
        accept: as in `dynamic_tree`.
        latency: seconds of a pass by the number of its tokens.
        num_ensemble: as in `dynamic_tree`.

    Raises:
        InputError: if there is no latency, or one that is not above 0.
    """
    if not latency:
        raise fail("hardware_aware_tree", "latency", "hold at least one size", "none")
    for size, seconds in latency.items():
        check_range("hardware_aware_tree", f"latency[{size}]", seconds, 0, open_low=True)
    trees = {size: dynamic_tree(accept, size, num_ensemble=num_ensemble) for size in latency}
    return trees[max(latency, key=lambda size: trees[size].expected / latency[size])]


def evaluate(accept: Tensor, states: Sequence[TreeState]) -> tuple[float, list[float]]:
    """Tokens that a step gains in the long run, and what each state is worth against state 0 (the bias of the chain).

    Args:
        accept: ``[m, K]`` chances of the guesses.
        states: trees of the states ``0 .. m``.
    """
    size = len(states)
    moves, gained = torch.zeros(size, size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
    for number, state in enumerate(states):
        chances = [(path, _chance(accept, path)) for path in state.paths]
        gained[number] = sum(chance for _, chance in chances)
        for last, prompts in zip(last_accepted(chances), state.prompts, strict=True):
            moves[number, prompts] += last
    # R + h_k = f_k + sum_j moves[k, j] h_j with h_0 = 0: one unknown for each state. A state that no other leads to
    # has its own equation, and least squares holds where the chain falls apart.
    system = torch.eye(size, dtype=torch.float64) - moves
    system[:, 0] = 1.0
    found = torch.linalg.lstsq(system, gained.unsqueeze(1), driver="gelsd").solution.squeeze(1).tolist()
    return found[0], [0.0, *found[1:]]


def _ways(accept: Tensor, depth: int, size: int) -> list[_Way]:
    """The best candidates of every number up to ``size``."""
    paths = best_paths(accept, depth, size)
    return [_Way(paths[:count], last_accepted(paths[:count])) for count in range(1, len(paths) + 1)]


def _best_state(ways: list[_Way], now: TreeState, worth: list[float], size: int, num_ensemble: int) -> TreeState:
    """The tree that gains most, with what the next state is worth; the one of now unless another is better."""

    def gain(way: _Way, prompts: Sequence[int]) -> float:
        later = sum(chance * worth[k] for chance, k in zip(way.last, prompts, strict=True))
        return sum(chance for _, chance in way.paths) + later

    # What is there now has the best candidates of its number too.
    best, state = gain(ways[len(now.paths) - 1], now.prompts), now
    for way in ways:
        prompts = place_prompts(way.last, worth, (size - len(way.paths)) // num_ensemble)
        if (gained := gain(way, prompts)) > best + 1e-12:
            best, state = gained, TreeState(tuple(path for path, _ in way.paths), tuple(prompts))
    return state


def _chance(accept: Tensor, path: Path) -> float:
    chance = 1.0
    for distance, rank in enumerate(path):
        chance *= float(accept[distance, rank])
    return chance
