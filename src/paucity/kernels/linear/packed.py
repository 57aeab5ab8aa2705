"""Linears with packed weights."""

from torch import Tensor

from ...checks import InputTypeError, fail
from ...ops.formats.block_rows import PackedBlocks
from ...ops.formats.groups import PackedGroups
from ...ops.formats.packed import PackedBitmask, PackedNM
from .. import dispatch
from . import packed_op
from .sparse import as_tokens, check_bias, check_input

Packed = PackedNM | PackedBitmask | PackedBlocks | PackedGroups


@dispatch.without_autocast
def packed_linear(x: Tensor, weight: Packed, bias: Tensor | None = None) -> Tensor:
    """``y = W x + bias`` with a packed weight, which is unpacked on the way: in registers for up to 16 tokens.

    More tokens share chunks of unpacked rows, each multiplied densely; so do 9 to 16 tokens (5 to 16 in bfloat16) of
    blocks whose width is no multiple of 16, which `paucity.kernels.dispatch.dense_runs` counts. Gradients flow to x and
    to bias; a packed weight is frozen.

    Args:
        x: ``[..., in]`` of the weight's dtype.
        weight: of dense shape ``[out, in]``.
        bias: ``[out]`` of the same dtype.

    Returns:
        ``[..., out]``, accumulated in float32.

    Raises:
        InputError: if a shape or a dtype does not fit, or the parts of the weight contradict each other.
    """
    name = "packed_linear"
    if not isinstance(weight, Packed):
        wanted = "PackedNM, PackedBitmask, PackedBlocks or PackedGroups"
        raise InputTypeError(f"{name}: weight must be {wanted}, got {type(weight).__name__}.")
    if len(weight.shape) != 2:
        raise fail(name, "weight", "have 2 dimensions", f"shape {list(weight.shape)}")
    rows, cols = weight.shape
    held = weight.scales if isinstance(weight, PackedGroups) else weight.values
    check_input(name, x, held.dtype, "weight", cols)
    check_bias(name, bias, x.dtype, rows)
    dispatch.check_devices(name, x.device, weight=held, bias=bias)
    tokens = as_tokens(x)
    out: Tensor
    if isinstance(weight, PackedBlocks):
        out = packed_op.run_blocks(tokens, weight.values, weight.columns, weight.row_offsets, bias)
    elif isinstance(weight, PackedGroups):
        parts = (weight.codes, weight.scales, weight.zeros, weight.columns, weight.row_offsets)
        out = packed_op.run_groups(tokens, parts, bias)
    else:
        offsets = weight.row_offsets if isinstance(weight, PackedBitmask) else None
        out = packed_op.run_bits(tokens, weight.values, weight.bits, offsets, bias)
    return out.view(*x.shape[:-1], rows)
