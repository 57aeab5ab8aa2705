"""StreamingLLM: the first tokens, which serve as sinks of attention, and a window of the newest.

Paper: Xiao et al. 2023, https://arxiv.org/abs/2309.17453, Sec. 3.2: positions are places in the cache, not in the
text, so that sinks stand right before the window however long the text has become.

Keys stay as they were turned when they came in; instead the query is turned back by as many positions as were evicted
when it looks at sinks, and the two parts are merged by their lse. So no error of turning adds up. `reindex` off leaves
sinks where they were in the text, as libraries that only evict do.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...checks import fail
from ...kernels.attention.merge import merge_attention
from ..cache.cached import Cached
from ..prompt import Prompt
from .policy import EvictionPolicy


class StreamingLLM(EvictionPolicy):
    """Options of ``streaming_llm``.

    Attributes:
        num_sinks: tokens at the start of the text that stay; the rest of the budget is the window.
        reindex: whether sinks are attended at their places in the cache; it needs a rotary embedding of a kind known.
    """

    every: int = Field(1, ge=0)
    num_sinks: int = Field(4, ge=0)
    reindex: bool = True

    @model_validator(mode="after")
    def _room(self) -> "StreamingLLM":
        if self.num_keys <= self.num_sinks:
            raise fail("streaming_llm", "num_keys", f"be above num_sinks ({self.num_sinks})", self.num_keys)
        return self

    def observe(self, query: Tensor, cached: Cached, prompt: Prompt) -> None:
        """Refuse a layer that cannot be re-indexed before anything is evicted from it."""
        if self.reindex and prompt.rotary is None:
            raise fail("streaming_llm", "reindex", "be off where the position embedding is of no kind known", True)

    def allowance(self, cached: Cached, prompt: Prompt) -> Tensor:
        """As every policy; with ``density``, too, more than the sinks."""
        return self.even_budgets(cached).clamp(min=self.num_sinks + 1)

    def score(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """The place in the list; inf for sinks."""
        place = torch.arange(cached.longest, device=query.device)
        score = place.float().masked_fill(place < self.num_sinks, torch.inf)
        return score.expand(*cached.lengths.shape, -1)

    def attend(self, query: Tensor, cached: Cached, prompt: Prompt) -> Tensor:
        """Attention over what is left, ``[B, H, Tq, Dv]``, sinks right before the window."""
        gone = cached.num_text - cached.lengths[:, 0]
        if not self.reindex or not self.num_sinks or prompt.rotary is None or not bool(gone.any()):
            return cached.attend(query, prompt)
        batch, heads, queries, dim = query.shape
        stands = cached.num_text.unsqueeze(-1) + torch.arange(-queries, 0, device=query.device)
        rows = query.transpose(0, 1).reshape(heads, -1, dim)
        turned = prompt.rotary.turn(rows, stands.flatten(), (stands - gone.unsqueeze(-1)).flatten())
        turned = turned.view(heads, batch, queries, dim).transpose(0, 1)
        sinks = torch.arange(min(self.num_sinks, cached.longest), device=query.device).view(1, 1, -1)
        parts = (
            cached.attend_part(turned, prompt, sinks),
            cached.attend_part(query, prompt, skip=self.num_sinks),
        )
        return merge_attention([out for out, _ in parts], [lse for _, lse in parts])[0]

    @property
    def own_attention(self) -> bool:
        """Only where sinks are moved."""
        return self.reindex and self.num_sinks > 0
