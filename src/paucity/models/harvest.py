"""Activations of any model, by the names of places in it: what a module gives or takes, in one forward for many.

A place is named by the path of a module (its output; ``PATH.input`` is its input) or, in a transformer, by what it is
and its layer: ``residual.2`` is what block 2 gives, ``mlp.2`` and ``attention.2`` what its MLP and its attention give,
``heads.2`` is the output of all query heads side by side before the output projection (with grouped queries, too,
there is one for each query head), ``heads.2.1`` one of them, and ``patches.2`` is ``residual.2`` without class tokens.
"""

import difflib
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from transformers import PreTrainedModel

from ..checks import InputError, InputTypeError, fail
from ..measure.tokens import device_of, evaluating
from .blocks import block_path
from .sites import Site, find_sites

KINDS = ("attention", "heads", "mlp", "patches", "residual")
"""What a place in a transformer is called."""
Inputs = Tensor | Mapping[str, Tensor]
"""What a model is run on: ``input_ids`` or pixels, or both with masks by the names of its arguments."""


@dataclass(frozen=True)
class Hook:
    """A place in a model.

    Attributes:
        name: as it was asked for.
        module: path of the module, ``""`` is the model.
        end: which side of it.
        head: (index, number of heads) where only one head's part of the width is wanted.
        patches: whether class tokens, which stand before the patches, are left out.
    """

    name: str
    module: str
    end: Literal["input", "output"] = "output"
    head: tuple[int, int] | None = None
    patches: bool = False


def find_hook(model: nn.Module, name: str) -> Hook:
    """The place called ``name``; see the top of this file.

    Raises:
        InputError: if the model has no such place; the nearest names are listed.
    """
    if not isinstance(name, str):
        raise InputTypeError(f"find_hook: hook must be a string, got {type(name).__name__}.")
    paths = {path for path, _ in model.named_modules() if path}
    if name in paths:
        return Hook(name, name)
    path, _, end = name.rpartition(".")
    if path in paths and end in ("input", "output"):
        return Hook(name, path, "input" if end == "input" else "output")
    places = _places(model)
    if name in places:
        return places[name]
    if path in places and path.startswith("heads.") and end.isdigit():
        count = num_heads(model)
        if int(end) < count:
            return Hook(name, places[path].module, "input", (int(end), count))
        raise fail("find_hook", "hook", f"name a head from 0 to {count - 1}", name)
    choices = [*places, *sorted(paths)]
    near = difflib.get_close_matches(name, choices, n=5, cutoff=0.3) or choices[:5]
    raise fail("find_hook", "hook", "be the name of a place in the model", f"{name}; the nearest are {', '.join(near)}")


