"""Non-negative matrix factorisation: scikit-learn's, on the contract of dictionaries.

Paper: Fevotte & Idier 2010, https://arxiv.org/abs/1010.1763, whose multiplicative updates and coordinate descent
`sklearn.decomposition.NMF` implements; nothing of it is written again here. Atoms and codes are not negative, and
neither may activations be. Sparsity comes from the l1 share of scikit-learn's penalty on the codes.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_range, fail
from ..ops.formats import Codes
from .base import Dictionary
from .online_learning import whole


class NMF(Dictionary):
    """Non-negative atoms and codes; needs scikit-learn.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        penalty: of the l1 norm of the codes (``alpha_W`` with ``l1_ratio=1``); the atoms have none.
        seed: of scikit-learn.
    """

    _atoms: Tensor

    def __init__(self, input_size: int, dict_size: int, *, penalty: float = 0.0, seed: int = 0) -> None:
        super().__init__(input_size, dict_size)
        check_range("NMF", "penalty", penalty, 0)
        self.penalty, self.seed = penalty, seed
        self.register_buffer("_atoms", torch.zeros(dict_size, input_size))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``, non-negative, not normalised; zeros before `fit`."""
        return self._atoms

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`; on the CPU, without gradient."""
        from sklearn.decomposition import non_negative_factorization

        self.check_input(x)
        if not bool(self._atoms.any()):
            raise fail("NMF.encode", "the dictionary", "be fit first", "no atoms")
        rows = x.detach().reshape(-1, self.input_size).double().cpu().numpy()
        if (rows < 0).any():
            raise fail("NMF.encode", "x", "not be negative", "negative entries")
        found, _, _ = non_negative_factorization(
            rows,
            H=self._atoms.double().cpu().numpy(),
            n_components=self.dict_size,
            update_H=False,
            alpha_W=self.penalty,
            l1_ratio=1.0,
            max_iter=400,
        )
        dense = torch.from_numpy(found).to(x)
        most = max(1, int((dense != 0).sum(1).max()))
        return Codes.from_dense(dense.view(*x.shape[:-1], self.dict_size), most)

    def fit(self, activations: Tensor, **options: Any) -> Any:
        """Factorise.

        Args:
            activations: ``[n, input_size]``, finite, not negative.
            options: further arguments of `sklearn.decomposition.NMF`.

        Returns:
            The fitted estimator.
        """
        from sklearn.decomposition import NMF as Estimator

        rows = whole(activations, "NMF.fit", self.input_size)
        if (rows < 0).any():
            raise fail("NMF.fit", "activations", "not be negative", "negative entries")
        start = "nndsvda" if self.dict_size <= min(rows.shape) else "random"
        given = {"init": start, "max_iter": 400, "alpha_H": 0.0, "l1_ratio": 1.0} | options
        found = Estimator(self.dict_size, alpha_W=self.penalty, random_state=self.seed, **given).fit(rows)
        self._atoms.copy_(torch.from_numpy(found.components_))
        return found

    def rescale(self, factor: float) -> None:
        """The penalty has the unit of an activation."""
        self.penalty *= factor

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "penalty", "seed")
        return {name: getattr(self, name) for name in names}
