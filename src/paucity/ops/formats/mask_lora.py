"""Low-rank adapters on a masked model (LoRA, peft): trained, merged, and as sparse as before.

Adapters leave the frozen weights alone, so that these keep their zeros while training goes on; merging ``W + BA`` fills
them. Two ways out, with the mask M of W:

- merge, then mask: ``M * (W + BA)``. The part of ``BA`` outside of M, which training relied on, is cut; how much is
  reported.
- train under the mask: the adapter computes with ``M * (BA)`` from the start (as SparsePEFT of SQFT, Muñoz et al. 2024,
  https://arxiv.org/abs/2410.03750), and merging changes nothing of what the model computes. A
  step costs one product of the size of the weight more.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.hooks import RemovableHandle

from ...checks import InputError, InputTypeError, fail
from .mask_names import Located
from .mask_training import removed_here, zero_removed

if TYPE_CHECKING:
    from .masks import Masks


@dataclass
class MergedLora:
    """A model with its adapters merged under masks.

    Attributes:
        model: the model without peft.
        cut: share of the updates' energy (sum of squares) that fell on removed entries, over the masked parameters that
            adapters changed; 0.0 if they changed none. Under `train_lora` this part never took part in anything.
        layers: the same by name of the parameter.
    """

    model: nn.Module
    cut: float
    layers: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def merge_lora(masks: "Masks", model: nn.Module, *, adapters: Collection[str] | None = None) -> MergedLora:
    """Merge adapters into their weights and set the removed entries to 0, layer by layer, in place.

    Works for every kind of adapter that peft can merge (LoRA, DoRA, LoHa, IA3 ... on linear, convolution, embedding and
    expert weights). Layers without a mask are merged as peft does. A copy of one layer is the memory it takes.

    Args:
        masks: of the model inside, by its own names or the wrapped ones.
        model: a ``PeftModel`` (not yet merged).
        adapters: names of the adapters to merge; None is the active ones.

    Raises:
        InputError: if the model is not of peft or is merged already, a mask does not match, an adapter is unknown or
            not finite; then nothing has changed.
        ImportError: without peft.
    """
    name = "Masks.merge_lora_"
    wrapped = _peft_model(name, model)
    found = masks._located(name, model)
    layers = [layer for layer in wrapped.modules() if _is_adapted(layer)]
    if not layers:
        raise fail(name, "model", "have layers with adapters", "none")
    if any(getattr(layer, "merged", False) for layer in layers):
        raise fail(name, "model", "not be merged yet (unmerge_adapter undoes it)", "merged adapters")
    chosen = None if adapters is None else [adapters] if isinstance(adapters, str) else list(adapters)
    known = sorted(wrapped.peft_config)
    for adapter in chosen or ():
        if adapter not in known:
            raise fail(name, "adapters", f"be among {', '.join(known)}", adapter)
    for path, parameter in wrapped.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise fail(name, "model", "be finite", f"NaN or infinity in {path}")
    try:
        wrapped.base_model._check_merge_allowed()
    except ValueError as error:
        raise fail(name, "model", "be one that peft can merge", error) from error
    energy: dict[str, tuple[float, float]] = {}
    for layer in layers:
        inside = {id(parameter) for parameter in layer.get_base_layer().parameters()}
        here = [(mask, place, place.parameter.clone()) for mask, place in found if id(place.parameter) in inside]
        layer.merge(adapter_names=chosen)
        for mask, place, before in here:
            _cut(mask, place, before, energy)
    plain: nn.Module = wrapped.unload()
    masks.apply_(plain)
    lost, whole = (sum(values) for values in zip(*energy.values(), strict=True)) if energy else (0.0, 0.0)
    shares = {path: off / of for path, (off, of) in energy.items()}
    return MergedLora(plain, lost / whole if whole else 0.0, shares)


def train_lora(masks: "Masks", model: nn.Module) -> "Handles":
    """Let the adapters of masked linear layers act only on kept entries, until the handle's ``remove()``.

    Merging by `merge_lora` then gives what was trained. Frozen weights are set to 0 where the masks remove. Works for
    LoRA on ``nn.Linear`` and transformers' ``Conv1D``, with every adapter there is now, its dropout and its scaling.

    Raises:
        InputError: if the model is not of peft, no masked layer has an adapter, a mask does not match, or a masked
            layer has an adapter of another kind (DoRA; convolutions, embeddings, expert stacks); then nothing has
            changed.
        ImportError: without peft.
    """
    name = "Masks.train_lora"
    wrapped = _peft_model(name, model)
    from peft.tuners.lora import Linear as LoraLinear

    found = masks._located(name, model)
    by_parameter = {id(place.parameter): (mask, place) for mask, place in found}
    chosen: list[tuple[Any, Tensor]] = []
    for layer in wrapped.modules():
        if not _is_adapted(layer):
            continue
        inside = [p for p in layer.get_base_layer().parameters() if id(p) in by_parameter]
        if not inside:
            continue
        mask, place = by_parameter[id(inside[0])]
        if not isinstance(layer, LoraLinear) or layer.lora_variant:
            kind = type(layer).__name__ + (" with a variant" if isinstance(layer, LoraLinear) else "")
            raise fail(name, "model", "have plain LoRA on linear layers where it is masked", f"{kind} at {place.path}")
        chosen.append((layer, mask.mT if layer.fan_in_fan_out else mask))
    if not chosen:
        raise fail(name, "model", "have an adapter on a masked layer", "none")
    zero_removed(name, found)
    acting = [_Acting(layer, adapter, mask) for layer, mask in chosen for adapter in layer.lora_A]
    return Handles([handle for each in acting for handle in each.handles()])


class Handles:
    """Several hooks as one handle."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()