def num_heads(model: nn.Module) -> int:
    """Query heads of an attention layer.

    Raises:
        InputError: if the model does not say.
    """
    config: Any = getattr(model, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    count = getattr(config, "num_attention_heads", None)
    attention = (count, *(getattr(m, name, None) for m in model.modules() for name in ("num_heads", "heads")))
    found = next((value for value in attention if isinstance(value, int)), None)
    if found is None:
        raise fail("find_hook", "model", "say how many heads it has", type(model).__name__)
    return found


def _places(model: nn.Module) -> dict[str, Hook]:
    """The places of a transformer by name, in the order of its layers."""
    found: dict[str, Hook] = {}
    for site in find_sites(model):
        if site.layer is None:
            continue
        for kind in ("residual", "patches"):
            name = f"{kind}.{site.layer}"
            found.setdefault(name, Hook(name, block_path(site), patches=kind == "patches"))
        if site.kind == "o":
            found[f"attention.{site.layer}"] = Hook(f"attention.{site.layer}", site.module)
            found[f"heads.{site.layer}"] = Hook(f"heads.{site.layer}", site.module, "input")
        elif site.kind in ("down", "expert_down"):
            found.setdefault(f"mlp.{site.layer}", Hook(f"mlp.{site.layer}", _mlp(site)))
    return found


def _mlp(site: Site) -> str:
    """The whole MLP where its down projection is one expert of many or has a parent of its own within the block."""
    block = block_path(site)
    inner = site.module.removeprefix(f"{block}.").split(".")
    return f"{block}.{inner[0]}"


def kept_tokens(inputs: Inputs, skip_ids: Collection[int] = ()) -> Tensor | None:
    """Which tokens are neither padding nor special: bool ``[B, T]``, None where the inputs are no tokens.

    Args:
        inputs: ids, or a mapping with ``input_ids`` and perhaps ``attention_mask``.
        skip_ids: token ids whose activations are not wanted.
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids")
    if ids is None or ids.is_floating_point():
        return None
    kept = torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(inputs, Tensor) and inputs.get("attention_mask") is not None:
        kept &= inputs["attention_mask"].to(ids.device).bool()
    if len(skip_ids):
        kept &= ~torch.isin(ids, torch.tensor(sorted(skip_ids), device=ids.device, dtype=ids.dtype))
    return kept


def harvest(
    model: nn.Module, hooks: Sequence[Hook], inputs: Inputs, *, skip_ids: Collection[int] = ()
) -> dict[str, Tensor]:
    """The activations at all of ``hooks`` from one forward, which ends where the last of them has been seen.

    Args:
        model: run in eval mode and without gradients; its mode is put back. A module that runs more than once in a
            forward is seen the first time.
        hooks: from `find_hook`, of different names.
        inputs: ids ``[B, T]``, pixels ``[B, C, H, W]``, or a mapping of the model's arguments. What has a dtype of
            floats is cast to the model's.
        skip_ids: token ids that are left out, as is what ``attention_mask`` hides.

    Returns:
        ``{hook.name: [n, width]}`` in the model's dtype, rows in the order of batch and token (or place).

    Raises:
        InputError: if a hook is not run, gives no activation, or not one for each token.
    """
    kept = kept_tokens(inputs, skip_ids)
    seen: dict[str, Tensor] = {}
    places: list[int] = []

    def see(hook: Hook, module: nn.Module, value: Any) -> None:
        if hook.name not in seen:
            seen[hook.name] = _rows(hook, module, value, places)
            if len(seen) == len(hooks):
                raise _Done

    with ExitStack() as stack:
        for hook in hooks:
            stack.callback(_register(model, hook, partial(see, hook)).remove)
        if any(hook.patches for hook in hooks):
            stack.callback(_count_patches(model, places).remove)
        stack.enter_context(evaluating(model))
        with suppress(_Done):
            _run(model, inputs)
    missed = [hook.name for hook in hooks if hook.name not in seen]
    if missed:
        raise fail("harvest", "hooks", "be run by the model's forward", f"{', '.join(missed)}, not run")
    return {hook.name: _kept(hook, seen[hook.name], kept) for hook in hooks}


def per_head(rows: Tensor, heads: int) -> Tensor:
    """Activations ``[n, heads * width]`` of ``heads.L`` as ``[n, heads, width]``."""
    if rows.shape[-1] % heads:
        raise fail("per_head", "heads", f"divide the width ({rows.shape[-1]})", heads)
    return rows.reshape(*rows.shape[:-1], heads, -1)


class _Done(Exception):
    """All hooks have been seen."""


def module_at(model: nn.Module, hook: Hook) -> nn.Module:
    """The module of a place; InputError where the model has none."""
    try:
        return model.get_submodule(hook.module)
    except AttributeError:
        raise fail("harvest", "hooks", "be places of this model", hook.name) from None


def _register(model: nn.Module, hook: Hook, see: Callable[[nn.Module, Any], None]) -> Any:
    module = module_at(model, hook)
    if hook.end == "output":
        return module.register_forward_hook(lambda m, args, output: see(m, output))
    return module.register_forward_pre_hook(
        lambda m, args, kwargs: see(m, args or tuple(kwargs.values())), with_kwargs=True
    )


def _run(model: nn.Module, inputs: Inputs) -> None:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype, device = (None if first is None else first.dtype), device_of(model)

    def ready(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    if isinstance(inputs, Tensor) and not inputs.is_floating_point() and isinstance(model, PreTrainedModel):
        known = inspect.signature(model.forward).parameters
        model(input_ids=ready(inputs), **({"use_cache": False} if "use_cache" in known else {}))
    elif isinstance(inputs, Tensor):
        model(ready(inputs))
    else:
        model(**{name: ready(x) for name, x in inputs.items()})


def first_tensor(hook: Hook, value: Any) -> tuple[int | None, Tensor]:
    """The activation in what a module gives: a tensor, or the first tensor of a tuple, and where it is there."""
    if isinstance(value, Tensor):
        return None, value
    if hasattr(value, "to_tuple"):
        value = value.to_tuple()
    if isinstance(value, tuple | list):
        for at, each in enumerate(value):
            if isinstance(each, Tensor) and each.is_floating_point():
                return at, each
    raise fail("harvest", "hooks", "give an activation", f"{type(value).__name__} at {hook.name}")


def _rows(hook: Hook, module: nn.Module, value: Any, places: list[int]) -> Tensor:
    """``[B, T, width]`` or ``[n, width]``."""
    x = first_tensor(hook, value)[1].detach()
    if x.ndim < 2 or not x.is_floating_point():
        raise fail("harvest", "hooks", "give activations [..., width]", f"shape {list(x.shape)} at {hook.name}")
    if x.ndim == 4 and _channelsfirst_tensor(module):
        x = x.movedim(1, -1)
    if hook.head is not None:
        x = per_head(x, hook.head[1])[..., hook.head[0], :]
    if hook.patches and places and x.ndim == 3:
        x = x[:, x.shape[1] - places[0] :]
    return x


def _channelsfirst_tensor(module: nn.Module) -> bool:
    kinds = (_ConvNd, _BatchNorm, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)
    return any(isinstance(each, kinds) for each in module.modules())


def _count_patches(model: nn.Module, places: list[int]) -> Any:
    """Note how many patches the pictures have: the places of the first convolution whose stride is its kernel."""
    for module in model.modules():
        if isinstance(module, _ConvNd) and module.stride == module.kernel_size and max(module.stride) > 1:
            return module.register_forward_hook(lambda _, args, out: places.append(out[0, 0].numel()))
    raise InputError(f"harvest: model must cut pictures into patches, got {type(model).__name__}, which does not.")


def _kept(hook: Hook, x: Tensor, kept: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if kept is None:
        return rows
    if len(rows) != kept.numel():
        got = f"{len(rows)} for {kept.numel()} at {hook.name}"
        raise fail("harvest", "hooks", "give one activation for each token", got)
    return rows[kept.flatten().to(rows.device)]
