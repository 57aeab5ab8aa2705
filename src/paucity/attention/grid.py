"""Grid: heads that look at every so many visual tokens, and other choices for text than for vision.

Paper: Li et al. 2025 (MMInference), https://arxiv.org/abs/2504.16083, Sec. 3 and the algorithms of its appendix.

In the keys of video, attention lies on lines at a fixed distance, that of the rows or the frames. Softmax attention of
the last queries is summed over the residues of a candidate stride; the residues (*phases*) with the most mass are the
lines, and the stride whose lines hold the most is taken, head by head. Lines are *vertical* (keys that all see),
*slash* (distances) and *horizontal* (queries that see everything before them). Sinks and a window are always seen, and
the heaviest single keys beside the lines.

Where text and vision alternate, a head may choose otherwise for each: ``boundary="query"`` estimates by the last visual
queries for visual ones and by the last text queries for text (*Q-boundary*), ``"both"`` gives in addition the text
keys and the visual keys a budget of their own (*2D-boundary*). Phases go on from one span of visual tokens to the next,
as if these followed each other.

Other than in the paper: mass is counted over what equally many keys of even attention would hold, since the largest
residue alone would always prefer the shortest stride; mass in the sinks and the window, which are kept anyway, does not
count; and what is computed stays in the order of the text, for gathering keys needs no permutation of them. So queries
of a block share their keys: a window counts from the first of them, a slash line is as wide as the block, and a block
with text and vision keeps what either keeps. Only queries on horizontal lines are taken out of their blocks; what the
first pass made of them is dropped, but counted. The search for the pattern of each head is `paucity.attention`'s, over
any policies; here all heads have the same options.
"""

import time
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ..checks import check_int, fail
from ..ops.blocks import grouped_products, soft_capped
from ..ops.formats.stripes import KeyLists
from ..ops.select import num_kept, topk_mask
from .compute import Attended, attend_pattern, rows_see_all
from .policy import PrefillPolicy
from .prompt import Prompt

_AT_ONCE = 1 << 22
"""Places that are worked out at once."""


