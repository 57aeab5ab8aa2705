"""What the loss of a language model does with an activation: its gradient at a place, one row for each token."""

from collections.abc import Collection

import torch
from torch import Tensor, nn

from ..checks import fail
from ..measure.tokens import check_batch, device_of, evaluating, forward
from .harvest import kept_tokens
from .places import Hook
from .substitute import substituted


def harvest_gradients(
    model: nn.Module, hook: Hook, ids: Tensor, *, skip_ids: Collection[int] = ()
) -> tuple[Tensor, Tensor]:
    """Activations at a place, and the gradient to each of the loss of all tokens that come after it.

    The loss is the negative log-likelihood of the next tokens, summed, so that a token's row does not depend on how
    many others there are. No gradient reaches the parameters.

    Args:
        model: a causal language model, run in eval mode; its mode is put back.
        hook: from `paucity.models.places.find_hook`; a place whose activations are ``[B, T, width]``, no single head.
        ids: int64 ``[B, T]``, without padding.
        skip_ids: token ids whose rows are left out.

    Returns:
        activations and gradients, ``[n, width]`` in the model's dtype, rows in the order of batch and token.

    Raises:
        InputError: if the place is not run, gives something else, or the loss does not depend on it.
    """
    check_batch("harvest_gradients", "ids", ids)
    if hook.head is not None:
        raise fail("harvest_gradients", "hook", "be no single head", hook.name)
    seen: list[Tensor] = []

    def cut(x: Tensor) -> Tensor:
        seen.append(x.detach().requires_grad_())
        return seen[-1]

    ids = ids.to(device_of(model))
    with evaluating(model), torch.enable_grad(), substituted(model, hook, cut):
        logits, _ = forward(model, ids[:, :-1], keep=ids.shape[1] - 1)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum")
        if len(seen) != 1 or seen[0].shape[:-1] != (len(ids), ids.shape[1] - 1):
            got = f"{len(seen)} times, shape {list(seen[0].shape)}" if seen else "never"
            raise fail("harvest_gradients", "hook", "be run once with an activation for each token", got)
        (gradient,) = torch.autograd.grad(loss, seen[0])
    kept = kept_tokens(ids[:, :-1], skip_ids)
    assert kept is not None  # ids are tokens
    return seen[0].detach()[kept], gradient[kept]
