"""Online dictionary learning: scikit-learn's, on the contract of dictionaries.

Paper: Mairal et al. 2009, https://arxiv.org/abs/0908.0050. `sklearn.decomposition.MiniBatchDictionaryLearning` finds
the atoms, `sklearn.decomposition.SparseCoder` the codes (lasso by LARS or by coordinate descent, LARS, or orthogonal
matching pursuit); nothing of either is written again here.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from ..checks import check_choice, check_floating, check_int, check_range, check_shape, fail
from ..ops.formats import Codes
from .base import Dictionary

ALGORITHMS = ("lars", "lasso_cd", "lasso_lars", "omp")


class OnlineLearning(Dictionary):
    """Atoms by scikit-learn's mini-batches; needs scikit-learn.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        algorithm: of the codes: ``lasso_lars``, ``lasso_cd``, ``lars`` or ``omp``.
        penalty: ``alpha`` of the lasso.
        k: entries of a code, for ``lars`` and ``omp``.
        nonnegative: whether codes are.
        seed: of scikit-learn.
    """

    _atoms: Tensor

    def __init__(
        self,
        input_size: int,
        dict_size: int,
        *,
        algorithm: Literal["lars", "lasso_cd", "lasso_lars", "omp"] = "lasso_lars",
        penalty: float = 1.0,
        k: int = 8,
        nonnegative: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(input_size, dict_size)
        check_choice("OnlineLearning", "algorithm", algorithm, ALGORITHMS)
        check_range("OnlineLearning", "penalty", penalty, 0)
        check_int("OnlineLearning", "k", k, 1, dict_size if algorithm in ("lars", "omp") else None)
        if nonnegative and algorithm in ("lars", "omp"):
            raise fail("OnlineLearning", "nonnegative", f"be False for {algorithm}", True)
        self.algorithm, self.penalty, self.k, self.nonnegative, self.seed = algorithm, penalty, k, nonnegative, seed
        self.register_buffer("_atoms", torch.zeros(dict_size, input_size))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``, rows of norm 1; zeros before `fit`."""
        return self._atoms

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`; on the CPU, without gradient."""
        self.check_input(x)
        if not bool(self._atoms.any()):
            raise fail("OnlineLearning.encode", "the dictionary", "be fit first", "no atoms")
        return scikit_codes(
            x,
            self._atoms,
            algorithm=self.algorithm,
            penalty=self.penalty,
            k=self.k,
            nonnegative=self.nonnegative,
        )

    def fit(self, activations: Tensor, **options: Any) -> Any:
        """Learn the atoms.

        Args:
            activations: ``[n, input_size]``, finite.
            options: further arguments of `sklearn.decomposition.MiniBatchDictionaryLearning`.

        Returns:
            The fitted estimator.
        """
        from sklearn.decomposition import MiniBatchDictionaryLearning

        rows = whole(activations, "OnlineLearning.fit", self.input_size)
        found = MiniBatchDictionaryLearning(
            self.dict_size,
            alpha=self.penalty,
            fit_algorithm="cd" if self.nonnegative else "lars",
            positive_code=self.nonnegative,
            random_state=self.seed,
            **options,
        ).fit(rows)
        atoms = torch.from_numpy(found.components_).float()
        self._atoms.copy_(atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-12))
        return found

    def rescale(self, factor: float) -> None:
        """The penalty has the unit of an activation."""
        self.penalty *= factor

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "algorithm", "penalty", "k", "nonnegative", "seed")
        return {name: getattr(self, name) for name in names}


def scikit_codes(
    x: Tensor, atoms: Tensor, *, algorithm: str, penalty: float = 1.0, k: int = 8, nonnegative: bool = False
) -> Codes:
    """Codes of ``x [..., d]`` over ``atoms [dict_size, d]`` by `sklearn.decomposition.SparseCoder`."""
    from sklearn.decomposition import SparseCoder

    check_choice("scikit_codes", "algorithm", algorithm, ALGORITHMS)
    lasso = algorithm.startswith("lasso")
    coder = SparseCoder(
        atoms.detach().double().cpu().numpy(),
        transform_algorithm=algorithm,
        transform_alpha=penalty if lasso else None,
        transform_n_nonzero_coefs=None if lasso else k,
        positive_code=nonnegative,
        transform_max_iter=2000,
    )
    rows = x.detach().reshape(-1, x.shape[-1]).double().cpu().numpy()
    dense = torch.from_numpy(coder.transform(rows)).to(x)
    most = max(1, int((dense != 0).sum(1).max()))
    return Codes.from_dense(dense.view(*x.shape[:-1], len(atoms)), most)


def whole(activations: Tensor, function: str, input_size: int) -> Any:
    """``activations [n, input_size]`` as a NumPy array of doubles; refused unless finite."""
    check_floating(function, "activations", activations)
    check_shape(function, "activations", activations, None, input_size)
    if not bool(activations.isfinite().all()):
        raise fail(function, "activations", "be finite", "NaN or infinity")
    return activations.detach().double().cpu().numpy()
