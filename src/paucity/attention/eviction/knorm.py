"""Knorm: keys with a small norm are kept, as attention goes to them.

Paper: Devoto et al. 2024, "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
https://arxiv.org/abs/2406.11430, Sec. 3. Which layers stay whole (the paper leaves out the first two of some models) is
the option ``layers``. Where a model norms its keys (Qwen3, Gemma 3) their lengths say little.
"""

from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import EvictionPolicy


class Knorm(EvictionPolicy):
    """Options of ``knorm``."""

    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Minus the L2 norm of each key."""
        norm: Tensor = cached.keys().float().norm(dim=-1)
        return -norm
