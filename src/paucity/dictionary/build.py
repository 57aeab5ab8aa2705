"""Dictionaries by the names of the catalogue."""

import inspect
from collections.abc import Mapping
from typing import Any

from .. import catalog
from ..checks import check_choice, fail
from .base import Dictionary
from .sae import Rule, SparseAutoencoder


def learned() -> list[str]:
    """Names of the methods that are trained by gradient on activations."""
    return sorted(
        name for name, method in catalog.METHODS.items() if method.family == "dictionary" and name.endswith("_sae")
    )


def build(method: str, input_size: int, dict_size: int, options: Mapping[str, Any] | None = None) -> Dictionary:
    """A dictionary by its name in the catalogue, untrained.

    Args:
        method: one of `learned`.
        input_size: width of an activation.
        dict_size: number of atoms.
        options: arguments of the rule (``k`` ...) or of the autoencoder (``seed``, ``silent_after`` ...).

    Raises:
        InputError: if there is no such method, or it does not take an option or its value.
    """
    check_choice("dictionary", "method", method, learned())
    target = catalog.get(method).load()
    is_rule = isinstance(target, type) and issubclass(target, Rule)
    own = inspect.signature(target).parameters if is_rule else {}
    outer = inspect.signature(SparseAutoencoder if is_rule else target).parameters
    given = dict(options or {})
    for name in given:
        if name not in own and name not in outer:
            raise fail("dictionary", name, f"be left out for {method}, which has no such option", given[name])
    inner = {name: value for name, value in given.items() if name in own}
    rest = {name: value for name, value in given.items() if name in outer}
    made = SparseAutoencoder(input_size, dict_size, target(**inner), **rest) if is_rule else None
    found: Dictionary = made if made is not None else target(input_size, dict_size, **rest)
    return found


def accepts(method: str, option: str) -> bool:
    """Whether `build` takes ``option`` for ``method``."""
    target = catalog.get(method).load()
    is_rule = isinstance(target, type) and issubclass(target, Rule)
    each = (target, SparseAutoencoder) if is_rule else (target,)
    return any(option in inspect.signature(one).parameters for one in each)
