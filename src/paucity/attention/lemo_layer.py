"""The hooks by which a layer drops tokens for LeMo (`paucity.attention.lemo`), and the scores that they go by.

Paper: Wang et al. 2025, https://arxiv.org/abs/2501.09767, Sec. 4.2. Operators: `paucity.ops.informative`.

Attention (Eq. 1, 2): scores are ``S_ij = q_i . k_j / sqrt(d)`` before the softmax, of which only positive ones count,
averaged over heads; a pair of blocks has the largest of its pairs, ``i != j``, and a block the sum over its pairs of
blocks. Pairs ``i < j``, which a causal model never looks at, are left out, so that a block counts as keys of the later
blocks and as queries of the earlier ones, as in the authors' code. Soft caps and sliding windows are ignored.

MLP: a token has the mean magnitude of its intermediate activations (what goes into the down projection, after ReLU, or
gated), a block has that of its largest token. The paper names the activations and no formula.

What attention multiplies is recorded by an attention function that transformers calls by name, in place of the
model's own and for one call; nothing is patched and nothing but projections and positions is computed.
"""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from ..checks import InputError
from ..ops.informative import activation_informativeness, block_informativeness, block_totals, keep_blocks, valid_blocks
from ..ops.subset import Subset, subset

if TYPE_CHECKING:
    from .lemo import AppliedLeMo

NAME = "paucity_lemo_record"
_AT_ONCE = 1 << 17
"""Features of a hidden state that go through an MLP at once, to be looked at."""
_CACHES = ("past_key_values", "past_key_value", "layer_past")
_Call = tuple[tuple[Any, ...], dict[str, Any]]


