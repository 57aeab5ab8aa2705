"""What the loss of a text would gain if attention were dropped, for every head of a model.

Paper: Fu et al. 2024 (MoA), https://arxiv.org/abs/2406.14909, Eq. 4-5.
"""

from dataclasses import dataclass, replace

import torch
from pydantic import PrivateAttr
from torch import Tensor, nn

from ..checks import check_shape, fail
from ..measure.tokens import check_batch, check_context, device_of, evaluating
from ..ops.formats.stripes import Window
from ..ops.influence import drop_influence
from .apply import apply
from .compute import Attended, attend_exactly
from .policy import PrefillPolicy
from .prompt import Prompt

IGNORED = -100
"""The label of a token that does not count."""


@dataclass(frozen=True)
class Influence:
    """What the loss of a text would gain if blocks of the attention were dropped.

    Attributes:
        blocks: ``[layers, H, n, n]`` float32, for the layers with attention in their order.
        length: tokens of the text.
        layers: index of each layer in the model.
        windows: sliding window of each layer; None where it sees everything.
    """

    blocks: Tensor
    length: int
    layers: tuple[int, ...]
    windows: tuple[int | None, ...]


class _Recorder(PrefillPolicy):
    """Dense attention that keeps what went in and what came out, with its graph."""

    min_length: int = 0
    _seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor, Prompt]] = PrivateAttr(default_factory=dict)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Window:
        return Window(key.shape[2])

    def compute(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        done = attend_exactly(query, key, value, prompt)
        out = done.out if done.out.requires_grad else done.out.requires_grad_()
        self._seen[prompt.layer] = (query.detach(), key.detach(), value.detach(), out, prompt)
        return replace(done, out=out)


def influence(
    model: nn.Module, input_ids: Tensor, labels: Tensor | None = None, *, block_size: int = 64, absolute: bool = False
) -> Influence:
    """Eq. 4-5 for every head: how the next-token cross-entropy would change if blocks of its attention were dropped.

    One forward and one backward pass, and as much again for the matrices of attention and of its gradient, which are
    never held whole. The model is left as it was: mode, attention and gradients.

    Args:
        model: a Hugging Face causal language model without a policy.
        input_ids: ``[B, T]`` int64, no padding; the loss is the mean over labels, influences are summed over rows.
        labels: ``[B, T]`` int64, the token itself where its prediction counts, -100 elsewhere; None is all tokens.
        block_size: queries and keys in a block.
        absolute: sum magnitudes.

    Raises:
        InputError: if shapes do not fit, there is no label, the text is beyond the model's context, or the model
            carries a policy or has attention that cannot be seen.
    """
    _check_batch(model, input_ids, labels)
    recorder = _Recorder()
    with evaluating(model), torch.enable_grad():
        applied = apply(model, recorder)
        try:
            loss = next_token_loss(model, input_ids, labels)
        finally:
            applied.remove()
        seen = recorder._seen
        if sorted(seen) != applied.layers:
            raise fail("influence", "model", "use causal attention of finite values in every layer", f"{sorted(seen)}")
        grads = torch.autograd.grad(loss, [seen[layer][3] for layer in applied.layers])
    blocks = []
    for layer, grad in zip(applied.layers, grads, strict=True):
        query, key, value, _, prompt = seen.pop(layer)
        dropped = drop_influence(
            query,
            key,
            value,
            grad,
            scale=prompt.scale,
            softcap=prompt.softcap,
            window=prompt.window,
            block_size=block_size,
            absolute=absolute,
        )
        blocks.append((dropped.sum(0).cpu(), prompt.window))
    return Influence(
        torch.stack([block for block, _ in blocks]),
        input_ids.shape[1],
        tuple(applied.layers),
        tuple(window for _, window in blocks),
    )


def next_token_loss(model: nn.Module, input_ids: Tensor, labels: Tensor | None) -> Tensor:
    """Mean cross-entropy of the labelled tokens, each from those before it; arguments as for `influence`."""
    device = device_of(model)
    ids, wanted = input_ids.to(device), (input_ids if labels is None else labels)[:, 1:].to(device)
    counts = wanted != IGNORED
    logits = model(input_ids=ids, use_cache=False).logits[:, :-1][counts]
    return nn.functional.cross_entropy(logits.float(), wanted[counts])


def _check_batch(model: nn.Module, input_ids: Tensor, labels: Tensor | None) -> None:
    check_batch("influence", "input_ids", input_ids)
    check_context("influence", "input_ids", model, input_ids.shape[1])
    if labels is not None:
        check_shape("influence", "labels", labels, *input_ids.shape)
        if not bool((labels[:, 1:] != IGNORED).any()):
            raise fail("influence", "labels", "have a token that counts, after the first", "none")
