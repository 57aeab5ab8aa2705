"""Linears with packed weights as operators of torch, with gradients to the input and the bias.

The weights are frozen. Up to `MAX_TOKENS` tokens, a twin streams the packed weight through the registers; with more, it
is unpacked in chunks of rows that stay in a cache, each followed by a dense product.
"""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .. import dispatch
from . import reference

KERNEL = "packed linear"
MAX_TOKENS = 16
"""More tokens than this share each unpacked chunk of the weight."""
NARROW_TOKENS = {torch.bfloat16: 4, torch.float32: 8}
"""The same for blocks whose width is no multiple of 16, which fill the registers badly: measured for 4x4 and 8x8 blocks
on a CPU, where only the ``auto`` choice of twins heeds it. All else was faster streamed for up to 16 tokens."""
CHUNK_BYTES = 2**22
"""Of the unpacked rows that are multiplied at a time."""


def _chunks(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """``(start, stop)`` of the chunks of ``rows``."""
    step = max(1, min(rows, CHUNK_BYTES // max(1, row_bytes)))
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _twin(x: Tensor) -> ModuleType:
    twin = dispatch.module(KERNEL, x, __package__)
    if twin is reference and dispatch.requested() == "auto":
        dispatch.note_dense(KERNEL, f"no kernel takes {str(x.dtype).removeprefix('torch.')} here, so it is unpacked")
    return twin


def _streams_blocks(x: Tensor, width: int) -> bool:
    """Whether ``x`` is multiplied with packed blocks of ``width`` columns as they are."""
    narrow = width % 16 and dispatch.requested() == "auto" and dispatch.twin(KERNEL, x) == "native"
    return x.shape[0] <= (NARROW_TOKENS[x.dtype] if narrow else MAX_TOKENS)


def _prefill(x: Tensor, rows: int, height: int, bias: Tensor | None, unpack: Callable[[int, int], Tensor]) -> Tensor:
    """``x W^T + bias``; ``unpack(start, stop)`` gives rows of the weight, counted in units of ``height`` rows."""
    if x.shape[0] > MAX_TOKENS:
        dispatch.note_dense(KERNEL, f"more than {MAX_TOKENS} tokens share unpacked rows")
    out = x.new_empty(x.shape[0], rows * height)
    for start, stop in _chunks(rows, x.shape[1] * x.element_size() * height):
        span = slice(start * height, stop * height)
        out[:, span] = F.linear(x, unpack(start, stop), None if bias is None else bias[span])
    return out


def _backward(grad: Tensor, cols: int, rows: int, height: int, unpack: Callable[[int, int], Tensor]) -> Tensor:
    """``dy W``, added up over chunks of rows in float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    out = grad.new_zeros(grad.shape[0], cols, dtype=wide)
    for start, stop in _chunks(rows, cols * grad.element_size() * height):
        out = out + grad[:, start * height : stop * height] @ unpack(start, stop)
    return out.to(grad.dtype)


def _packed_bits(x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """See `reference.packed_bits`."""
    twin = _twin(x)
    if x.shape[0] <= MAX_TOKENS:
        out: Tensor = twin.packed_bits(x.contiguous(), values, bits, row_offsets, bias)
        return out

    def unpack(start: int, stop: int) -> Tensor:
        chunk: Tensor = twin.unpack_bit_rows(values, bits, row_offsets, x.shape[1], start, stop)
        return chunk

    return _prefill(x, bits.shape[0], 1, bias, unpack)


packed_bits = torch.library.custom_op("paucity::packed_bits_linear", _packed_bits, mutates_args=())


@torch.library.custom_op("paucity::unpack_bit_rows", mutates_args=())
def unpack_bit_rows(
    values: Tensor, bits: Tensor, row_offsets: Tensor | None, cols: int, start: int, stop: int
) -> Tensor:
    """See `reference.unpack_bit_rows`."""
    out: Tensor = dispatch.module(KERNEL, values, __package__).unpack_bit_rows(
        values, bits, row_offsets, cols, start, stop
    )
    return out


def _packed_blocks(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See `reference.packed_blocks`."""
    twin = _twin(x)
    if _streams_blocks(x, values.shape[2]):
        out: Tensor = twin.packed_blocks(x.contiguous(), values, columns, row_offsets, bias)
        return out
    if x.shape[0] <= MAX_TOKENS:
        dispatch.note_dense(
            KERNEL, f"more than {NARROW_TOKENS[x.dtype]} tokens and blocks of {values.shape[2]} columns"
        )

    def unpack(start: int, stop: int) -> Tensor:
        chunk: Tensor = twin.unpack_block_rows(values, columns, row_offsets, x.shape[1], start, stop)
        return chunk

    return _prefill(x, len(row_offsets) - 1, values.shape[1], bias, unpack)


packed_blocks = torch.library.custom_op("paucity::packed_blocks_linear", _packed_blocks, mutates_args=())


@torch.library.custom_op("paucity::unpack_block_rows", mutates_args=())
def unpack_block_rows(values: Tensor, columns: Tensor, row_offsets: Tensor, cols: int, start: int, stop: int) -> Tensor:
    """See `reference.unpack_block_rows`."""
    out: Tensor = dispatch.module(KERNEL, values, __package__).unpack_block_rows(
        values, columns, row_offsets, cols, start, stop
    )
    return out


def _packed_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """See `reference.packed_groups`."""
    twin = _twin(x)
    packed = (codes, scales, zeros, columns, row_offsets)
    if x.shape[0] <= MAX_TOKENS:
        out: Tensor = twin.packed_groups(x.contiguous(), *packed, bias)
        return out

    def unpack(start: int, stop: int) -> Tensor:
        chunk: Tensor = twin.unpack_group_rows(*packed, x.shape[1], start, stop)
        return chunk

    return _prefill(x, len(row_offsets) - 1, 1, bias, unpack)


packed_groups = torch.library.custom_op("paucity::packed_groups_linear", _packed_groups, mutates_args=())


@torch.library.custom_op("paucity::unpack_group_rows", mutates_args=())
def unpack_group_rows(
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor,
    columns: Tensor,
    row_offsets: Tensor,
    cols: int,
    start: int,
    stop: int,
) -> Tensor:
    """See `reference.unpack_group_rows`."""
    twin = dispatch.module(KERNEL, scales, __package__)
    out: Tensor = twin.unpack_group_rows(codes, scales, zeros, columns, row_offsets, cols, start, stop)
    return out


@packed_bits.register_fake
def _(x: Tensor, values: Tensor, bits: Tensor, row_offsets: Any, bias: Any) -> Tensor:
    return x.new_empty(x.shape[0], bits.shape[0])


@unpack_bit_rows.register_fake
def _(values: Tensor, bits: Tensor, row_offsets: Any, cols: int, start: int, stop: int) -> Tensor:
    return values.new_empty(stop - start, cols)


@packed_blocks.register_fake
def _(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, bias: Any) -> Tensor:
    return x.new_empty(x.shape[0], (row_offsets.shape[0] - 1) * values.shape[1])


@unpack_block_rows.register_fake
def _(values: Tensor, columns: Tensor, row_offsets: Tensor, cols: int, start: int, stop: int) -> Tensor:
    return values.new_empty((stop - start) * values.shape[1], cols)


@packed_groups.register_fake
def _(x: Tensor, codes: Any, scales: Any, zeros: Any, columns: Any, row_offsets: Tensor, bias: Any) -> Tensor:
    return x.new_empty(x.shape[0], row_offsets.shape[0] - 1)


@unpack_group_rows.register_fake
def _(codes: Any, scales: Tensor, zeros: Any, columns: Any, offsets: Any, cols: int, start: int, stop: int) -> Tensor:
    return scales.new_empty(stop - start, cols)


def is_plain(x: Tensor, bias: Tensor | None) -> bool:
    """Whether nobody records, traces or counts operators now, so that a kernel may be called without the dispatcher.

    That costs several times what a small layer takes.
    """
    tracked = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if tracked or type(x) is not Tensor or torch.compiler.is_compiling():
        return False
    watched = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    return (
        not watched and torch._C._functorch.peek_interpreter_stack() is None and torch._C._get_tracing_state() is None
    )


def run_bits(x: Tensor, values: Tensor, bits: Tensor, row_offsets: Tensor | None, bias: Tensor | None) -> Tensor:
    """`packed_bits`, directly where that makes no difference; so are the next two."""
    out: Tensor = (_packed_bits if is_plain(x, bias) else packed_bits)(x, values, bits, row_offsets, bias)
    return out


def run_blocks(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, bias: Tensor | None) -> Tensor:
    """See `packed_blocks`."""
    out: Tensor = (_packed_blocks if is_plain(x, bias) else packed_blocks)(x, values, columns, row_offsets, bias)
    return out


def run_groups(x: Tensor, packed: tuple[Tensor, Tensor, Tensor, Tensor, Tensor], bias: Tensor | None) -> Tensor:
    """See `packed_groups`."""
    out: Tensor = (_packed_groups if is_plain(x, bias) else packed_groups)(x, *packed, bias)
    return out


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, *packed, _ = inputs
    ctx.packed, ctx.cols = packed, x.shape[1]


def _bits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, bits, row_offsets = ctx.packed
    dx = None
    if ctx.needs_input_grad[0]:

        def unpack(start: int, stop: int) -> Tensor:
            chunk: Tensor = unpack_bit_rows(values, bits, row_offsets, ctx.cols, start, stop)
            return chunk

        dx = _backward(grad, ctx.cols, bits.shape[0], 1, unpack)
    return dx, None, None, None, grad.sum(0) if ctx.needs_input_grad[4] else None


def _blocks_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, columns, row_offsets = ctx.packed
    dx = None
    if ctx.needs_input_grad[0]:

        def unpack(start: int, stop: int) -> Tensor:
            chunk: Tensor = unpack_block_rows(values, columns, row_offsets, ctx.cols, start, stop)
            return chunk

        dx = _backward(grad, ctx.cols, row_offsets.shape[0] - 1, values.shape[1], unpack)
    return dx, None, None, None, grad.sum(0) if ctx.needs_input_grad[4] else None


def _groups_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    packed, dx = ctx.packed, None
    if ctx.needs_input_grad[0]:

        def unpack(start: int, stop: int) -> Tensor:
            chunk: Tensor = unpack_group_rows(*packed, ctx.cols, start, stop)
            return chunk

        dx = _backward(grad, ctx.cols, len(packed[-1]) - 1, 1, unpack)
    return dx, None, None, None, None, None, grad.sum(0) if ctx.needs_input_grad[6] else None


packed_bits.register_autograd(_bits_backward, setup_context=_save)
packed_blocks.register_autograd(_blocks_backward, setup_context=_save)
packed_groups.register_autograd(_groups_backward, setup_context=_save)


@register_flop_formula(torch.ops.paucity.packed_bits_linear, get_raw=True)  # type: ignore[untyped-decorator]
def _packed_bits_flops(x: Tensor, values: Tensor, bits: Tensor, *_: Any, **__: Any) -> int:
    """As of the dense product: zeros are put back in the registers, which saves bytes and no arithmetic."""
    return 2 * x.shape[0] * x.shape[1] * bits.shape[0]


@register_flop_formula(torch.ops.paucity.packed_blocks_linear, get_raw=True)  # type: ignore[untyped-decorator]
def _packed_blocks_flops(x: Tensor, values: Tensor, columns: Tensor, row_offsets: Tensor, *_: Any, **__: Any) -> int:
    """Of the kept blocks; of the dense product where the weight is unpacked for many tokens."""
    dense = (row_offsets.shape[0] - 1) * values.shape[1] * x.shape[1]
    return 2 * x.shape[0] * (values.numel() if _streams_blocks(x, values.shape[2]) else dense)


@register_flop_formula(torch.ops.paucity.packed_groups_linear, get_raw=True)  # type: ignore[untyped-decorator]
def _packed_groups_flops(x: Tensor, codes: Tensor, *rest: Any, **__: Any) -> int:
    """Of the kept groups; of the dense product where the weight is unpacked for many tokens."""
    dense = (rest[3].shape[0] - 1) * x.shape[1]
    return 2 * x.shape[0] * (2 * codes.numel() if x.shape[0] <= MAX_TOKENS else dense)
