"""MInference: an offline search gives every head one of three patterns, at equal cost.

Paper: Jiang et al. 2024, https://arxiv.org/abs/2407.02490, Sec. 3.2, Algorithm 2 and the search space of its appendix.

Candidates are the A-shape (`paucity.attention.sink_window`), vertical-slash with several ratios of verticals to slashes
(`paucity.attention.vertical_slash`) and block-sparse (`paucity.attention.block_topk`). Each is first brought to the
same cost, as the kernels count it: pairs of query and key, measured head by head on calibration prompts. Then every
head gets the candidate with the smallest error of its attention output, or with the largest share of attention mass.

Sizes become shares of the length: a candidate keeps its ratios and is scaled as a whole by the largest of the factors
``2 ** -(i / 4)`` at which the head stays within the density, so that it costs at most that, and seldom much less. (The
paper's sizes are for 128k tokens.) With ``equal_pairs`` off, candidates have the sizes given, at any cost.

Differences: the paper counts the FLOPs of its GPU kernels; a score is the mean over prompts, where the paper looks at
one; the authors' code turns A-shape and block-sparse heads into vertical-slash ones afterwards, which is not here.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..checks import fail
from ..kernels.attention import Pattern, sparse_attention
from ..measure.tokens import check_batch
from ..ops.formats.stripes import Window
from .block_topk import BlockTopK
from .compute import kept_pairs
from .interface import exact_pairs
from .per_head import PerHead
from .policy import PolicySearch, PrefillPolicy
from .prefill import Observed
from .prompt import Prompt
from .sink_window import SinkWindow
from .vertical_slash import VerticalSlash, line_scores
from .watch import look

Scaled = Sequence[Sequence[PrefillPolicy]]
"""Candidates, each at all its scales, the cheapest first."""

FACTORS = tuple(2 ** (-i / 4) for i in range(40, -1, -1))
"""What candidates are scaled by, ascending: from a thousandth of the text to all of it."""


@dataclass(frozen=True)
class HeadChoice:
    """What a head was given.

    Attributes:
        layer: index of the layer.
        head: index of the query head.
        policy: its pattern.
        score: of the criterion, mean over prompts: error of the output, or recall of attention mass.
        density: pairs computed as a share of the dense model's, mean over prompts.
        candidates: score and density of every candidate, in their order, that of the choice among them.
    """

    layer: int
    head: int
    policy: PrefillPolicy
    score: float
    density: float
    candidates: tuple[tuple[float, float], ...]


class MInference(PolicySearch):
    """Options of ``minference``. Sizes of candidates are ratios, or tokens where ``equal_pairs`` is off.

    Attributes:
        density: pairs that a head computes as a share of the dense model's, at most, mean over calibration prompts.
        criterion: ``output_error``, norm of the difference from dense attention over the norm of that, or ``recall``,
            share of the dense attention mass kept, mean over queries.
        equal_pairs: whether candidates are brought to ``density``; otherwise they have the sizes given, in tokens.
        a_shape: sinks and window of each A-shape candidate.
        vertical_slash: verticals and slashes of each vertical-slash candidate.
        block_topk: blocks a row of each block-sparse candidate.
        block_size: of the block-sparse candidates.
        min_length: of the policy found.
        q_block: of the policies found, the block-sparse ones apart.
    """

    density: float = Field(0.25, gt=0, le=1)
    criterion: Literal["output_error", "recall"] = "output_error"
    equal_pairs: bool = True
    a_shape: list[list[int]] = Field([[100, 800]])
    vertical_slash: list[list[int]] = Field([[30, 800], [100, 750], [500, 700], [3500, 100]])
    block_topk: list[int] = Field([100])
    block_size: int = Field(64, ge=1)
    min_length: int = Field(1024, ge=0)
    q_block: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _sizes(self) -> "MInference":
        for name, pairs in (("a_shape", self.a_shape), ("vertical_slash", self.vertical_slash)):
            for pair in pairs:
                if len(pair) != 2 or min(pair) < 1:
                    raise fail("minference", name, "hold pairs of numbers of at least 1", pair)
        if min(self.block_topk, default=1) < 1:
            raise fail("minference", "block_topk", "hold numbers of at least 1", self.block_topk)
        if not (self.a_shape or self.vertical_slash or self.block_topk):
            raise fail("minference", "a_shape, vertical_slash and block_topk", "hold a candidate", "none")
        return self

    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> PerHead:
        """The policy for ``model``, which is left as it was.

        Args:
            model: a Hugging Face causal language model without a policy.
            calibration: prompts, token ids ``[B, T]``, as long as those that the policy is for.

        Raises:
            InputError: if there is no prompt, or one is not ``[B, T]`` or has less than two tokens.
        """
        return self.policy(self.search(model, calibration))

    def search(self, model: nn.Module, calibration: Sequence[Tensor]) -> list[HeadChoice]:
        """What `fit` gives every head, and how well; arguments and errors are as there.

        Costs two prefills of every prompt, and the attention of all candidates in one of them.
        """
        if not calibration:
            raise fail("minference", "calibration", "hold at least one prompt", "none")
        for ids in calibration:
            check_batch("minference", "calibration", ids)
        candidates = self.candidates()
        density: dict[int, Tensor] = {}  # of each layer [candidates, scales, H]
        score: dict[int, Tensor] = {}  # of each layer [candidates, H]
        scale: dict[int, Tensor] = {}

        def weigh(seen: Observed) -> None:
            query, key, _, prompt, _ = seen
            found = _densities(candidates, self.density, query, key, prompt)
            density[prompt.layer] = density.get(prompt.layer, 0) + found / len(calibration)

        def judge(seen: Observed) -> None:
            query, key, value, prompt, _ = seen
            found = _scores(candidates, scale[prompt.layer], self.criterion, query, key, value, prompt)
            score[prompt.layer] = score.get(prompt.layer, 0) + found / len(calibration)

        for ids in calibration:
            look(model, ids, weigh)
        if not density:
            raise fail("minference", "model", "attend to the calibration prompts causally", type(model).__name__)
        scale = {layer: ((found <= self.density).sum(1) - 1).clamp(min=0) for layer, found in density.items()}
        for ids in calibration:
            look(model, ids, judge)
        return [
            self._choose(layer, head, candidates, scale[layer], density[layer], score[layer])
            for layer in sorted(density)
            for head in range(density[layer].shape[-1])
        ]

    def policy(self, choices: Sequence[HeadChoice]) -> PerHead:
        """The policy that gives every head its choice; what `search` returned, or a part of its layers."""
        kinds: list[PrefillPolicy] = []
        for choice in choices:
            if choice.policy not in kinds:
                kinds.append(choice.policy)
        # A layer without attention has a number that nobody asks for.
        rows: list[list[int]] = [[] for _ in range(max(choice.layer for choice in choices) + 1)]
        for choice in sorted(choices, key=lambda choice: choice.head):
            rows[choice.layer].append(kinds.index(choice.policy))
        return PerHead(choices=kinds, assignment=[row or 0 for row in rows], min_length=self.min_length)

    def candidates(self) -> list[list[PrefillPolicy]]:
        """The candidates, each at all its scales, the cheapest first."""
        factors = FACTORS if self.equal_pairs else (None,)
        return [
            *([self._a_shape(sinks, size, factor) for factor in factors] for sinks, size in self.a_shape),
            *(
                [self._lines(columns, slashes, factor) for factor in factors]
                for columns, slashes in self.vertical_slash
            ),
            *([self._blocks(blocks, factor) for factor in factors] for blocks in self.block_topk),
        ]

    def _a_shape(self, sinks: int, window: int, factor: float | None) -> PrefillPolicy:
        if factor is None:
            return SinkWindow(num_sinks=sinks, window_size=window, q_block=self.q_block)
        unit = factor / (sinks + window)
        return SinkWindow(sink_share=sinks * unit, window_share=window * unit, q_block=self.q_block)

    def _lines(self, vertical: int, slash: int, factor: float | None) -> PrefillPolicy:
        if factor is None:
            return VerticalSlash(num_vertical=vertical, num_slash=slash, q_block=self.q_block)
        unit = factor / (vertical + slash)
        return VerticalSlash(vertical_share=vertical * unit, slash_share=slash * unit, q_block=self.q_block)

    def _blocks(self, blocks: int, factor: float | None) -> PrefillPolicy:
        size = self.block_size
        if factor is None:
            return BlockTopK(num_blocks=blocks, q_block=size, k_block=size)
        return BlockTopK(block_share=factor, q_block=size, k_block=size)

    def _choose(
        self, layer: int, head: int, candidates: Scaled, scale: Tensor, density: Tensor, score: Tensor
    ) -> HeadChoice:
        scales, scores = scale[:, head].tolist(), score[:, head].tolist()
        shares = [float(density[i, at, head]) for i, at in enumerate(scales)]
        limit = max(self.density, min(shares)) if self.equal_pairs else max(shares)
        sign = 1 if self.criterion == "recall" else -1
        worth = [
            sign * one if one == one and share <= limit else -math.inf
            for one, share in zip(scores, shares, strict=True)
        ]
        best = worth.index(max(worth))
        figures = tuple(zip(scores, shares, strict=True))
        return HeadChoice(layer, head, candidates[best][scales[best]], scores[best], shares[best], figures)


def _densities(candidates: Scaled, limit: float, query: Tensor, key: Tensor, prompt: Prompt) -> Tensor:
    """Share of the pairs that every head computes, ``[candidates, scales, H]``, mean over the batch.

    It is infinite for scales above the first one with which all heads are above ``limit``.
    """
    heads, (queries, keys) = query.shape[1], (query.shape[2], key.shape[2])
    pairs = exact_pairs(queries, keys, prompt.window).to(query.device)
    found = torch.full((len(candidates), len(candidates[0]), heads), torch.inf, device=query.device)
    for i, scales in enumerate(candidates):
        for j, pattern in enumerate(_patterns(scales, query, key, prompt)):
            kept = kept_pairs(pattern, queries, keys, window=prompt.window)
            found[i, j] = (kept / pairs).mean(0)
            if bool((found[i, j] > limit).all()):
                break
    return found


def _scores(
    candidates: Scaled, scale: Tensor, criterion: str, query: Tensor, key: Tensor, value: Tensor, prompt: Prompt
) -> Tensor:
    """Criterion of every candidate at the scale ``[candidates, H]`` of each head, ``[candidates, H]``."""
    run = partial(sparse_attention, scale=prompt.scale, softcap=prompt.softcap, window=prompt.window, return_lse=True)
    dense, dense_lse = run(query, key, value, Window(key.shape[2]))
    size = dense.float().norm(dim=(2, 3)).clamp(min=1e-30)
    found = torch.zeros(scale.shape, device=query.device)
    for i, scales in enumerate(candidates):
        used = sorted(set(scale[i].tolist()))
        for j, pattern in zip(used, _patterns([scales[j] for j in used], query, key, prompt), strict=True):
            out, lse = run(query, key, value, pattern)
            if criterion == "recall":
                each = (lse - dense_lse).exp().clamp(max=1).mean((0, 2))
            else:
                each = ((out.float() - dense.float()).norm(dim=(2, 3)) / size).mean(0)
            found[i] = torch.where(scale[i] == j, each, found[i])
    return found


def _patterns(scales: Sequence[PrefillPolicy], query: Tensor, key: Tensor, prompt: Prompt) -> Iterator[Pattern]:
    """What each of the policies selects; the estimate of vertical-slash is made once for all of them."""
    lines = None
    for policy in scales:
        if not isinstance(policy, VerticalSlash):
            yield policy.select(query, key, prompt)
            continue
        lines = lines or line_scores(query, key, prompt, num_last=policy.num_last_queries)
        yield policy.pattern(*lines, num_queries=query.shape[2], dropped=prompt.dropped)
