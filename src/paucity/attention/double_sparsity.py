"""Double Sparsity: a calibration finds the channels of each head that its attention hangs on.

Paper: Yang et al. 2024 (Double Sparsity), https://arxiv.org/abs/2408.07092, Sec. 3.1; what is done with the channels is
`paucity.attention.decode.double_sparsity_channels`.

A channel ``c`` of a KV head scores the mean of ``|q_c k_c|`` over all pairs of a query of its group and a key that this
query sees, on all tokens of all calibration texts, positions embedded; the highest are taken. (The authors' code pairs
every token with itself alone, and by a slip keeps the last sample alone.)
"""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from ..checks import fail
from ..measure.tokens import check_batch
from ..ops.select import topk_indices
from .decode.double_sparsity_channels import DoubleSparsityChannels
from .policy import PolicySearch
from .prefill import Observed
from .watch import look


class DoubleSparsity(PolicySearch):
    """Options of ``double_sparsity``. Those not listed here are of the policy found.

    Attributes:
        channel_share: channels that are taken, of those of a head; the paper has 1/4 to 1/16.
        num_channels: how many, instead.
    """

    channel_share: float = Field(0.125, gt=0, le=1)
    num_channels: int | None = Field(None, ge=1)
    dense_layers: int = Field(2, ge=0)
    num_keys: int = Field(256, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    bits: Literal[4, 16] = 4
    group_size: int = Field(32, ge=1)
    offload: str | None = None
    min_length: int = Field(1024, ge=0)

    def fit(self, model: nn.Module, calibration: Sequence[Tensor]) -> DoubleSparsityChannels:
        """The policy for ``model``, which is left as it was.

        Args:
            model: a Hugging Face causal language model without a prefill policy.
            calibration: token ids ``[B, T]``, one batch after another.

        Raises:
            InputError: if there is no text, or a head has not so many channels.
        """
        scores = channel_scores(model, calibration)
        first = next(iter(scores.values()))
        wanted = self.num_channels or max(1, round(self.channel_share * first.shape[-1]))
        if wanted > first.shape[-1]:
            raise fail("double_sparsity", "num_channels", f"be at most {first.shape[-1]}", wanted)
        absent = torch.zeros_like(first)  # a layer without attention has channels that nobody asks for
        options = {
            name: getattr(self, name)
            for name in ("dense_layers", "num_keys", "density", "bits", "group_size", "offload")
        }
        return DoubleSparsityChannels(
            channels=[topk_indices(scores.get(layer, absent), wanted).tolist() for layer in range(max(scores) + 1)],
            min_length=self.min_length,
            **options,
        )


def channel_scores(model: nn.Module, calibration: Sequence[Tensor]) -> dict[int, Tensor]:
    """Sum of ``|q_c k_c|`` over the pairs of query and key that attention has, ``[H_kv, D]`` float64, by layer.

    Args:
        model: a Hugging Face causal language model without a prefill policy.
        calibration: token ids ``[B, T]``, one batch after another.

    Raises:
        InputError: if there is no text.
    """
    if not calibration:
        raise fail("double_sparsity", "calibration", "hold at least one text", "none")
    scores: dict[int, Tensor] = {}

    def note(seen: Observed) -> None:
        found = product_sums(seen.query, seen.key, seen.prompt.window)
        layer = seen.prompt.layer
        scores[layer] = scores[layer] + found if layer in scores else found

    for ids in calibration:
        check_batch("double_sparsity", "calibration", ids)
        look(model, ids, note)
    return dict(sorted(scores.items()))


def product_sums(query: Tensor, key: Tensor, window: int | None = None) -> Tensor:
    """``sum |q_c k_c|`` over the pairs of a causal text, ``[H_kv, D]`` float64.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, H_kv, T, D]``.
        window: keys visible, self included; None is all.
    """
    mine = query.abs().double().view(len(key), key.shape[1], -1, *key.shape[2:]).sum(2)
    theirs = key.abs().double().cumsum(2)
    if window is not None:
        gone = theirs[:, :, : max(0, key.shape[2] - window)]
        theirs = theirs - torch.nn.functional.pad(gone, (0, 0, key.shape[2] - gone.shape[2], 0))
    total: Tensor = (mine * theirs).sum((0, 2)).cpu()
    return total
