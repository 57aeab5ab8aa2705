"""Sparsity refinement: heads whose budget recovers too little of their attention get more, offline, once per model.

Paper: Yang et al. 2025 (Qwen2.5-1M), https://arxiv.org/abs/2501.15383, Sec. 5.2, "sparsity refinement".

The softmax over chosen keys and that over all keys share their numerators, so that ``exp(lse_sparse - lse_full)`` is
the share of a query's attention mass that the choice recovers; no attention map is made. A head whose mean recall over
the queries of a calibration text is below ``threshold`` has its budget of verticals and slashes multiplied by
``growth``, until it is not or reads everything.

The paper names neither the threshold nor the steps: ours are 0.9 and 2. It calibrates at a million tokens; here the
texts are the caller's, and should be as long as those to come, or budgets shares of the length. Mean over queries is
ours too. Logsumexps are those of dual-chunk attention at its own positions, where positions change.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from pydantic import Field, model_validator
from torch import Tensor, nn

from ..checks import fail
from ..measure.tokens import check_batch, device_of, forward
from .apply import apply
from .dual_chunk import DualChunk
from .policy import PolicySearch
from .prefill import Observed
from .prompt import Prompt
from .watch import watch


class RefinedBudgets(PolicySearch):
    """Options of ``refined_budgets``.

    Attributes:
        base: the policy whose sparse selection is refined; budget factors that it has are where the search begins.
        threshold: share of the attention mass to recover, mean over queries.
        growth: factor on the budgets at every step.
        max_factor: no head gets more than this many times its budget.
    """

    base: DualChunk
    threshold: float = Field(0.9, gt=0, lt=1)
    growth: float = Field(2.0, gt=1)
    max_factor: float = Field(64.0, ge=1)

    @model_validator(mode="after")
    def _selects(self) -> "RefinedBudgets":
        if self.base.sparse is None:
            raise fail("refined_budgets", "base", "have sparse selection", "sparse=None")
        return self

    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> DualChunk:
        """``base`` with a budget factor for every head; texts too short for its selection change nothing.

        Raises:
            InputError: if there is no calibration text, one is not ``[B, T]`` or empty, or `apply` refuses the model.
        """
        if not calibration:
            raise fail("refined_budgets", "calibration", "hold at least one batch", 0)
        for ids in calibration:
            check_batch("refined_budgets", "calibration", ids, 1)
        given, found = self.base.budget_factors, dict[int, list[float]]()

        def refine(seen: Observed) -> None:
            query, key, _, prompt, _ = seen
            start = [1.0] * query.shape[1] if given is None else given[prompt.layer]
            ruled = self.base.layers is None or prompt.layer in self.base.layers
            factors = found.setdefault(prompt.layer, list(start))
            found[prompt.layer] = self.refined(query, key, prompt, factors) if ruled else factors

        applied = apply(model, self.base.model_copy(update={"sparse": None, "budget_factors": None, "layers": None}))
        try:
            for ids in calibration:
                watch(applied, refine, partial(forward, model, ids.to(device_of(model)), keep=1))
        finally:
            applied.remove()
        if not found:
            return self.base
        plain = [1.0] * len(next(iter(found.values())))
        rows = [found.get(layer, plain) for layer in range(max(found) + 1)]
        return self.base.model_copy(update={"budget_factors": rows})

    def refined(self, query: Tensor, key: Tensor, prompt: Prompt, factors: Sequence[float]) -> list[float]:
        """The factors of a layer's heads, none smaller than in ``factors``, that recover enough of one prompt.

        Args:
            query: ``[B, H, Tq, D]`` at true positions.
            key: ``[B, H_kv, Tk, D]``.
            prompt: of the layer.
            factors: one for each head.
        """
        prompt = replace(prompt, scale=prompt.scale * self.base.logit_scale(key.shape[2] + prompt.dropped))
        whole = self._lse(query, key, prompt, None)
        current = list(factors)
        while True:
            recall = (self._lse(query, key, prompt, current) - whole).exp().mean((0, 2)).tolist()
            grown = [
                factor * self.growth if share < self.threshold and factor * self.growth <= self.max_factor else factor
                for share, factor in zip(recall, current, strict=True)
            ]
            if grown == current:
                return current
            current = grown

    def _lse(self, query: Tensor, key: Tensor, prompt: Prompt, factors: list[float] | None) -> Tensor:
        """Logsumexp of the logits ``[B, H, Tq]``: of all keys, or of those chosen with these factors."""
        rows = None if factors is None else [factors] * (prompt.layer + 1)
        changed = {"budget_factors": rows} | ({"sparse": None} if rows is None else {})
        policy = self.base.model_copy(update=changed)
        return policy.attend_chunks(query, key, key, policy.select(query, key, prompt), prompt)[1]
