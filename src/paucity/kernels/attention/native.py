"""Sparse attention in native code: float32 and bfloat16, every pattern, forward and backward."""

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from ...checks import InputError
from ...ops.formats.stripes import KeyLists, Window
from .. import native
from .problem import Problem

_INT, _FLOAT, _ADDRESS = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p


class _Attention(ctypes.Structure):
    """``csrc/attention.h: Attention``, field by field."""

    _fields_ = (
        *((name, _INT) for name in ("size", "dtype", "batch", "heads", "kv_heads", "queries", "keys", "dim")),
        ("value_dim", _INT),
        *((name, _INT * 3) for name in ("query_strides", "key_strides", "value_strides")),
        *((name, _ADDRESS) for name in ("query", "key", "value")),
        *((name, _FLOAT) for name in ("scale", "softcap")),
        *((name, _INT) for name in ("causal", "window")),
        *((name, _ADDRESS) for name in ("padding", "bias")),
        ("bias_strides", _INT * 3),
        *((name, _INT) for name in ("kind", "pattern_batch", "pattern_heads", "q_block", "k_block", "num_blocks")),
        ("width", _INT),
        *((name, _ADDRESS) for name in ("blocks", "partial", "elements", "positions", "sink_end")),
        ("window_size", _INT),
        *((name, _ADDRESS) for name in ("out", "lse", "grad_out", "grad_lse")),
        ("parts", _INT),
        *((name, _ADDRESS) for name in ("sums", "grad_query", "grad_key", "grad_value", "grad_bias")),
        ("grad_bias_strides", _INT * 4),
        ("grad_bias_by_head", _INT),
    )


_forward = native.function("attention", native.Pointer)
_backward = native.function("attention_backward", native.Pointer)
_PARTS = 8  # how many sums of a key's gradient there are at least, over all rows and heads; the threads share them


class _Call:
    """The arguments of one call, and the tensors that they point to."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> None:
        self.struct = _Attention(size=ctypes.sizeof(_Attention), dtype=native.DTYPES[query.dtype])
        self.held: list[Tensor] = []
        batch, heads, queries, dim = query.shape
        sizes = {"batch": batch, "heads": heads, "kv_heads": key.shape[1], "queries": queries, "keys": key.shape[2]}
        self.set(**sizes, dim=dim, value_dim=value.shape[-1])
        for name, tensor in (("query", query), ("key", key), ("value", value)):
            tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
            self.point(**{name: tensor})
            self.set(**{f"{name}_strides": (_INT * 3)(*tensor.stride()[:3])})
        self.struct.scale, self.struct.softcap = problem.scale, problem.softcap or 0.0
        self.set(causal=int(problem.causal), window=problem.window or 0)
        if problem.padding is not None:
            self.point(padding=problem.padding.contiguous())
        if problem.bias is not None:
            bias = problem.bias.float().contiguous()
            self.point(bias=bias)
            self.set(bias_strides=(_INT * 3)(*_shared_strides(bias)))
        self._pattern(problem, key.shape[2])

    def _pattern(self, problem: Problem, num_keys: int) -> None:
        pattern = problem.pattern
        self.set(q_block=pattern.q_block)
        if isinstance(pattern, Window):
            sinks = pattern.sink_mask(num_keys, problem.padding)
            end = (sinks * torch.arange(1, num_keys + 1)).amax(-1)
            self.point(sink_end=end)
            self.set(kind=2, pattern_batch=len(end), window_size=pattern.window_size)
        elif isinstance(pattern, KeyLists):
            self.point(positions=pattern.positions.int().contiguous())
            self._shape(1, pattern.positions.shape)
        else:
            self.point(blocks=pattern.blocks.contiguous())
            self._shape(0, pattern.blocks.shape)
            self.set(k_block=pattern.k_block)
            if pattern.partial is not None and pattern.elements is not None:
                self.point(partial=pattern.partial.int().contiguous(), elements=pattern.elements.contiguous())

    def _shape(self, kind: int, shape: Sequence[int]) -> None:
        batch, heads, blocks, width = shape
        self.set(kind=kind, pattern_batch=batch, pattern_heads=heads, num_blocks=blocks, width=width)

    def set(self, **fields: "int | ctypes.Array[ctypes.c_int64]") -> None:
        """Fill fields in."""
        for name, field in fields.items():
            setattr(self.struct, name, field)

    def point(self, **tensors: Tensor) -> None:
        """Point at tensors, and keep them alive."""
        for name, tensor in tensors.items():
            self.held.append(tensor)
            setattr(self.struct, name, tensor.data_ptr())


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Attention as ``problem`` says.

    Args:
        query: ``[B, H, Tq, D]`` float32 or bfloat16; any strides, as for the others.
        key: ``[B, H_kv, Tk, D]``.
        value: ``[B, H_kv, Tk, Dv]``.
        problem: what is computed.

    Returns:
        ``[B, H, Tq, Dv]`` in the dtype of ``query``, 0 where a query sees no key; and the log-sum-exp of the logits
        ``[B, H, Tq]`` float32, -inf there.

    Raises:
        InputError: if a list holds a position that no key has.
    """
    out = query.new_empty(*query.shape[:3], value.shape[-1])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    call = _Call(query, key, value, problem)
    call.point(out=out, lse=lse)
    _run(_forward(call.struct), key)
    return out, lse


