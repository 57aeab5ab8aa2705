"""Attention of a tree of tokens: each sees the text before its root, its ancestors and itself, not its siblings.

Speculative decoding checks many continuations of one text in a single pass: the text lies in the cache, the tokens of
the tree are the last keys, in any order in which parents come before their children.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from ...checks import InputTypeError, check_int, check_ndim, check_tensor, fail
from ...kernels.attention import sparse_attention
from ...ops.formats.block import BlockMask

_NAME = "tree_attention"
_K_BLOCK, _MOST_QUERIES = 64, 64


def tree_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    parents: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    padding: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """``softmax(scale * q k^T) v`` over the ancestors of each token of a tree; differentiable.

    Args:
        query: ``[B, H, n, D]``, the tokens of the tree.
        key: ``[B, H_kv, Tk, D]``: a text of ``Tk - n`` tokens, then the tree's own.
        value: ``[B, H_kv, Tk, Dv]``.
        parents: as in `tree_mask`.
        scale: factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: logits become ``softcap * tanh(logits / softcap)``.
        padding: ``[B, Tk]`` bool, False where a key is padding.
        window: sliding window of the model, by the positions of `tree_positions`.

    Returns:
        ``[B, H, n, Dv]`` in the dtype of ``query``, 0 where a token sees no key.

    Raises:
        InputError: if shapes or dtypes do not fit, or a parent does not come before its child.
    """
    check_ndim(_NAME, "query", query, 4)
    check_ndim(_NAME, "key", key, 4)
    _check_parents(_NAME, parents, key.shape[2])
    if parents.shape[-1] != query.shape[2] or (parents.ndim == 2 and len(parents) not in (1, len(query))):
        wanted = f"be for {len(query)} rows of {query.shape[2]} tokens"
        raise fail(_NAME, "parents", wanted, f"shape {list(parents.shape)}")
    pattern = tree_pattern(parents, key.shape[2], window=window)
    return sparse_attention(query, key, value, pattern, scale=scale, softcap=softcap, padding=padding, causal=False)


def tree_mask(parents: Tensor, num_keys: int, *, window: int | None = None) -> Tensor:
    """The keys that each token of a tree sees, bool ``[B or 1, n, num_keys]``.

    Args:
        parents: int64 ``[n]`` or ``[B, n]``: the key that is the parent of each token, -1 for none. Token ``i`` is the
            key ``num_keys - n + i``; a parent before ``num_keys - n`` is a token of the text, with all text before it.
        num_keys: of the text and the tree.
        window: keys visible to a token, itself included, by position.

    Raises:
        InputError: if a parent does not come before its child.
    """
    _check_parents("tree_mask", parents, num_keys)
    seen, place = _climb(parents, num_keys)
    if window is None or window >= num_keys:
        return seen
    text = torch.arange(num_keys - place.shape[1], device=place.device).expand(len(place), -1)
    return seen & (place.unsqueeze(2) - torch.cat([text, place], dim=1).unsqueeze(1) < window)


def tree_positions(parents: Tensor, num_keys: int) -> Tensor:
    """Where the tokens of a tree stand, int64 ``[B or 1, n]``: one behind their parents.

    Arguments are as in `tree_mask`.
    """
    _check_parents("tree_positions", parents, num_keys)
    return _climb(parents, num_keys)[1]


def tree_pattern(parents: Tensor, num_keys: int, *, window: int | None = None) -> BlockMask:
    """`tree_mask` as a block-sparse pattern, for `sparse_attention` with ``causal=False``."""
    _check_parents("tree_pattern", parents, num_keys)
    parents = parents.reshape(-1, parents.shape[-1])
    # Where every token of the tree has all of a long text before it, only what follows that needs a mask.
    known = num_keys - parents.shape[1]
    if parents.numel() and (window is None or window >= num_keys):
        known = min(known, max(0, int(torch.where(parents < known, parents, known).min()) + 1))
    whole = 0 if window is not None and window < num_keys else known // _K_BLOCK
    mask = tree_mask((parents - whole * _K_BLOCK).clamp(min=-1), num_keys - whole * _K_BLOCK, window=window)
    q_block = max(1, min(_MOST_QUERIES, mask.shape[1]))
    rest = BlockMask.from_dense(mask.unsqueeze(1), q_block=q_block, k_block=_K_BLOCK, exact=True)
    if not whole:
        return rest
    blocks = pad(rest.blocks, (whole, 0), value=True)
    partial = None if rest.partial is None else pad(rest.partial, (whole, 0), value=-1)
    return replace(rest, blocks=blocks, partial=partial, kv_len=num_keys)


def _climb(parents: Tensor, num_keys: int) -> tuple[Tensor, Tensor]:
    """What each token sees, and its position: from every token at once to its ancestors, level by level."""
    parents = parents.reshape(-1, parents.shape[-1])
    first = num_keys - parents.shape[1]
    at = torch.arange(first, num_keys, device=parents.device).expand_as(parents)
    seen = torch.zeros(*parents.shape, num_keys, dtype=torch.bool, device=parents.device)
    depth = torch.zeros_like(parents)
    inside = at >= first
    while bool(inside.any()):
        seen |= torch.zeros_like(seen).scatter_(2, at.clamp(min=0).unsqueeze(2), inside.unsqueeze(2))
        depth += inside
        at = torch.where(inside, parents.gather(1, (at - first).clamp(min=0)), at)
        inside = at >= first
    seen[..., :first] = torch.arange(first, device=at.device) <= at.unsqueeze(2)
    return seen, at + depth


def _check_parents(name: str, parents: Tensor, num_keys: int) -> None:
    check_tensor(name, "parents", parents)
    if parents.dtype != torch.int64:
        raise InputTypeError(f"{name}: parents must be torch.int64, got {parents.dtype}.")
    check_ndim(name, "parents", parents, 1, 2)
    check_int(name, "num_keys", num_keys, parents.shape[-1])
    own = torch.arange(num_keys - parents.shape[-1], num_keys, device=parents.device)
    if bool(((parents < -1) | (parents >= own)).any()):
        raise fail(name, "parents", "come before their children", parents.tolist())
