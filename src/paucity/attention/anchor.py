"""Anchor attention: keep the keys whose score comes close to the highest score near the start and near the query.

Paper: Zhang et al. 2025 (AnchorAttention), https://arxiv.org/abs/2505.23520, Sec. 3 and Algorithms 1 to 3.

    x_a = max(q [K_init, K_w]^T / sqrt(d))        for every query; K_init: first block, K_w: local window
    keep key j:  avgpool(q) k_j / sqrt(d) + theta >= avgpool(x_a)        for some block of the group

Queries are pooled over blocks of ``q_block``; ``step`` consecutive blocks are a group that shares its *stripes*, single
keys. First block and window are always computed. The window of a query reaches from one block before its group to the
query itself. There is no budget: how much stays follows from ``theta``, which says by how many logits (natural, as in
the paper's equation) a key may fall short of the anchor.

Differs from the published code: that scores in base 2 in its fast kernel, so that its ``theta`` of 12 are 8.3 natural
logits; it computes queries behind the last whole group densely, here they are a short group. The window's extra block
is from that code; with it the first queries of a group have a window too. The maximum is not handed on to the
attention: the kernel computes the products of the anchor region again. With a soft cap, scores and anchors are capped
logits; with a sliding window keys count only for blocks that see them.
"""

import torch
from pydantic import Field
from torch import Tensor

from ..ops.blocks import grouped_products, pool_blocks, soft_capped
from ..ops.formats.stripes import KeyLists
from .policy import PrefillPolicy
from .prompt import Prompt


class Anchor(PrefillPolicy):
    """Options of ``anchor``; ``q_block`` queries are pooled into one.

    Attributes:
        theta: how far below the anchor a score may be, in logits; more keeps more.
        step: blocks of queries that share their stripes.
    """

    min_length: int = Field(2048, ge=0)
    theta: float = Field(12.0, allow_inf_nan=False)
    step: int = Field(16, ge=1)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> KeyLists:
        """First block, window and stripes of every group, as one key list per head."""
        before, keys = key.shape[2] - query.shape[2], key.shape[2]
        group = self.q_block * self.step
        anchors = pool_blocks(row_anchors(query, key, prompt, self.q_block, self.step), self.q_block, start=before)
        pooled = pool_blocks(query.detach(), self.q_block, start=before)
        groups = range(before // group, -(-keys // group))
        kept = torch.zeros(*query.shape[:2], len(groups), keys, dtype=torch.bool, device=query.device)
        for row, index in enumerate(groups):
            start = index * group
            low = window_start(start, self.q_block)
            kept[:, :, row, : self.q_block] = True
            kept[:, :, row, low : start + group] = True
            if low > self.q_block:
                first = before // self.q_block
                mine = slice(max(0, index * self.step - first), (index + 1) * self.step - first)
                begin = torch.arange(mine.start, mine.start + pooled[:, :, mine].shape[2], device=query.device) + first
                stripes = self._stripes(pooled[:, :, mine], anchors[:, :, mine], key[:, :, self.q_block : low], prompt)
                if prompt.window is not None:
                    oldest = (begin * self.q_block).clamp(min=before) - prompt.window
                    stripes &= torch.arange(self.q_block, low, device=query.device) > oldest.unsqueeze(-1)
                kept[:, :, row, self.q_block : low] = stripes.any(2)
        lists = KeyLists.from_mask(kept, q_block=group)
        return lists if before % group == 0 else by_block(lists, before, keys, self.q_block, self.step)

    def lookahead(self, length: int) -> int:
        """A group: its queries share their stripes."""
        return self.q_block * self.step

    def _stripes(self, pooled: Tensor, anchors: Tensor, key: Tensor, prompt: Prompt) -> Tensor:
        """Which keys come close to the anchor of which block: bool ``[B, H, blocks, keys]``."""
        score = _logits(pooled, key.detach().to(pooled.dtype), prompt)
        return score >= anchors - self.theta


def row_anchors(query: Tensor, key: Tensor, prompt: Prompt, q_block: int, step: int) -> Tensor:
    """Highest logit of every query over the first block and its window.

    Args:
        query: ``[B, H, Tq, D]``, the last ``Tq`` of the ``Tk`` tokens.
        key: ``[B, H_kv, Tk, D]``.
        prompt: scale, softcap and window.
        q_block: keys in the first block, and queries that are computed together.
        step: blocks of queries in a group.

    Returns:
        ``[B, H, Tq, 1]`` float32 (float64 for float64), detached.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    query, key = query.detach(), key.detach().to(wide)
    before, keys = key.shape[2] - query.shape[2], key.shape[2]
    found = query.new_empty(*query.shape[:3], 1, dtype=wide)
    for start in range(before - before % q_block, keys, q_block):
        here, stop = max(start, before), min(start + q_block, keys)
        rows = query[:, :, here - before : stop - before].to(wide)
        low = window_start(start // (q_block * step) * q_block * step, q_block)
        near = _logits(rows, key[:, :, low:stop], prompt)
        at = torch.arange(here, stop, device=key.device).unsqueeze(-1)
        near[..., here - low :] += torch.full((stop - here,) * 2, -torch.inf, device=key.device).triu(1).to(wide)
        if prompt.window is not None:
            near.masked_fill_(torch.arange(low, stop, device=key.device) <= at - prompt.window, -torch.inf)
        best = near.amax(-1, keepdim=True)
        if low:
            far = _logits(rows, key[:, :, : min(q_block, low)], prompt)
            if prompt.window is not None:
                far.masked_fill_(torch.arange(far.shape[-1], device=key.device) <= at - prompt.window, -torch.inf)
            best = torch.maximum(best, far.amax(-1, keepdim=True))
        found[:, :, here - before : stop - before] = best
    return found


def window_start(group_start: int, q_block: int) -> int:
    """The first key in the window of a group that begins at ``group_start``."""
    return max(0, group_start - q_block)


def by_block(lists: KeyLists, first: int, num_keys: int, q_block: int, step: int) -> KeyLists:
    """Lists of groups as lists of their blocks, from the block of position ``first`` on.

    A prompt that begins within a group so computes no more than its own blocks.
    """
    group = torch.arange(first // q_block, -(-num_keys // q_block), device=lists.positions.device) // step
    group = group - first // (q_block * step)
    return KeyLists(lists.positions[:, :, group], lists.counts[:, :, group], q_block)


def _logits(query: Tensor, key: Tensor, prompt: Prompt) -> Tensor:
    """Scaled and capped products ``[B, H, rows, n]`` of ``[B, H, rows, D]`` and ``[B, H_kv, n, D]``, of one dtype."""
    return soft_capped(grouped_products(query * prompt.scale, key), prompt.softcap)
