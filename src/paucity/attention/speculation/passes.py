"""Forward passes that speculation needs: of the tokens that follow a cache, and of a tree of tokens behind it.

A tree goes through the model in one pass, whatever the architecture: transformers calls `attention` by name, and finds
the tree of the pass in a context variable. The cache is a transformers cache whose layers keep every token, so that
what was not accepted can be cropped.
"""

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache

from ...checks import fail
from ...kernels.attention import sparse_attention
from ...measure.tokens import context_length
from ...models.text_config import set_implementation, text_config
from ...ops.formats.block import BlockMask
from .. import interface
from ..site import ATTRIBUTE, Site
from .tree import tree_pattern, tree_positions

NAME = "paucity_tree"


class _Tree:
    """The tree of the pass under way; its pattern is made once for all layers of one kind."""

    def __init__(self, parents: Tensor) -> None:
        self.parents = parents
        self._patterns: dict[tuple[int, int | None], BlockMask] = {}

    def pattern(self, num_keys: int, window: int | None) -> BlockMask:
        if (num_keys, window) not in self._patterns:
            self._patterns[num_keys, window] = tree_pattern(self.parents, num_keys, window=window)
        return self._patterns[num_keys, window]


_TREE: ContextVar[_Tree] = ContextVar("tree")


def sites(model: nn.Module) -> list[Site]:
    """What the attention modules of a model carry of policies; empty where there are none."""
    found = (getattr(module, ATTRIBUTE, None) for module in model.modules())
    return [site for site in found if isinstance(site, Site)]


@contextmanager
def tree_passes(model: nn.Module) -> Iterator[None]:
    """Let `tree_pass` be called on ``model``; its attention of before is restored at the end.

    Raises:
        InputError: if the attention of the model cannot be exchanged, or it carries a decode or an eviction policy.
    """
    if any(site.decode or site.eviction for site in sites(model)):
        raise fail("tree_passes", "model", "carry no decode or eviction policy", "one that does")
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, interface.attention_mask)
    before = _implementation(model)
    set_implementation(model, NAME)
    try:
        if _implementation(model) != NAME:
            raise fail("tree_passes", "model", "use transformers' attention interface", type(model).__name__)
        yield
    finally:
        set_implementation(model, before)


def tree_pass(
    model: nn.Module, cache: Cache, embeddings: Tensor, parents: Tensor, *, padding: Tensor | None = None
) -> Tensor:
    """Logits of the tokens of a tree, ``[B, n, vocab]``; the cache grows by all of them. Within `tree_passes`.

    Args:
        model: a causal language model.
        cache: holds the text.
        embeddings: ``[B, n, hidden]``, what the model's input embedding gives for the tokens.
        parents: int64 ``[n]`` or ``[B, n]``, as in `paucity.attention.speculation.tree.tree_mask`.
        padding: bool ``[B, text]``, False where a token of the text is padding on the left.
    """
    size = embeddings.shape[1]
    num_keys = cache.get_seq_length() + size
    positions, mask = tree_positions(parents, num_keys), None
    if padding is not None:
        mask = nn.functional.pad(padding, (0, size), value=True)
        positions = positions - (~padding).sum(-1, keepdim=True)
    limit = context_length(model)  # what stands beyond it is never looked at, but must not fail
    positions = positions.clamp(min=0, max=None if limit is None else limit - 1).expand(len(embeddings), -1)
    token = _TREE.set(_Tree(parents))
    try:
        return model(  # type: ignore[no-any-return]
            inputs_embeds=embeddings,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        ).logits
    finally:
        _TREE.reset(token)


def text_pass(
    model: nn.Module, cache: Cache, ids: Tensor, *, padding: Tensor | None = None, keep: int | None = None
) -> Tensor:
    """Logits of the tokens that follow what is cached, ``[B, keep, vocab]``; the cache grows by them.

    Args:
        model: a causal language model.
        cache: holds the text before them.
        ids: int64 ``[B, n]``.
        padding: bool ``[B, cached + n]``, False where a token is padding on the left.
        keep: last tokens whose logits are wanted, all by default.
    """
    keep = ids.shape[1] if keep is None else keep
    options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
    if padding is not None:
        positions = padding.long().cumsum(-1)[:, -ids.shape[1] :] - 1
        options |= {"attention_mask": padding.long(), "position_ids": positions.clamp(min=0)}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = keep
    logits: Tensor = model(input_ids=ids, **options).logits
    return logits[:, -keep:]


def keep_path(cache: Cache, size: int, path: Tensor) -> None:
    """Of the last ``size`` cached tokens, a tree, keep those at ``path`` (int64 ``[a]``, ascending), in its order."""
    first = cache.get_seq_length() - size
    end = first + len(path)
    for layer in cache.layers:
        if not torch.equal(path, torch.arange(len(path), device=path.device)):
            for name in ("keys", "values"):
                kept = getattr(layer, name)
                kept[:, :, first:end] = kept.index_select(2, path + first)
    cache.crop(len(path) - size)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of a layer, as transformers calls it: ``[B, n, H, Dv]`` and no weights; as usual outside a `tree_pass`.

    Raises:
        InputError: in a `tree_pass`, for dropout, learned sinks, a position bias, a cache that drops tokens, or a
            mask that is neither causal nor a sliding window.
    """
    tree = _TREE.get(None)
    if tree is None:
        return interface.attention(  # type: ignore[no-any-return]
            module, query, key, value, attention_mask, dropout, scaling=scaling, softcap=softcap, **kwargs
        )
    if dropout or any(kwargs.get(name) is not None for name in ("s_aux", "position_bias", "cache")):
        raise fail("tree_pass", "model", "use plain attention within a tree_pass", type(module).__name__)
    padding, window = None, None
    if attention_mask is not None:
        if attention_mask.ndim != 2 or attention_mask.shape[1] != key.shape[2]:
            raise fail("tree_pass", "cache", "keep every token, under a causal mask", list(attention_mask.shape))
        widest = int(attention_mask.max())
        window = widest if 0 < widest < key.shape[2] else None
        padding = None if bool((attention_mask > 0).all()) else (attention_mask > 0).expand(len(query), -1)
    scale = 1 / math.sqrt(query.shape[-1]) if scaling is None else scaling
    pattern = tree.pattern(key.shape[2], window)
    out = sparse_attention(query, key, value, pattern, scale=scale, softcap=softcap, padding=padding, causal=False)
    return out.transpose(1, 2).contiguous(), None


def _implementation(model: nn.Module) -> str:
    if not hasattr(model, "set_attn_implementation"):
        raise fail("tree_passes", "model", "be a Hugging Face model", type(model).__name__)
    return str(text_config(model)._attn_implementation)
