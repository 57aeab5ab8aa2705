"""Named keep-masks over the parameters of a model."""

import json
import os
from collections.abc import Collection, ItemsView, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ...checks import InputTypeError, check_bool, check_range, check_shape, check_sparsity, fail
from .mask_names import Located, locate, named_weights
from .mask_report import SparsityReport
from .mask_training import clearing, local, removed_here, total, zero_removed
from .packed import pack_bits, unpack_bits

if TYPE_CHECKING:
    from .mask_lora import Handles, MergedLora

_FORMAT = "paucity.masks.1"


class Masks:
    """Bool masks (True is kept) by full parameter name, in the parameter's own layout.

    What they do to a model is explicit: ``apply_`` once, ``install`` for training, ``merge_lora_`` to merge adapters.
    Whatever rewrites weights from elsewhere (loaded weights, averaging across different masks) needs ``apply_`` again;
    ``violations`` says whether. A name finds its parameter through what wraps the model, such as ``torch.compile``,
    ``DistributedDataParallel``, ``AveragedModel``, peft or parametrizations (the rule: `mask_names`). Tied parameters
    are one: masked and counted once, under any of their names.

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
        cls,
        model: nn.Module,
        names: Collection[str] | None = None,
        *,
        nominal: float | None = None,
        min_sparsity: float = 0.0,
    ) -> Self:
        """Keep exactly the nonzeros of a model that is sparse already.

        Args:
            model: the model, wrapped or not.
            names: parameters to look at; None is each of two or more dimensions, once, by its unwrapped name, without
                those of adapters (peft).
            nominal: for the report.
            min_sparsity: parameters with a smaller share of zeros are left out, such as dense embeddings.

        Raises:
            InputError: if a name is unknown, or no parameter is that sparse.
        """
        check_range("Masks.from_zeros", "min_sparsity", min_sparsity, 0.0, 1.0)
        if names is None:
            names = [name for name, parameter in named_weights(model) if parameter.ndim >= 2]
        kept = {place.name: _full(place.weight()) != 0 for place in locate("Masks.from_zeros", model, names)}
        sparse = {name: mask for name, mask in kept.items() if (~mask).sum() >= min_sparsity * mask.numel()}
        if not sparse:
            constraint = f"have a parameter with at least {min_sparsity:.0%} zeros"
            raise fail("Masks.from_zeros", "model", constraint, f"none among {len(kept)}")
        return cls(sparse, nominal=nominal)

    def apply_(self, model: nn.Module) -> None:
        """Set the removed entries of the model's parameters to 0, in place.

        Raises:
            InputError: if a name or shape does not match, masks of tied parameters differ, or a parametrization fills
                removed entries; then nothing has changed.
        """
        zero_removed("Masks.apply_", self._located("Masks.apply_", model))

    def install(self, optimizer: Optimizer, model: nn.Module) -> RemovableHandle:
        """Keep removed entries at 0 now and after every ``optimizer.step()``, until the handle's ``remove()``.

        The optimizer's state of the parameter's shape (momentum, moments) is cleared at the same entries, also after
        ``load_state_dict``. Gradients stay dense. To change the masks, remove and install the new ones. A copy of the
        optimizer (``copy.deepcopy``) does not have the hook: install again. What replaces parameters by others, such
        as sharding, goes before.

        Raises:
            InputError: as ``apply_``, or if the optimizer holds none of the masked parameters (as it is while adapters
                train and the model is frozen, where there is nothing to keep).
        """
        if not isinstance(optimizer, Optimizer):
            raise InputTypeError(f"Masks.install: optimizer must be an Optimizer, got {type(optimizer).__name__}.")
        found = self._located("Masks.install", model)
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if not any(id(place.parameter) in held for _, place in found):
            raise fail("Masks.install", "optimizer", "hold at least one masked parameter of the model", "none of them")
        zero_removed("Masks.install", found)
        clear = clearing(found)
        clear(optimizer)
        return optimizer.register_step_post_hook(clear)

    def merge_lora_(self, model: nn.Module, *, adapters: Collection[str] | None = None) -> "MergedLora":
        """Merge the adapters of a peft model under these masks; see `mask_lora.merge_lora`."""
        from .mask_lora import merge_lora

        return merge_lora(self, model, adapters=adapters)

    def train_lora(self, model: nn.Module) -> "Handles":
        """Let adapters of a peft model act only where these masks keep; see `mask_lora.train_lora`."""
        from .mask_lora import train_lora

        return train_lora(self, model)

    def with_prefix(self, prefix: str) -> Self:
        """The same masks for a model whose parameter names start with ``prefix``, such as ``"module."``."""
        return type(self)({prefix + name: mask for name, mask in self.items()}, nominal=self.nominal)

    def to(self, device: torch.device | str) -> Self:
        """The same masks on ``device``; a model on another device can be masked all the same."""
        return type(self)({name: mask.to(device) for name, mask in self.items()}, nominal=self.nominal)

    def sparsity(self, model: nn.Module | None = None) -> SparsityReport:
        """What the masks remove; with a model also of how much, and tied names count once."""
        if model is None:
            return self._report({name: int((~mask).sum()) for name, mask in self.items()})
        found = self._located("Masks.sparsity", model)
        return self._report({place.name: int((~mask).sum()) for mask, place in found}, model)

    def achieved_in(self, model: nn.Module) -> SparsityReport:
        """The zeros that the masked parameters of ``model`` really have, whether masked or not."""
        found = [place for _, place in self._located("Masks.achieved_in", model)]
        return self._report({place.name: _count(place.weight(), None) for place in found}, model)

    def violations(self, model: nn.Module) -> dict[str, int]:
        """Removed entries that are not 0 in ``model`` by name of the parameter; empty where it obeys. NaN is not 0."""
        found = self._located("Masks.violations", model)
        counts = {place.name: _count(place.weight(), mask) for mask, place in found}
        return {name: count for name, count in counts.items() if count}

    def table(self, model: nn.Module | None = None) -> str:
        """``sparsity(model)`` as lines of text."""
        return self.sparsity(model).table()

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
        except SafetensorError as error:
            raise OSError(f"{path} could not be written: {error}") from error
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

    def _located(self, function: str, model: nn.Module) -> list[tuple[Tensor, Located]]:
        """Masks and their parameters, each parameter once."""
        unique: dict[int, tuple[Tensor, Located]] = {}
        for place in locate(function, model, self):
            mask = self[place.name]
            check_shape(function, f"masks[{place.name!r}]", mask, *place.parameter.shape)
            if place.parametrized:
                check_shape(function, place.path, place.weight(), *mask.shape)
            first, other = unique.setdefault(id(place.parameter), (mask, place))
            if first is not mask and not torch.equal(first, mask.to(first.device)):
                raise fail(function, "masks", "agree where parameters are tied", f"{other.name} and {place.name}")
        return list(unique.values())

    def _matched(self, function: str, other: "Masks") -> dict[str, tuple[Tensor, Tensor]]:
        if odd := sorted(set(self) ^ set(other)):
            raise fail(function, "other", "mask the same parameters", f"a difference in {', '.join(odd)}")
        for name, mask in self.items():
            check_shape(function, f"other[{name!r}]", other[name], *mask.shape)
        return {name: (mask, other[name].to(mask.device)) for name, mask in self.items()}

    def _report(self, zeros: dict[str, int], model: nn.Module | None = None) -> SparsityReport:
        whole = None if model is None else sum(parameter.numel() for parameter in model.parameters())
        shapes = {name: tuple(self[name].shape) for name in zeros}
        return SparsityReport.count(self.nominal, zeros, shapes, whole)


def _count(weight: Tensor, mask: Tensor | None) -> int:
    """Zeros of a weight; with a mask removed entries that are none."""
    mine = local(weight)
    bad = mine == 0 if mask is None else (mine != 0).logical_and_(removed_here(mask, weight))
    return total(bad.sum(), weight)


def _full(weight: Tensor) -> Tensor:
    full: Tensor = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return full
