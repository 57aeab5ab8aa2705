"""The context tree of SharedLLM: a chunk is halved along one path, and every sibling off the path is read coarsely.

Paper: Han et al. 2024, https://arxiv.org/abs/2410.19318, Sec. 3.2, Eq. 1 and Alg. 1. A chunk of ``l`` tokens is split
in two, ``b = floor(l / 2 - eps)``; one half is selected and split again, the other is preserved as a node of this
level. At the last level both halves are preserved. A node of level ``w`` keeps one token in ``alpha_w``, and
``alpha_w = 2 * alpha_(w + 1)``, so that what lies near the end of the path is read finely.

Differs: lengths belong to the selected and to the preserved half (``b`` and ``l - b``) instead of to left and right, so
that all chunks have nodes of equal lengths whichever way their paths go; the noise is symmetric, so nothing else
changes. The paper does not say which tokens a uniform downsampling keeps: here the last of every stretch of
``alpha``, which has seen the others of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Choose = Callable[[Tensor, Tensor], Tensor]
"""From the tokens of both halves, ``[R, l // 2]`` and ``[R, l - l // 2]``, to ``[R]`` bool: True goes right."""


@dataclass(frozen=True)
class Nodes:
    """The preserved nodes of one level of all trees.

    Attributes:
        positions: ``[R, nodes, length]`` int64, where the tokens of each node stand in their chunk.
        kept: ``[num_kept]`` int64, which tokens of a node are kept, the same in every node.
    """

    positions: Tensor
    kept: Tensor


def level_lengths(length: int, height: int, noise: Sequence[float] = ()) -> list[tuple[int, int]]:
    """``(selected, preserved)`` lengths of each level of a chunk of ``length`` tokens; at least one token each.

    A chunk too short for ``height`` halvings gets fewer levels, and a single token none.

    Args:
        length: tokens in the chunk.
        height: levels wanted.
        noise: ``eps`` of each level as a share of the length that is split there; absent is 0.
    """
    lengths = []
    for level in range(height):
        if length < 2:
            break
        eps = length * noise[level] if level < len(noise) else 0.0
        selected = min(max(int((length / 2 - eps) // 1), 1), length - 1)
        lengths.append((selected, length - selected))
        length = selected
    return lengths


def kept_tokens(length: int, ratio: int) -> Tensor:
    """int64 ``[max(1, round(length / ratio))]``: the last token of each of so many even stretches of a node."""
    count = max(1, round(length / ratio))
    return torch.arange(1, count + 1).mul(length).add(count - 1).div(count, rounding_mode="floor") - 1


def grow(
    chunks: Tensor, ratios: Sequence[int], choose: Choose | None = None, noise: Sequence[float] = ()
) -> list[Nodes]:
    """The preserved nodes of the trees of ``chunks``, coarsest level first; together they have every token once.

    Args:
        chunks: ``[R, l]`` int64, one chunk a row.
        ratios: compression ratio of each level, one or more.
        choose: which half to go on with, seen from the tokens of both; None is always the right one.
        noise: as in `level_lengths`.

    Returns:
        one `Nodes` a level: one node a chunk, two at the last level.
    """
    rows, length = chunks.shape
    device = chunks.device
    lengths = level_lengths(length, len(ratios), noise)
    if not lengths:
        whole = torch.arange(length, device=device).expand(rows, 1, length)
        return [Nodes(whole, kept_tokens(length, ratios[-1]).to(device))]
    start, levels = torch.zeros(rows, 1, dtype=torch.int64, device=device), []
    for level, (selected, preserved) in enumerate(lengths):
        last = level == len(lengths) - 1
        if choose is None or last:  # the last level keeps both
            right = torch.ones(rows, 1, dtype=torch.bool, device=device)
        else:
            node = chunks.gather(1, start + torch.arange(selected + preserved, device=device))
            half = node.shape[1] // 2
            right = choose(node[:, :half], node[:, half:])[:, None]
        chosen = torch.where(right, start + preserved, start)
        sibling = torch.where(right, start, start + selected)
        kept = kept_tokens(preserved, ratios[level]).to(device)
        levels.append(Nodes((sibling + torch.arange(preserved, device=device))[:, None], kept))
        start = chosen
    _, preserved = lengths[-1]
    tail = (start + torch.arange(lengths[-1][0], device=device))[:, None]
    levels.append(Nodes(tail, kept_tokens(tail.shape[-1], ratios[len(lengths) - 1]).to(device)))
    return levels


def compressed_length(length: int, ratios: Sequence[int]) -> int:
    """Tokens that a tree of a chunk of ``length`` tokens keeps, without noise."""
    return sum(nodes.positions.shape[1] * len(nodes.kept) for nodes in grow(torch.zeros(1, length), ratios))
