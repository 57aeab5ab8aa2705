"""SnapKV: what the end of a prompt attends to, with its neighbours, is what the answer will need.

Paper: Li et al. 2024, https://arxiv.org/abs/2404.14469, Sec. 4 and Listing 1: the attention that the last
``window_size`` queries pay to each earlier key is summed and pooled over neighbouring keys; the best keys of each head
stay, and the window itself. A fact is kept as far as the kernel reaches from where the question looks: for answers of
several tokens it must be about as wide as they are. The default (7, greatest) is what the authors run LongBench with;
their code and kvpress fall back to 5 and the mean.

Differences: with grouped queries the votes of the heads that share a KV head are averaged, so that keys are never
repeated; of a turn shorter than the window, the last queries of the turn before vote, too. ``every`` goes on voting
with the newest queries during generation, which the paper does not.
"""

from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import EvictionPolicy
from .votes import Kernel, Pooling, window_votes


class SnapKV(EvictionPolicy):
    """Options of ``snapkv``.

    Attributes:
        window_size: tokens at the end that vote, and stay; of a budget below that the newest stay.
        kernel_size: keys over which votes are pooled, odd.
        pooling: "avg" or "max".
    """

    window_size: int = Field(64, ge=1)
    kernel_size: Kernel = 7
    pooling: Pooling = "max"

    @property
    def lookback(self) -> int:
        """The window."""
        return self.window_size

    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Pooled votes of the window."""
        return window_votes(
            query,
            cached,
            prompt,
            window_size=self.window_size,
            kernel_size=self.kernel_size,
            pooling=self.pooling,
        )
