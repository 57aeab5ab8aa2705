"""A policy as an option of another one, which stands in for its budget."""

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, PlainSerializer, SerializeAsAny

from ...checks import fail
from .policy import EvictionPolicy


def _from_json(value: Any) -> Any:
    from ..portable import from_json

    return from_json(value) if isinstance(value, dict) else value


def _to_json(policy: EvictionPolicy) -> dict[str, Any]:
    from ..portable import to_json

    return to_json(policy)


def _plain(policy: EvictionPolicy) -> EvictionPolicy:
    if policy.own_attention:
        raise fail("apply", "policy", "have no attention of its own within another one", type(policy).__name__)
    return policy


Wrapped = Annotated[
    SerializeAsAny[EvictionPolicy], BeforeValidator(_from_json), AfterValidator(_plain), PlainSerializer(_to_json)
]
"""In JSON and YAML a mapping of ``method`` and its options."""


def with_budget_of(outer: EvictionPolicy, policy: EvictionPolicy) -> EvictionPolicy:
    """``policy`` with the budget of the one that wraps it."""
    return policy.model_copy(update={"num_keys": outer.num_keys, "density": outer.density, "every": outer.every})
