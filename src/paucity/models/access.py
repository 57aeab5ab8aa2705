"""Access to activations while a model runs: what is at a place is read, or something else is put there.

Convolutions, their norms and poolings hold channels at dimension 1, linear layers at the last. What any other module
(an activation function, a whole block) gives has the dimensions of the last such module that ran before: channels are
where as many are as it gave, or, where both or none have that size, where its own are.
"""

from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd, _AvgPoolNd, _MaxPoolNd
from torch.utils.hooks import RemovableHandle
from transformers.pytorch_utils import Conv1D

from ..checks import fail
from .places import Hook, patch_convolution

_FIRST = (
    *(_ConvNd, _BatchNorm, _InstanceNorm, nn.GroupNorm),
    *(_MaxPoolNd, _AvgPoolNd, _AdaptiveAvgPoolNd, _AdaptiveMaxPoolNd),
)
_LAST = (nn.Linear, Conv1D, nn.Embedding)


class Access:
    """A context in which the places of a model are read or changed by `at`, whenever they are computed.

    Args:
        model: that runs while the context is open.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._handles: list[RemovableHandle] = []
        self._last: tuple[int, int, int] | None = None  # dimensions, dimension of channels, how many
        self._patches: int | None = None

    def __enter__(self) -> Self:
        if any(isinstance(module, _FIRST) for module in self.model.modules()):
            self._handles.append(self.model.register_forward_pre_hook(self._forget))
            for module in self.model.modules():
                if isinstance(module, _FIRST) or _is_last(module):
                    self._handles.append(module.register_forward_hook(self._note))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def at(self, hook: Hook, change: Callable[[Tensor], Tensor | None]) -> None:
        """Call ``change`` with the activation ``[..., width]`` at ``hook``; what it gives takes its place, unless None.

        Raises:
            InputError: if the model has no such place, or is asked for patches and cuts none.
        """
        try:
            module = self.model.get_submodule(hook.module)
        except AttributeError:
            raise fail("harvest", "hooks", "be places of this model", hook.name) from None
        if hook.patches:
            path = patch_convolution(self.model)
            if path is None:
                got = f"{type(self.model).__name__}, which does not"
                raise fail("harvest", "model", "cut pictures into patches", got)
            self._handles.append(self.model.get_submodule(path).register_forward_hook(self._count))
        if hook.end == "output":
            seen = module.register_forward_hook(lambda m, args, output: self._changed(hook, m, output, change))
        else:
            seen = module.register_forward_pre_hook(partial(self._changed_input, hook, change), with_kwargs=True)
        self._handles.append(seen)

    def _changed(
        self, hook: Hook, module: nn.Module, value: Any, change: Callable[[Tensor], Tensor | None]
    ) -> Any | None:
        """What a module gives with another activation in it, None if ``change`` gives none."""
        key, x = _activation(hook, value)
        if x.ndim < 2 or not x.is_floating_point():
            raise fail("harvest", "hooks", "give activations [..., width]", f"shape {list(x.shape)} at {hook.name}")
        part, back = self._part(hook, module, x)
        new = change(part)
        if new is None:
            return None
        if new.shape != part.shape:
            raise fail("substituted", "change", f"give shape {list(part.shape)}", list(new.shape))
        new = back(new.to(x.dtype))
        if key is None:
            return new
        if isinstance(value, Mapping):
            value = copy(value)
            value[key] = new  # type: ignore[index]
            return value
        values = [new if number == key else each for number, each in enumerate(value)]
        return type(value)(*values) if hasattr(value, "_fields") else type(value)(values)

    def _changed_input(
        self,
        hook: Hook,
        change: Callable[[Tensor], Tensor | None],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[Any, Any] | None:
        if any(_is_float(each) for each in args):
            new = self._changed(hook, module, args, change)
            return None if new is None else (new, kwargs)
        new = self._changed(hook, module, kwargs, change)
        return None if new is None else (args, new)

    def _part(self, hook: Hook, module: nn.Module, x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """The part of ``x`` at ``hook`` as ``[..., width]``, and what makes a new ``x`` of a changed part."""
        channels = self._channels(hook, module, x)
        whole = x if channels == x.ndim - 1 else x.movedim(channels, -1)
        skipped = 0
        if hook.patches and self._patches is not None and x.ndim == 3:
            skipped = x.shape[1] - self._patches
            if skipped < 0:
                got = f"{x.shape[1]} for {self._patches} patches at {hook.name}"
                raise fail("harvest", "hooks", "give an activation for each patch", got)
        part = whole[:, skipped:] if skipped else whole
        if hook.head is not None:
            part = per_head(part, hook.head[1])[..., hook.head[0], :]

        def back(new: Tensor) -> Tensor:
            if hook.head is not None:
                parts = list(per_head(whole, hook.head[1]).unbind(-2))
                parts[hook.head[0]] = new
                new = torch.cat(parts, -1)
            new = torch.cat([whole[:, :skipped], new], 1) if skipped else new
            return new if whole is x else new.movedim(-1, channels).contiguous()

        return part, back

    def _channels(self, hook: Hook, module: nn.Module, x: Tensor) -> int:
        last = x.ndim - 1
        if x.ndim < 3 or _is_last(module):
            return last
        if isinstance(module, _FIRST):
            return 1
        if self._last is None:
            return 1 if x.ndim > 3 and any(isinstance(each, _FIRST) for each in module.modules()) else last
        ndim, channels, count = self._last
        if ndim != x.ndim or (channels == last and ndim == 3):
            return last
        if (x.shape[1] == count) != (x.shape[last] == count):
            return 1 if x.shape[1] == count else last
        if channels == last and x.shape[1] == count:  # a block of linear layers may have put them anywhere
            raise fail("harvest", "hooks", "be places whose channels can be told", f"{list(x.shape)} at {hook.name}")
        return channels

    def _note(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.ndim >= 3:
            channels = 1 if isinstance(module, _FIRST) else output.ndim - 1
            self._last = output.ndim, channels, output.shape[channels]

    def _count(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self._patches = output[0, 0].numel()

    def _forget(self, module: nn.Module, args: Any) -> None:
        self._last = None


def _activation(hook: Hook, value: Any) -> tuple[int | str | None, Tensor]:
    """The activation in what a module gives, a tensor or the first in a tuple or mapping, and where it is there."""
    if isinstance(value, Tensor):
        return None, value
    each = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, tuple | list) else ()
    for key, x in each:
        if _is_float(x):
            return key, x
    raise fail("harvest", "hooks", "give an activation", f"{type(value).__name__} at {hook.name}")


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _is_last(module: nn.Module) -> bool:
    return isinstance(module, _LAST) or type(module) is nn.LayerNorm  # others of that name may turn what they take


def per_head(rows: Tensor, heads: int) -> Tensor:
    """Activations ``[n, heads * width]`` of ``heads.L`` as ``[n, heads, width]``."""
    if rows.shape[-1] % heads:
        raise fail("per_head", "heads", f"divide the width ({rows.shape[-1]})", heads)
    return rows.reshape(*rows.shape[:-1], heads, -1)
