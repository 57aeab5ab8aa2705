"""Sink and window: every query sees the first keys and its latest ones.

Papers: Xiao et al. 2023 (StreamingLLM), https://arxiv.org/abs/2309.17453, Sec. 3.2, for the pattern;
Jiang et al. 2024 (MInference), https://arxiv.org/abs/2407.02490, Sec. 3.1, "A-shape", for its use in prefill and the
defaults.

Both sizes count keys exactly for every single query, not blocks. Sinks are the first tokens of the text: a prompt
continued on a cache keeps its sinks. Positions keep their numbers (StreamingLLM renumbers within the cache, which
matters only for texts longer than the model was trained on; that is not here).
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
    """

    num_sinks: int = Field(128, ge=0)
    window_size: int = Field(3968, ge=1)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Window:
        """The same pattern for every head; ``query`` and ``key`` are not looked at."""
        return Window(self.window_size, max(0, self.num_sinks - prompt.dropped), self.q_block)

    def lookahead(self, length: int) -> int:
        """1: the pattern is fixed."""
        return 1
