"""What a dictionary does to a model on text that it was not trained on: metrics by exact name and definition.

``explained_variance`` is ``1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2)`` over all tokens, in float64, and ``fvu`` what is
missing to 1; ``l0`` the mean number of nonzeros of a code; ``dead`` the share of atoms in no code of these
``num_tokens`` and ``dense`` that of atoms in more than a tenth of them; ``ce_loss_score`` is
``(CE_zero - CE_dictionary) / (CE_zero - CE)`` of the next token, where the activation is replaced by zeros or by its
reconstruction, at all tokens that are not left out.
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import fail
from ..measure.codes import Firing, firing
from ..measure.tokens import device_of, evaluating, forward
from ..models.harvest import harvest, kept_tokens
from ..models.places import Hook, find_hook
from ..models.substitute import substituted
from .base import Dictionary

Tell = Callable[[int, int, str], object]


def judge(
    model: nn.Module,
    hook: str,
    dictionary: Dictionary,
    items: Sequence[Tensor],
    *,
    skip_ids: Collection[int] = (),
    on_progress: Tell | None = None,
) -> dict[str, Any]:
    """The metrics at the top of this file.

    Args:
        model: a causal language model for the score of the loss; of any other the score is None.
        hook: where the dictionary was trained.
        dictionary: that takes the width of the hook.
        items: ids ``[B, T]`` without padding, one forward each.
        skip_ids: token ids whose activations are left alone and not counted.
        on_progress: told items that are done, items in all, and what is done.

    Raises:
        InputError: if there are no items, or the width is another.
    """
    if not len(items):
        raise fail("judge", "items", "hold at least one", "none")
    place, sums = find_hook(model, hook), _Sums(dictionary.dict_size)
    losses = dict.fromkeys(("model", "dictionary", "zero"), 0.0)
    predicted = 0
    for number, ids in enumerate(items, 1):
        rows = harvest(model, [place], ids, skip_ids=skip_ids)[hook]
        if rows.shape[1] != dictionary.input_size:
            raise fail("judge", "hook", f"be {dictionary.input_size} wide like the dictionary", rows.shape[1])
        sums.add(dictionary, rows.float())
        if not ids.is_floating_point() and hasattr(model, "get_output_embeddings"):
            kept = kept_tokens(ids, skip_ids)
            assert kept is not None
            for name in losses:
                losses[name] += _loss(model, place, dictionary, ids, kept, name)
            predicted += ids.numel() - len(ids)
        if on_progress is not None:
            on_progress(number, len(items), f"measuring {hook}")
    score = None
    if predicted:
        losses = {name: total / predicted for name, total in losses.items()}
        room = losses["zero"] - losses["model"]
        score = (losses["zero"] - losses["dictionary"]) / room if abs(room) > 1e-9 else math.nan
    return sums.figures() | {"ce_loss_score": score, "ce_loss": losses if predicted else None}


class _Sums:
    """Running sums in float64."""

    def __init__(self, dict_size: int) -> None:
        self.count, self.error, self.square, self.nonzeros = 0, 0.0, 0.0, 0
        self.mean: Tensor | None = None
        self.fired = torch.zeros(dict_size, dtype=torch.int64)

    @torch.no_grad()
    def add(self, dictionary: Dictionary, rows: Tensor) -> None:
        for x in torch.split(rows, 4096):
            codes = dictionary.encode(x)
            self.error += float((dictionary.decode(codes) - x).double().square().sum())
            self.square += float(x.double().square().sum())
            total = x.double().sum(0).cpu()
            self.mean = total if self.mean is None else self.mean + total
            self.nonzeros += int(codes.l0().sum())
            self.fired += firing([codes]).counts
            self.count += len(x)

    def figures(self) -> dict[str, Any]:
        if not self.count or self.mean is None:
            raise fail("judge", "items", "hold a token that is not left out", "none")
        variance = self.square / self.count - float((self.mean / self.count).square().sum())
        fires = Firing(self.fired, self.count)
        fvu = self.error / self.count / variance if variance > 0 else math.nan
        return {
            "num_tokens": self.count,
            "fvu": fvu,
            "explained_variance": 1 - fvu,
            "l0": self.nonzeros / self.count,
            "dead": fires.dead,
            "dense": fires.dense(),
        }


def _loss(model: nn.Module, place: Hook, dictionary: Dictionary, ids: Tensor, kept: Tensor, what: str) -> float:
    """Summed cross-entropy of the next tokens."""

    def change(x: Tensor) -> Tensor:
        mask = kept.to(x.device).view(*x.shape[:-1], 1)
        if what == "model":
            return x
        return torch.where(mask, dictionary(x.float()).to(x.dtype) if what == "dictionary" else 0, x)

    with evaluating(model), substituted(model, place, change):
        logits, _ = forward(model, ids.to(device_of(model)), keep=ids.shape[1])
    targets = ids[:, 1:].to(logits.device)
    return float(F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), reduction="sum"))
