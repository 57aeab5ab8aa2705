"""Linears over some of the inputs, or for some of the outputs, of each token."""

from torch import Tensor

from ...checks import InputTypeError, check_bool, check_floating, check_int, check_ndim, check_range, check_shape, fail
from .. import dispatch
from . import op


def input_major(weight: Tensor) -> Tensor:
    """``weight`` ``[out, in]`` with the weights of one input together in memory: the same values, ``stride(0) == 1``.

    That is how `sparse_input_linear` reads it. A weight stored so already is returned as it is.
    """
    check_ndim("input_major", "weight", weight, 2)
    return weight if op.is_input_major(weight) else weight.t().contiguous().t()


def pays(weight: Tensor) -> bool:
    """Whether a token or a few, half of their inputs dropped, may go through ``weight`` faster than densely here.

    False where the weight lies in a cache, and where only the reference would compute.
    """
    check_ndim("pays", "weight", weight, 2)
    return weight.numel() >= op.MIN_WEIGHTS and dispatch.twin(op.KERNEL, weight) != "reference"


@dispatch.without_autocast
def sparse_input_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    threshold: float | None = None,
    k: int | None = None,
    norm: Tensor | None = None,
) -> Tensor:
    """``y = W[:, kept] x[kept] + bias``: each token keeps the inputs whose ``|x_j| * norm_j`` is high.

    TEAL (Liu et al. 2024, https://arxiv.org/abs/2408.14690) keeps those above a threshold, WINA (Chen et al. 2025,
    https://arxiv.org/abs/2505.19427) the top k with the norms of the weight's columns. The columns that no token keeps
    are not read, for up to 16 tokens. More tokens, a small weight, more than 85 % kept (60 % for 9 or more tokens in
    half precision) or a weight that is not stored input-major run as the dense product of the masked input, and
    `paucity.kernels.dispatch.dense_runs` counts that; where ``PAUCITY_KERNELS`` forces a twin, the layout alone can be
    the reason. Gradients flow as through that product with a constant mask.

    Args:
        x: ``[..., in]``, any float dtype.
        weight: ``[out, in]`` of the same dtype, stored input-major (see `input_major`), with finite entries.
        bias: ``[out]`` of the same dtype.
        threshold: keep ``|x_j| * norm_j > threshold``; NaN is dropped.
        k: keep the k highest of each token; ties go to the lower position, NaN comes last.
        norm: ``[in]`` float; None is ones.

    Returns:
        ``[..., out]``, accumulated in float32.

    Raises:
        InputError: unless exactly one of threshold and k is given, or if a shape, dtype or value does not fit.
    """
    name = "sparse_input_linear"
    _check(name, x, weight, bias)
    if (threshold is None) == (k is None):
        raise fail(name, "exactly one of threshold and k", "be given", "neither" if k is None else "both")
    if threshold is not None:
        check_range(name, "threshold", threshold)
        threshold = float(threshold)
    if k is not None:
        check_int(name, "k", k, 0, weight.shape[1])
    if norm is not None:
        check_floating(name, "norm", norm)
        check_shape(name, "norm", norm, weight.shape[1])
        dispatch.check_devices(name, x.device, norm=norm)
    out, _ = op.sparse_input(as_tokens(x), weight, bias, norm, threshold, k)
    return _like(out, x)


@dispatch.without_autocast
def masked_input_linear(x: Tensor, weight: Tensor, mask: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = W[:, kept] x[kept] + bias`` with a selection made elsewhere, else as `sparse_input_linear`.

    Args:
        x: ``[..., in]``, any float dtype.
        weight: ``[out, in]`` of the same dtype, stored input-major (see `input_major`), with finite entries.
        mask: bool, the shape of ``x`` or ``[in]`` for all tokens; True is kept.
        bias: ``[out]`` of the same dtype.

    Raises:
        InputError: if a shape or a dtype does not fit.
    """
    name = "masked_input_linear"
    _check(name, x, weight, bias)
    mask = _rows(name, "mask", mask, x, weight.shape[1])
    out = op.masked_input(as_tokens(x), weight, mask, bias)
    return _like(out, x)


@dispatch.without_autocast
def sparse_output_linear(x: Tensor, weight: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """``y = W x + bias`` at the outputs that ``rows`` keeps, 0 at the others.

    Deja Vu (Liu et al. 2023, https://arxiv.org/abs/2310.17157) predicts the rows that matter; in a gated MLP they are
    those that the gate leaves. Rows that no token keeps are not read, for up to 16 tokens; more tokens, a small weight
    or more than 85 % kept (60 % for 9 or more tokens in half precision) run dense, and
    `paucity.kernels.dispatch.dense_runs` counts that.

    Args:
        x: ``[..., in]``, any float dtype.
        weight: ``[out, in]`` of the same dtype, in the ordinary layout (``stride(1) == 1``).
        rows: bool ``[..., out]``, or ``[out]`` for all tokens; True is kept.
        bias: ``[out]`` of the same dtype; it is added where a row is kept.

    Returns:
        ``[..., out]``, accumulated in float32.

    Raises:
        InputError: if a shape or a dtype does not fit.
    """
    name = "sparse_output_linear"
    _check(name, x, weight, bias)
    rows = _rows(name, "rows", rows, x, weight.shape[0])
    out = op.sparse_output(as_tokens(x), weight, rows, bias)
    return _like(out, x)


def _check(function: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floating(function, "x", x)
    check_ndim(function, "weight", weight, 2)
    check_input(function, x, weight.dtype, "weight", weight.shape[1])
    check_bias(function, bias, x.dtype, weight.shape[0])
    dispatch.check_devices(function, x.device, weight=weight, bias=bias)


def check_input(function: str, x: Tensor, dtype: object, of: str, cols: int) -> None:
    """Raise unless ``x`` is ``[..., cols]`` of ``dtype``, which is that of the argument ``of``."""
    dispatch.check_computable(function, "x", x)
    if x.dtype != dtype:
        raise InputTypeError(f"{function}: x must have the dtype of {of} ({dtype}), got {x.dtype}.")
    if not x.ndim or x.shape[-1] != cols:
        raise fail(function, "x", f"have shape [..., {cols}]", list(x.shape))


def check_bias(function: str, bias: Tensor | None, dtype: object, rows: int) -> None:
    """Raise unless ``bias`` is None or ``[rows]`` of ``dtype``."""
    if bias is not None:
        check_shape(function, "bias", bias, rows)
        if bias.dtype != dtype:
            raise InputTypeError(f"{function}: bias must have the dtype of x ({dtype}), got {bias.dtype}.")


def _like(out: Tensor, x: Tensor) -> Tensor:
    return out.view(*x.shape[:-1], out.shape[-1])


def as_tokens(x: Tensor) -> Tensor:
    """``[T, n]``; a size of -1 would be ambiguous for an empty ``x``."""
    return x.reshape(x.shape[:-1].numel(), x.shape[-1])


def _rows(function: str, argument: str, mask: Tensor, x: Tensor, size: int) -> Tensor:
    """``mask`` as ``[T, size]``."""
    check_bool(function, argument, mask)
    if mask.shape not in ((size,), (*x.shape[:-1], size)):
        lead = "".join(f"{length}, " for length in x.shape[:-1])
        raise fail(function, argument, f"have shape [{lead}{size}] or [{size}]", list(mask.shape))
    dispatch.check_devices(function, x.device, **{argument: mask})
    return as_tokens(mask.expand(*x.shape[:-1], size))
