"""Chunked hierarchical (DHSA): chunks of keys are scored as wholes; a block of queries keeps the best ones.

Paper: Xiong et al. 2025, https://arxiv.org/abs/2510.24606, Sec. 3. A chunk ``C`` is as long as its content is alike. It
stands for its keys by their mean, scaled so that chunks of different lengths compare: ``k_C = mean_{j in C}(k_j)
sqrt(|C|)``. A block of queries, by its mean, gives each chunk the score ``q . k_C``; every key has the score of its
chunk (upsampling), and the highest keys stay up to the budget. (A factor ``sqrt`` of the queries would change no rank.)

A block's own keys always stay, and the first chunk of the text after them; both are part of the budget. Of the last
chunk that the budget reaches only the first keys stay. Chunks have ``k_block`` keys, or lengths of their own with
``boundary_threshold``. Not here: the paper's boundary predictor, a network trained for a model's keys to tell where the
attention that keys receive changes. In its place, without training, a chunk ends where the mean keys of the
``boundary_window`` positions before and after are least alike (cosine, over all heads) among the positions nearer than
``min_chunk``, and less alike than the threshold. No chunk crosses a multiple of ``q_block``, so that choices are causal
block by block. The public code averages queries and keys over heads before it scores; here every head has its own
choice.
"""

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import max_pool1d_with_indices, pad

from ..checks import fail
from ..ops.blocks import block_lengths, block_mask, diagonal_blocks, grouped_products, pool_blocks, visible_blocks
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import KeyLists
from ..ops.select import num_kept, topk_mask
from .policy import PrefillPolicy
from .prompt import Prompt


