"""Put policies on the attention modules of a Hugging Face model through transformers' registries, and take them off."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..checks import check_int, fail
from ..models.text_config import set_implementation, text_config
from .interface import attention, attention_mask
from .rotary import find_rotary
from .site import ATTRIBUTE, NAME, Site, take_cache_layer

KINDS = ("prefill", "decode", "eviction")


def install(
    model: nn.Module,
    kind: str,
    layers: Sequence[int] | None,
    check_model: Callable[[Sequence[int], int, int], None],
    make: Callable[[list[int]], Any],
) -> Any:
    """Put a policy on every attention module of a model, beside those of other kinds.

    Args:
        model: a Hugging Face causal language model.
        kind: one of `KINDS`.
        layers: which layers it rules; None is all.
        check_model: raises InputError where the policy is for another model; told layers, heads and KV heads.
        make: what is put there, from the layers that it rules.

    Raises:
        InputError: if the model has no causal attention that transformers can exchange, carries a policy of the kind
            already, lacks one of the layers, or does not fit the policy.
    """
    modules = attention_modules(model)
    sites = {layer: getattr(module, ATTRIBUTE, None) for layer, module in modules.items()}
    if any(site is not None and getattr(site, kind) is not None for site in sites.values()):
        raise fail("apply", "model", f"carry no {kind} policy yet", "one that does; remove it first")
    for layer in modules if layers is None else layers:
        check_int("apply", "layers", layer, 0)
        if layer not in modules:
            raise fail("apply", "layers", f"be among the {len(modules)} attention layers", layer)
    config = text_config(model)
    heads = config.num_attention_heads
    check_model(list(modules), heads, getattr(config, "num_key_value_heads", None) or heads)
    applied = make(sorted(modules if layers is None else set(layers)))
    _check_together(sites, kind, applied.policy)
    if kind != "prefill" and any(getattr(module, "is_kv_shared_layer", False) for module in modules.values()):
        raise fail("apply", "model", "have keys of its own in every layer", "one whose layers share them")
    if all(site is None for site in sites.values()):
        sites = _register(model, modules)
    elif config._attn_implementation != NAME:
        raise fail("apply", "model", "have the attention of its other policies", config._attn_implementation)
    for site in sites.values():
        assert isinstance(site, Site)
        setattr(site, kind, applied)
    if kind != "prefill":
        _hook(modules)
    return applied


def uninstall(model: nn.Module, kind: str) -> None:
    """Take the policy of a kind off a model; with the last one the attention that the model had is restored."""
    modules = [module for module in model.modules() if isinstance(getattr(module, ATTRIBUTE, None), Site)]
    for module in modules:
        setattr(getattr(module, ATTRIBUTE), kind, None)
    sites = [getattr(module, ATTRIBUTE) for module in modules]
    if not any(site.decode or site.eviction for site in sites):
        for module in modules:
            _unhook(module)
    if sites and not any(site.in_force for site in sites):
        for module in modules:
            delattr(module, ATTRIBUTE)
        set_implementation(model, sites[0].implementation)


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The causal self-attention modules of a language model, by layer.

    Raises:
        InputError: if it is no decoder-only Hugging Face model, or has none.
    """
    config = getattr(model, "config", None)
    if not hasattr(model, "set_attn_implementation") or getattr(config, "is_encoder_decoder", False):
        raise fail("apply", "model", "be a decoder-only Hugging Face model", type(model).__name__)
    found: dict[int, nn.Module] = {}
    for module in model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and getattr(module, "is_causal", None) is True:
            found[layer] = module
    if not found:
        raise fail("apply", "model", "have causal attention", f"{type(model).__name__}, which has none")
    return dict(sorted(found.items()))


def _register(model: nn.Module, modules: dict[int, nn.Module]) -> dict[int, Site | None]:
    """Let the model call our attention; a site for each module."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, attention_mask)
    before = str(text_config(model)._attn_implementation)
    sites: dict[int, Site | None] = {
        layer: Site(layer, len(modules), find_rotary(model, layer), before) for layer in modules
    }
    set_implementation(model, NAME)
    if text_config(model)._attn_implementation != NAME:
        set_implementation(model, before)
        raise fail("apply", "model", "use transformers' attention interface", type(model).__name__)
    for layer, module in modules.items():
        setattr(module, ATTRIBUTE, sites[layer])
    return sites


def _check_together(sites: dict[int, Any], kind: str, policy: Any) -> None:
    """Refuse policies that each have attention of their own for the same step."""
    found = {
        other: getattr(site, other).policy for site in sites.values() if site for other in KINDS if getattr(site, other)
    }
    found[kind] = policy
    own = [
        name
        for name, attends in (
            ("prefill", getattr(found.get("prefill"), "decodes", False)),
            ("decode", "decode" in found),
            ("eviction", getattr(found.get("eviction"), "own_attention", False)),
        )
        if attends
    ]
    if len(own) > 1:
        raise fail("apply", "policy", "leave the attention of single steps to one policy", " and ".join(own))


def _hook(modules: dict[int, nn.Module]) -> None:
    for module in modules.values():
        if take_cache_layer not in module._forward_pre_hooks.values():
            module.register_forward_pre_hook(take_cache_layer, with_kwargs=True)


def _unhook(module: nn.Module) -> None:
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is take_cache_layer:
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
