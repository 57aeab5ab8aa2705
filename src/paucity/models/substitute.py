"""A model that goes on with something else than what it computed at a place: zeros, a reconstruction, a steered one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import fail
from .harvest import Hook, first_tensor, module_at, per_head


@contextmanager
def substituted(model: nn.Module, hook: Hook, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context is open, the model goes on with ``change(activation)`` at ``hook``.

    ``change`` is given ``[..., width]`` as the module has it (one head's part where the hook is one) and gives the same
    shape; the rest of a tuple stays. Zeros ablate, a dictionary's reconstruction shows what it costs.

    Raises:
        InputError: if ``change`` gives another shape.
    """

    def put(value: Any) -> Any:
        at, x = first_tensor(hook, value)
        if hook.head is None:
            new = change(x)
        else:
            index, count = hook.head
            parts = list(per_head(x, count).unbind(-2))
            parts[index] = change(parts[index])
            new = torch.cat(parts, -1)
        if new.shape != x.shape:
            raise fail("substituted", "change", f"give shape {list(x.shape)}", list(new.shape))
        new = new.to(x.dtype)
        if at is None:
            return new
        return type(value)([*value[:at], new, *value[at + 1 :]]) if isinstance(value, tuple | list) else value

    module = module_at(model, hook)
    if hook.end == "input":
        handle = module.register_forward_pre_hook(lambda _, args: (put(args[0]), *args[1:]) if args else None)
    else:
        handle = module.register_forward_hook(lambda _, args, output: put(output))
    try:
        yield
    finally:
        handle.remove()
