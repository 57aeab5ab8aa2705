"""HiP: a search down a binary tree finds the keys of a block of queries, in O(T log T) for the whole text.

Paper: Lee et al. 2024 (HiP), https://arxiv.org/abs/2406.09827, Sec. 3.

For a block of queries the keys before its window are cut into ``k / k_block`` segments of equal length (in blocks of
``k_block`` keys). Every segment is split in two; a half scores ``max q . key`` over the queries of the block and the
keys of the block in its middle, its representative; the ``k / k_block`` best halves stay, and are split again until
all are single blocks. Each query head searches on its own, and every key may be found, however old. The search costs
``2 k log2(T / k)`` products per scoring query, in memory ``O(T / q_block * (k + window_size))`` positions.

Granularity: the block sees the latest ``window_size`` keys of its first query and all since, so that a query sees up to
``q_block - 1`` keys more, about half of that in the mean. What is searched ends where this begins: nothing is listed
twice, and ``k`` is what comes on top.

Not all queries of a block score but every ``query_stride``-th, the last one among them (the paper's sampling by
strides); 1 takes the maximum over all. Its default and that of ``num_sinks``, the first keys that always stay, are
those of the authors' code. Not here: the mask that decode steps refresh every few steps (they are dense here), the
offloaded cache, positions beyond those that the model was trained on, scores shared by heads, and the first layers
kept dense in some of the authors' settings (``layers`` does that).
"""

from pydantic import Field, model_validator
from torch import Tensor

from ..checks import fail
from ..kernels.tree import tree_select
from ..ops.formats.stripes import KeyLists
from .policy import PrefillPolicy
from .prompt import Prompt


class Hierarchical(PrefillPolicy):
    """Options of ``hierarchical``.

    Attributes:
        k: keys that the search keeps for a block of queries, a multiple of ``k_block``.
        q_block: queries that share one search.
        k_block: keys that are scored and kept together.
        window_size: latest keys that every query sees, itself included.
        num_sinks: keys at the start that every query sees.
        query_stride: of a block each ``query_stride``-th query scores, its last one among them.
    """

    q_block: int = Field(32, ge=1)
    k: int = Field(512, ge=1)
    k_block: int = Field(2, ge=1)
    window_size: int = Field(128, ge=1)
    num_sinks: int = Field(4, ge=0)
    query_stride: int = Field(2, ge=1)

    @model_validator(mode="after")
    def _whole_blocks(self) -> "Hierarchical":
        if self.k % self.k_block:
            raise fail("hierarchical", "k", f"be a multiple of k_block ({self.k_block})", self.k)
        return self

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> KeyLists:
        """The choice of every head; a soft cap or scale above 0 does not change which scores are highest."""
        return tree_select(
            query,
            key,
            k=self.k,
            q_block=self.q_block,
            k_block=self.k_block,
            window_size=self.window_size,
            num_sinks=max(0, self.num_sinks - prompt.dropped),
            query_stride=self.query_stride,
            window=prompt.window,
        )

    def lookahead(self, length: int) -> int:
        """``q_block``: a block's queries choose for that block alone."""
        return self.q_block
