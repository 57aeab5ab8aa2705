"""Operators that move, cut, join, pool or reduce channels: rules of `channels_graph`, the first half.

The labels of a tensor (see `channels_graph.Tracer.labels`) are moved as its entries are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .channels_graph import Tracer

MIXED = "{} mixes them"
_FIXED = "{} gives them fixed places"
_RESHAPES = ("view", "_unsafe_view", "_reshape_alias", "reshape")


@dataclass(frozen=True)
class Call:
    """An operator as called.

    Attributes:
        op: its name, without the underscore of writing in place.
        func: the operator.
        given: its arguments by name.
        out: its result.
    """

    op: str
    func: Any
    given: dict[str, Any]
    out: Any


Rule = Callable[[Tracer, Call], None]


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors inside an argument or a result."""
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def varying(labels: Tensor) -> list[int]:
    """The dimensions along which labels change."""
    return [dim for dim, size in enumerate(labels.shape) if size > 1]


def along(tracer: Tracer, tensor: Tensor, dim: int, what: str) -> Tensor:
    """The nodes along one dimension ``[size]``; where they change along others too they are locked and lost."""
    labels, dim = tracer.labels(tensor), dim % tensor.ndim
    if any(other != dim for other in varying(labels)):
        tracer.lock(labels, MIXED.format(what))
        return torch.zeros(tensor.shape[dim], dtype=torch.int64)
    return labels.flatten().expand(tensor.shape[dim])


def unknown(tracer: Tracer, call: Call) -> None:
    """Whatever goes into an operator without a rule stays."""
    for tensor in tensors_in(call.given):
        tracer.lock(tracer.labels(tensor), MIXED.format(call.op))
        if id(tensor) in tracer.names:
            tracer.fixed[tracer.names[id(tensor)]] = MIXED.format(call.op)


def keep(tracer: Tracer, call: Call) -> None:
    """The result holds what the first tensor holds."""
    labels = tracer.labels(tensors_in(call.given)[0])
    for out in tensors_in(call.out):
        tracer.put(out, labels)


def lock_reduced(tracer: Tracer, labels: Tensor, dims: Sequence[int], op: str) -> bool:
    """Whether ``op`` reduces dimensions along which channels lie; then they are locked."""
    mixed = bool(set(varying(labels)) & {dim % max(1, labels.ndim) for dim in dims})
    if mixed:
        tracer.lock(labels, MIXED.format(op))
    return mixed


def _softmax(tracer: Tracer, call: Call) -> None:
    lock_reduced(tracer, tracer.labels(call.given["self"]), [call.given["dim"]], call.op)
    keep(tracer, call)


def _reduction(tracer: Tracer, call: Call) -> None:
    x = call.given["self"]
    labels, dims = tracer.labels(x), call.given.get("dim")
    dims = [dims] if isinstance(dims, int) else list(dims or range(x.ndim))
    if lock_reduced(tracer, labels, dims, call.op):
        return
    gone = {dim % max(1, x.ndim) for dim in dims}
    left = [size for dim, size in enumerate(labels.shape) if dim not in gone]
    for out in tensors_in(call.out):
        tracer.put(out, labels if out.ndim == x.ndim else labels.view(left))


def _spatial(tracer: Tracer, call: Call) -> None:
    """Pooling, resizing, mirrored edges: the last one, two or three dimensions change."""
    x = tensors_in(call.given)[0]
    places = next((int(n) for n in "123" if f"{n}d" in call.op), 2)
    labels = tracer.labels(x)
    if lock_reduced(tracer, labels, range(x.ndim - places, x.ndim), call.op):
        return
    for out in tensors_in(call.out):
        tracer.put(out, labels)


