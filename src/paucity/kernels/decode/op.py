"""Decode attention as an operator: picks the twin, refuses numbers out of range, has the reference's gradients."""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ...checks import InputError, fail
from .. import dispatch
from . import native, reference
from .problem import Problem

_NAME = "decode_attention"


@torch.library.custom_op("paucity::decode_attention", mutates_args=())
@dispatch.without_autocast
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    page_size: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor]:
    """``(out, lse)`` of `Problem`."""
    problem = _problem(key, pages, lengths, starts, padding, page_size, scale, softcap, window)
    if not query.shape[:3].numel():
        return _outputs(query, value)
    twin = dispatch.module("decode attention", query, __package__)
    if twin is native:
        out, lse, code = native.forward(query, key, value, problem)
        if code:
            raise _out_of_range(key, problem)
        return out, lse
    _check_numbers(key, problem)
    out, lse = twin.forward(query, key, value, problem)
    return out, lse


@attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return _outputs(query, value)


@torch.library.custom_op("paucity::decode_attention_backward", mutates_args=())
@dispatch.without_autocast
def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    pages: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    page_size: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, by the reference on every device."""
    problem = _problem(key, pages, lengths, starts, padding, page_size, scale, softcap, window)
    if not query.shape[:3].numel():
        return query.new_zeros(query.shape), key.new_zeros(key.shape), value.new_zeros(value.shape)
    return reference.backward(grad_out, grad_lse, query, key, value, out, lse, problem)


@attend_backward.register_fake
def _(grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (query, key, value))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.options = inputs[7:]


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    grads = attend_backward(grad_out, grad_lse, *ctx.saved_tensors, *ctx.options)
    return *grads, *[None] * 8


attend.register_autograd(_backward, setup_context=_setup_context)


def _flops(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None) -> int:
    return 2 * _num_pairs(query, key, rest) * (query.shape[-1] + value.shape[-1])


def _backward_flops(
    grad_out: Tensor, grad_lse: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None
) -> int:
    return 2 * _num_pairs(query, key, rest[2:]) * (3 * query.shape[-1] + 2 * value.shape[-1])


def _num_pairs(query: Tensor, key: Tensor, rest: tuple[Any, ...]) -> int:
    return reference.num_pairs(query, key, _problem(key, *rest))


register_flop_formula(torch.ops.paucity.decode_attention, get_raw=True)(_flops)
register_flop_formula(torch.ops.paucity.decode_attention_backward, get_raw=True)(_backward_flops)


def _problem(
    key: Tensor,
    pages: Tensor | None,
    lengths: Tensor | None,
    starts: Tensor | None,
    padding: Tensor | None,
    page_size: int,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Problem:
    """The problem, a page being no longer than the cache: a size like 2^62 would overflow."""
    return Problem(scale, pages, min(page_size, max(key.shape[2], 1)), lengths, starts, padding, softcap, window)


def _outputs(query: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """What every twin returns: contiguous output, and lse in float32 (float64 for float64)."""
    lse_dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(*query.shape[:3], value.shape[-1]), query.new_empty(query.shape[:3], dtype=lse_dtype)


def _check_numbers(key: Tensor, problem: Problem) -> None:
    """Refuse pages and lengths that are out of range."""
    keys, pages, lengths, starts = key.shape[2], problem.pages, problem.lengths, problem.starts
    wrong = [(pages < -1) | (pages >= -(-keys // problem.page_size))] if pages is not None else []
    wrong += [(starts < 0) | (starts > keys)] if starts is not None else []
    wrong += [(lengths < 0) | (lengths > _room(key, problem))] if lengths is not None else []
    if any(bool(x.any()) for x in wrong):
        raise _out_of_range(key, problem)


def _room(key: Tensor, problem: Problem) -> Tensor | int:
    """Keys of the cache from the start of each list on."""
    return key.shape[2] if problem.starts is None else key.shape[2] - problem.starts


def _out_of_range(key: Tensor, problem: Problem) -> InputError:
    """The error that names the first number out of range."""
    keys, pages, lengths, starts = key.shape[2], problem.pages, problem.lengths, problem.starts
    if starts is not None and (wrong := (starts < 0) | (starts > keys)).any():
        return fail(_NAME, "starts", f"be in [0, {keys}]", starts[wrong][0].item())
    if lengths is not None and (wrong := (lengths < 0) | (lengths > _room(key, problem))).any():
        room = f"be in [0, {keys}]" if starts is None else f"be in [0, {keys} - start]"
        return fail(_NAME, "lengths", room, lengths[wrong][0].item())
    assert pages is not None
    last = -(-keys // problem.page_size) - 1
    first = pages[(pages < -1) | (pages > last)][0].item()
    return fail(_NAME, "pages", f"be in [-1, {last}]", first)
