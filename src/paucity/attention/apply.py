"""Install policies on a Hugging Face causal language model, one of each kind, and take them off again.

A model may carry a prefill policy (what a prompt reads), a decode policy (what a step with one token reads) and an
eviction policy (what stays in the cache) together.

Dense, whatever the policy: texts shorter than its ``min_length``, layers that it does not rule, attention dropout,
queries, keys or values that are not finite, padding inside a text, and masks that are neither causal nor a sliding
window (packed sequences, static caches, masks of the caller's own). Decode and eviction policies leave alone caches
whose layers are not ordinary ones (static, sliding, quantised, offloaded) and calls without a cache. What `apply`
returns says in its ``state`` how often that was so, and why.
"""

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, overload

from pydantic import BaseModel
from torch import Tensor, nn

from ..checks import InputTypeError, fail
from .decode.applied import AppliedDecode
from .decode.policy import DecodePolicy
from .eviction.applied import AppliedEviction
from .eviction.policy import EvictionPolicy
from .install import install, uninstall
from .policy import PolicySearch, PrefillPolicy
from .portable import Policy, options_for
from .prefill import AppliedAttention, Observed

__all__ = ["AppliedAttention", "AppliedDecode", "AppliedEviction", "Observed", "apply", "apply_step", "remove"]

_KINDS: dict[str, tuple[type[Policy], Any]] = {
    "prefill": (PrefillPolicy, AppliedAttention),
    "decode": (DecodePolicy, AppliedDecode),
    "eviction": (EvictionPolicy, AppliedEviction),
}

if TYPE_CHECKING:
    from ..models.load import Loaded


def apply_step(
    loaded: "Loaded", method: str, options: BaseModel, calibration: list[Tensor]
) -> AppliedAttention | AppliedDecode | AppliedEviction:
    """Install the method of a recipe; a search looks at the ``calibration`` tokens, a policy at nothing."""
    kind = options_for(method)
    if not isinstance(options, kind):
        raise fail("apply_step", "options", f"be {kind.__name__}", type(options).__name__)
    policy = options.fit(loaded.model, calibration) if isinstance(options, PolicySearch) else options
    assert isinstance(policy, Policy)
    return apply(loaded.model, policy)


@overload
def apply(model: nn.Module, policy: PrefillPolicy, layers: Sequence[int] | None = None) -> AppliedAttention: ...
@overload
def apply(model: nn.Module, policy: DecodePolicy, layers: Sequence[int] | None = None) -> AppliedDecode: ...
@overload
def apply(model: nn.Module, policy: EvictionPolicy, layers: Sequence[int] | None = None) -> AppliedEviction: ...
@overload
def apply(
    model: nn.Module, policy: Policy, layers: Sequence[int] | None = None
) -> AppliedAttention | AppliedDecode | AppliedEviction: ...


def apply(
    model: nn.Module, policy: Policy, layers: Sequence[int] | None = None
) -> AppliedAttention | AppliedDecode | AppliedEviction:
    """Let ``policy`` choose what the model's prompts or steps read, or what its cache keeps.

    Args:
        model: a Hugging Face causal language model, perhaps with policies of the other kinds.
        policy: how to choose.
        layers: which layers it rules, instead of ``policy.layers``.

    Raises:
        InputError: if the model has no causal attention that transformers can exchange, carries a policy of this kind
            already, or lacks one of the layers, if the policy is for a model with other layers or heads, or if it and
            another one each have attention of their own for steps with one token.
    """
    for kind, (base, applied) in _KINDS.items():
        if isinstance(policy, base):
            wanted = policy.layers if layers is None else layers
            made: AppliedAttention | AppliedDecode | AppliedEviction
            made = install(model, kind, wanted, policy.check_model, partial(applied, model, policy))
            return made
    raise InputTypeError(f"apply: policy must be a policy, got {type(policy).__name__}.")


def remove(model: nn.Module) -> None:
    """Take all policies off a model, or off a deep copy of one; nothing happens where there is none."""
    for kind in _KINDS:
        uninstall(model, kind)