def _run(code: int, key: Tensor) -> None:
    if code == 2:
        raise InputError(f"sparse_attention: positions must be below {key.shape[2]}, got others.")
    if code:
        raise RuntimeError(f"sparse_attention: the native kernel refused its arguments (code {code}).")


def _shared_strides(tensor: Tensor) -> list[int]:
    """Strides of all dimensions but the last, 0 for those of size 1."""
    return [0 if size == 1 else step for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)]


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    problem: Problem,
    *,
    bias_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of what `forward` gave.

    Args:
        grad_out: ``[B, H, Tq, Dv]``, of ``out``.
        grad_lse: ``[B, H, Tq]``, of ``lse``; None is zeros.
        query: as given to `forward`, like all up to ``problem``.
        key: as there.
        value: as there.
        out: what `forward` gave.
        lse: what `forward` gave.
        problem: as there.
        bias_grad: whether the bias needs a gradient.

    Returns:
        Gradients of ``query``, ``key`` and ``value`` in their dtype, and of the bias in float32, or None. They are
        summed in float32; queries that saw nothing get and give none.

    Raises:
        InputError: if a list holds a position that no key has.
    """
    call = _Call(query, key, value, problem)
    call.point(out=out.contiguous(), lse=lse.contiguous(), grad_out=grad_out.to(query.dtype).contiguous())
    if grad_lse is not None:
        call.point(grad_lse=grad_lse.float().contiguous())
    batch, kv_heads, keys, dim = key.shape
    grads = [torch.empty(x.shape, dtype=x.dtype) for x in (query, key, value)]
    parts = max(1, -(-_PARTS // max(1, batch * kv_heads)))
    width = sum(-(-size // 16) * 16 for size in (dim, value.shape[-1]))
    sums = torch.empty(batch, kv_heads, parts, keys, width)
    call.point(sums=sums, grad_query=grads[0], grad_key=grads[1], grad_value=grads[2])
    call.set(parts=parts)
    bias, shared = (problem.bias if bias_grad else None), None
    if bias is not None:
        # Nobody adds to what another part of the work adds to.
        by_head, rows = bias.shape[1] > 1, bias.shape[2]
        slots = (batch, query.shape[1] if by_head else kv_heads, parts if rows == 1 else 1)
        shared = torch.zeros(*slots, rows, keys)
        call.point(grad_bias=shared)
        call.set(grad_bias_strides=(_INT * 4)(*_shared_strides(shared)), grad_bias_by_head=int(by_head))
    _run(_backward(call.struct), key)
    return grads[0], grads[1], grads[2], None if bias is None or shared is None else _reduced(shared, bias)


def _reduced(shared: Tensor, bias: Tensor) -> Tensor:
    """Sums over batch, heads and parts ``[B, heads, parts, rows, keys]`` in a fixed order, to the shape of the bias."""
    parts = shared.unbind(2)
    if bias.shape[1] == 1:
        parts = tuple(head.unsqueeze(1) for part in parts for head in part.unbind(1))
    if bias.shape[0] == 1:
        parts = tuple(row.unsqueeze(0) for part in parts for row in part.unbind(0))
    return functools.reduce(torch.add, parts)
