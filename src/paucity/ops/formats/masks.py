"""Named keep-masks over the parameters of a model."""

import json
import os
from collections.abc import Collection, ItemsView, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...checks import InputError, InputTypeError, check_bool, check_shape, check_sparsity, did_you_mean, fail
from .packed import pack_bits, unpack_bits

_FORMAT = "paucity.masks.1"


@dataclass(frozen=True)
class SparsityReport:
    """Sparsity asked for and reached, and what was counted.

    Attributes:
        nominal: the sparsity asked for; None where nobody said.
        achieved: ``num_zeros / num_parameters``, 0.0 without parameters.
        num_layers: parameters (tensors) counted.
        num_parameters: entries of the counted layers.
        num_zeros: entries among them that are removed.
        layers: achieved sparsity of each counted layer by name.
    """

    nominal: float | None
    achieved: float
    num_layers: int
    num_parameters: int
    num_zeros: int
    layers: dict[str, float]


class Masks:
    """Bool masks (True is kept) by full parameter name, in the parameter's own layout.

    What they do to a model is explicit: ``apply_`` once, or ``install`` for training. Whatever rewrites weights from
    elsewhere (a merged low-rank update, loaded weights, averaging across different masks) needs ``apply_`` again. A
    wrapper that renames parameters, such as ``AveragedModel`` or ``DistributedDataParallel``, needs
    ``with_prefix("module.")``.

    Args:
        masks: bool tensors by parameter name, at least one; kept as they are, not copied.
        nominal: the sparsity asked for, in [0, 1), for the report.

    Raises:
        InputError: if there is no mask, one is not bool, or ``nominal`` is out of range.
    """

    def __init__(self, masks: Mapping[str, Tensor], *, nominal: float | None = None) -> None:
        if not masks:
            raise fail("Masks", "masks", "name at least one parameter", "none")
        for name, mask in masks.items():
            check_bool("Masks", f"masks[{name!r}]", mask)
        if nominal is not None:
            check_sparsity("Masks", nominal, "nominal")
        self.nominal = nominal
        self._masks = {name: mask.detach() for name, mask in masks.items()}

    @classmethod
    def from_zeros(
        cls, model: nn.Module, names: Collection[str] | None = None, *, nominal: float | None = None
    ) -> Self:
        """Keep exactly the nonzeros of the parameters ``names``; None is every parameter of two or more dimensions."""
        parameters = _parameters(model)
        if names is None:
            names = [name for name, parameter in model.named_parameters() if parameter.ndim >= 2]
        for name in names:
            _check_name("Masks.from_zeros", name, parameters)
        return cls({name: parameters[name].detach() != 0 for name in names}, nominal=nominal)

    @torch.no_grad()
    def apply_(self, model: nn.Module) -> None:
        """Set the removed entries of the model's parameters to 0, in place.

        Raises:
            InputError: if a name or shape does not match; then nothing has changed.
        """
        for mask, parameter in self._pairs("Masks.apply_", model):
            parameter.masked_fill_(~mask.to(parameter.device), 0)

    def install(self, optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
        """Keep removed entries at 0 now and after every ``optimizer.step()``, until the handle's ``remove()``.

        The optimizer's state of the parameter's shape (momentum, moments) is cleared at the same entries, also after
        ``load_state_dict``. Gradients stay dense. To change the masks, remove and install the new ones.

        Raises:
            InputError: if a name or shape does not match, or the optimizer holds none of the masked parameters.
        """
        if not isinstance(optimizer, Optimizer):
            raise InputTypeError(f"Masks.install: optimizer must be an Optimizer, got {type(optimizer).__name__}.")
        pairs = self._pairs("Masks.install", model)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(parameter) in held for _, parameter in pairs):
            raise fail("Masks.install", "optimizer", "hold at least one masked parameter of the model", "none of them")
        removed = [(~mask.to(parameter.device), parameter) for mask, parameter in pairs]

        @torch.no_grad()
        def clear(optimizer: Optimizer, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
            for gone, parameter in removed:
                parameter.masked_fill_(gone.to(parameter.device), 0)
                for value in optimizer.state.get(parameter, {}).values():
                    if isinstance(value, Tensor) and value.ndim and value.shape == parameter.shape:
                        value.masked_fill_(gone.to(value.device), 0)

        clear(optimizer)
        return optimizer.register_step_post_hook(clear)

    def with_prefix(self, prefix: str) -> Self:
        """The same masks for a model whose parameter names start with ``prefix``, such as ``"module."``."""
        return type(self)({prefix + name: mask for name, mask in self.items()}, nominal=self.nominal)

    def to(self, device: torch.device | str) -> Self:
        """The same masks on ``device``; a model on another device can be masked all the same."""
        return type(self)({name: mask.to(device) for name, mask in self.items()}, nominal=self.nominal)

    def sparsity(self) -> SparsityReport:
        """What the masks remove."""
        return self._report({name: int((~mask).sum()) for name, mask in self.items()})

    def achieved_in(self, model: nn.Module) -> SparsityReport:
        """The zeros that the masked parameters of ``model`` really have, whether masked or not."""
        pairs = zip(self, self._pairs("Masks.achieved_in", model), strict=True)
        return self._report({name: int((parameter == 0).sum()) for name, (_, parameter) in pairs})

    def change(self, other: "Masks") -> int:
        """Entries kept by one and removed by the other: SAD of SR-STE (Zhou et al. 2021, https://arxiv.org/abs/2102.04010)."""
        return sum(int((mine ^ theirs).sum()) for mine, theirs in self._matched("Masks.change", other).values())

    def overlap(self, other: "Masks") -> float:
        """Entries that both keep over entries that either keeps; 1.0 where neither keeps any."""
        pairs = self._matched("Masks.overlap", other).values()
        both = sum(int((mine & theirs).sum()) for mine, theirs in pairs)
        either = sum(int((mine | theirs).sum()) for mine, theirs in pairs)
        return both / either if either else 1.0

    def save(self, path: str | Path) -> None:
        """Write as safetensors, one bit an entry; an existing file is replaced only by a complete one."""
        path = Path(path)
        if path.is_dir() or not path.parent.is_dir():
            raise fail("Masks.save", "path", "be a file in an existing folder", path)
        bits = {name: pack_bits(mask.flatten()).cpu() for name, mask in self.items()}
        shapes = {name: list(mask.shape) for name, mask in self.items()}
        metadata = {"format": _FORMAT, "shapes": json.dumps(shapes), "nominal": json.dumps(self.nominal)}
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            save_file(bits, temporary, metadata=metadata)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read what ``save`` wrote, onto the CPU.

        Raises:
            InputError: if there is no file, or it is something else or damaged.
        """
        if not Path(path).is_file():
            raise fail("Masks.load", "path", "be an existing file", path)
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise ValueError
                shapes = json.loads(metadata["shapes"])
                masks = {
                    name: unpack_bits(file.get_tensor(name), torch.Size(shape).numel()).view(shape)
                    for name, shape in shapes.items()
                }
                return cls(masks, nominal=json.loads(metadata["nominal"]))
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError):
            raise fail("Masks.load", "path", f"be a mask file ({_FORMAT})", path) from None

    def items(self) -> ItemsView[str, Tensor]:
        """Names and masks."""
        return self._masks.items()

    def __getitem__(self, name: str) -> Tensor:
        """The mask of one parameter."""
        return self._masks[name]

    def __iter__(self) -> Iterator[str]:
        """Parameter names, in the order given."""
        return iter(self._masks)

    def __len__(self) -> int:
        """Number of masked parameters."""
        return len(self._masks)

    def __and__(self, other: object) -> Self:
        """Entries that both keep; same names and shapes."""
        if not isinstance(other, Masks):
            return NotImplemented
        return type(self)({name: a & b for name, (a, b) in self._matched("Masks.__and__", other).items()})

    def __or__(self, other: object) -> Self:
        """Entries that either keeps; same names and shapes."""
        if not isinstance(other, Masks):
            return NotImplemented
        return type(self)({name: a | b for name, (a, b) in self._matched("Masks.__or__", other).items()})

    def __eq__(self, other: object) -> bool:
        """Whether both keep the same entries of the same parameters, on any device; ``nominal`` does not matter."""
        if not isinstance(other, Masks):
            return NotImplemented
        if set(self) != set(other):
            return False
        return all(torch.equal(mask, other[name].to(mask.device)) for name, mask in self.items())

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        """Layers, parameters and sparsity."""
        report = self.sparsity()
        counted = f"{report.num_layers} layers, {report.num_parameters} parameters"
        return f"Masks({counted}, sparsity {report.achieved:.4f}, nominal {report.nominal})"

    def _pairs(self, function: str, model: nn.Module) -> list[tuple[Tensor, Tensor]]:
        parameters = _parameters(model)
        for name, mask in self.items():
            _check_name(function, name, parameters)
            check_shape(function, f"masks[{name!r}]", mask, *parameters[name].shape)
        return [(mask, parameters[name]) for name, mask in self.items()]

    def _matched(self, function: str, other: "Masks") -> dict[str, tuple[Tensor, Tensor]]:
        if odd := sorted(set(self) ^ set(other)):
            raise fail(function, "other", "mask the same parameters", f"a difference in {', '.join(odd)}")
        for name, mask in self.items():
            check_shape(function, f"other[{name!r}]", other[name], *mask.shape)
        return {name: (mask, other[name].to(mask.device)) for name, mask in self.items()}

    def _report(self, zeros: dict[str, int]) -> SparsityReport:
        sizes = {name: mask.numel() for name, mask in self.items()}
        layers = {name: zeros[name] / max(size, 1) for name, size in sizes.items()}
        total, removed = sum(sizes.values()), sum(zeros.values())
        return SparsityReport(self.nominal, removed / max(total, 1), len(self), total, removed, layers)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"Masks: model must be a Module, got {type(model).__name__}.")
    return dict(model.named_parameters(remove_duplicate=False))


def _check_name(function: str, name: str, parameters: Mapping[str, nn.Parameter]) -> None:
    if name not in parameters:
        near = did_you_mean(name, parameters)
        raise InputError(f"{function}: every masked name must be a parameter of the model, got {name}{near}.")