class _Acting:
    """Hooks that give ``x (M * BA)^T`` for ``(x A^T) B^T``, with ``x`` as the dropout left it.

    Bound methods, so that a copy of the model has hooks of its own.
    """

    def __init__(self, layer: Any, adapter: str, mask: Tensor) -> None:
        self.first, self.second = layer.lora_A[adapter], layer.lora_B[adapter]
        self.mask = mask.to(self.second.weight.device)
        self.seen: list[Tensor] = []

    def handles(self) -> list[RemovableHandle]:
        return [self.first.register_forward_pre_hook(self.see), self.second.register_forward_hook(self.act)]

    def see(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.seen[:] = args[:1]

    def act(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        weight = self.second.weight
        return linear(self.seen.pop(), (weight @ self.first.weight) * self.mask.to(weight.device), self.second.bias)


def _cut(mask: Tensor, place: Located, before: Tensor, energy: dict[str, tuple[float, float]]) -> None:
    """Note the energy of the update of one merged weight: what falls on removed entries, and all."""
    gone = removed_here(mask, place.parameter)
    update = (place.parameter.float() - before.float()).square_()
    if whole := float(update.sum()):
        lost, had = energy.get(place.name, (0.0, 0.0))
        energy[place.name] = (lost + float(update[gone].sum()), had + whole)


def _is_adapted(layer: Any) -> bool:
    return hasattr(layer, "get_base_layer") and hasattr(layer, "merge") and hasattr(layer, "adapter_layer_names")


def _peft_model(function: str, model: nn.Module) -> Any:
    try:
        from peft import PeftMixedModel, PeftModel
    except ImportError as error:
        raise ImportError(f"{function} needs peft: pip install 'paucity[lora]'.") from error
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"{function}: model must be a Module, got {type(model).__name__}.")
    inner: Any = model
    while not isinstance(inner, PeftModel | PeftMixedModel):
        inner = getattr(inner, "_orig_mod", getattr(inner, "module", None))
        if not isinstance(inner, nn.Module):
            raise InputError(f"{function}: model must be a PeftModel, or wrap one, got {type(model).__name__}.")
    return inner
