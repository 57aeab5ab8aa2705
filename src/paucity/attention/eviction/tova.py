"""TOVA: whatever the newest token attends to least goes, the same in all heads of a layer.

Paper: Oren et al. 2024, "Transformers are Multi-State RNNs", https://arxiv.org/abs/2401.06104, Sec. 3.2: attention of
the last query, averaged over the heads of a layer; when the cache is full, the lowest entry goes, step by step. Nothing
is kept because it is recent or first.

Difference: a prompt is cut once, by its last query, as its queries are computed together.
"""

from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import EvictionPolicy, probabilities


class Tova(EvictionPolicy):
    """Options of ``tova``."""

    every: int = Field(1, ge=0)

    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Mean attention of the newest token."""
        weights = probabilities(query[:, :, -1:], cached, prompt)[:, :, 0]
        return weights.mean(1, keepdim=True).expand(-1, cached.lengths.shape[1], -1)
