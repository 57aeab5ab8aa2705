"""What GQSA (https://arxiv.org/abs/2412.17560) leaves on a model: the stored groups, and the way back."""

from collections.abc import Collection
from typing import Any

from torch import Tensor, nn

from ..ops.formats.groups import PackedGroups
from .layerwise import restore


class AppliedGroups:
    """Weights pruned and quantised by groups in force on a model, with the dense ones kept beside them.

    Args:
        model: the compressed model; its weights are exactly what `packed` unpacks to.
        groups: the stored weights by parameter name.
        bits: of a number.
        dense: the weights before by parameter name.
        state: method, options, and the errors of both stages before and after.
        stacks: names of the weights that are more than one matrix.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: dict[str, PackedGroups],
        bits: int,
        dense: dict[str, Tensor],
        state: dict[str, Any],
        stacks: Collection[str] = (),
    ) -> None:
        self.model, self.groups, self.bits, self.stacks = model, groups, bits, frozenset(stacks)
        self._dense, self._state = dense, state

    def packed(self) -> dict[str, PackedGroups]:
        """The stored form of each weight that is one matrix ``[out, in]``, by parameter name, as of the compression.

        ``paucity.weights.pack(model, "groups", weights=applied.packed())`` runs the model on it. Stacks of experts and
        grouped convolutions are in ``groups`` only, one matrix below the other.
        """
        return {name: packed for name, packed in self.groups.items() if name not in self.stacks}

    def nbytes(self) -> int:
        """Bytes of all weights as stored, numbers in ``bits`` bits; the places of groups only where some are absent."""
        total = 0
        for packed in self.groups.values():
            places = packed.columns.nbytes + packed.row_offsets.nbytes
            total += packed.codes.nbytes * self.bits // 4 + packed.scales.nbytes + packed.zeros.nbytes
            total += 0 if bool(packed.mask().all()) else places
        return total

    def remove(self) -> None:
        """Write the dense weights back, exactly; what training changed since is lost."""
        restore(self.model, self._dense)
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
