"""A model that goes on with something else than what it computed at a place: zeros, a reconstruction, a steered one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from .access import Access
from .places import Hook


@contextmanager
def substituted(model: nn.Module, hook: Hook, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While the context is open, the model goes on with ``change(activation)`` at ``hook``.

    ``change`` is given ``[..., width]``, the activation whose rows `paucity.models.harvest.harvest` gives (channels
    last, one head's part, no class tokens), and gives the same shape; what else there is stays. Zeros ablate, a
    dictionary's reconstruction shows what it costs.

    Raises:
        InputError: if ``change`` gives another shape.
    """
    with Access(model) as access:
        access.at(hook, change)
        yield
