"""Inference of pruned ConvNets: BatchNorm folded into the convolutions, and 1x1 convolutions that skip their zeros.

Paper: Elsen et al. 2019 (Fast Sparse ConvNets), https://arxiv.org/abs/1911.09723, Section 3: in nets of separable
blocks the 1x1 convolutions hold nearly all weights and arithmetic; pruned, each is a sparse matrix times the picture
laid out channels first. The stem, depthwise convolutions and the classifier stay dense, as in the paper. Not
implemented: its activation inside the product.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ..checks import InputTypeError, check_int, check_tensor, fail
from ..kernels.depthwise import depthwise_conv
from ..kernels.spmm import op as spmm
from ..kernels.spmm import sparse_conv1x1
from ..measure.cost import time_interleaved
from ..ops.formats import PackedCSR

_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


@dataclass(frozen=True)
class LayerChoice:
    """What became of one 1x1 convolution.

    Attributes:
        name: of the module.
        density: share of its weights that are not 0.
        sparse: whether it computes with the stored weights alone.
        reason: why, in words.
        dense_ms: measured median of the dense convolution; None where nothing was measured.
        sparse_ms: the same of the sparse one.
    """

    name: str
    density: float
    sparse: bool
    reason: str
    dense_ms: float | None = None
    sparse_ms: float | None = None


class SparseConv1x1(nn.Module):
    """A 1x1 convolution that stores and multiplies its nonzero weights only; see `paucity.kernels.spmm`.

    Under autocast the product is computed in the weight's own dtype and the result is given in autocast's.

    Args:
        weight: of ``[out, in, 1, ...]``.
        bias: ``[out]`` or None.
        stride: steps between the pixels taken, in every dimension.
    """

    values: Tensor
    columns: Tensor
    row_offsets: Tensor
    bias: Tensor | None

    def __init__(self, weight: PackedCSR, bias: Tensor | None = None, *, stride: int = 1) -> None:
        super().__init__()
        if not isinstance(weight, PackedCSR):
            raise InputTypeError(f"SparseConv1x1: weight must be a PackedCSR, got {type(weight).__name__}.")
        check_int("SparseConv1x1", "stride", stride)
        self.shape, self.stride = weight.shape, stride
        self.register_buffer("values", weight.values.detach())
        self.register_buffer("columns", weight.columns)
        self.register_buffer("row_offsets", weight.row_offsets)
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @classmethod
    def from_conv(cls, conv: Convolution) -> "SparseConv1x1":
        """The nonzeros of a convolution with a kernel of 1, without padding and groups.

        Raises:
            InputError: if ``conv`` is no such convolution.
        """
        if not _is_pointwise(conv):
            raise fail("SparseConv1x1", "conv", "be a 1x1 convolution without padding and groups", conv)
        return cls(PackedCSR.pack(conv.weight), conv.bias, stride=conv.stride[0])

    @property
    def weight(self) -> PackedCSR:
        """The stored weights."""
        return PackedCSR(self.values, self.columns, self.row_offsets, self.shape)

    def forward(self, x: Tensor) -> Tensor:
        """``[N, in, *spatial] -> [N, out, *spatial / stride]``."""
        values, bias = self.values, self.bias
        if x.dtype != values.dtype or x.ndim < 4 or not self._fits(x):
            run = partial(sparse_conv1x1, weight=self.weight, bias=bias, stride=self.stride)
            return _heeding_autocast(run, x, values.dtype)
        # A small layer takes less than the checks of its arguments.
        out = spmm.run(values, self.columns, self.row_offsets, x.reshape(*x.shape[:2], -1), bias)
        return out.view(x.shape[0], self.shape[0], *x.shape[2:])

    def _fits(self, x: Tensor) -> bool:
        whole = self.stride == 1 and x.ndim == len(self.shape) and x.shape[1] == self.shape[1] and x.numel() > 0
        return whole and x.device == self.values.device and not torch.is_autocast_enabled(x.device.type)

    def extra_repr(self) -> str:
        """Channels, density and stride."""
        density = len(self.values) / max(1, self.shape.numel())
        return f"{self.shape[1]}, {self.shape[0]}, density={density:.3f}, stride={self.stride}"


class DepthwiseConv(nn.Module):
    """A depthwise convolution that reads and writes channels-first pictures; see `paucity.kernels.depthwise`.

    Under autocast it is computed in the weight's own dtype and the result is given in autocast's.

    Args:
        conv: to take weight, bias, stride and padding from; they are shared.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = conv.weight, conv.bias
        self.stride, self.padding = conv.stride[0], int(conv.padding[0])

    def forward(self, x: Tensor) -> Tensor:
        """``[N, C, H, W] -> [N, C, H', W']``."""
        run = partial(depthwise_conv, weight=self.weight, bias=self.bias, stride=self.stride, padding=self.padding)
        return _heeding_autocast(run, x, self.weight.dtype)


