"""Activations of any model at its places (`paucity.models.places`): one forward for many, rows of ``[n, width]``."""

import inspect
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import check_shape, fail
from ..measure.tokens import device_of, evaluating
from .access import Access
from .places import Hook

Inputs = Tensor | Mapping[str, Any]
"""What a model is run on: ``input_ids`` or pixels, or both with masks by the names of its arguments."""


def tokens_at(model: nn.Module, hook: Hook, inputs: Inputs) -> Inputs:
    """What of ``inputs`` is read where ``hook`` lies: behind the encoder of two, ids and mask of the decoder.

    Raises:
        InputError: if there are none of these, as what a model makes up for them has its own order.
    """
    two = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if not two or {"encoder", "shared"}.intersection(hook.module.split(".")):
        return inputs
    if isinstance(inputs, Tensor) or inputs.get("decoder_input_ids") is None:
        raise fail("harvest", "inputs", "hold decoder_input_ids for a place behind the encoder", hook.name)
    return {name.removeprefix("decoder_"): x for name, x in inputs.items() if name.startswith("decoder_")}


def kept_tokens(inputs: Inputs, skip_ids: Collection[int] = ()) -> Tensor | None:
    """Which tokens are neither padding nor special: bool ``[B, T]``, None where the inputs are no tokens.

    Args:
        inputs: ids, or a mapping with ``input_ids`` and perhaps ``attention_mask [B, T]``; see `tokens_at`.
        skip_ids: token ids whose activations are not wanted.

    Raises:
        InputError: if the mask is not of the shape of the ids.
    """
    ids = inputs if isinstance(inputs, Tensor) else inputs.get("input_ids")
    if ids is None or not _are_ids(ids):
        return None
    kept = torch.ones_like(ids, dtype=torch.bool)
    if not isinstance(inputs, Tensor) and inputs.get("attention_mask") is not None:
        mask: Tensor = inputs["attention_mask"]
        check_shape("harvest", "attention_mask", mask, *ids.shape)
        kept &= mask.to(ids.device).bool()
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
        skip_ids: token ids that are left out, as is what ``attention_mask`` (in a decoder
            ``decoder_attention_mask``) hides.

    Returns:
        ``{hook.name: [n, width]}`` in the model's dtype, rows in the order of batch and token (or place).

    Raises:
        InputError: if a hook is not run, gives no activation, or not one for each token, or the tokens of a batch do
            not stand in the order ``[B, T, ...]`` (which cannot be told where B is T).
    """
    kept = {hook.name: kept_tokens(tokens_at(model, hook, inputs), skip_ids) for hook in hooks}
    seen: dict[str, Tensor] = {}

    def see(hook: Hook, x: Tensor) -> None:
        if hook.name not in seen:
            seen[hook.name] = _rows(hook, x.detach(), kept[hook.name])
            if len(seen) == len(hooks):
                raise _Done

    with Access(model) as access, evaluating(model):
        for hook in hooks:
            access.at(hook, partial(see, hook))
        with suppress(_Done):
            _run(model, inputs)
    missed = [hook.name for hook in hooks if hook.name not in seen]
    if missed:
        raise fail("harvest", "hooks", "be run by the model's forward", f"{', '.join(missed)}, not run")
    return {hook.name: seen[hook.name] for hook in hooks}


class _Done(Exception):
    """All hooks have been seen."""


def _run(model: nn.Module, inputs: Inputs) -> None:
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    dtype, device = (None if first is None else first.dtype), device_of(model)

    def ready(x: Tensor) -> Tensor:
        return x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    if isinstance(inputs, Tensor) and not inputs.is_floating_point() and isinstance(model, PreTrainedModel):
        if not _are_ids(inputs):
            raise fail("harvest", "inputs", "be ids [B, T] or floats", f"{inputs.dtype} {list(inputs.shape)}")
        known = inspect.signature(model.forward).parameters
        model(input_ids=ready(inputs), **({"use_cache": False} if "use_cache" in known else {}))
    elif isinstance(inputs, Tensor):
        model(ready(inputs))
    else:
        model(**{name: ready(x) if isinstance(x, Tensor) else x for name, x in inputs.items() if x is not None})


def _are_ids(x: Tensor) -> bool:
    return x.ndim == 2 and not x.is_floating_point()


def _rows(hook: Hook, x: Tensor, kept: Tensor | None) -> Tensor:
    """Rows ``[n, width]`` that nothing after this place can overwrite."""
    rows = x.reshape(-1, x.shape[-1])
    if kept is None:
        return rows.clone()
    if len(rows) != kept.numel():
        got = f"{len(rows)} for {kept.numel()} at {hook.name}"
        raise fail("harvest", "hooks", "give one activation for each token", got)
    if x.ndim > 2 and min(kept.shape) > 1 and kept.shape != x.shape[:2] == kept.mT.shape:
        raise fail("harvest", "hooks", "give activations [B, T, width]", f"{list(x.shape)} at {hook.name}")
    return rows[kept.flatten().to(rows.device)]