class Layer:
    """The hooks of one layer; what the first half of a call leaves for the second is here."""

    def __init__(
        self, owner: "AppliedLeMo", layer: int, attention: nn.Module, mlp: nn.Module | None, down: str
    ) -> None:
        self.owner, self.layer, self.attention, self.mlp, self.down = owner, layer, attention, mlp, down
        self.counts: dict[str, tuple[int, int]] = {}
        self._valid: Tensor | None = None
        self._kept: dict[str, Subset] = {}
        self._made: Tensor | None = None

    def before_attention(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        """Take the kept tokens out of all that the attention gets."""
        self._kept.pop("attention", None)
        self._valid = None
        if not self.owner.active(module):
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        kwargs = dict(kwargs)
        for name in _CACHES:
            cache = kwargs.get(name)
            if cache is not None and cache.get_seq_length(self.layer):
                raise InputError(
                    "lemo: cache must be empty while tokens are dropped, got one with tokens; use eval mode."
                )
            if cache is not None:
                kwargs[name] = None
        mask = kwargs.get("attention_mask")
        valid = self._valid = valid_tokens(mask, hidden)
        if not self.owner.options.attention:
            return args, kwargs
        predictor, observer = self.owner.predictor("attention", self.layer), self.owner.seen.get("attention")
        if predictor is not None and observer is None:
            score = predictor.score(hidden, valid)
        else:
            query, key, scale = record_heads(module, args, kwargs)
            size = self.owner.options.block_size
            score = block_informativeness(query, key, size, scale=scale, valid=valid)
            if observer is not None:
                observer("attention", self.layer, hidden.detach(), score)
                return args, kwargs
            score = block_totals(score, valid_blocks(valid, size))
        kept = self._choose("attention", score, valid)
        if kept is None:
            return args, kwargs
        if kwargs.get("position_embeddings") is not None and "position_ids" in kwargs:
            kwargs["position_ids"] = None  # gaps in them look like packed texts to some attention functions
        taken = {name: _take(kept, value) for name, value in kwargs.items()}
        if mask is not None and mask.ndim == 2:
            taken["attention_mask"] = taken["attention_mask"] * kept.present
        return tuple(_take(kept, value) for value in args), taken

    def after_attention(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put what the attention gave back in its places."""
        return self._put("attention", output)

    def before_mlp(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Take the kept tokens out of what the MLP gets."""
        self._kept.pop("mlp", None)
        if not self.owner.active(module):
            return None
        hidden: Tensor = args[0]
        valid = self._valid
        if valid is None or valid.shape != hidden.shape[:2]:
            raise InputError(f"lemo: MLP must get states [B, T, C] after its attention, got {list(hidden.shape)}.")
        predictor, observer = self.owner.predictor("mlp", self.layer), self.owner.seen.get("mlp")
        whole = self.owner.options.mlp == "backward"
        if whole and not torch.is_grad_enabled() and observer is None:
            return None
        made: Tensor | None = None
        if predictor is not None and observer is None:
            score = predictor.score(hidden, valid)
        else:
            down = module.get_submodule(self.down)
            score, made = run_without_gradient(module, down, hidden, self.owner.options.block_size, valid)
            if observer is not None:
                observer("mlp", self.layer, hidden.detach(), score)
                return None
        kept = self._choose("mlp", score, valid)
        if kept is None:
            return None
        self._made = made if whole else None
        return kept.take(hidden), *args[1:]

    def after_mlp(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Put what the MLP gave back in its places."""
        made, self._made = self._made, None
        return self._put("mlp", output, made)

    def _choose(self, site: str, score: Tensor, valid: Tensor) -> Subset | None:
        """The tokens that stay at ``attention`` or ``mlp``; None where that is all of them."""
        size = self.owner.options.block_size
        there = valid_blocks(valid, size)
        threshold = self.owner.thresholds.get((site, self.layer))
        if threshold is None:
            blocks = keep_blocks(score, there, sparsity=self.owner.options.sparsity(site))
        else:
            blocks = keep_blocks(score, there, threshold=threshold)
        tokens = blocks.repeat_interleave(size, dim=1)[:, : valid.shape[1]] & valid
        before = self.counts.get(site, (0, 0))
        self.counts[site] = before[0] + int(tokens.sum()), before[1] + int(valid.sum())
        kept = subset(tokens)
        if kept.is_all:
            return None
        self._kept[site] = kept
        return kept

    def _put(self, site: str, output: Any, into: Tensor | None = None) -> Any:
        kept = self._kept.pop(site, None)
        if kept is None:
            return None
        return (kept.put(output[0], into), *output[1:]) if isinstance(output, tuple) else kept.put(output, into)


def _take(kept: Subset, value: Any) -> Any:
    """The kept tokens of whatever an attention module gets beside its mask."""
    if isinstance(value, tuple | list):
        return type(value)(_take(kept, part) for part in value)
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    if value.ndim >= 2 and value.shape[0] in (1, len(kept.index)) and value.shape[1] == kept.length:
        return kept.take(value)
    if value.ndim == 4 and value.shape[2:] == (kept.length, kept.length):
        return kept.take_mask(value)
    raise InputError(f"lemo: model must give attention one vector for each token, got shape {list(value.shape)}.")


def valid_tokens(mask: Any, hidden: Tensor) -> Tensor:
    """Tokens ``[B, T]`` bool of ``hidden`` that are no padding, read from the mask that a layer gets.

    Args:
        mask: None, ``[B, T]`` (1 is seen), or ``[B or 1, H or 1, T, T]``, bool or added to the logits.
        hidden: ``[B, T, C]``.

    Raises:
        InputError: if the mask is none of these.
    """
    batch, length = hidden.shape[:2]
    if mask is None:
        return hidden.new_ones(batch, length, dtype=torch.bool)
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape == (batch, length) and not bool((mask > 1).any()):
        return mask.bool()
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.shape[2:] == (length, length):
        seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        return seen.flatten(1, 2).any(1).expand(batch, -1)
    got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise InputError(f"lemo: attention mask must be none, [B, T] or [B, H, T, T] for {length} tokens, got {got}.")


def record_heads(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor, float]:
    """Query ``[B, H, T, D]``, key ``[B, H_kv, T, D]`` and scale that an attention module would attend with, detached.

    Raises:
        InputError: if the module does not go through transformers' attention interface.
    """
    AttentionInterface.register(NAME, _record)
    config: Any = module.config
    before = config._attn_implementation
    try:
        config._attn_implementation = NAME
        with torch.no_grad():
            module.forward(*args, **kwargs)
    except _Recorded as found:
        return found.heads
    finally:
        config._attn_implementation = before
    raise InputError(f"lemo: model must use transformers' attention interface, got {type(module).__name__}.")


def run_without_gradient(
    mlp: nn.Module, down: nn.Module, hidden: Tensor, block_size: int, valid: Tensor
) -> tuple[Tensor, Tensor]:
    """What ``mlp`` makes of all tokens ``[B, T, C]``, a few blocks at a time, and how informative these are to it.

    Returns:
        `activation_informativeness` ``[B, n]`` of what goes into its ``down`` projection, and its output ``[B, T, C]``.
    """
    step = max(1, _AT_ONCE // max(1, hidden[:, :block_size].numel())) * block_size
    scores: list[Tensor] = []
    output = torch.empty_like(hidden)
    with torch.no_grad():
        for first in range(0, hidden.shape[1], step):
            part = slice(first, first + step)
            handle = down.register_forward_pre_hook(partial(_note, scores, block_size, valid[:, part]))
            try:
                output[:, part] = mlp.forward(hidden[:, part])
            finally:
                handle.remove()
    return torch.cat(scores, dim=1), output


def _note(scores: list[Tensor], block_size: int, valid: Tensor, module: nn.Module, args: tuple[Any, ...]) -> None:
    scores.append(activation_informativeness(args[0], block_size, valid=valid))


class _Recorded(Exception):
    """The rest of the attention is not needed."""

    def __init__(self, query: Tensor, key: Tensor, scale: float) -> None:
        self.heads = (query, key, scale)


def _record(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> None:
    raise _Recorded(query, key, query.shape[-1] ** -0.5 if scaling is None else scaling)
