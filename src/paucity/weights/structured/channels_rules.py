"""Operators that make channels or compute with them one by one: rules of `channels_graph`, the second half.

Operators are those of ``aten``, to which every forward comes down.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...models.resize import whole_groups
from .channels_graph import Tracer
from .channels_moves import MOVES, Call, Rule, along, keep, lock_reduced, tensors_in, unknown, varying

_UNREAD = "they meet what is no channel of a layer: the input, a constant, padding"
_COMPUTED = "a weight is computed in the forward"


def follow(tracer: Tracer, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> None:
    """Apply the rule of ``func`` to what it was called with and what it returned."""
    op = func._schema.name.removeprefix("aten::")
    op = op.removesuffix("_") if func._schema.is_mutable else op
    names = [argument.name for argument in func._schema.arguments]
    call = Call(op, func, dict(zip(names, args, strict=False)) | kwargs, out)
    rule = _RULES.get(op) or (_pointwise if _is_pointwise(op) else unknown)
    try:
        rule(tracer, call)
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError):  # called in a form that the rule does not know
        unknown(tracer, call)


def _is_pointwise(op: str) -> bool:
    packet = getattr(torch.ops.aten, op, None)
    return packet is not None and any(torch.Tag.pointwise in getattr(packet, name).tags for name in packet.overloads())


def _pointwise(tracer: Tracer, call: Call) -> None:
    (out, *_), inputs = tensors_in(call.out), tensors_in(call.given)

    def aligned(shape: Sequence[int]) -> list[int]:
        return [1] * (out.ndim - len(shape)) + list(shape)

    held = [tracer.labels(tensor) for tensor in inputs]
    held = [labels.view(aligned(labels.shape)) for labels in held]
    dims = sorted({dim for labels in held for dim in varying(labels)})
    result: Tensor | None = None
    for tensor, labels in zip(inputs, held, strict=True):
        shape = aligned(tensor.shape)
        full = [dim for dim in dims if shape[dim] > 1]
        if id(tensor) in tracer.names and len(full) == 1 and not varying(labels):
            # A parameter of several dimensions, one of them that of the channels.
            dim = full[0] - out.ndim + tensor.ndim
            nodes = tracer.nodes(tracer.names[id(tensor)], dim, tensor.shape[dim], "scale")
            labels = nodes.view([-1 if place == full[0] else 1 for place in range(out.ndim)])
        if not full and not bool(labels.any()):
            continue  # the same for all channels
        if result is None:
            result = labels
        else:
            tracer.tie(result, labels, _UNREAD)
            result = torch.where(result == 0, labels, result)
    tracer.put(out, torch.zeros([1] * out.ndim, dtype=torch.int64) if result is None else result)


def _convolution(tracer: Tracer, call: Call) -> None:
    x, weight, bias, groups = (call.given[name] for name in ("input", "weight", "bias", "groups"))
    name, turned = tracer.names.get(id(weight)), call.given["transposed"]
    source = along(tracer, x, 1, call.op)
    if name is None:
        tracer.lock(source, _COMPUTED)
        return
    num_in, num_out, width = x.shape[1], call.out.shape[1], x.shape[1] // groups
    rows = source.view(groups, width)
    if whole_groups(groups, width):  # what goes in and comes out of a group goes together
        tracer.tie(rows, rows[:, :1], _UNREAD)
        if turned:
            tracer.tie(rows, tracer.nodes(name, 0, num_in, "in").view(groups, width), _UNREAD)
            making = rows[:, :1].expand(groups, num_out // groups).flatten()
        else:
            making = tracer.nodes(name, 0, num_out, "out")
            tracer.tie(rows[:, :1], making.view(groups, -1), _UNREAD)
    else:  # the same places of every group
        tracer.tie(rows, rows[:1], _UNREAD)
        if turned:
            tracer.tie(source, tracer.nodes(name, 0, num_in, "in").expand(num_in), _UNREAD)
            making = tracer.nodes(name, 1, num_out // groups, "out").expand(num_out // groups).repeat(groups)
        else:
            tracer.tie(rows, tracer.nodes(name, 1, width, "in").expand(width), _UNREAD)
            making = tracer.nodes(name, 0, num_out, "out").expand(num_out)
            tracer.tie(making.view(groups, -1), making.view(groups, -1)[:1], _UNREAD)
    if bias is not None:
        tracer.tie(making, tracer.labels(bias).expand(num_out), _COMPUTED)
    tracer.put(call.out, making.view(1, -1, *[1] * (call.out.ndim - 2)))


def _linear(tracer: Tracer, call: Call) -> None:
    bias, x = (None, call.given["self"]) if call.op == "mm" else (call.given["self"], call.given["mat1"])
    weight = call.given["mat2"]
    name, in_dim = tracer.names.get(id(weight)), 0
    if id(weight) in tracer.transposed:
        name, in_dim = tracer.transposed[id(weight)][1], 1
    if name is None:
        unknown(tracer, call)
        return
    num_in, num_out = weight.shape
    reading = tracer.nodes(name, in_dim, num_in, "in").expand(num_in)
    making = tracer.nodes(name, 1 - in_dim, num_out, "out").expand(num_out)
    tracer.tie(along(tracer, x, 1, "a linear layer"), reading, _UNREAD)
    if bias is not None:
        tracer.tie(making, tracer.labels(bias).flatten().expand(num_out), _COMPUTED)
    tracer.put(call.out, making.view(1, -1))


def _embedding(tracer: Tracer, call: Call) -> None:
    weight = call.given["weight"]
    name = tracer.names.get(id(weight))
    if name is not None:
        making = tracer.nodes(name, 1, weight.shape[1], "out")
        tracer.put(call.out, making.view(*[1] * (call.out.ndim - 1), -1))


def _batch_norm(tracer: Tracer, call: Call) -> None:
    x = call.given["input"]
    labels = along(tracer, x, 1, call.op)
    for name in ("weight", "bias", "running_mean", "running_var"):
        values = call.given.get(name)
        if values is not None:
            tracer.tie(labels, tracer.labels(values).expand(len(labels)), _UNREAD)
    tracer.put(tensors_in(call.out)[0], labels.view(1, -1, *[1] * (x.ndim - 2)))


def _group_norm(tracer: Tracer, call: Call) -> None:
    """The channels of a group of the norm share its mean: they go together, and the group with them."""
    rows = along(tracer, call.given["input"], 1, call.op).view(call.given["group"], -1)
    tracer.tie(rows, rows[:, :1], _UNREAD)
    _batch_norm(tracer, call)


def _layer_norm(tracer: Tracer, call: Call) -> None:
    x = call.given["input"]
    lock_reduced(tracer, tracer.labels(x), range(x.ndim - len(call.given["normalized_shape"]), x.ndim), "a layer norm")
    keep(tracer, call)


_RULES: dict[str, Rule] = MOVES | {
    "_convolution": _convolution,
    "_fused_rms_norm": _layer_norm,
    "_prelu_kernel": _pointwise,
    "addmm": _linear,
    "convolution": _convolution,
    "embedding": _embedding,
    "mm": _linear,
    "native_group_norm": _group_norm,
    "native_layer_norm": _layer_norm,
}
for _name in ("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm", "_native_batch_norm_legit"):
    _RULES[_name] = _batch_norm
for _name in ("_native_batch_norm_legit_no_training", "batch_norm_with_update", "_batch_norm_with_update"):
    _RULES[_name] = _batch_norm
