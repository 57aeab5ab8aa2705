"""MoA: every head gets a span that grows with the text as its influence on the loss asks for.

Paper: Fu et al. 2024, https://arxiv.org/abs/2406.14909, Sec. 4 and Eq. 3-5.

Dropping the attention ``A_ij`` of a head changes the loss, to first order in the output and with the rest of the row
renormalised, by ``E_ij = -A_ij (G_ij - sum_n A_in G_in) / (1 - A_ij)``, ``G`` the gradient of the loss with respect to
``A``. Summed in blocks of 64 x 64 and averaged over calibration texts of each profile length, it says what a rule
``span = alpha + beta * N`` costs: the sum over the blocks that it drops. An integer programme gives every head a rule
of the grid at a mean density of at most ``density`` for each length, once for each point of the Pareto front of the
losses at the profile lengths; the real loss at a longer length picks one of them.

Calibration: the paper profiles with texts whose answers depend on what stood far before, and with the dense model's own
answers as the only supervision. `MoA.search` takes such texts, with labels. `MoA.fit`, which recipes call, has plain
token ids: it joins them and cuts texts of the profile lengths out of them, and every token is supervision.

Differences: magnitudes of ``E`` are summed, as the authors' code does and the paper does not say (``absolute=False``
for the signed sums, in which what would help and what would hurt cancel); density counts pairs of query and key, as
everywhere here, where the paper counts keys left in the cache at the end; HiGHS instead of a commercial solver; heads
that share keys may have different spans; the grid has the rules whose span at the shortest length is zero (one block)
too, without which low densities are out of reach.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from ..checks import fail
from ..measure.tokens import check_context, context_length, evaluating
from ..ops.ilp import pareto_options
from ..ops.influence import window_influence
from .apply import apply
from .influence import Influence, influence, next_token_loss
from .policy import PolicySearch
from .spans import Spans, pair_share, span_of

Batch = tuple[Tensor, Tensor | None]
"""Token ids ``[B, T]`` int64, and labels of that shape with -100 where there is none, or None: every token is one."""

LENGTHS, VALIDATION_LENGTH = (2048, 4096, 8192), 12288


class MoA(PolicySearch):
    """Options of ``moa``.

    Attributes:
        density: pairs computed as a share of the dense model's, at most, mean over heads, at every length.
        lengths: of the profiled texts; None is 2048, 4096 and 8192 as far as the model's context and half of the
            calibration tokens go.
        validation_length: of the texts that pick a point of the front; None is 12288 or as far as those go.
        num_samples: texts profiled at each length.
        num_validation: texts that pick.
        num_alpha: values of alpha, from minus the shortest to the longest profile length.
        num_beta: values of beta, from 0 to 1.
        rules_per_layer: different rules in a layer, at most; None is any number.
        num_intervals: of each loss's range, for the front.
        absolute: sum magnitudes of influences.
        num_sinks: keys at the start that every query sees; a multiple of ``block_size``.
        block_size: of spans and influences.
        gap: relative distance from the least loss at which an integer programme may stop.
        time_limit: seconds for each integer programme.
        min_length: of the policy found.
        q_block: of the policy found.
    """

    density: float = Field(0.5, gt=0, le=1)
    lengths: list[int] | None = Field(None, min_length=1)
    validation_length: int | None = Field(None, ge=2)
    num_samples: int = Field(8, ge=1)
    num_validation: int = Field(2, ge=1)
    num_alpha: int = Field(11, ge=2)
    num_beta: int = Field(9, ge=2)
    rules_per_layer: int | None = Field(2, ge=1)
    num_intervals: int = Field(4, ge=1)
    absolute: bool = True
    num_sinks: int = Field(64, ge=0)
    block_size: int = Field(64, ge=1)
    gap: float = Field(0.01, ge=0)
    time_limit: float = Field(60.0, gt=0)
    min_length: int = Field(1024, ge=0)
    q_block: int = Field(128, ge=1)

    @model_validator(mode="after")
    def _fit_together(self) -> "MoA":
        if self.num_sinks % self.block_size:
            raise fail("moa", "num_sinks", f"be a multiple of block_size ({self.block_size})", self.num_sinks)
        if min(self.lengths or [2]) < 2:
            raise fail("moa", "lengths", "be at least 2", self.lengths)
        return self

    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> Spans:
        """The policy for ``model``, which is left as it was.

        Args:
            model: a Hugging Face causal language model without a policy.
            calibration: token ids ``[B, T]``, one batch after another; the last of them validate.

        Raises:
            InputError: if there are too few tokens, a length is beyond the model's context, or no choice of the grid
                has so low a density.
        """
        tokens = torch.cat([ids.flatten() for ids in calibration]) if calibration else torch.zeros(0, dtype=torch.int64)
        lengths, validation = self._sizes(model, len(tokens))
        spare = (len(tokens) - max(lengths)) // validation
        if spare < 1:
            wanted = f"have at least {max(lengths) + validation} tokens for lengths {lengths} and {validation}"
            raise fail("moa", "calibration", wanted, len(tokens))
        rest = len(tokens) - min(spare, self.num_validation) * validation
        profiled = [text for n in lengths for text in tokens[:rest].unfold(0, n, n)[: self.num_samples, None]]
        held_out = tokens[rest:].unfold(0, validation, validation)[:, None]
        return self.search(model, [(text, None) for text in profiled], [(text, None) for text in held_out])

    def search(self, model: nn.Module, profiled: Sequence[Batch], validation: Sequence[Batch]) -> Spans:
        """The policy for ``model`` by texts of one's own, with labels.

        Args:
            model: as for `fit`.
            profiled: the objectives are the lengths found among these.
            validation: the plan of the front with the least mean loss on these is the result.

        Raises:
            InputError: if there is no text of a kind, and as `fit` does.
        """
        if not validation:
            raise fail("moa", "validation", "hold at least one text", "none")
        plans = self.plans(self.profile(model, profiled), sorted({ids.shape[1] for ids, _ in validation}))
        return best_plan(model, plans, validation)

    def profile(self, model: nn.Module, texts: Sequence[Batch]) -> list[Influence]:
        """The mean influence over the texts of each length, shortest first; arguments as for `search`."""
        if not texts:
            raise fail("moa", "profiled", "hold at least one text", "none")
        by_length: dict[int, list[Influence]] = {}
        for ids, labels in texts:
            found = influence(model, ids, labels, block_size=self.block_size, absolute=self.absolute)
            by_length.setdefault(found.length, []).append(found)
        return [_mean(by_length[length]) for length in sorted(by_length)]

    def plans(self, profiles: Sequence[Influence], more_lengths: Sequence[int] = ()) -> list[Spans]:
        """The Pareto front of the losses at the profiled lengths.

        Args:
            profiles: one for each length.
            more_lengths: the density is kept at these too.

        Raises:
            InputError: if no choice of the grid has so low a density.
        """
        first, longest = profiles[0], max(profiles, key=lambda profile: profile.length)
        lengths = [profile.length for profile in profiles]
        all_lengths = [*lengths, *more_lengths]
        rules = self._rules(lengths, all_lengths)
        spans = [[span_of(*rule, n, self.block_size) for rule in rules] for n in all_lengths]
        heads = first.blocks.shape[1]
        sizes = {"num_sinks": self.num_sinks, "block_size": self.block_size}
        losses = [
            window_influence(profile.blocks, row, **sizes, absolute=self.absolute).flatten(0, 1)
            for profile, row in zip(profiles, spans, strict=False)
        ]
        cost = torch.stack([self._share(row, n, longest) for n, row in zip(all_lengths, spans, strict=True)])
        choices, _ = pareto_options(
            torch.stack(losses),
            cost,
            [self.density * cost.shape[1]] * len(cost),
            num_intervals=self.num_intervals,
            groups=[layer for layer in first.layers for _ in range(heads)],
            max_distinct=self.rules_per_layer,
            gap=self.gap,
            time_limit=self.time_limit,
        )
        return [self._plan(rules, choice.view(-1, heads).tolist(), first.layers) for choice in choices]

    def _sizes(self, model: nn.Module, num_tokens: int) -> tuple[list[int], int]:
        """Profile lengths and validation length, those by default as long as there is room for them."""
        room = min(context_length(model) or num_tokens, num_tokens // 2)
        lengths = self.lengths or [length for length in LENGTHS if length <= room]
        if not lengths:
            raise fail("moa", "lengths", f"be given where there is room for {room} tokens", None)
        validation = self.validation_length or min(VALIDATION_LENGTH, room)
        for name, length in (("lengths", max(lengths)), ("validation_length", validation)):
            check_context("moa", name, model, length)
        return sorted(set(lengths)), validation

    def _rules(self, profiled: Sequence[int], lengths: Sequence[int]) -> list[tuple[float, float]]:
        """The grid, without rules whose span is below 0 or beyond long texts, and without those that another equals."""
        rules: dict[tuple[int, ...], tuple[float, float]] = {}
        short, long = min(profiled), max(profiled)
        for beta in torch.linspace(0, 1, self.num_beta, dtype=torch.float64).tolist():
            for alpha in torch.linspace(-short, long, self.num_alpha, dtype=torch.float64).tolist():
                if alpha + beta * min(lengths) >= 0 and all(alpha + beta * n <= n for n in (long, max(lengths))):
                    spans = tuple(min(span_of(alpha, beta, n, self.block_size), n) for n in lengths)
                    rules.setdefault(spans, (alpha, beta))
        return list(rules.values())

    def _share(self, spans: Sequence[int], length: int, profile: Influence) -> Tensor:
        """Pairs of each span as a share of the dense layer's, ``[layers * H, spans]`` float64."""
        by_window = {
            window: torch.tensor([pair_share(span, self.num_sinks, length, window) for span in spans]).double()
            for window in set(profile.windows)
        }
        shares = torch.stack([by_window[window] for window in profile.windows])
        return shares.repeat_interleave(profile.blocks.shape[1], 0)

    def _plan(self, rules: Sequence[tuple[float, float]], choice: list[list[int]], layers: Sequence[int]) -> Spans:
        by_layer = dict(zip(layers, choice, strict=True))
        every = range(max(layers) + 1)  # a layer without attention has a number that nobody asks for
        alpha = [[rules[i][0] for i in by_layer[layer]] if layer in by_layer else 0.0 for layer in every]
        beta = [[rules[i][1] for i in by_layer[layer]] if layer in by_layer else 1.0 for layer in every]
        return Spans(
            alpha=alpha,
            beta=beta,
            num_sinks=self.num_sinks,
            block_size=self.block_size,
            min_length=self.min_length,
            q_block=self.q_block,
        )


def best_plan(model: nn.Module, plans: Sequence[Spans], texts: Sequence[Batch]) -> Spans:
    """The plan under which the model has the least mean loss on the texts; arguments as for `MoA.search`.

    Raises:
        InputError: if there is no plan, or no text.
    """
    for name, given in (("plans", plans), ("texts", texts)):
        if not given:
            raise fail("best_plan", name, "hold at least one", "none")
    losses = [_loss_under(model, plan, texts) for plan in plans] if len(plans) > 1 else [0.0]
    return plans[losses.index(min(losses))]


def _mean(profiles: Sequence[Influence]) -> Influence:
    return replace(profiles[0], blocks=torch.stack([profile.blocks for profile in profiles]).mean(0))


def _loss_under(model: nn.Module, plan: Spans, batches: Sequence[Batch]) -> float:
    applied = apply(model, plan.model_copy(update={"min_length": 0}))
    try:
        with evaluating(model):
            return sum(float(next_token_loss(model, ids, labels)) for ids, labels in batches) / len(batches)
    finally:
        applied.remove()
