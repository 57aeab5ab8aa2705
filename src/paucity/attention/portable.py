"""Policies as JSON: ``{"method": name, option: value, ...}``, by the names of the catalogue."""

import json
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from .. import catalog
from ..checks import InputError, InputTypeError, check_choice, fail
from .decode.policy import DecodePolicy
from .eviction.policy import EvictionPolicy
from .policy import PolicySearch, PrefillPolicy

FAMILY = "attention"
Policy = PrefillPolicy | DecodePolicy | EvictionPolicy
"""What can be installed on a model."""


def methods() -> dict[str, catalog.Method]:
    """The attention methods of the catalogue that are steps of a recipe, those of plug-ins included."""
    steps = ((name, method) for name, method in sorted(catalog.METHODS.items()) if method.step)
    return {name: method for name, method in steps if method.family == FAMILY}


def options_for(method: str) -> type[Policy] | type[PolicySearch]:
    """The options of a method: its policy, or the search that finds one.

    Raises:
        InputError: if there is no such method.
    """
    check_choice("options_for", "method", method, methods())
    found: type[Policy] | type[PolicySearch] = catalog.get(method).load()
    return found


def method_name(options: BaseModel) -> str:
    """The name in the catalogue of the method that these are the options of.

    Raises:
        InputError: if it is not there.
    """
    kind = type(options)
    for name, method in methods().items():
        if f"{method.package}.{method.target}" == f"{kind.__module__}:{kind.__qualname__}":
            return name
    raise fail("method_name", "options", "be of a method in the catalogue", kind.__name__)


def label(policy: Policy) -> str:
    """`method_name`, or the name of the class of a policy that is not in the catalogue."""
    try:
        return method_name(policy)
    except InputError:
        return type(policy).__name__


def to_json(policy: Policy) -> dict[str, Any]:
    """``policy`` as JSON values; what has its default is left out."""
    return {"method": method_name(policy), **policy.model_dump(mode="json", exclude_defaults=True)}


def from_json(data: dict[str, Any]) -> Policy:
    """The policy that `to_json` gave.

    Raises:
        InputError: if the method is absent, unknown or a search, or an option is wrong.
    """
    found = options_from(data)
    if isinstance(found, PolicySearch):
        raise fail("from_json", "method", "be a policy, not a search", data["method"])
    return found


def options_from(data: dict[str, Any]) -> Policy | PolicySearch:
    """The policy or the search that a mapping of ``method`` and its options describes.

    Raises:
        InputError: if the method is absent or unknown, or an option is wrong.
    """
    if not isinstance(data, dict):
        raise InputTypeError(f"from_json: policy must be a mapping, got {type(data).__name__}.")
    if "method" not in data:
        raise fail("from_json", "method", "be given", sorted(data))
    kind = options_for(str(data["method"]))
    try:
        return kind.model_validate({key: value for key, value in data.items() if key != "method"})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise InputError(f"from_json: {data['method']} must have valid options, got {where}: {first['msg']}.") from None


def save_policy(policy: Policy, path: str | Path) -> None:
    """Write a policy as a JSON file, complete or not at all; an older file of that name is replaced."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(to_json(policy)) + "\n", encoding="utf-8")
    temporary.replace(path)


def load_policy(path: str | Path) -> Policy:
    """Read what `save_policy` wrote.

    Raises:
        InputError: if there is no such file, or no valid policy in it.
    """
    return from_json(read_mapping(path))


def read_mapping(path: str | Path) -> dict[str, Any]:
    """The mapping in a JSON or YAML file.

    Raises:
        InputError: if there is none.
        InputTypeError: if ``path`` is not a path.
    """
    if not isinstance(path, str | Path):
        raise InputTypeError(f"load_policy: path must be a path, got {type(path).__name__}.")
    path = Path(path)
    if not path.is_file():
        raise fail("load_policy", "path", "be a JSON file", f"{path}, which does not exist")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML too
    except (yaml.YAMLError, UnicodeDecodeError):
        raise fail("load_policy", str(path), "be valid JSON or YAML", "something else") from None
    if not isinstance(data, dict):
        raise fail("load_policy", str(path), "hold a mapping", type(data).__name__)
    return data
