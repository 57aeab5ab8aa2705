"""Which parameter of a model a name means, whatever wraps the model.

The rule: a name means the parameter of exactly that name; where there is none, the only parameter that has it once the
parts that wrappers add are dropped from both. So masks of a plain model find their parameters in the wrapped one, and
masks of a wrapped model in the plain one. Dropped, wherever they stand:

- ``module``: ``DistributedDataParallel``, ``DataParallel``, ``AveragedModel``, DeepSpeed;
- ``_orig_mod``: ``torch.compile``;
- ``_fsdp_wrapped_module``, ``_checkpoint_wrapped_module``, ``_forward_module``: sharding, checkpoints, Fabric;
- ``base_model.model``, ``base_layer``, ``modules_to_save.<adapter>``: peft;
- ``parametrizations.<name>.original`` becomes ``<name>``: ``torch.nn.utils.parametrize`` with one original tensor.
"""

import difflib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from ...checks import InputError, InputTypeError, fail

_DROPPED = {
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",
    "base_layer",
}


@dataclass(frozen=True)
class Located:
    """A parameter that a name means.

    Attributes:
        name: the name that was looked up.
        path: the name of the parameter in the model.
        parameter: what training changes.
        owner: the module that computes with it.
        attribute: where the owner finds what it computes with; not the parameter itself under a parametrization.
    """

    name: str
    path: str
    parameter: nn.Parameter
    owner: nn.Module
    attribute: str

    @property
    def parametrized(self) -> bool:
        """Whether the module computes with a function of the parameter."""
        return self.attribute != self.path.rpartition(".")[2]

    def weight(self) -> Tensor:
        """What the module computes with, detached."""
        found: Tensor = getattr(self.owner, self.attribute)
        return found.detach()


def plain_name(name: str) -> str:
    """``name`` without the parts that wrappers add.

    Example:
        >>> plain_name("module.base_model.model.model.layers.0.q_proj.base_layer.weight")
        'model.layers.0.q_proj.weight'
        >>> plain_name("_orig_mod.0.parametrizations.weight.original")
        '0.weight'
    """
    parts = [part for part in name.split(".") if part not in _DROPPED]
    kept: list[str] = []
    i = 0
    while i < len(parts):
        here = parts[i : i + 3]
        if here[:2] == ["base_model", "model"] or (here[0] == "modules_to_save" and len(here) == 3):
            i += 2
        elif here[0] == "parametrizations" and here[2:] == ["original"] and i + 3 == len(parts):
            kept.append(here[1])
            i += 3
        else:
            kept.append(here[0])
            i += 1
    return ".".join(kept)


def named_weights(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Every parameter once, by its plain name; those of adapters (peft), and what they replace, are left out."""
    _check_model(model)
    skipped = tuple(
        f"{path}.{name}." if path else f"{name}."
        for path, module in model.named_modules()
        for name in _of_adapters(module)
    )
    for path, parameter in model.named_parameters():
        if not path.startswith(skipped):
            yield plain_name(path), parameter


def locate(function: str, model: nn.Module, names: Iterable[str]) -> list[Located]:
    """The parameters that ``names`` mean in ``model``, in their order; tied names give the same parameter.

    Raises:
        InputError: if a name means no parameter (the nearest are named), or several.
    """
    _check_model(model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    by_plain: dict[str, dict[int, str]] = {}
    for path, parameter in parameters.items():
        by_plain.setdefault(plain_name(path), {}).setdefault(id(parameter), path)
    return [_one(function, model, parameters, by_plain, name) for name in names]


def _one(
    function: str,
    model: nn.Module,
    parameters: dict[str, nn.Parameter],
    by_plain: dict[str, dict[int, str]],
    name: str,
) -> Located:
    path = name
    if name not in parameters:
        found = list(by_plain.get(plain_name(name), {}).values())
        if not found:
            near = difflib.get_close_matches(plain_name(name), list(by_plain), n=3, cutoff=0.5)
            hint = f" (nearest: {', '.join(near)})" if near else ""
            raise InputError(f"{function}: every masked name must be a parameter of the model, got {name}{hint}.")
        if len(found) > 1:
            raise fail(function, name, "mean one parameter of the model", " and ".join(found))
        path = found[0]
    parameter = parameters[path]
    if parameter.is_meta:
        raise fail(function, name, "be in memory", "a parameter on the meta device")
    owner, _, attribute = path.rpartition(".")
    if attribute == "original" and owner.split(".")[-2:-1] == ["parametrizations"]:
        owner, attribute = ".".join(owner.split(".")[:-2]), owner.split(".")[-1]
    return Located(name, path, parameter, model.get_submodule(owner), attribute)


def _of_adapters(module: nn.Module) -> tuple[str, ...]:
    """Children of a module of peft that are no weights of the model: the low-rank ones, or what a copy stands for."""
    if "modules_to_save" in module._modules:
        return ("original_module",)
    return getattr(module, "adapter_layer_names", ()) if "base_layer" in module._modules else ()


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise InputTypeError(f"Masks: model must be a Module, got {type(model).__name__}.")
