"""What a policy did to one prompt, layer by layer: density, recall of attention mass, error, time and pictures."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_int
from ..kernels.attention import Problem, attention_recall
from ..kernels.attention.pairs import visible
from ..ops.formats.stripes import causal_mask
from .compute import Part, attend_exactly, first_row, lead_of, take_heads
from .interface import exact_pairs
from .prefill import AppliedAttention, Observed
from .prompt import Prompt
from .watch import Seconds, attention_seconds, watch


@dataclass(frozen=True)
class LayerTelemetry:
    """One prompt in one layer; of several rows the mean, of texts of different lengths in a batch one entry each.

    Attributes:
        layer: index of the layer.
        num_queries: tokens that were computed.
        num_keys: tokens that could be read, those of the cache included.
        density: ``[H]`` float32, pairs computed as a share of the dense model's.
        recall: ``[H]`` float32, share of the dense attention mass that the pattern keeps, mean over queries; None for a
            method that is not attention over a pattern.
        output_error: ``[H]`` float32, norm of the difference from dense attention over the norm of that.
        seconds: time of the attention, median of some rounds in turns with dense.
        select_seconds: time of the choice, part of ``seconds``.
        dense_seconds: time of ``scaled_dot_product_attention`` on the same prompt; in layers with a soft cap or a
            window, which it does not have, that of our own exact attention.
        picture: ``[H, n, n]`` float32, the share of the visible pairs that was computed, in cells of equal numbers of
            queries (down) and keys (across); NaN in cells of which nothing is visible. None like ``recall``.
    """

    layer: int
    num_queries: int
    num_keys: int
    density: Tensor
    recall: Tensor | None
    output_error: Tensor
    seconds: float
    select_seconds: float
    dense_seconds: float
    picture: Tensor | None


def observe(
    applied: AppliedAttention, input_ids: Tensor, *, cells: int = 48, repeats: int = 3, **inputs: Any
) -> list[LayerTelemetry]:
    """Run one prompt and tell what the policy did; costs several dense prefills, and counts in no density.

    Args:
        applied: a policy in force.
        input_ids: ``[B, T]`` int64.
        cells: pictures have this many cells a side, or as many as there are tokens.
        repeats: rounds of timing.
        inputs: what else the model takes, as ``attention_mask`` and ``past_key_values``.

    Returns:
        One entry for each layer that the policy rules and each length of text; none for what was computed densely
        because of its length or its mask.

    Raises:
        InputError: if ``cells`` or ``repeats`` is less than 1.
    """
    check_int("observe", "cells", cells)
    check_int("observe", "repeats", repeats)
    seen: list[LayerTelemetry] = []

    def note(seen_there: Observed) -> None:
        seen.append(_layer(seen_there, attention_seconds(applied.policy, seen_there, repeats=repeats), cells))

    watch(applied, note, partial(applied.model, input_ids=input_ids, **inputs))
    return seen


def _layer(seen: Observed, times: Seconds, cells: int) -> LayerTelemetry:
    query, key, value, prompt, done = seen
    (batch, heads, queries, _), keys = query.shape, key.shape[2]
    exact = attend_exactly(query, key, value, prompt).out.float()
    error = (done.out.float() - exact).norm(dim=(2, 3)) / exact.norm(dim=(2, 3)).clamp(min=1e-30)
    pairs = exact_pairs(queries, keys, prompt.window).to(done.kept.device)
    density = (done.kept / pairs).expand(batch, heads).mean(0).float()
    recall = picture = None
    if done.parts is not None:
        recall, picture = torch.zeros(heads), torch.zeros(heads, min(cells, queries), min(cells, keys))
        for part in done.parts:
            mine = list(range(heads) if part.heads is None else part.heads)
            recall[mine] = _recall(query, key, part, prompt).mean(0).cpu()
            picture[mine] = _picture(query, key, part, prompt, cells).cpu()
    means = error.mean(0).cpu()
    return LayerTelemetry(prompt.layer, queries, keys, density.cpu(), recall, means, *times, picture)


def _recall(query: Tensor, key: Tensor, part: Part, prompt: Prompt) -> Tensor:
    """Recall ``[B, heads of the part]``: that of whole blocks, without the queries that are missing in front."""
    query = query if part.heads is None else take_heads(query, part.heads)
    key = key if part.kv_heads is None else take_heads(key, part.kv_heads)
    queries, keys = query.shape[2], key.shape[2]
    lead = lead_of(part.pattern, queries, keys)
    recall = partial(attention_recall, scale=prompt.scale, softcap=prompt.softcap, window=prompt.window)
    found = recall(pad(query, (0, 0, lead, 0)), key, part.pattern)
    if not lead:
        return found
    before = keys - queries
    nobody = torch.zeros_like(query[:, :, :1]).expand(-1, -1, lead, -1)
    front = recall(nobody, key[:, :, :before], first_row(part.pattern, lead, before))
    return (found * (queries + lead) - front * lead) / queries


def _picture(query: Tensor, key: Tensor, part: Part, prompt: Prompt, cells: int) -> Tensor:
    """Share of the visible pairs kept in each cell, ``[heads of the part, n, n]``."""
    heads = query.shape[1] if part.heads is None else len(part.heads)
    queries, keys = query.shape[2], key.shape[2]
    lead = lead_of(part.pattern, queries, keys)
    rows, columns = (torch.arange(n) * min(cells, n) // n for n in (queries, keys))
    kept = torch.zeros(heads, int(rows[-1]) + 1, int(columns[-1]) + 1)
    total = torch.zeros(kept.shape[1:])
    problem = Problem(part.pattern, prompt.scale, window=prompt.window)
    causal = causal_mask(queries + lead, keys, window=prompt.window)[0, 0]
    step = max(1, 128 // part.pattern.q_block) * part.pattern.q_block
    for first in range(0, queries + lead, step):
        last = min(first + step, queries + lead)
        mask = visible(problem, queries + lead, keys, first, last).cpu()
        here = slice(max(0, lead - first), None)
        share = mask.float().mean(0)[:, here]
        share = share.repeat_interleave(heads // len(share), dim=0) if len(share) != heads else share
        at = rows[max(0, first - lead) : last - lead]
        for whole, count in ((kept, share), (total, causal[first:last][here].float())):
            narrow = count.new_zeros(*count.shape[:-1], whole.shape[-1]).index_add_(-1, columns, count)
            whole.index_add_(-2, at, narrow)
    return torch.where(total > 0, kept / total, torch.nan)
