"""Sparse concept coding: atoms that follow the neighbourhoods of the data, and lasso codes over them.

Paper: Dash et al. 2020, https://arxiv.org/abs/2004.01551, after Cai et al. 2011 (Sparse Concept Coding for Visual
Analysis). Three steps: a graph of nearest neighbours with heat-kernel weights; its smoothest eigenvectors ``Y``
(``L y = lambda D y``, the constant one left out); atoms by spectral regression, ``D = (X^T X + alpha I)^-1 X^T Y`` with
columns brought to norm 1; then LARS with a bound on the entries of a code. The paper feeds it tetrolets
(`paucity.dictionary.tetrolets`).

Rows are coded for themselves, with scikit-learn's `SparseCoder`. There are at most as many atoms as inputs.
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import check_int, check_range, fail
from ..ops.formats import Codes
from .base import Dictionary
from .online_learning import scikit_codes, whole


class SparseConceptCoding(Dictionary):
    """Atoms by spectral regression on a graph of neighbours; needs scikit-learn.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms, at most ``input_size``.
        k: most entries of a code.
        num_neighbours: of a row in the graph.
        ridge: ``alpha`` of the regression for rows of norm 1; relative to the mean squared norm of a row.
        seed: of the eigenvectors' start.
    """

    _atoms: Tensor

    def __init__(
        self,
        input_size: int,
        dict_size: int,
        k: int = 8,
        *,
        num_neighbours: int = 5,
        ridge: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(input_size, dict_size)
        check_int("SparseConceptCoding", "dict_size", dict_size, 1, input_size)
        check_int("SparseConceptCoding", "k", k, 1, dict_size)
        check_int("SparseConceptCoding", "num_neighbours", num_neighbours)
        check_range("SparseConceptCoding", "ridge", ridge, 0, open_low=True)
        self.k, self.num_neighbours, self.ridge, self.seed = k, num_neighbours, ridge, seed
        self.register_buffer("_atoms", torch.zeros(dict_size, input_size))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``, rows of norm 1, the smoothest first; zeros before `fit`."""
        return self._atoms

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`; on the CPU, without gradient; codes have either sign."""
        self.check_input(x)
        if not bool(self._atoms.any()):
            raise fail("SparseConceptCoding.encode", "the dictionary", "be fit first", "no atoms")
        return scikit_codes(x, self._atoms, algorithm="lars", k=self.k)

    def fit(self, activations: Tensor) -> Tensor:  # type: ignore[override]
        """Find the atoms.

        Args:
            activations: ``[n, input_size]``, finite, more than ``dict_size + 1`` rows and more than neighbours.

        Returns:
            The eigenvectors ``[n, dict_size]`` that the atoms regress on.
        """
        rows = whole(activations, "SparseConceptCoding.fit", self.input_size)
        check_int("SparseConceptCoding.fit", "the number of activations", len(rows), self.dict_size + 2)
        if len(rows) <= self.num_neighbours:
            raise fail("SparseConceptCoding.fit", "num_neighbours", f"be below the rows ({len(rows)})", len(rows))
        smooth = neighbour_embedding(rows, self.dict_size, self.num_neighbours, self.seed)
        x, y = torch.from_numpy(rows), torch.from_numpy(smooth.copy())
        gram = x.T @ x
        gram.diagonal().add_(self.ridge * float(x.square().sum(1).mean()))
        atoms = torch.linalg.solve(gram, x.T @ y).T
        self._atoms.copy_(atoms / atoms.norm(dim=1, keepdim=True).clamp_min(1e-30))
        return y

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "k", "num_neighbours", "ridge", "seed")
        return {name: getattr(self, name) for name in names}


def neighbour_embedding(rows: Any, count: int, num_neighbours: int, seed: int) -> Any:
    """The ``count`` smoothest eigenvectors of the graph of nearest neighbours, without the constant one.

    Weights are ``exp(-||x - y||^2 / (2 s^2))`` with ``s`` the mean distance of neighbours; the graph is made symmetric
    by the larger of both directions.

    Args:
        rows: ``[n, d]``, a NumPy array.
        count: of eigenvectors, below ``n - 1``.
        num_neighbours: of a row.
        seed: of the start.
    """
    import numpy as np
    from scipy.sparse import diags_array
    from scipy.sparse.linalg import eigsh
    from sklearn.neighbors import kneighbors_graph

    graph = kneighbors_graph(rows, num_neighbours, mode="distance")
    width = max(float(graph.data.mean()), 1e-12)
    graph.data = np.exp(-(graph.data**2) / (2 * width**2))
    graph = graph.maximum(graph.T)
    root = diags_array(1 / np.sqrt(np.maximum(np.asarray(graph.sum(1)).ravel(), 1e-12)))
    start = np.random.default_rng(seed).standard_normal(len(rows))
    _, vectors = eigsh(root @ graph @ root, k=count + 1, which="LA", v0=start)
    return (root @ vectors[:, ::-1])[:, 1:]