def _pad(tracer: Tracer, call: Call) -> None:
    """Places beside a picture belong to its channel; channels beside its channels belong to nobody."""
    x, pad = call.given["self"], list(call.given["pad"])
    labels = tracer.labels(x)
    for place in range(0, len(pad), 2):
        if labels.shape[x.ndim - 1 - place // 2] == 1:
            pad[place : place + 2] = [0, 0]
    tracer.put(call.out, torch.constant_pad_nd(labels, pad, 0))


def _view(tracer: Tracer, call: Call) -> None:
    """A dimension of channels that is cut in several has to stay a rectangle."""
    x = call.given["self"]
    if call.op in ("t", "transpose", "permute") and x.ndim == 2 and id(x) in tracer.names:
        tracer.transposed[id(call.out)] = call.out, tracer.names[id(x)]
        return
    rest = {name: value for name, value in call.given.items() if name != "self"}
    whole = tracer.labels(x).expand(x.shape)
    same_order = call.op in _RESHAPES
    tracer.put(call.out, whole.reshape(call.out.shape) if same_order else call.func(whole, **rest))
    before, after = tracer.labels(x), tracer.labels(call.out)
    if len(varying(after)) > len(varying(before)):
        for dim in varying(after)[:-1]:
            tracer.tie(after, after.narrow(dim, 0, 1), _FIXED.format(call.op))


def _cut(tracer: Tracer, call: Call) -> None:
    """Equal parts of the channels lose the same places together; of one part it is not known how it was counted."""
    x = call.given["self"]
    labels, dim = tracer.labels(x), call.given.get("dim", 0) % x.ndim
    outs = tensors_in(call.out)
    rest = {name: value for name, value in call.given.items() if name != "self"}
    for out, result in zip(outs, tensors_in(call.func(labels.expand(x.shape), **rest)), strict=True):
        tracer.put(out, result)
    if labels.shape[dim] == 1 or outs[0].shape == x.shape:
        return
    if len(outs) > 1 and len({out.shape for out in outs}) == 1:
        moved = [tracer.labels(out).expand(out.shape) for out in outs]
        for one, other in pairwise(moved):
            tracer.tie(one, other, _FIXED.format(call.op))
    else:
        tracer.lock(labels, _FIXED.format(call.op))


def _join(tracer: Tracer, call: Call) -> None:
    tensors = [tensor for tensor in call.given["tensors"] if tensor.shape != (0,)]
    dim = call.given.get("dim", 0) % call.out.ndim
    held = [tracer.labels(tensor) for tensor in tensors]
    if call.op == "stack":
        held = [labels.unsqueeze(dim) for labels in held]
    elif any(labels.shape[dim] > 1 for labels in held):
        parts = [labels.expand(tensor.shape) for labels, tensor in zip(held, tensors, strict=True)]
        tracer.put(call.out, torch.cat(parts, dim))
        return
    for labels in held[1:]:
        tracer.tie(held[0], labels, "they are joined to what is no channel of a layer")
    result = held[0]
    for labels in held[1:]:
        result = torch.where(result == 0, labels, result)
    tracer.put(call.out, result)


def _pixel_shuffle(tracer: Tracer, call: Call) -> None:
    x, factor = call.given["self"], call.given["upscale_factor"] ** 2
    rows = along(tracer, x, x.ndim - 3, call.op).reshape(-1, factor)
    tracer.tie(rows, rows[:, :1], _FIXED.format(call.op))
    tracer.put(call.out, rows[:, 0].reshape(*[1] * (x.ndim - 3), -1, 1, 1))


def _channel_shuffle(tracer: Tracer, call: Call) -> None:
    x = tensors_in(call.given)[0]
    rows = along(tracer, x, 1, call.op).reshape(call.given["groups"], -1)
    tracer.tie(rows, rows[:1], _FIXED.format(call.op))
    tracer.put(call.out, rows.mT.reshape(1, -1, *[1] * (x.ndim - 2)))


def _copy(tracer: Tracer, call: Call) -> None:
    x, source = call.given["self"], call.given["src"]
    one, other = tracer.labels(x).expand(x.shape), tracer.labels(source).expand(source.shape)
    tracer.tie(one, other, "they are written into what is no channel of a layer")


def _constant(tracer: Tracer, call: Call) -> None:
    """A constant holds no channels."""


def _numbered(*patterns: str) -> list[str]:
    return [pattern.format(n) for pattern in patterns for n in (1, 2, 3)]


MOVES: dict[str, Rule] = {
    "constant_pad_nd": _pad,
    "pixel_shuffle": _pixel_shuffle,
    "channel_shuffle": _channel_shuffle,
    "native_channel_shuffle": _channel_shuffle,
    "copy": _copy,
    "cat": _join,
    "stack": _join,
    "_softmax": _softmax,
    "_log_softmax": _softmax,
}
for _rule, _names in (
    (_view, "view _unsafe_view _reshape_alias reshape permute transpose t unsqueeze squeeze expand flip repeat"),
    (_cut, "slice select split split_with_sizes unbind index_select"),
    (keep, "clone _to_copy detach alias lift_fresh native_dropout contiguous"),
    (keep, "zeros_like ones_like full_like empty_like rand_like randn_like"),
    (_constant, "empty zeros ones full arange rand randn scalar_tensor empty_strided"),
    (_constant, "new_zeros new_ones new_full new_empty new_empty_strided"),
    (_reduction, "sum mean amax amin var std logsumexp prod max min any all argmax argmin linalg_vector_norm norm"),
    (_reduction, "var_mean std_mean median"),
):
    MOVES |= dict.fromkeys(_names.split(), _rule)
MOVES |= dict.fromkeys(
    _numbered(
        "avg_pool{}d",
        "max_pool{}d",
        "max_pool{}d_with_indices",
        "adaptive_avg_pool{}d",
        "_adaptive_avg_pool{}d",
        "adaptive_max_pool{}d",
        "reflection_pad{}d",
        "replication_pad{}d",
        "upsample_nearest{}d",
        "_upsample_nearest_exact{}d",
        "upsample_linear{}d",
        "upsample_bilinear{}d",
        "upsample_bicubic{}d",
        "upsample_trilinear{}d",
    ),
    _spatial,
)