def _heeding_autocast(run: Callable[[Tensor], Tensor], x: Tensor, own: torch.dtype) -> Tensor:
    if not (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)):
        return run(x)
    return run(x.to(own)).to(torch.get_autocast_dtype(x.device.type))


def fold_batchnorm(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in eval mode in which each BatchNorm behind a convolution is part of that convolution.

    The outputs are those of the model in eval mode, up to rounding. A norm stays where its convolution feeds something
    else as well, where either runs several times, and where it keeps no running statistics. A zero of a weight stays a
    zero.

    Raises:
        InputError: if ``torch.fx`` cannot follow the model's forward.
    """
    _check_module("fold_batchnorm", model)
    folded = copy.deepcopy(model).eval()
    for conv_name, norm_name in _conv_norm_pairs(folded):
        conv, norm = folded.get_submodule(conv_name), folded.get_submodule(norm_name)
        assert isinstance(conv, _CONVOLUTIONS)
        assert isinstance(norm, _NORMS)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = torch.ones_like(norm.running_mean) if norm.weight is None else norm.weight
        shift = torch.zeros_like(norm.running_mean) if norm.bias is None else norm.bias
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, scale, shift
        )
        folded.set_submodule(norm_name, nn.Identity())
    return folded


@torch.no_grad()
def sparsify_convs(
    model: nn.Module, example: Tensor | None = None, *, repeats: int = 15
) -> tuple[nn.Module, list[LayerChoice]]:
    """A copy of ``model`` in eval mode whose pruned 1x1 convolutions skip their zeros, where that is faster.

    Args:
        model: pruned, zeros in place; best after `fold_batchnorm`.
        example: pictures as the model will get them. With it each 1x1 convolution is timed, dense and sparse in turns,
            on its own input, and the faster one stays; without it the kernel's limit on density decides. A dtype
            without a kernel stays dense. Where one is sparse, depthwise convolutions run channels first, too: PyTorch's
            turn the pictures over and back. Last, the whole network is timed against the dense one with channels last,
            which stays where it is not slower.
        repeats: rounds of the timing.

    Returns:
        the model, and what became of each 1x1 convolution, in the order of the modules.

    Raises:
        InputError: if ``repeats`` is no count, or the model does not run on ``example``.
    """
    _check_module("sparsify_convs", model)
    check_int("sparsify_convs", "repeats", repeats)
    sparse = copy.deepcopy(model).eval()
    names = [name for name, module in sparse.named_modules() if _is_pointwise(module)]
    others = [name for name, module in sparse.named_modules() if _is_depthwise(module)]
    inputs = {} if example is None else _inputs(sparse, [*names, *others], example)
    choices = []
    for name in names:
        conv = sparse.get_submodule(name)
        choice, replacement = _choose(name, conv, inputs.get(name), repeats)  # type: ignore[arg-type]
        choices.append(choice)
        if choice.sparse and name:
            sparse.set_submodule(name, replacement)
        elif choice.sparse:  # the model is this convolution
            sparse = replacement
    for name in others if any(choice.sparse for choice in choices) else ():
        conv = sparse.get_submodule(name)
        ours = DepthwiseConv(conv)  # type: ignore[arg-type]
        if name not in inputs or _faster(conv, ours, inputs[name], repeats)[0]:
            sparse.set_submodule(name, ours)
    if example is None:
        return sparse, choices
    dense = copy.deepcopy(model).eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    wins, was, now = _faster(dense, sparse, example, repeats)
    if wins:
        return sparse, choices
    reason = f"the whole network took {was:.3f} ms dense and {now:.3f} ms with sparse layers"
    return dense, [replace(choice, sparse=False, reason=reason) for choice in choices]


def _faster(dense: nn.Module, ours: nn.Module, x: Tensor, repeats: int) -> tuple[bool, float, float]:
    """Whether ``ours`` takes less time, and the medians of both in ms."""
    timings = time_interleaved({"dense": lambda: dense(x), "ours": lambda: ours(x)}, repeats=repeats).timings
    was, now = (1e3 * timings[name].median for name in ("dense", "ours"))
    return now < was, was, now


def _choose(name: str, conv: Convolution, x: Tensor | None, repeats: int) -> tuple[LayerChoice, SparseConv1x1]:
    packed = SparseConv1x1.from_conv(conv)
    density = len(packed.values) / max(1, conv.weight.numel())
    limit = spmm.DENSE_ABOVE.get(conv.weight.dtype)
    if limit is None:
        return LayerChoice(name, density, False, f"no kernel skips zeros in {conv.weight.dtype}"), packed
    if density > limit:
        return LayerChoice(name, density, False, f"a density of {density:.2f} is above {limit}"), packed
    if x is None:
        return LayerChoice(name, density, True, f"a density of {density:.2f} is at most {limit}"), packed
    wins, dense, ours = _faster(conv, packed, x, repeats)
    reason = f"measured {ours:.3f} ms sparse and {dense:.3f} ms dense for inputs of {list(x.shape)}"
    return LayerChoice(name, density, wins, reason, dense, ours), packed


def _inputs(model: nn.Module, names: list[str], example: Tensor) -> dict[str, Tensor]:
    """What each module gets when the model runs on ``example``; a module that does not run is left out."""
    check_tensor("sparsify_convs", "example", example)
    found: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found.update({name: args[0]}))
        for name in names
    ]
    try:
        model(example)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        given = f"shape {list(example.shape)} ({first})"
        raise fail("sparsify_convs", "example", "be what the model's forward takes", given) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _is_pointwise(module: nn.Module) -> bool:
    if not isinstance(module, _CONVOLUTIONS) or module.groups != 1 or len(set(module.stride)) != 1:
        return False
    return set(module.kernel_size) == {1} and module.padding in ("valid", "same", (0,) * len(module.kernel_size))


def _is_depthwise(module: nn.Module) -> bool:
    if not isinstance(module, nn.Conv2d) or module.weight.shape[:2] != (module.in_channels, 1) or module.groups == 1:
        return False
    even = len(set(module.stride)) == 1 and not isinstance(module.padding, str) and len(set(module.padding)) == 1
    return even and set(module.dilation) == {1} and module.padding_mode == "zeros"


def _conv_norm_pairs(model: nn.Module) -> Iterator[tuple[str, str]]:
    try:
        graph = fx.Tracer().trace(model)
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise fail("fold_batchnorm", "model", "have a forward that torch.fx can follow", first) from error
    modules = dict(model.named_modules(remove_duplicate=False))
    calls = [node for node in graph.nodes if node.op == "call_module"]
    times = [id(modules[str(node.target)]) for node in calls]
    for node in calls:
        norm, source = modules[str(node.target)], node.args[0] if node.args else None
        if not isinstance(norm, _NORMS) or norm.running_mean is None or not isinstance(source, fx.Node):
            continue
        conv = modules.get(str(source.target)) if source.op == "call_module" else None
        once = isinstance(conv, _CONVOLUTIONS) and times.count(id(conv)) == times.count(id(norm)) == 1
        if once and len(source.users) == 1:
            yield str(source.target), str(node.target)


def _check_module(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{function}: model must be a Module, got {type(model).__name__}.")
