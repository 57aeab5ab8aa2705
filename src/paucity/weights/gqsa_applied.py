"""What GQSA (https://arxiv.org/abs/2412.17560) leaves on a model: the stored groups, and the way back."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.formats.groups import PackedGroups


class AppliedGroups:
    """Weights pruned and quantised by groups in force on a model, with the dense ones kept beside them.

    Args:
        model: the compressed model; its weights are exactly what `packed` unpacks to.
        groups: the stored weights by parameter name.
        bits: of a number.
        dense: the weights before by parameter name.
        state: method, options, and the errors of both stages before and after.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: dict[str, PackedGroups],
        bits: int,
        dense: dict[str, Tensor],
        state: dict[str, Any],
    ) -> None:
        self.model, self.groups, self.bits = model, groups, bits
        self._dense, self._state = dense, state

    def packed(self) -> dict[str, PackedGroups]:
        """The stored form by parameter name: ``[out, in]``, experts one below the other.

        It is that of the moment of compression: weights that were trained since are not in it.
        """
        return dict(self.groups)

    def nbytes(self) -> int:
        """Bytes of all weights as stored, numbers in ``bits`` bits; the places of groups only where some are absent."""
        total = 0
        for packed in self.groups.values():
            places = packed.columns.nbytes + packed.row_offsets.nbytes
            total += packed.codes.nbytes * self.bits // 4 + packed.scales.nbytes + packed.zeros.nbytes
            total += 0 if bool(packed.mask().all()) else places
        return total

    @torch.no_grad()
    def remove(self) -> None:
        """Write the dense weights back, exactly; what training changed since is lost."""
        for name, weight in self._dense.items():
            self.model.get_parameter(name).copy_(weight)
        self._dense = {}

    def density(self) -> dict[str, float]:
        """Share of the weights whose groups are stored; a stored weight may be 0."""
        return {name: packed.codes.numel() * 2 / max(1, packed.shape.numel()) for name, packed in self.groups.items()}

    def reset(self) -> None:
        """Nothing to reset: the density of weights is static."""

    def state(self) -> dict[str, Any]:
        """``{"method", "options", "sparsity", "bits_per_weight", "calibration_tokens", "blocks", "loss", "notes"}``.

        ``blocks`` has for each block the squared error of its output over the squares of the dense block's, before and
        after stage 1; ``loss`` the nats per calibration token before and after stage 2, None without it.
        """
        return self._state
