"""Claim: at equal cost, single keys chosen by anchors keep more of the attention than blocks or lines do.

Paper: Zhang et al. 2025, https://arxiv.org/abs/2505.23520, Sec. 4.3 and Figure 6: recall against sparsity. Measured on
the queries and keys of all layers and heads of a model that reads text it was not trained on: the share of the dense
attention mass that a pattern keeps (recall), at the number of pairs that anchor attention comes to for each ``theta``.

The others get the same pairs, rounded up in their favour: blocks of 128 keys, first and own block always, then the best
by pooled query times pooled key (the block estimate of MInference and FlexPrefill), or by the same evidence that
anchors have (pooled query times every key, summed as exponentials), in every block of queries as many as anchor
attention pays there; vertical-slash in every layer, with its paper's 1000 columns to 6096 distances. So the others are
given anchor attention's own choice of how much each head, row or layer needs. `holds` if the mean recall of anchors is
the highest at every ``theta`` at which they leave something out. The full run also has blocks with the same share for
every head and row: their recall at the density of anchors, and the density at which they reach their recall.

On the embedded model the claim does not hold, at 4096 tokens with thetas of 8 to 12: anchors keep a little more than
blocks by pooled keys, as much as blocks by the same evidence, and at small thetas less than vertical-slash. What they
have is the choice of how much: against blocks with the same share everywhere their lead is large. Differences: the
paper reads up to 128k tokens; groups are 4 blocks instead of 16, which would be half of the text, and window.
"""

import itertools
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.anchor import Anchor
from ..attention.prompt import Prompt
from ..attention.vertical_slash import VerticalSlash, line_scores
from ..attention.watch import record
from ..kernels.attention import attention_recall
from ..measure.data import held_out_python
from ..measure.tokens import context_length, encode
from ..models.load import Loaded, load
from ..ops.blocks import block_mask, pool_blocks, visible_blocks
from ..ops.formats.block import BlockMask
from ..ops.formats.stripes import KeyLists
from . import CLAIMS
from .base import ClaimResult

NAME = "anchor-higher-recall"
LENGTH, QUICK_LENGTH = 4096, 1536
NUM_TEXTS, QUICK_TEXTS = 2, 1
THETAS, QUICK_THETAS = (8.0, 10.0, 12.0), (8.0, 12.0)
BLOCK, STEP, QUICK_STEP = 128, 4, 2
SHARES = (0.15, 0.3, 0.45, 0.6, 0.8)
OTHERS = ("blocks", "blocks_by_key", "vertical_slash")

Layer = tuple[Tensor, Tensor, Prompt]


