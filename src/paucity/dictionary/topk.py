"""TopK: the k highest pre-activations of a row, as far as they are positive.

Paper: Gao et al. 2024, https://arxiv.org/abs/2406.04093, Eq. 4.
"""

from typing import Any

from torch import Tensor

from ..checks import check_int
from ..ops.formats import Codes
from .sae import Rule, SparseAutoencoder


class TopK(Rule):
    """Keep ``k`` of each row.

    Args:
        k: entries of a code, at most the atoms that there are.
    """

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        check_int("TopK", "k", k)
        self.k = k

    def attach(self, sae: SparseAutoencoder) -> None:
        """Raise InputError if there are fewer atoms than ``k``."""
        check_int("TopK", "k", self.k, 1, sae.dict_size)

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`."""
        values, indices = sae.best(x, self.k)
        return Codes(values.relu(), indices, sae.dict_size)

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"k": self.k}
