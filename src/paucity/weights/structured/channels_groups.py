"""The dependency groups of channels of any network of convolutions and linear layers.

After Fang et al. 2023 (DepGraph), https://arxiv.org/abs/2301.12900: what has to be removed together is found from what
the network computes, not from its architecture's name. Handled: additions, concatenations, grouped, depthwise and
transposed convolutions, batch, instance and group norms, flattening into a linear layer, padded channels, products with
squeeze-and-excitation gates, pooling, resizing, reshaping, equal splits, modules used twice, parameters used directly.
Locked, and said so: the model's outputs, what meets the input or a constant, what an operator mixes across channels
(layer norm, softmax, attention, means over channels), and whatever proves tied to a size that the code has fixed: every
group is tried, by removing one unit and comparing the outputs.
"""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ...checks import InputTypeError
from .channels_graph import Graph, run, trace
from .channels_shrink import ChannelGroup, Kept, Member, channel_masks, shrink_channels

_FIXED = "the forward has its size fixed, or computes something else without one of them"
_ALONE = "it is one unit, which has to stay"


def channel_groups(model: nn.Module, example_input: Any) -> list[ChannelGroup]:
    """The groups of ``model`` in the order of its forward, locked ones too.

    Args:
        model: any module; it is run in eval mode without gradients and is the same afterwards.
        example_input: what its forward takes: a tensor, or a tuple of arguments. Small sizes and few examples do;
            values should not be all zero, since outputs are compared.

    Raises:
        InputError: if the model does not run on the example.
    """
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"channel_groups: model must be a Module, got {type(model).__name__}.")
    groups = _groups(trace(model, example_input))
    free = [group for group in groups if not group.locked]
    if not free or _agree(model, free, example_input):
        return groups
    failing = {group.name for group in free if not _agree(model, [group], example_input)}
    free = [group for group in free if group.name not in failing]
    if not failing or (free and not _agree(model, free, example_input)):
        failing |= {group.name for group in free}
    return [replace(group, reason=_FIXED) if group.name in failing else group for group in groups]


def _groups(graph: Graph) -> list[ChannelGroup]:
    """Classes of nodes that lie in the same dimensions of the same parameters, and are locked alike, are one group."""
    held = [graph.classes[block.nodes.numpy()] for block in graph.blocks]
    blocks_of: dict[int, list[int]] = {}
    for index, classes in enumerate(held):
        for one in dict.fromkeys(classes.tolist()):
            blocks_of.setdefault(one, []).append(index)
    alike: dict[tuple[tuple[int, ...], str], list[int]] = {}
    for one, blocks in blocks_of.items():
        alike.setdefault((tuple(blocks), graph.reasons.get(one, "")), []).append(one)
    used: dict[str, int] = {}
    groups = []
    for (indices, reason), classes in alike.items():
        unit = np.full(int(graph.classes.max()) + 1, -1)
        unit[classes] = np.arange(len(classes))
        members = tuple(
            Member(graph.blocks[i].name, graph.blocks[i].dim, graph.blocks[i].role, torch.from_numpy(unit[held[i]]))
            for i in indices
        )
        first = next((member for member in members if member.role == "out"), members[0])
        module = first.name.rpartition(".")[0]
        place = module if first.role == "out" else f"{first.name}[{first.dim}]"
        used[place] = used.get(place, 0) + 1
        name = place if used[place] == 1 else f"{place}#{used[place]}"
        reason = reason or (_ALONE if len(classes) == 1 else "")
        groups.append(ChannelGroup(name, len(classes), members, graph.sizes.get(module, ()), reason))
    return groups


@torch.no_grad()
def _agree(model: nn.Module, groups: Sequence[ChannelGroup], example_input: Any) -> bool:
    """Whether zeros and physical removal of one unit of every group give the same outputs."""
    kept: Kept = {group.name: torch.arange(group.size) != group.size // 2 for group in groups}
    masked = deepcopy(model).eval()
    channel_masks(masked, groups, kept).apply_(masked)
    expected = tree_leaves(run(masked, example_input))
    del masked
    try:
        got = tree_leaves(run(shrink_channels(model, groups, kept).eval(), example_input))
    except Exception:  # whatever a forward raises that counts on a size
        return False
    pairs = [(a, b) for a, b in zip(expected, got, strict=True) if isinstance(a, Tensor)]
    return all(a.shape == b.shape and _close(a, b) for a, b in pairs)


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.is_floating_point() or not one.numel():
        return torch.equal(one, other)
    scale = float(one.abs().nan_to_num(0, 0, 0).max())
    return torch.allclose(one.double(), other.double(), rtol=1e-3, atol=1e-3 * scale + 1e-12, equal_nan=True)