class Grid(PrefillPolicy):
    """Options of ``grid``. Budgets are per head.

    Attributes:
        strides: candidates for the distance of lines, in visual tokens: of a row, of a frame.
        spans: first token, and one after the last, of each run of visual tokens; None is the whole text.
        num_phases: lines in a stride.
        line_share: lines as a share of the keys, instead of ``num_phases``.
        vertical: whether there are lines of keys.
        slash: whether there are lines of distances.
        horizontal: whether the queries on the lines of keys see everything.
        boundary: whether text and visual queries, and their keys, are chosen for apart.
        num_vertical: single keys beside the lines; with ``boundary="both"`` of text and of vision each.
        vertical_share: these as a share of the text's length, instead of ``num_vertical``.
        num_sinks: keys at the start that every query sees.
        window_size: latest keys that the first query of a block sees, itself included; the others see as far back.
        num_last_queries: queries at the end that the estimate uses.
    """

    strides: list[int] = Field(min_length=1)
    spans: list[list[int]] | None = None
    num_phases: int = Field(1, ge=1)
    line_share: float | None = Field(None, gt=0, le=1)
    vertical: bool = True
    slash: bool = False
    horizontal: bool = False
    boundary: Literal["none", "query", "both"] = "none"
    num_vertical: int = Field(1000, ge=0)
    vertical_share: float | None = Field(None, gt=0, le=1)
    num_sinks: int = Field(30, ge=0)
    window_size: int = Field(1024, ge=1)
    num_last_queries: int = Field(64, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        for stride in self.strides:
            check_int("grid", "strides", stride)
            if self.line_share is None and self.num_phases > stride:
                raise fail("grid", "num_phases", f"be at most every stride ({stride})", self.num_phases)
            if self.line_share is not None and self.line_share * stride < 1:
                raise fail("grid", "line_share", f"be at least one key in a stride of {stride}", self.line_share)
            if self.slash and stride <= self.q_block:
                raise fail("grid", "strides", f"be longer than q_block ({self.q_block}) with slash", stride)
        if self.horizontal and not self.vertical:
            raise fail("grid", "horizontal", "be given with vertical, whose lines it takes", self.horizontal)
        end = 0
        for span in self.spans or []:
            if len(span) != 2 or not end <= span[0] < span[1]:
                raise fail("grid", "spans", "be [start, stop] in ascending order, not empty", self.spans)
            end = span[1]
        return self

    def phases(self, stride: int) -> int:
        """Lines in a stride."""
        return self.num_phases if self.line_share is None else int(self.line_share * stride + 1e-9)

    def select(self, query: Tensor, key: Tensor, prompt: Prompt) -> KeyLists:
        """The keys of every block; horizontal lines are not among them."""
        return self._choose(query, key, prompt)[0]

    def compute(self, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt) -> Attended:
        """Attention over what `select` chooses, and over all keys for the queries on horizontal lines."""
        started = time.perf_counter()
        pattern, lines = self._choose(query, key, prompt)
        seconds = time.perf_counter() - started
        done = attend_pattern(query, key, value, pattern, prompt, select_seconds=seconds)
        if not self.horizontal or not bool(lines.any()):
            return done
        return rows_see_all(done, lines, query, key, value, prompt)

    def _choose(self, query: Tensor, key: Tensor, prompt: Prompt) -> tuple[KeyLists, Tensor]:
        """Keys of every block, and which queries are on lines: bool ``[B, H, Tq]``."""
        (batch, heads, queries, _), keys, device = query.shape, key.shape[2], query.device
        order = self._order(keys, prompt.dropped, device)  # of visual tokens, -1 for text
        visual, first = order >= 0, keys - queries
        num_sinks = max(0, self.num_sinks - prompt.dropped)
        sinks = torch.arange(keys, device=device) < num_sinks
        wanted = self.num_vertical if self.vertical_share is None else num_kept(keys, 1 - self.vertical_share)
        apart = self.boundary != "none"
        kinds = visual[first:].int() if apart else torch.ones(queries, dtype=torch.int32, device=device)
        kept = torch.zeros(batch, heads, 3, keys, dtype=torch.bool, device=device)  # text, vision, blocks with both
        lines, covered = torch.zeros(batch, heads, keys, dtype=torch.bool, device=device), None
        for kind in (0, 1):
            rows = (kinds == kind).nonzero().squeeze(-1)[-self.num_last_queries :]
            if not len(rows):
                continue
            prob = _attention_beyond(query, key, rows, prompt, num_sinks, self.window_size, self.q_block)
            if kind == 1 and bool(visual.any()):
                lines, covered = self._lines(prob, order, first + rows, queries)
            mass = prob.sum(-2).masked_fill(sinks | (lines if kind else False), -torch.inf)
            found = torch.zeros_like(lines)
            for group in (visual, ~visual) if self.boundary == "both" else (torch.ones_like(visual),):
                score = mass.masked_fill(~group, -torch.inf)
                found |= topk_mask(score, k=min(wanted, keys)) & (score > -torch.inf)
            kept[:, :, kind] = found | sinks
        kept[:, :, 1] |= lines if self.vertical else False
        kept[:, :, 2] = kept[:, :, 0] | kept[:, :, 1]
        lists = self._lists(kept, kinds, first)
        if covered is not None:
            lists = KeyLists.from_mask(_as_mask(lists, keys) | covered, q_block=self.q_block)
        return lists, lines[:, :, first:]

    def _order(self, keys: int, dropped: int, device: torch.device) -> Tensor:
        """The number of each visual token among these, -1 for text: ``[Tk]``."""
        if self.spans is None:
            return dropped + torch.arange(keys, device=device)
        visual = torch.zeros(dropped + keys, dtype=torch.bool, device=device)
        for start, stop in self.spans:
            visual[start:stop] = True
        return torch.where(visual, visual.cumsum(0) - 1, -1)[dropped:]

    def _lines(self, prob: Tensor, order: Tensor, rows: Tensor, queries: int) -> tuple[Tensor, Tensor | None]:
        """Lines of keys, bool ``[B, H, Tk]``, and keys on lines of distances, bool ``[B, H, blocks, Tk]`` or None."""
        visual = order >= 0
        index = visual.nonzero().squeeze(-1)
        mass, place = prob.sum(-2)[..., index], order[index]
        keys, first = len(order), len(order) - queries
        starts = torch.arange(first // self.q_block, -(-keys // self.q_block), device=order.device) * self.q_block
        best = torch.full(mass.shape[:2], -torch.inf, device=mass.device)
        lines = torch.zeros(*mass.shape[:2], keys, dtype=torch.bool, device=mass.device)
        covered = lines.new_zeros(*mass.shape[:2], len(starts), keys) if self.slash else None
        for stride in sorted(set(self.strides)):
            share, total = self.phases(stride) / stride, mass.sum(-1)
            count = min(self.phases(stride), int(place[-1]) + 1)
            stride = min(stride, int(place[-1]) + 1)  # all longer ones are alike
            gain, chosen = torch.zeros_like(best), lines.new_zeros(mass.shape)
            if self.vertical:
                found = grid_phases(mass, place, stride, count)
                chosen = found[..., place % stride]
                gain = gain + (mass * chosen).sum(-1) - share * total
            far = None
            if self.slash:
                distance = ((order[rows].unsqueeze(-1) - place) % stride).flatten()
                by_row = (prob[..., index] * visual[rows].unsqueeze(-1)).flatten(-2)
                found = grid_phases(by_row, distance, stride, count)
                gain = gain + (by_row * found[..., distance]).sum(-1) - share * by_row.sum(-1)
                far = _slash_cover(found, order, starts, self.q_block, stride)
            better = gain > best + 1e-6 * total
            best = torch.where(better, gain, best)
            lines[..., index] = torch.where(better[..., None], chosen, lines[..., index])
            if covered is not None and far is not None:
                covered = torch.where(better[..., None, None], far, covered)
        return lines, covered

    def _lists(self, kept: Tensor, kinds: Tensor, first: int) -> KeyLists:
        """Of each block the kept keys before its window, and the window; ``kinds`` of queries ``[Tq]``."""
        keys, block, device = kept.shape[-1], self.q_block, kept.device
        starts = torch.arange(first // block, -(-keys // block), device=device) * block
        text, vision = (
            torch.zeros(len(starts), dtype=torch.bool, device=device).index_fill_(
                0, (first + (kinds == kind).nonzero().squeeze(-1)) // block - first // block, True
            )
            for kind in (0, 1)
        )
        row = torch.where(text & vision, 2, vision.long())
        low, high = (starts - self.window_size + 1).clamp(min=0), (starts + block).clamp(max=keys)
        single = KeyLists.from_mask(kept, q_block=1)
        positions, counts = single.positions[:, :, row], single.counts[:, :, row]
        width = positions.shape[-1]
        edge = low.int().view(-1, 1).expand(*positions.shape[:3], 1).contiguous()
        before = torch.searchsorted(positions.contiguous(), edge).squeeze(-1) - (width - counts)
        total = before + high - low
        most = int(total.max())
        at = torch.arange(most, dtype=torch.int32, device=device) - (most - total).int().unsqueeze(-1)
        listed = at + (low - before).int().unsqueeze(-1)
        if bool(before.any()):  # lists end before the shortest window begins
            span = slice(0, most - int((high - low).min()))
            place = (at[..., span] + (width - counts).int().unsqueeze(-1)).clamp_(0, width - 1).long()
            listed[..., span] = torch.where(
                at[..., span] < before.int().unsqueeze(-1), positions.gather(-1, place), listed[..., span]
            )
        return KeyLists(listed.masked_fill_(at < 0, -1), total, block)

    def lookahead(self, length: int) -> int:
        """``length``: the last queries choose for all."""
        return length


def grid_phases(mass: Tensor, place: Tensor, stride: int, count: int) -> Tensor:
    """The residues that hold the most mass.

    Args:
        mass: ``[..., N]``, not negative.
        place: ``[N]`` int64, the number whose residue counts.
        stride: by which.
        count: residues kept.

    Returns:
        bool ``[..., stride]``.
    """
    total = mass.new_zeros(*mass.shape[:-1], stride).index_add_(-1, place % stride, mass)
    return topk_mask(total, k=count)


def _attention_beyond(
    query: Tensor, key: Tensor, rows: Tensor, prompt: Prompt, num_sinks: int, window_size: int, q_block: int
) -> Tensor:
    """Attention of the queries ``rows``, 0 in the sinks and the window of their block: float32 ``[B, H, n, Tk]``."""
    queries, keys = query.shape[2], key.shape[2]
    last = query.detach().index_select(2, rows) * prompt.scale
    logits = soft_capped(grouped_products(last, key.detach()).float(), prompt.softcap)
    at, place = (rows + keys - queries).unsqueeze(-1), torch.arange(keys, device=key.device)
    begin = at // q_block * q_block - window_size + 1
    # Only columns from the first row's on are later than any row, or in a window: rows ascend.
    far, late = max(0, int(begin[0])), int(at[0])
    logits[..., late:].masked_fill_(place[late:] > at, -torch.inf)
    if prompt.window is not None:
        logits.masked_fill_(place <= at - prompt.window, -torch.inf)
    prob = logits.softmax(-1)
    prob[..., far:].masked_fill_(place[far:] >= begin, 0)
    prob[..., :num_sinks] = 0
    return prob


def _slash_cover(phases: Tensor, order: Tensor, starts: Tensor, q_block: int, stride: int) -> Tensor:
    """Visual keys at a kept distance from any visual query of a block: bool ``[B, H, blocks, Tk]``."""
    q_block = min(q_block, len(order))  # a longer block is the same block
    before = torch.arange(len(order), device=order.device) < (starts + q_block).unsqueeze(-1)
    at = starts.unsqueeze(-1) + torch.arange(q_block, device=order.device)
    mine = torch.where(at < len(order), order[at.clamp(max=len(order) - 1)], -1)
    # By residue of the key: is any query of the block a kept distance away? Text counts for a residue of its own.
    far = phases.nonzero()[:, -1].view(*phases.shape[:-1], 1, 1, -1)
    hit = phases.new_zeros(*phases.shape[:-1], len(starts), stride + 1)
    step = max(1, _AT_ONCE // (far.numel() * q_block))
    for first in range(0, len(starts), step):
        some = mine[first : first + step].unsqueeze(-1)
        residue = torch.where(some >= 0, (some - far) % stride, stride)
        hit[..., first : first + step, :].scatter_(-1, residue.flatten(-2), True)
    return hit[..., torch.where(order >= 0, order % stride, stride)] & (order >= 0) & before


def _as_mask(lists: KeyLists, keys: int) -> Tensor:
    """Bool ``[B, H, blocks, Tk]``."""
    mask = torch.zeros(*lists.counts.shape, keys + 1, dtype=torch.bool, device=lists.positions.device)
    return mask.scatter_(-1, lists.positions.long() % (keys + 1), True)[..., :keys]
