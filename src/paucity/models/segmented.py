"""The loss of a causal language model computed segment by segment: logits of all positions are never there at once.

With a large vocabulary and a long text the logits, their float copy and their gradient are the peak of a training step.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..checks import InputError, check_int, fail
from ..ops.segment_loss import segment_loss
from .text_config import text_config

_Call = tuple[tuple[Any, ...], dict[str, Any]]


class SegmentedLoss:
    """While it is in force, ``model(..., labels=...)`` takes its loss segment by segment, gradients included.

    The loss is that of the model (cross-entropy of the next token, ``-100`` is no label, ``num_items_in_batch`` divides
    the sum); ``logits`` are those of the last position alone. A call without labels, or with ``logits_to_keep``, is as
    ever.

    Args:
        model: a Hugging Face causal language model whose logits are its output embeddings, soft-capped or not.
        segment: positions whose logits are there at once.
        when: asked at each call whether to act; None is always.

    Raises:
        InputError: if the model is of another kind; at the first call, if its logits are computed in another way.
    """

    def __init__(self, model: nn.Module, segment: int, *, when: Callable[[], bool] | None = None) -> None:
        check_int("SegmentedLoss", "segment", segment)
        known = inspect.signature(model.forward).parameters
        head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
        if not isinstance(model, PreTrainedModel) or head is None or not {"labels", "logits_to_keep"} <= set(known):
            raise fail("SegmentedLoss", "model", "be a causal language model that takes labels", type(model).__name__)
        self.model, self.segment, self.when = model, segment, when
        self._labels: Tensor | None = None
        self._hidden: Tensor | None = None
        self._checked = False
        self._handles = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.get_decoder().register_forward_hook(self._after_base),
            model.register_forward_hook(self._after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Give the model its own loss back."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._labels = self._hidden = None

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        self._labels = self._hidden = None
        asked = kwargs.get("labels") is not None and not kwargs.get("logits_to_keep")
        if not asked or kwargs.get("shift_labels") is not None or not (self.when is None or self.when()):
            return None
        kwargs = dict(kwargs)
        self._labels = kwargs.pop("labels")
        return args, {**kwargs, "logits_to_keep": 1}

    def _after_base(self, base: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._hidden = output[0] if self._labels is not None else None

    def _after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        labels, hidden = self._labels, self._hidden
        self._labels = self._hidden = None
        if labels is None:
            return None
        if hidden is None:
            raise InputError(f"SegmentedLoss: model must run its decoder, got {type(model).__name__}, which does not.")
        self._check(hidden[:, -1], output[0][:, -1])
        target = nn.functional.pad(labels, (0, 1), value=-100)[..., 1:].flatten().to(hidden.device)
        total = segment_loss(
            self._row_loss,
            hidden.flatten(0, 1),
            target,
            segment=self.segment,
            parameters=list(self.model.get_output_embeddings().parameters()),
        )
        count = kwargs.get("num_items_in_batch")
        loss = total / ((target != -100).sum() if count is None else count)
        if isinstance(output, tuple):
            return (loss, *output)
        output.loss = loss
        return output

    def _logits(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(rows).float()
        cap = getattr(text_config(self.model), "final_logit_softcapping", None)
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _row_loss(self, rows: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self._logits(rows), target, reduction="sum")

    def _check(self, hidden: Tensor, logits: Tensor) -> None:
        if self._checked:
            return
        with torch.no_grad():
            ours, theirs = self._logits(hidden), logits.detach().float()
        if not torch.allclose(ours, theirs, rtol=0.02, atol=0.02 * float(theirs.abs().max())):
            got = type(self.model).__name__
            raise InputError(f"SegmentedLoss: model must not change its logits but by a soft cap, got {got}.")
        self._checked = True