class ChunkedHierarchical(PrefillPolicy):
    """Options of ``chunked_hierarchical``. The budget is per block of queries and head.

    Attributes:
        density: keys kept as a share of the text's length; never fewer than a block of queries has.
        num_keys: keys kept, instead of ``density``.
        k_block: keys in a chunk, where chunks are fixed; the budget is then rounded up to whole ones.
        boundary_threshold: chunks end where adjacent windows of keys are less alike than this, in [-1, 1], instead of
            every ``k_block`` keys; 1 takes every local minimum.
        boundary_window: keys on either side that are compared.
        min_chunk: keys in the shortest chunk.
    """

    k_block: int = Field(32, ge=1)
    density: float = Field(0.125, gt=0, le=1)
    num_keys: int | None = Field(None, ge=1)
    boundary_threshold: float | None = Field(None, ge=-1, le=1)
    boundary_window: int = Field(4, ge=1)
    min_chunk: int = Field(8, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> "ChunkedHierarchical":
        if self.num_keys is not None and self.num_keys < self.q_block:
            raise fail("chunked_hierarchical", "num_keys", f"be at least q_block ({self.q_block})", self.num_keys)
        if self.boundary_threshold is None and self.q_block % self.k_block:
            raise fail("chunked_hierarchical", "q_block", f"be a multiple of k_block ({self.k_block})", self.q_block)
        if self.boundary_threshold is not None and self.boundary_window > self.min_chunk:
            wanted = f"be at most min_chunk ({self.min_chunk})"
            raise fail("chunked_hierarchical", "boundary_window", wanted, self.boundary_window)
        return self

    def budget(self, length: int) -> int:
        """Keys that a block of queries keeps of a text of ``length`` tokens, where it sees as many."""
        wanted = num_kept(length, 1 - self.density) if self.num_keys is None else self.num_keys
        return min(max(wanted, self.q_block), length)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> BlockMask | KeyLists:
        """The choice of every block of queries: whole fixed chunks, or the keys of chunks of varying length."""
        query, key = query.detach(), key.detach()
        if self.boundary_threshold is not None:
            return self._varying(query, key, prompt)
        queries, keys = query.shape[2], key.shape[2]
        sizes = (queries, keys, self.q_block, self.k_block)
        seen = visible_blocks(*sizes, window=prompt.window, device=query.device)
        own = diagonal_blocks(*sizes, device=query.device)
        count = block_lengths(keys, self.k_block, device=key.device).unsqueeze(-1)
        chunks = pool_blocks(key, self.k_block) * count.sqrt()
        score = grouped_products(pool_blocks(query, self.q_block, start=keys - queries), chunks)
        score = _ranked(score, own, seen, prompt)
        kept = topk_mask(score, k=-(-self.budget(keys) // self.k_block)) & seen
        return block_mask(kept, queries, keys, q_block=self.q_block, k_block=self.k_block)

    def lookahead(self, length: int) -> int:
        """The block of queries: it looks at its own queries and keys as a whole."""
        return self.q_block

    def _varying(self, query: Tensor, key: Tensor, prompt: Prompt) -> KeyLists:
        size, queries, keys = self.q_block, query.shape[2], key.shape[2]
        start, length, chunks = self.chunks(key)
        row = torch.arange((keys - queries) // size, -(-keys // size), device=key.device).unsqueeze(-1) * size
        oldest = 0 if prompt.window is None else row.clamp(min=keys - queries) - prompt.window + 1
        begin, end = (x.unsqueeze(1).unsqueeze(1) for x in (start, start + length))
        begin = torch.maximum(begin, torch.zeros_like(row) + oldest)
        room = torch.where(begin < row + size, end - begin, 0).clamp(min=0)  # keys that a row sees of each chunk
        score = grouped_products(pool_blocks(query, size, start=keys - queries), chunks)
        score = _ranked(score, end > row, room > 0, prompt)
        order = score.argsort(dim=-1, descending=True, stable=True)
        best = room.expand_as(score).gather(-1, order)
        best = torch.minimum((self.budget(keys) - best.cumsum(-1) + best).clamp(min=0), best)
        return span_lists(begin, torch.empty_like(best).scatter_(-1, order, best), q_block=size)

    def chunks(self, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Chunks of varying length: first key and length, int64 ``[B, n]``, and vector, float32 ``[B, H_kv, n, D]``.

        Texts with fewer chunks than others have empty ones at the end.

        Args:
            key: ``[B, H_kv, Tk, D]``.
        """
        keys = key.shape[2]
        size = min(self.q_block, keys)  # a longer block is the same block
        # Sums within each block of queries, which no chunk leaves: [B, H_kv, blocks, size + 1, D].
        wide = pad(key.to(torch.promote_types(key.dtype, torch.float32)), (0, 0, 0, -keys % size))
        sums = pad(wide.reshape(*key.shape[:2], -1, size, key.shape[3]).cumsum(-2), (0, 0, 1, 0))
        begins = self._boundaries(sums, keys).flatten(1)[:, :keys]
        count = begins.sum(-1)
        used = torch.arange(int(count.max()), device=key.device) < count.unsqueeze(-1)
        start = torch.full(used.shape, keys, device=key.device)
        start.masked_scatter_(used, begins.nonzero(as_tuple=True)[1])
        length = pad(start, (0, 1), value=keys).diff()
        place = start.clamp(max=keys - 1)
        place = (place // size * (size + 1) + place % size)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        flat, reach = sums.flatten(2, 3), length[:, None, :, None]
        total = flat.gather(2, place + reach) - flat.gather(2, place)
        return start, length, total / reach.clamp(min=1).sqrt()

    def _boundaries(self, sums: Tensor, keys: int) -> Tensor:
        """Where chunks begin, bool ``[B, blocks, q_block]``, from running sums of keys, as `chunks` has them."""
        near, apart, size = self.boundary_window, self.min_chunk, sums.shape[3] - 1
        assert self.boundary_threshold is not None
        begins = torch.zeros(len(sums), sums.shape[2], size, dtype=torch.bool, device=sums.device)
        begins[..., 0] = True
        if size < 2 * apart:
            return begins
        span = sums[..., near:, :] - sums[..., :-near, :]  # of the window that begins at each position
        norm = span.square().sum((1, -1)).sqrt()
        dot = (span[..., :-near, :] * span[..., near:, :]).sum((1, -1))
        alike = dot / (norm[..., :-near] * norm[..., near:]).clamp(min=torch.finfo(norm.dtype).tiny)
        at = torch.arange(near, size - near + 1, device=sums.device)
        text = torch.arange(sums.shape[2], device=sums.device).unsqueeze(-1) * size + at
        allowed = (at >= apart) & (at <= size - apart) & (text <= keys - apart)
        alike = alike.masked_fill(~allowed, torch.inf)
        lowest = max_pool1d_with_indices(-alike, [2 * apart - 1], [1], [apart - 1])[1] + near
        begins[..., near : size - near + 1] |= allowed & (lowest == at) & (alike < self.boundary_threshold)
        return begins


def span_lists(begin: Tensor, length: Tensor, *, q_block: int) -> KeyLists:
    """The key lists of spans that lie in order and apart.

    Args:
        begin: first key of each span; broadcasts to ``length``.
        length: ``[B, H, blocks of queries, n]`` int64, keys of each span; 0 is no span.
        q_block: queries in a block.
    """
    counts = length.sum(-1)
    size = length.flatten()
    shift = begin.expand_as(length).flatten() - (size.cumsum(0) - size)
    keys = (torch.arange(int(size.sum()), device=length.device) + shift.repeat_interleave(size)).int()
    width = int(counts.max())
    positions = torch.full((*counts.shape, width), -1, dtype=torch.int32, device=length.device)
    used = torch.arange(width, device=length.device) >= width - counts.unsqueeze(-1)
    return KeyLists(positions.masked_scatter_(used, keys), counts, q_block)


def _ranked(score: Tensor, own: Tensor, seen: Tensor, prompt: Prompt) -> Tensor:
    """Scores of chunks with a row's own on top, then the first of the text, and what it does not see at the end."""
    first = torch.arange(score.shape[-1], device=score.device) == 0
    if not prompt.dropped:
        score = score.masked_fill(first, torch.finfo(score.dtype).max)
    return score.masked_fill(own, torch.inf).masked_fill(~seen, -torch.inf)
