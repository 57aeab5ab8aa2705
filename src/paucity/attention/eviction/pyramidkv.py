"""PyramidKV: lower layers keep more, as attention narrows from layer to layer.

Paper: Cai et al. 2024, https://arxiv.org/abs/2406.02069, Sec. 4: of ``m`` layers with budget ``k`` on average, the last
keeps ``k / beta``, the first ``2 k - k / beta``, and those between lie on a line (Eq. 3); which keys, the votes of the
last ``window_size`` queries say, as in SnapKV. The window stays in every layer, on top of what is shared out so.

Differences: grouped queries and short turns as in `snapkv`. A layer whose text is shorter than its budget leaves the
rest unused. With ``layers`` the line is still one over all layers of the model.
"""

from pydantic import Field
from torch import Tensor

from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import EvictionPolicy
from .votes import Kernel, Pooling, window_votes


class PyramidKV(EvictionPolicy):
    """Options of ``pyramidkv``; ``num_keys`` and ``density`` are the mean over the layers.

    Attributes:
        beta: how many times less than the mean the last layer keeps, window aside.
        window_size: tokens at the end that vote, and stay.
        kernel_size: keys over which votes are pooled, odd.
        pooling: "avg" or "max".
    """

    beta: float = Field(20.0, ge=1)
    window_size: int = Field(8, ge=1)
    kernel_size: Kernel = 7
    pooling: Pooling = "max"

    @property
    def lookback(self) -> int:
        """The window."""
        return self.window_size

    def allowance(self, cached: Cached, prompt: Prompt) -> Tensor:
        """The layer's place on the line, and the window."""
        mean = self.even_budgets(cached)
        window = mean.clamp(max=self.window_size)
        last = 1 / self.beta
        depth = prompt.layer / max(1, (prompt.num_layers or 1) - 1)
        share = 1.0 if prompt.num_layers in (None, 1) else (2 - last) + (2 * last - 2) * depth
        return (window + ((mean - window) * share).round().long()).clamp(min=1)

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
