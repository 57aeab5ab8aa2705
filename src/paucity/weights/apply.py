"""Which module of the family installs a method as a step of a recipe."""

import importlib
from types import ModuleType

from pydantic import BaseModel
from torch import Tensor

from ..checks import check_choice
from ..models.applied import Applied
from ..models.load import Loaded

_HOMES: dict[str, str] = {
    "channels": "structured.channels",
    "cfsp": "structured.apply",
    "dsnot": "pruning",
    "gqsa": "gqsa",
    "gradual": "gradual",
    "heads": "structured.apply",
    "kernel_groups": "kernel_groups",
    "layers": "structured.apply",
    "magnitude": "pruning",
    "neurons": "structured.apply",
    "packed": "packed",
    "random": "pruning",
    "sparsegpt": "pruning",
    "taylor": "pruning",
    "wanda": "pruning",
}
"""Method to module. A module has ``options_for(method)`` and ``apply_step(loaded, method, options, calibration)``."""


def options_for(method: str) -> type[BaseModel]:
    """The options of a method, with the paper's defaults."""
    options: type[BaseModel] = _home("options_for", method).options_for(method)
    return options


def apply_step(loaded: Loaded, method: str, options: BaseModel, calibration: list[Tensor]) -> Applied:
    """Make ``loaded.model`` sparse in place; `Applied.remove` brings the dense weights back.

    Raises:
        InputError: if the options do not fit the model or the calibration; then the weights are as before.
    """
    applied: Applied = _home("apply_step", method).apply_step(loaded, method, options, calibration)
    return applied


def _home(function: str, method: str) -> ModuleType:
    check_choice(function, "method", method, _HOMES)
    return importlib.import_module(f".{_HOMES[method]}", __package__)
