"""Sparse attention as operators of PyTorch: they trace, compile, differentiate and count their FLOPs."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...checks import fail
from ...ops.formats.block import BlockMask
from ...ops.formats.stripes import KeyLists, Window
from .. import dispatch
from . import dense, reference
from .pairs import kept_pairs
from .problem import Pattern, Problem

KERNEL = "sparse attention"
# Kinds of pattern; what ``index`` and ``extra`` are: blocks and partial, positions and counts, dropped and nothing.
BLOCKS, LISTS, WINDOW = 0, 1, 2
_MOST = 2**63 - 1  # the largest integer that an operator takes


def flat(problem: Problem) -> tuple[Any, ...]:
    """The arguments of the operators that follow the tensors, up to ``causal``."""
    pattern, index, extra, elements = problem.pattern, None, None, None
    kind, k_block, window_size, num_sinks = WINDOW, 0, 0, 0
    if isinstance(pattern, BlockMask):
        kind, k_block = BLOCKS, pattern.k_block
        index, extra, elements = pattern.blocks, pattern.partial, pattern.elements
    elif isinstance(pattern, KeyLists):
        kind, index, extra = LISTS, pattern.positions, pattern.counts
    else:
        window_size, num_sinks, index = pattern.window_size, pattern.num_sinks, pattern.dropped
    sizes = (min(size, _MOST) for size in (pattern.q_block, k_block, window_size, num_sinks))
    options = (problem.padding, problem.bias, problem.scale, problem.softcap, problem.window, problem.causal)
    return kind, index, extra, elements, *sizes, *options


@torch.library.custom_op("paucity::sparse_attention", mutates_args=())
@dispatch.without_autocast
def sparse_attention_op(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    kind: int,
    index: Tensor | None,
    extra: Tensor | None,
    elements: Tensor | None,
    q_block: int,
    k_block: int,
    window_size: int,
    num_sinks: int,
    padding: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
    need_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Out and logsumexp; without ``need_lse`` the second may be NaN, as it may run dense where that is faster."""
    pattern = _pattern(query, key, kind, index, extra, elements, q_block, k_block, window_size, num_sinks)
    problem = Problem(pattern, scale, softcap, padding, window, causal, bias)
    _check_positions(problem, key.shape[2])
    if not query.shape[:3].numel():
        return query.new_empty(*query.shape[:3], value.shape[-1]), _lse_like(query)
    twin = dispatch.module(KERNEL, query, __package__)
    if twin is not reference:
        out, lse = twin.forward(query, key, value, problem)
        return out, lse
    if not need_lse and (reason := dense.reason(query, key, problem)):
        dispatch.note_dense(KERNEL, reason)
        return dense.attention(query, key, value, problem), _lse_like(query).fill_(torch.nan)
    return reference.forward(query, key, value, problem, need_lse=need_lse)


