"""What a layer has cached: a list of keys and values for each row and KV head, as transformers' cache layers."""

from .cached import Cached
from .layer import SparseLayer
from .store import Store

__all__ = ["Cached", "SparseLayer", "Store"]
