"""Eviction policies: which keys and values stay in the cache."""

from .knorm import Knorm
from .policy import EvictionPolicy

__all__ = ["EvictionPolicy", "Knorm"]
