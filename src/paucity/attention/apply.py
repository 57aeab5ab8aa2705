"""Install a prefill policy on a Hugging Face causal language model, and take it off again.

Dense, whatever the policy: texts shorter than its ``min_length``, decode steps (unless the policy has its own), layers
that it does not rule, attention dropout, queries, keys or values that are not finite, padding inside a text, and masks
that are neither causal nor a sliding window (packed sequences, static caches, masks of the caller's own).
`AppliedAttention.state` says how often a prompt was computed densely, and why.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from pydantic import BaseModel
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..checks import check_int, fail
from .compute import Attended, attend_exactly
from .interface import ATTRIBUTE, NAME, Site, attention, attention_mask, exact_pairs
from .policy import PolicySearch, PrefillPolicy, finite
from .portable import method_name, options_for
from .prompt import Prompt
from .rotary import find_rotary

if TYPE_CHECKING:
    from ..models.load import Loaded


class Observed(NamedTuple):
    """One attention that a policy computed: its inputs, as `PrefillPolicy.attend` has them, and what came out."""

    query: Tensor
    key: Tensor
    value: Tensor
    prompt: Prompt
    done: Attended


def apply_step(loaded: "Loaded", method: str, options: BaseModel, calibration: list[Tensor]) -> "AppliedAttention":
    """Install the method of a recipe; a search looks at the ``calibration`` tokens, a policy at nothing."""
    kind = options_for(method)
    if not isinstance(options, kind):
        raise fail("apply_step", "options", f"be {kind.__name__}", type(options).__name__)
    if isinstance(options, PolicySearch):
        return apply(loaded.model, options.fit(loaded.model, calibration))
    assert isinstance(options, PrefillPolicy)
    return apply(loaded.model, options)


def apply(model: nn.Module, policy: PrefillPolicy, layers: Sequence[int] | None = None) -> "AppliedAttention":
    """Let ``policy`` choose what the model's prompts read.

    Args:
        model: a Hugging Face causal language model.
        policy: how to choose.
        layers: which layers it rules, instead of ``policy.layers``.

    Raises:
        InputError: if the model has no causal attention that transformers can exchange, carries a policy already, or
            lacks one of the layers, or if the policy is for a model with other layers or heads.
    """
    sites = _attention_modules(model)
    if any(hasattr(module, ATTRIBUTE) for module in sites.values()):
        raise fail("apply", "model", "carry no policy yet", "one that does; remove it first")
    wanted = policy.layers if layers is None else list(layers)
    for layer in sites if wanted is None else wanted:
        check_int("apply", "layers", layer, 0)
        if layer not in sites:
            raise fail("apply", "layers", f"be among the {len(sites)} attention layers", layer)
    config = _text_config(model)
    heads = config.num_attention_heads
    policy.check_model(list(sites), heads, getattr(config, "num_key_value_heads", None) or heads)
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    applied = AppliedAttention(model, policy, sorted(sites if wanted is None else set(wanted)), _implementation(model))
    found = {layer: Site(applied, layer, find_rotary(model, layer)) for layer in sites}
    _set_implementation(model, NAME)
    if _text_config(model)._attn_implementation != NAME:
        applied.remove()
        raise fail("apply", "model", "use transformers' attention interface", type(model).__name__)
    for layer, module in sites.items():
        setattr(module, ATTRIBUTE, found[layer])
    return applied


def remove(model: nn.Module) -> None:
    """Take the policy off a model, or off a deep copy of one; nothing happens where there is none."""
    for module in model.modules():
        site = getattr(module, ATTRIBUTE, None)
        if isinstance(site, Site):
            site.applied.remove()
            return


class AppliedAttention:
    """A policy in force on a model.

    Attributes:
        policy: how the pattern is chosen.
        layers: the layers that it rules.
    """

    def __init__(self, model: nn.Module, policy: PrefillPolicy, layers: list[int], implementation: str) -> None:
        self.model, self.policy, self.layers = model, policy, layers
        self._implementation = implementation
        self._kept: dict[int, Tensor] = {}
        self._pairs: dict[int, Tensor] = {}
        self._dense: Counter[str] = Counter()
        self.observer: Callable[[Observed], None] | None = None

    def attend(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Tensor:
        """Attention ``[B, H, Tq, Dv]`` of texts without padding, as the policy has it; counts what is computed."""
        reason = None
        length = key.shape[2] + prompt.dropped
        if length < self.policy.min_length:
            reason = "prompt shorter than min_length"
        elif not finite(query, key, value):
            reason = "values that are not finite"
        if reason is not None:
            self.count_dense(reason)
        done = attend_exactly(query, key, value, prompt) if reason else self.policy.compute(query, key, value, prompt)
        if self.observer is not None:
            if reason is None:
                self.observer(Observed(query, key, value, prompt, done))
            return done.out
        pairs = exact_pairs(query.shape[2], key.shape[2], prompt.window).expand(len(query), 1)
        self.count_pairs(prompt.layer, query.shape[1], done.kept.expand(len(query), -1), pairs)
        return done.out

    def remove(self) -> None:
        """Restore the attention that the model had."""
        for module in self.model.modules():
            if isinstance(getattr(module, ATTRIBUTE, None), Site):
                delattr(module, ATTRIBUTE)
        _set_implementation(self.model, self._implementation)

    def reset(self) -> None:
        """Start measuring anew."""
        self._kept.clear()
        self._pairs.clear()
        self._dense.clear()

    def density(self) -> dict[str, float]:
        """Pairs of query and key computed in prompts, as a share of those of the dense model, mean over heads.

        Padding is not counted. For a sliding-window layer the dense model is the one with its window. A prompt that was
        computed densely counts as 1. Layers that have seen no prompt since the last reset are absent.
        """
        return {f"layers.{layer}.attention": float(share.mean()) for layer, share in self._shares().items()}

    def head_density(self) -> Tensor:
        """`density` of every head, float32 ``[layers, H]``; empty before the first prompt."""
        shares = list(self._shares().values())
        return torch.stack(shares).float() if shares else torch.zeros(0, 0)

    def state(self) -> dict[str, Any]:
        """Method, options, layers, and how many prompts (times layers) were computed densely, by reason."""
        options = self.policy.model_dump(mode="json") | {"layers": self.layers}
        return {
            "method": method_name(self.policy),
            "options": options,
            "dense_prompts": dict(sorted(self._dense.items())),
        }

    def count_dense(self, reason: str) -> None:
        """Note that a layer computed a prompt densely."""
        self._dense[reason] += 1

    def _shares(self) -> dict[int, Tensor]:
        return {layer: self._kept[layer] / self._pairs[layer] for layer in sorted(self._kept)}

    def count_pairs(self, layer: int, heads: int, kept: Tensor, pairs: Tensor) -> None:
        """Add the pairs computed, ``[B, 1 or H]``, and those of the dense model, ``[B, 1]``."""
        total = pairs.sum().double()
        if total:
            self._kept[layer] = self._kept.get(layer, torch.zeros(())) + kept.double().sum(0).expand(heads).cpu()
            self._pairs[layer] = self._pairs.get(layer, torch.zeros(())) + total.cpu()


def _attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The causal self-attention modules of a language model, by layer."""
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or getattr(config, "is_encoder_decoder", False):
        raise fail("apply", "model", "be a decoder-only Hugging Face model", type(model).__name__)
    sites: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and getattr(module, "is_causal", None) is True:
            sites[layer] = module
    if not sites:
        raise fail("apply", "model", "have causal attention", f"{type(model).__name__}, which has none")
    return dict(sorted(sites.items()))


def _text_config(model: nn.Module) -> Any:
    return model.config.get_text_config()  # type: ignore[operator, union-attr]


def _implementation(model: nn.Module) -> str:
    return str(_text_config(model)._attn_implementation)


def _set_implementation(model: nn.Module, name: str) -> None:
    """Set the attention of the language model; towers for images or sound keep theirs."""
    config, text = model.config, _text_config(model)
    keys = [key for key in config.sub_configs if getattr(config, key) is text]  # type: ignore[union-attr]
    model.set_attn_implementation({keys[0]: name} if keys else name)  # type: ignore[operator]
