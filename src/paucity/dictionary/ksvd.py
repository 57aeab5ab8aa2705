"""K-SVD: codes by orthogonal matching pursuit, atoms one by one with the values of those that use them.

Paper: Aharon et al. 2006, https://doi.org/10.1109/TSP.2006.881199 , in the approximate form of Rubinstein
et al. 2008: an atom and its values take one step of power iteration towards the best rank 1 of what the other atoms
leave, in place of a whole SVD. An atom that no row uses, or that copies another, becomes the row that is
represented worst, as the paper advises.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_floating, check_int, check_shape, fail
from ..ops.formats import Codes
from ..ops.pursuit import orthogonal_matching_pursuit
from .base import Dictionary


class KSVD(Dictionary):
    """Unit atoms, fit whole on a matrix of activations.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        k: entries of a code.
        seed: of the initial atoms and of their order.
    """

    def __init__(self, input_size: int, dict_size: int, k: int = 8, *, seed: int = 0) -> None:
        super().__init__(input_size, dict_size)
        check_int("KSVD", "k", k, 1, min(input_size, dict_size))
        self.k, self.seed = k, seed
        generator = torch.Generator().manual_seed(seed)
        start = F.normalize(torch.randn(dict_size, input_size, generator=generator), dim=1)
        self.decoder = nn.Parameter(start, requires_grad=False)

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``, rows of norm 1."""
        return self.decoder

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`."""
        self.check_input(x)
        return orthogonal_matching_pursuit(x.to(self.decoder.dtype), self.decoder, self.k)

    @torch.no_grad()
    def fit(self, activations: Tensor, *, num_iterations: int = 20) -> list[float]:  # type: ignore[override]
        """Start at rows of the activations and alternate.

        Args:
            activations: ``[n, input_size]``, at least ``dict_size`` rows; finite.
            num_iterations: of coding and updating all atoms.

        Returns:
            The share of the squared norm that is not explained, after each iteration.

        Raises:
            InputError: if a shape or a number does not fit, or activations are not finite.
        """
        check_floating("KSVD.fit", "activations", activations)
        check_shape("KSVD.fit", "activations", activations, None, self.input_size)
        check_int("KSVD.fit", "the number of activations", len(activations), self.dict_size)
        check_int("KSVD.fit", "num_iterations", num_iterations)
        if not bool(activations.isfinite().all()):
            raise fail("KSVD.fit", "activations", "be finite", "NaN or infinity")
        x = activations.float()
        generator = torch.Generator().manual_seed(self.seed)
        heavy = (x.norm(dim=1) > 1e-6 * x.norm(dim=1).max()).nonzero().squeeze(1)
        drawn = heavy[torch.randperm(len(heavy), generator=generator)][: self.dict_size]
        self.decoder[: len(drawn)] = F.normalize(x[drawn], dim=1)
        history = []
        for _ in range(num_iterations):
            codes = self.encode(x)
            values, indices = codes.values.clone(), codes.indices.long()
            left = x - self.decode(codes)
            taken = torch.zeros(len(x), dtype=torch.bool)
            for atom in torch.randperm(self.dict_size, generator=generator).tolist():
                self._update(atom, x, left, taken, values, indices)
            copies = ((self.decoder @ self.decoder.T).abs().triu(1) > 0.99).any(0)
            for atom in copies.nonzero().squeeze(1).tolist():
                self._replace(atom, x, left, taken)
            history.append(float(left.square().sum() / x.square().sum().clamp_min(1e-30)))
        return history

    def _update(self, atom: int, x: Tensor, left: Tensor, taken: Tensor, values: Tensor, indices: Tensor) -> None:
        slots = (indices == atom) & (values != 0)
        rows = slots.any(1).nonzero().squeeze(1)
        old = self.decoder[atom].clone()
        if not len(rows):
            return self._replace(atom, x, left, taken)
        weight = values[slots]
        without = left[rows] + weight.unsqueeze(1) * old
        fresh = weight @ without
        if float(fresh.norm()) == 0:
            return
        fresh = F.normalize(fresh, dim=0)
        weight = without @ fresh
        self.decoder[atom] = fresh
        values[slots] = weight
        left[rows] = without - weight.unsqueeze(1) * fresh

    def _replace(self, atom: int, x: Tensor, left: Tensor, taken: Tensor) -> None:
        """Make an atom of the worst row that no other took, or of what is left of it if that row is an atom already."""
        worst = int(torch.where(taken, 0, left.square().sum(1)).argmax())
        if bool(taken[worst]) or not float(left[worst].norm()) or not float(x[worst].norm()):
            return
        taken[worst] = True
        self.decoder[atom] = F.normalize(x[worst], dim=0)
        others = self.decoder @ self.decoder[atom]
        others[atom] = 0
        if float(others.abs().max()) > 0.99:  # a copy would be as unused
            self.decoder[atom] = F.normalize(left[worst], dim=0)

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        return {"input_size": self.input_size, "dict_size": self.dict_size, "k": self.k, "seed": self.seed}
