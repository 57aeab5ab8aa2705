"""Sink and window: every query sees the first keys and its latest ones.

Papers: Xiao et al. 2023 (StreamingLLM), https://arxiv.org/abs/2309.17453, Sec. 3.2, for the pattern;
Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, Sec. 3.1, "A-shape", for its use in prefill and the
defaults.

Both sizes count keys exactly for every single query, not blocks; either may be a share of the text's length instead.
Sinks are the first tokens of the text: a prompt continued on a cache keeps its sinks. Positions keep their numbers
(StreamingLLM renumbers within the cache, which matters only for texts longer than the model was trained on; that is not
here).
"""

from pydantic import Field
from torch import Tensor

from ..ops.formats.stripes import Window
from .policy import PrefillPolicy
from .prompt import Prompt


class SinkWindow(PrefillPolicy):
    """Options of ``sink_window``.

    Attributes:
        num_sinks: keys at the start that every query sees.
        window_size: latest keys that a query sees, itself included.
        sink_share: sinks as a share of the text's length, instead of ``num_sinks``.
        window_share: latest keys as a share of the text's length, at least one, instead of ``window_size``.
    """

    num_sinks: int = Field(128, ge=0)
    window_size: int = Field(3968, ge=1)
    sink_share: float | None = Field(None, ge=0, le=1)
    window_share: float | None = Field(None, gt=0, le=1)

    def sizes(self, length: int) -> tuple[int, int]:
        """Sinks and window of a text of ``length`` tokens."""
        sinks = self.num_sinks if self.sink_share is None else round(length * self.sink_share)
        window = self.window_size if self.window_share is None else max(1, round(length * self.window_share))
        return sinks, window

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Window:
        """The same pattern for every head; of ``query`` and ``key`` only the length is looked at."""
        sinks, window = self.sizes(key.shape[2] + prompt.dropped)
        return Window(window, max(0, sinks - prompt.dropped), self.q_block)

    def lookahead(self, length: int) -> int:
        """1: the pattern is fixed; shares are of the whole text."""
        return 1 if self.sink_share is None and self.window_share is None else length
