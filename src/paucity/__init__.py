"""Paucity: sparsity in deep learning, measured honestly against dense.

Importing it imports nothing heavy; each name is fetched from its family when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .models.load import Loaded, load
    from .pipeline import run
    from .recipe import Recipe
    from .report import Report

_HOMES = {
    "Loaded": "models.load",
    "Recipe": "recipe",
    "Report": "report",
    "load": "models.load",
    "run": "pipeline",
}
_MODULES = ("activations", "attention", "catalog", "kernels", "measure", "models", "ops", "report", "weights")

__version__ = "0.1.0"
__all__ = [
    "Loaded",
    "Recipe",
    "Report",
    "activations",
    "attention",
    "catalog",
    "kernels",
    "load",
    "measure",
    "models",
    "ops",
    "report",
    "run",
    "weights",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
