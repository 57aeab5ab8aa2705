"""Which channels of a network belong together, seen in one forward.

Every index along a channel dimension of a parameter is a node; every tensor of the forward carries, for each of its
entries, the node whose channel it holds (0 where it holds none). An operator that needs two entries to be there
together ties their nodes: a convolution its input with its columns, an addition both operands, a depthwise convolution
input and output. A class of tied nodes is what can be removed together. An operator without a rule locks its nodes.

The idea of dependency groups is Fang et al. 2023 (DepGraph), https://arxiv.org/abs/2301.12900; there the graph is made
of modules and of gradient functions, here of the operators that the forward really runs. So a network with control flow
is taken as it runs for the example; a branch not taken there is not seen.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...checks import fail


@dataclass
class Block:
    """The nodes of one dimension of a parameter or buffer.

    Attributes:
        name: of the parameter or buffer.
        dim: the dimension.
        role: ``out`` where it makes channels, ``in`` where it reads them, ``scale`` for one value a channel.
        nodes: ``[size]`` int64.
    """

    name: str
    dim: int
    role: str
    nodes: Tensor


@dataclass
class Graph:
    """All nodes seen, and the classes they fall into.

    Attributes:
        blocks: in the order of the forward.
        classes: ``[num nodes + 1]``, class of each node.
        reasons: class to why it cannot be removed; a class that is not here can be.
        sizes: name of a module to the height and width (or length) of what it put out last, where it has any.
    """

    blocks: list[Block]
    classes: np.ndarray[Any, Any]
    reasons: dict[int, str]
    sizes: dict[str, tuple[int, ...]] = field(default_factory=dict)


class Tracer(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs operators as they are and follows the channels through them; the rules are in `channels_rules`.

    Args:
        model: its parameters and buffers are known by name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names = {id(value): name for name, value in [*model.named_parameters(), *model.named_buffers()]}
        self.blocks: dict[tuple[str, int], Block] = {}
        self.transposed: dict[int, tuple[Tensor, str]] = {}
        self.fixed: dict[str, str] = {}
        self._labels: dict[int, tuple[Tensor, Tensor]] = {}  # with the tensor itself, so that its id stays taken
        self._edges: list[Tensor] = []
        self._locks: list[tuple[Tensor, str]] = []
        self._size = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from .channels_rules import follow

        out = func(*args, **(kwargs or {}))
        follow(self, func, args, kwargs or {}, out)
        return out

    def nodes(self, name: str, dim: int, size: int, role: str) -> Tensor:
        """``[size]``: the nodes of a parameter's dimension, 0 for one of size 1, whose only channel stays."""
        if size == 1:
            return torch.zeros(1, dtype=torch.int64)
        if (name, dim) not in self.blocks:
            start = self._size + 1
            self._size += size
            self.blocks[name, dim] = Block(name, dim, role, torch.arange(start, start + size))
        return self.blocks[name, dim].nodes

    def labels(self, tensor: Tensor) -> Tensor:
        """The nodes of a tensor's entries, with size 1 in every dimension along which they do not change."""
        if id(tensor) in self._labels:
            return self._labels[id(tensor)][1]
        name, wide = self.names.get(id(tensor)), [dim for dim, size in enumerate(tensor.shape) if size > 1]
        if name is None or len(wide) != 1:
            return torch.zeros([1] * tensor.ndim, dtype=torch.int64)
        shape = [-1 if dim == wide[0] else 1 for dim in range(tensor.ndim)]
        return self.nodes(name, wide[0], tensor.numel(), "scale").view(shape)

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """Note what a tensor's entries hold."""
        for dim, size in enumerate(labels.shape):
            if size > 1 and bool((labels == labels.narrow(dim, 0, 1)).all()):
                labels = labels.narrow(dim, 0, 1)
        self._labels[id(tensor)] = tensor, labels

    def tie(self, one: Tensor, other: Tensor, reason: str) -> None:
        """Entries at the same place go together; beside an entry without a channel (0) the other one is locked."""
        one, other = torch.broadcast_tensors(one, other)  # type: ignore[no-untyped-call]
        pairs = torch.stack([one.flatten(), other.flatten()])
        pairs = torch.unique(pairs[:, pairs[0] != pairs[1]], dim=1)
        lonely = (pairs == 0).any(0)
        if bool(lonely.any()):
            self.lock(pairs[:, lonely], reason)
        self._edges.append(pairs[:, ~lonely])

    def lock(self, nodes: Tensor, reason: str) -> None:
        """These are never removed, nor is what is tied to them."""
        held = torch.unique(nodes[nodes > 0])
        if held.numel():
            self._locks.append((held, reason))

    def graph(self) -> Graph:
        """What has been seen so far."""
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64), *self._edges], dim=1).numpy()
        size = self._size + 1
        joined = coo_matrix((np.ones(pairs.shape[1], dtype=bool), (pairs[0], pairs[1])), shape=(size, size))
        _, classes = connected_components(joined, directed=False)
        reasons: dict[int, str] = {}
        whole = [(block.nodes, self.fixed[name]) for (name, _), block in self.blocks.items() if name in self.fixed]
        for held, reason in [*self._locks, *whole]:
            for index in np.unique(classes[held.numpy()]):
                reasons.setdefault(int(index), reason)
        return Graph(list(self.blocks.values()), classes, reasons)


@torch.no_grad()
def trace(model: nn.Module, example_input: Any) -> Graph:
    """Run ``model`` in eval mode on ``example_input`` (a tensor, or a tuple of arguments) and follow the channels.

    Raises:
        InputError: if the forward fails.
    """
    tracer, sizes = Tracer(model), dict[str, tuple[int, ...]]()
    modes = {module: module.training for module in model.modules()}
    hooks = [
        module.register_forward_hook(lambda _, args, out, name=name: _note_size(sizes, name, out))
        for name, module in model.named_modules()
    ]
    model.eval()
    try:
        with tracer:
            out = run(model, example_input)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        shapes = [list(x.shape) if isinstance(x, Tensor) else type(x).__name__ for x in tree_leaves(example_input)]
        given = f"{', '.join(map(str, shapes))} ({first})"
        raise fail("channel_groups", "example_input", "be what the model's forward takes", given) from error
    finally:
        for hook in hooks:
            hook.remove()
        for module, mode in modes.items():
            module.training = mode
    for leaf in tree_leaves(out):
        if isinstance(leaf, Tensor):
            tracer.lock(tracer.labels(leaf), "it is an output of the model")
    graph = tracer.graph()
    graph.sizes = sizes
    return graph


def run(model: nn.Module, example_input: Any) -> Any:
    """``model`` called on a tensor or on a tuple of arguments."""
    return model(*example_input) if isinstance(example_input, tuple) else model(example_input)


def _note_size(sizes: dict[str, tuple[int, ...]], name: str, out: Any) -> None:
    if isinstance(out, Tensor) and out.ndim > 2:
        sizes[name] = tuple(out.shape[2:])
