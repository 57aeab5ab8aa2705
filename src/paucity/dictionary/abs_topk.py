"""AbsTopK: the k entries of largest magnitude, with their sign, so that one atom has two directions.

Paper: Zhu, Khalili and Zhu 2025, https://arxiv.org/abs/2510.00404: one step of the proximal gradient method for a code
with at most k entries is ``z = H_k(u)``, ``u = W_enc (x - b_dec) + b_enc``: hard thresholding of the magnitudes. That
the ReLU of TopK is left out is all that differs. Silent atoms are revived by their largest ``|u|``, and an atom lives
when its value is not 0. No code of the authors was found; this follows the paper.
"""

from typing import Any

from torch import Tensor

from ..checks import check_int
from ..ops.formats import Codes
from .sae import Rule, SparseAutoencoder


class AbsTopK(Rule):
    """Keep ``k`` of each row by magnitude; values are of either sign.

    Args:
        k: entries of a code, at most the atoms that there are.
    """

    signed = True

    def __init__(self, k: int = 32) -> None:
        super().__init__()
        check_int("AbsTopK", "k", k)
        self.k = k

    def attach(self, sae: SparseAutoencoder) -> None:
        """Raise InputError if there are fewer atoms than ``k``."""
        check_int("AbsTopK", "k", self.k, 1, sae.dict_size)

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`."""
        return Codes(*sae.best(x, self.k, by_abs=True), sae.dict_size)

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        return {"k": self.k}