def run(*, quick: bool, seed: int = 0, loaded: Loaded | None = None) -> ClaimResult:
    """Recall of anchors and of the others at the same pairs, for several thetas and texts.

    Args:
        quick: one text of 1536 tokens, groups of two blocks, and two thetas.
        seed: not used; nothing is drawn.
        loaded: the model, the embedded one if not given.
    """
    started = time.monotonic()
    loaded = loaded or load("embedded")
    thetas, step = (QUICK_THETAS, QUICK_STEP) if quick else (THETAS, STEP)
    wanted, count = (QUICK_LENGTH, QUICK_TEXTS) if quick else (LENGTH, NUM_TEXTS)
    tokens = encode(loaded.need_tokenizer(NAME), held_out_python()[: 32 * wanted * count])
    length = min(wanted, len(tokens) // count, context_length(loaded.model) or wanted)
    texts = [
        captured(loaded.model, torch.tensor(tokens[i * length : (i + 1) * length]).unsqueeze(0)) for i in range(count)
    ]
    rows: list[dict[str, Any]] = []
    for theta in thetas:
        measured = [_compared(layer, Anchor(theta=theta, step=step, q_block=BLOCK)) for text in texts for layer in text]
        rows.append({"theta": theta, **{name: _mean([one[name] for one in measured]) for name in measured[0]}})
    curve = [] if quick else [_mean([_blocks_at(layer, share) for layer in texts[0]]) for share in SHARES]
    for row in rows if curve else ():
        row["uniform_blocks"] = {
            "recall_at_this_density": _between(curve, "density", row["anchor"]["density"], "recall"),
            "density_for_this_recall": _between(curve, "recall", row["anchor"]["recall"], "density"),
        }
    sparse = [row for row in rows if row["anchor"]["density"] < 1]
    return ClaimResult(
        claim=NAME,
        paper=CLAIMS[NAME].paper,
        statement=CLAIMS[NAME].statement,
        paper_figure={"recall at the same sparsity": "higher than FlexPrefill's and vertical-slash's at every theta"},
        measured={"by_theta": rows, "uniform_blocks": curve},
        holds=bool(sparse)
        and all(row["anchor"]["recall"] > row[other]["recall"] for row in sparse for other in OTHERS),
        seconds=time.monotonic() - started,
        seed=seed,
        settings={
            "model": loaded.source,
            "text": "held_out_python",
            "length": length,
            "texts": count,
            "block": BLOCK,
            "step": step,
            "thetas": list(thetas),
        },
    )


def captured(model: nn.Module, ids: Tensor) -> list[Layer]:
    """Queries and keys of every layer for the text ``ids`` ``[1, T]``, as attention gets them."""
    return [(seen.query.float(), seen.key.float(), seen.prompt) for seen in record(model, ids)]


def top_blocks(score: Tensor, pairs: Tensor, length: int) -> BlockMask:
    """First and own block of every block of queries, and the best others, until the pairs are ``pairs`` or more.

    Args:
        score: ``[1, H, n, n]``.
        pairs: ``[1, H, n]``, pairs that each block of queries may pay; never less than the forced blocks.
        length: of the text.
    """
    seen = visible_blocks(length, length, BLOCK, BLOCK, device=score.device)
    own = torch.eye(len(seen), dtype=torch.bool, device=score.device)
    forced = own.clone()
    forced[:, 0] = True
    score = score.masked_fill(forced, torch.inf).masked_fill(~seen, -torch.inf)
    rows = (length - torch.arange(len(seen), device=score.device) * BLOCK).clamp(max=BLOCK)
    others = (pairs - rows * (rows + 1) // 2).clamp(min=0) / (rows * BLOCK)
    rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = seen & ((rank < 1 + others.ceil().unsqueeze(-1)) | forced)
    return block_mask(kept, length, length, q_block=BLOCK, k_block=BLOCK)


def _block_scores(query: Tensor, key: Tensor, prompt: Prompt) -> dict[str, Tensor]:
    """Both estimates of a block's mass ``[1, H, n, n]``, comparable within a block of queries."""
    batch, heads, _, dim = query.shape
    pooled = pool_blocks(query, BLOCK).view(batch, key.shape[1], -1, dim) * prompt.scale
    means = pool_blocks(key, BLOCK)
    by_key = nn.functional.pad(pooled @ key.mT, (0, -key.shape[2] % BLOCK), value=-torch.inf)
    scores = {"blocks": pooled @ means.mT, "blocks_by_key": by_key.view(*by_key.shape[:-1], -1, BLOCK).logsumexp(-1)}
    return {name: score.reshape(batch, heads, -1, means.shape[2]) for name, score in scores.items()}


def _compared(layer: Layer, policy: Anchor) -> dict[str, dict[str, float]]:
    """Density and recall of anchors, and of the others at as many pairs."""
    query, key, prompt = layer
    length = key.shape[2]
    mine = policy.select(query, key, prompt)
    pairs = _pairs_by_block(mine, length)
    found = {"anchor": _figures(layer, mine)}
    for name, score in _block_scores(query, key, prompt).items():
        found[name] = _figures(layer, top_blocks(score, pairs, length))
    found["vertical_slash"] = _figures(layer, _lines(layer, float(pairs.sum(-1).float().mean())))
    return found


def _pairs_by_block(pattern: KeyLists, length: int) -> Tensor:
    """Pairs that each block of `BLOCK` queries pays, ``[1, H, n]``."""
    seen = pattern.visible(length, length).sum(-1)
    return nn.functional.pad(seen, (0, -length % BLOCK)).view(*seen.shape[:2], -1, BLOCK).sum(-1)


def _lines(layer: Layer, pairs: float) -> KeyLists:
    """The vertical-slash pattern with the fewest lines (by 1/512) that pays ``pairs`` on the mean over heads."""
    query, key, prompt = layer
    length = key.shape[2]
    scores = line_scores(query, key, prompt)

    def pattern(steps: int) -> KeyLists:
        slashes = -(-length * steps // 512)
        columns = max(1, round(slashes * 1000 / 6096))
        policy = VerticalSlash(num_vertical=columns, num_slash=slashes, forced_vertical=1, forced_slash=1)
        return policy.pattern(*scores, num_queries=length)

    low, high = 1, 512
    while low < high:
        middle = (low + high) // 2
        if float(pattern(middle).kept_pairs(length, length).float().mean()) >= pairs:
            high = middle
        else:
            low = middle + 1
    return pattern(low)


def _blocks_at(layer: Layer, share: float) -> dict[str, float]:
    """Blocks by the better evidence, at a share of the pairs of every block of queries."""
    query, key, prompt = layer
    length = key.shape[2]
    full = _pairs_by_block(
        KeyLists(torch.arange(length).int()[None, None, None], torch.tensor([[[length]]]), length), length
    )
    score = _block_scores(query, key, prompt)["blocks_by_key"]
    return _figures(layer, top_blocks(score, (full * share).long(), length))


def _figures(layer: Layer, pattern: KeyLists | BlockMask) -> dict[str, float]:
    query, key, prompt = layer
    length = key.shape[2]
    recall = attention_recall(query, key, pattern, scale=prompt.scale, softcap=prompt.softcap, window=prompt.window)
    kept = pattern.kept_pairs(length, length, window=prompt.window).float()
    return {"density": float(kept.mean()) / (length * (length + 1) / 2), "recall": float(recall.mean())}


def _mean(found: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.mean(one[name] for one in found) for name in found[0]}


def _between(curve: list[dict[str, float]], known: str, value: float, wanted: str) -> float | None:
    """What the curve has where ``known`` is ``value``, by straight lines between its points; None beyond its ends."""
    for low, high in itertools.pairwise(curve):
        if low[known] <= value <= high[known] and high[known] > low[known]:
            return low[wanted] + (value - low[known]) / (high[known] - low[known]) * (high[wanted] - low[wanted])
    return None
