"""FlashAttention: exact attention, tile by tile.

Paper: Dao et al. 2022, https://arxiv.org/abs/2205.14135, Algorithm 1: ``softmax(q k^T) v`` over one tile of keys after
the other, with a running maximum and a running sum (the online softmax), so that no ``T * T`` matrix is ever stored.

Nothing is left out, so this is the model's own attention by another kernel: for heads that stay dense in `per_head`,
and as the baseline that a sparse pattern has to beat. The tiles are sized for the caches of a CPU in the native kernel,
for shared memory in the Triton one. Without either, and without gradients, it runs as PyTorch's own attention.
Dropout is not here: a prompt that needs it is computed by the model.
"""

from pydantic import Field
from torch import Tensor

from ..ops.formats.stripes import Window
from .policy import PrefillPolicy
from .prompt import Prompt


class Flash(PrefillPolicy):
    """Options of ``flash``: it has none of its own, and as it is exact its ``min_length`` is 0."""

    min_length: int = Field(0, ge=0)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> Window:
        """Every key, for every head; ``query`` and ``key`` are not looked at."""
        return Window(key.shape[2], q_block=self.q_block)

    def lookahead(self, length: int) -> int:
        """1: nothing is chosen."""
        return 1
