"""PowerAttention: near blocks, and blocks at distances that are powers of two, so that the reach doubles with a layer.

Paper: Chen et al. 2025, https://arxiv.org/abs/2503.03588, Sec. 3.3 and Algorithm 1. A block of queries sees the block
of keys at distance ``d`` if ``d & (d - 1) == 0`` (0 and the powers of two), if it is among the nearest, or if it is a
sink. A distance is the sum of the powers of its binary digits, so that what is ``N`` blocks away arrives after as many
layers as ``N`` has ones, at most ``log2 N``, and nothing is left out; a window of the same cost needs ``O(N)`` layers.

The window counts the block of the query itself: with the defaults and 128 blocks a query sees 5 near blocks, those at
8, 16, 32 and 64, and the sink, about as many as a window of 9 blocks with a sink, which the paper compares with.
The paper goes on to train the model with the pattern, and keeps two of every seven layers dense where it is evaluated
on long tasks: that is `layers` here.
"""

from pydantic import Field
from torch import Tensor

from ..ops.formats.block import BlockMask
from ..ops.patterns import is_power_of_two, text_blocks, text_mask
from .policy import PrefillPolicy
from .prompt import Prompt


class Power(PrefillPolicy):
    """Options of ``power``.

    Attributes:
        window_blocks: nearest blocks that a block of queries sees, its own included.
        sink_blocks: blocks at the start of the text that every block of queries sees.
        q_block: tokens in a block, of queries and of keys alike.
    """

    window_blocks: int = Field(5, ge=1)
    sink_blocks: int = Field(1, ge=0)
    q_block: int = Field(256, ge=1)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask:
        """The same pattern for every head; ``query`` and ``key`` are not looked at."""
        num_queries, num_keys = query.shape[2], key.shape[2]
        row, column = text_blocks(num_queries, num_keys, self.q_block, dropped=prompt.dropped, device=query.device)
        distance = row - column
        kept = is_power_of_two(distance) | (distance < self.window_blocks) | (column < self.sink_blocks)
        return text_mask(
            kept, num_queries, num_keys, block_size=self.q_block, dropped=prompt.dropped, window=prompt.window
        )

    def lookahead(self, length: int) -> int:
        """1: the pattern is fixed."""
        return 1