@torch.library.custom_op("paucity::sparse_attention_backward", mutates_args=())
@dispatch.without_autocast
def sparse_attention_backward_op(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    kind: int,
    index: Tensor | None,
    extra: Tensor | None,
    elements: Tensor | None,
    q_block: int,
    k_block: int,
    window_size: int,
    num_sinks: int,
    padding: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and, with ``bias_grad``, of the bias; empty without."""
    pattern = _pattern(query, key, kind, index, extra, elements, q_block, k_block, window_size, num_sinks)
    problem = Problem(pattern, scale, softcap, padding, window, causal, bias)
    _check_positions(problem, key.shape[2])
    if not query.shape[:3].numel():
        none = (
            problem.bias.new_zeros(problem.bias.shape) if bias_grad and problem.bias is not None else query.new_empty(0)
        )
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape), none
    twin = dispatch.module(KERNEL, query, __package__)
    grads = twin.backward(grad_out, grad_lse, query, key, value, out, lse, problem, bias_grad=bias_grad)
    return (*grads[:3], query.new_empty(0) if grads[3] is None else grads[3].to(problem.bias.dtype))  # type: ignore[union-attr]


@sparse_attention_op.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *args: Any) -> tuple[Tensor, Tensor]:
    return query.new_empty(*query.shape[:3], value.shape[-1]), _lse_like(query)


@sparse_attention_backward_op.register_fake
def _(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    bias_grad: bool,
    *args: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    bias = args[9]
    grad_bias = bias.new_empty(bias.shape) if bias_grad else query.new_empty(0)
    return query.new_empty(query.shape), key.new_empty(key.shape), value.new_empty(value.shape), grad_bias


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, kind, index, extra, elements, *rest = inputs
    sizes, (padding, bias), options = rest[:4], rest[4:6], rest[6:10]
    ctx.save_for_backward(query, key, value, index, extra, elements, padding, bias, *output)
    ctx.kind, ctx.sizes, ctx.options = kind, sizes, options
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
    query, key, value, index, extra, elements, padding, bias, out, lse = ctx.saved_tensors
    nothing = (None,) * 18
    if grad_out is None and grad_lse is None:
        return nothing
    bias_grad = bias is not None and ctx.needs_input_grad[12]
    grads = sparse_attention_backward_op(
        torch.zeros_like(out) if grad_out is None else grad_out,
        grad_lse,
        *(query, key, value, out, lse, bias_grad),
        *(ctx.kind, index, extra, elements, *ctx.sizes, padding, bias, *ctx.options),
    )
    return (*grads[:3], *nothing[3:12], grads[3] if bias_grad else None, *nothing[13:])


sparse_attention_op.register_autograd(_differentiate, setup_context=_save)


def _pairs(query: Tensor, key: Tensor, *args: Any) -> float:
    """Pairs of a query and a key that it sees, of all heads; ``args`` as `flat` gives them."""
    kind, index, extra, elements, q_block, k_block, window_size, num_sinks = args[:8]
    padding, bias, scale, softcap, window, causal = args[8:14]
    pattern = _pattern(query, key, kind, index, extra, elements, q_block, k_block, window_size, num_sinks)
    problem = Problem(pattern, scale, softcap, padding, window, causal, bias)
    return kept_pairs(query, key, problem)


def _forward_flops(query: Tensor, key: Tensor, value: Tensor, *args: Any, out_val: Any = None) -> int:
    return int(2 * (query.shape[-1] + value.shape[-1]) * _pairs(query, key, *args))


def _backward_flops(grad_out: Tensor, grad_lse: Tensor | None, *args: Any, out_val: Any = None) -> int:
    query, key, value = args[:3]
    # As for dense attention: the scores again, then four gradients.
    return int(2.5 * 2 * (query.shape[-1] + value.shape[-1]) * _pairs(query, key, *args[6:]))


register_flop_formula(torch.ops.paucity.sparse_attention, get_raw=True)(_forward_flops)
register_flop_formula(torch.ops.paucity.sparse_attention_backward, get_raw=True)(_backward_flops)


def _lse_like(query: Tensor) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float32))


def _pattern(
    query: Tensor,
    key: Tensor,
    kind: int,
    index: Tensor | None,
    extra: Tensor | None,
    elements: Tensor | None,
    q_block: int,
    k_block: int,
    window_size: int,
    num_sinks: int,
) -> Pattern:
    if elements is None:  # a block may be larger than the text; nobody need reckon with how much
        q_block, k_block = min(q_block, max(1, query.shape[2])), min(k_block, max(1, key.shape[2]))
    if kind == WINDOW:
        return Window(window_size, num_sinks, q_block, index)
    assert index is not None
    if kind == BLOCKS:
        return BlockMask(index, q_block, k_block, query.shape[2], key.shape[2], extra, elements)
    assert extra is not None
    return KeyLists(index, extra, q_block)


def _check_positions(problem: Problem, num_keys: int) -> None:
    """Raise InputError where an index points outside what it indexes; nothing has been read yet."""
    pattern, name = problem.pattern, "sparse_attention"
    if isinstance(pattern, KeyLists):
        positions, counts = pattern.positions, pattern.counts
        _check_ends(name, "pattern.positions", positions, num_keys)
        first = (positions.shape[-1] - counts).unsqueeze(-1)
        padded = torch.nn.functional.pad(positions, (1, 1), value=-1)
        padded[..., -1] = 0
        _check_ends(name, "pattern.counts", counts, positions.shape[-1] + 1, low=0)
        if (padded.gather(-1, first) >= 0).any() or (padded.gather(-1, first + 1) < 0).any():
            raise fail(name, "pattern.counts", "say where each list begins", "others")
        if ((positions[..., 1:] <= positions[..., :-1]) & (positions[..., :-1] >= 0)).any():
            raise fail(name, "pattern.positions", "ascend in each list", "others")
    elif isinstance(pattern, BlockMask) and pattern.partial is not None and pattern.elements is not None:
        _check_ends(name, "pattern.partial", pattern.partial, len(pattern.elements))


def _check_ends(function: str, argument: str, index: Tensor, size: int, low: int = -1) -> None:
    if index.numel():
        least, most = (int(end) for end in index.aminmax())
        if least < low or most >= size:
            raise fail(function, argument, f"be in [{low}, {size})", [least, most])
