"""The Triton twin of sparse attention, for GPUs (and for Triton's interpreter, where it is only right, not fast).

What a pattern becomes: a `BlockMask` lists of blocks of keys (those that a causal cut or the model's own window hides
from every query are taken out first), `KeyLists` gathered single keys, a `Window` one range of keys, with the sinks as
gathered single keys for the queries that have them outside their window. Blocks may have any size: programs work on
tiles inside them and a tile is padded to a power of two, so blocks of 64 or a multiple waste nothing. Heads that share
keys are not packed into one tile, so a single query (decoding) uses one row of its tile.
"""

from dataclasses import replace

import torch
import triton
from torch import Tensor

from .. import dispatch
from .problem import Problem
from .triton_backward import key_kernel, query_kernel, sum_kernel
from .triton_forward import forward_kernel
from .triton_plan import Pass, Plan

_BUFFER = 256 << 20  # bytes of gradients of single keys that are held at once


def forward(query: Tensor, key: Tensor, value: Tensor, problem: Problem) -> tuple[Tensor, Tensor]:
    """Sparse attention and the logarithm of its denominators.

    Args:
        query: ``[B, H, Tq, D]`` float32, bfloat16 or float16, any strides.
        key: ``[B, H_kv, Tk, D]``.
        value: ``[B, H_kv, Tk, Dv]``.
        problem: what is computed; checked before.

    Returns:
        ``[B, H, Tq, Dv]`` in the dtype of ``query``, 0 where a query sees no key; ``[B, H, Tq]`` float32, -inf there.
    """
    out = torch.empty(*query.shape[:3], value.shape[3], dtype=query.dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    query, key, value = _operands(query, key, value)
    plan = Plan.make(query, key, value, problem, Pass.FORWARD)
    with torch.cuda.device(query.get_device()):  # -1, which changes nothing, without one
        forward_kernel[plan.query_grid](
            query, key, value, out, lse, out.stride(), *plan.arguments(), **plan.constants()
        )
    return out, lse


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
    """Gradients of `forward`, summed in float32 and in an order that does not change from run to run.

    Single keys take a buffer of up to 256 MiB; ``bias_grad`` takes ``[B, H, Tq, Tk]`` float32.

    Args:
        grad_out: ``[B, H, Tq, Dv]``.
        grad_lse: ``[B, H, Tq]`` or None for 0.
        query: as in `forward`.
        key: as in `forward`.
        value: as in `forward`.
        out: result of `forward`.
        lse: result of `forward`.
        problem: what was computed.
        bias_grad: whether the gradient of the bias is wanted.

    Returns:
        Those of ``query``, ``key`` and ``value`` in their dtypes, and of the bias in float32, in its shape, or None.
    """
    (batch, heads, q_len, _), (_, group_heads, kv_len, _) = query.shape, key.shape
    dtypes, device, bias = (key.dtype, value.dtype), query.device, problem.bias
    delta = (grad_out.float() * out.float()).sum(-1)
    delta = (delta if grad_lse is None else delta - grad_lse).contiguous()
    dq = torch.empty(query.shape, dtype=query.dtype, device=device)
    ds = torch.zeros(batch, heads, q_len, kv_len, device=device) if bias_grad and bias is not None else None
    query, key, value = _operands(query, key, value)
    given = (query, key, value, grad_out, lse.contiguous(), delta, grad_out.stride())
    with torch.cuda.device(query.get_device()):  # -1, which changes nothing, without one
        plan = Plan.make(query, key, value, problem, Pass.QUERIES)
        query_kernel[plan.query_grid](*given, dq, ds, *plan.arguments(), **plan.constants())
        plan = Plan.make(query, key, value, problem, Pass.KEYS)
        singles = plan.keys.positions is not None
        dk, dv = (
            torch.zeros(x.shape, dtype=torch.float32 if singles else dtype, device=device)
            for x, dtype in zip((key, value), dtypes, strict=True)
        )
        if plan.keys.blocks is not None or plan.keys.near:
            keys = plan.keys.without_sinks()
            tiles = triton.cdiv(kv_len, keys.k_block) * triton.cdiv(keys.k_block, plan.tiles.n)
            key_kernel[tiles, batch * group_heads](
                *given, dk, dv, group_heads, kv_len, 0, *plan.arguments(keys), **plan.constants(keys)
            )
        if singles:
            _add_single_keys(dk, dv, plan, given)
    dbias = None if ds is None or bias is None else ds.sum_to_size(bias.shape)
    return dq, dk.to(dtypes[0]), dv.to(dtypes[1]), dbias


def _add_single_keys(dk: Tensor, dv: Tensor, plan: Plan, given: tuple[object, ...]) -> None:
    """Add what single keys get: rows for each slot of a list, for some blocks of queries at a time, summed by key."""
    (batch, group_heads, kv_len, dim), value_dim, heads, device = dk.shape, dv.shape[3], plan.query.shape[1], dk.device
    # A program for sinks runs over many queries, which share them.
    keys = replace(plan.keys, q_block=16 * plan.tiles.m) if plan.keys.near else plan.keys
    blocks, width = triton.cdiv(plan.query.shape[2], keys.q_block), keys.width
    if keys.positions is None or not width:
        return
    owners = heads if keys.list_heads == heads else group_heads
    owner = torch.arange(owners, device=device)
    positions = keys.positions[:, owner * keys.list_heads // owners].expand(batch, -1, blocks, -1)
    kv_head = torch.arange(batch, device=device).unsqueeze(-1) * group_heads + owner * group_heads // owners
    step = max(1, min(blocks, _BUFFER // (batch * owners * width * (dim + value_dim) * 4)))
    for skipped in range(0, blocks, step):
        position = positions[:, :, skipped : skipped + step].long()
        rows = position.shape[2] * width
        into = torch.where(position < 0, dk[..., 0].numel(), kv_head[..., None, None] * kv_len + position)
        into, order = into.flatten().sort(stable=True)
        bounds = torch.searchsorted(into, torch.arange(dk[..., 0].numel() + 1, device=device))
        parts = [torch.empty(batch, owners, rows, size, device=device) for size in (dim, value_dim)]
        key_kernel[position.shape[2] * triton.cdiv(width, plan.tiles.n), batch * owners](
            *given, *parts, owners, rows, skipped, *plan.arguments(keys), **plan.constants(keys)
        )
        for total, part, block in zip((dk, dv), parts, (plan.tiles.dim, plan.tiles.value_dim), strict=True):
            sum_kernel[(len(bounds) - 1,)](
                part, order, bounds, total, DIM=total.shape[3], BLOCK=block, ROWS=16, num_warps=1, enable_fp_fusion=True
            )


def _operands(*tensors: Tensor) -> list[Tensor]:
    """The tensors; for the interpreter, whose products take bfloat16 for integers, in float32."""
    widen = dispatch.interprets_triton() and tensors[0].dtype == torch.bfloat16
    return [x.float() if widen else x for x in tensors]
