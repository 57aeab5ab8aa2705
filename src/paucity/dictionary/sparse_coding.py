"""Sparse coding: codes by optimisation with the atoms held, atoms by gradient with the codes held.

Paper: Rentzeperis et al. 2023 (Beyond l1 sparse coding in V1), https://arxiv.org/abs/2301.10002: atoms of norm 1 and
codes ``z <- prox(z + mu D (x - z D)^T)`` with the prox of the l1 norm, of the number of nonzeros, or of CEL0, between
the two. FISTA and orthogonal matching pursuit are coders of the same dictionary. Codes have either sign unless asked.

Not implemented: the paper's l_p penalties between 0 and 1, and the adaptation of the penalty to a wanted sparsity;
`penalty_for` finds the penalty of a sparsity for given atoms.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_choice, check_int, check_range, fail
from ..kernels.codes import decode_codes
from ..ops.formats import Codes
from ..ops.proximal import proximal_codes
from ..ops.pursuit import orthogonal_matching_pursuit
from .base import Batch, Dictionary, Objective

Coder = Literal["ista", "fista", "hard", "cel0", "omp"]
CODERS = ("cel0", "fista", "hard", "ista", "omp")


class SparseCoding(Dictionary):
    """Unit atoms that are learned by gradient, with a coder of choice.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        coder: ``ista`` and ``fista`` (l1), ``hard`` (l0), ``cel0`` or ``omp``.
        penalty: ``lambda`` of all but ``omp``, for activations as they are given to `encode`, for the scaled ones
            while training (`TrainOptions.normalise`).
        k: entries of a code of ``omp``.
        num_steps: most steps of the others.
        nonnegative: whether codes of the others are cut off below 0.
        seed: of the initial atoms.

    Attributes:
        decoder: ``[dict_size, input_size]``, rows of norm 1.
    """

    def __init__(
        self,
        input_size: int,
        dict_size: int,
        coder: Coder = "cel0",
        *,
        penalty: float = 0.1,
        k: int = 8,
        num_steps: int = 100,
        nonnegative: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(input_size, dict_size)
        check_choice("SparseCoding", "coder", coder, CODERS)
        check_range("SparseCoding", "penalty", penalty, 0)
        check_int("SparseCoding", "k", k, 1, min(input_size, dict_size) if coder == "omp" else None)
        check_int("SparseCoding", "num_steps", num_steps)
        if nonnegative and coder == "omp":
            raise fail("SparseCoding", "nonnegative", "be False for omp", True)
        self.coder, self.penalty, self.k, self.num_steps = coder, penalty, k, num_steps
        self.nonnegative, self.seed = nonnegative, seed
        generator = torch.Generator().manual_seed(seed)
        self.decoder = nn.Parameter(F.normalize(torch.randn(dict_size, input_size, generator=generator), dim=1))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``, rows of norm 1."""
        return self.decoder

    @torch.no_grad()
    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`; no gradient flows."""
        self.check_input(x)
        x = x.to(self.decoder.dtype)
        if self.coder == "omp":
            return orthogonal_matching_pursuit(x, self.decoder, self.k)
        return proximal_codes(
            x,
            self.decoder,
            self.penalty,
            shrink=self.coder if self.coder in ("hard", "cel0") else "soft",
            accelerate=self.coder == "fista",
            num_steps=self.num_steps,
            nonnegative=self.nonnegative,
        )

    def objective(self, batch: Batch) -> Objective:
        """Squared error summed over the width, mean over rows, of codes that are held."""
        codes = self.encode(batch.x)
        reconstruction = decode_codes(codes.values, codes.indices, self.decoder)
        error = (reconstruction - batch.target).square().sum(-1).mean()
        return Objective(error, codes, reconstruction, {"error": error})

    @torch.no_grad()
    def after_step(self) -> None:
        """Atoms of norm 1."""
        self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.decoder.dtype).tiny))

    def rescale(self, factor: float) -> None:
        """The penalty, which has the unit of an activation for l1 and of its square for the others."""
        self.penalty *= factor if self.coder in ("ista", "fista") else factor**2

    def fit(self, activations: Any, **options: Any) -> Any:
        """See `paucity.dictionary.trainer.train`, whose options these are."""
        from .trainer import train

        return train(self, activations, **options)

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "coder", "penalty", "k", "num_steps", "nonnegative", "seed")
        return {name: getattr(self, name) for name in names}


def penalty_for(dictionary: SparseCoding, x: Tensor, l0: float, *, halvings: int = 12) -> float:
    """The penalty at which codes of ``x [n, input_size]`` have ``l0`` entries on average, by bisection.

    The dictionary's penalty is left as it was.

    Raises:
        InputError: if ``l0`` is not between 0 and the number of atoms, or the coder has no penalty.
    """
    check_range("penalty_for", "l0", l0, 0, dictionary.dict_size, open_low=True, open_high=True)
    if dictionary.coder == "omp":
        raise fail("penalty_for", "coder", "have a penalty", "omp")
    top = float((x.to(dictionary.decoder) @ dictionary.decoder.detach().T).abs().max())
    top = max(top, 1e-12) if dictionary.coder in ("ista", "fista") else max(top, 1e-12) ** 2
    low, high, before = 1e-6, 1.0, dictionary.penalty
    try:
        for _ in range(halvings):
            middle = (low * high) ** 0.5
            dictionary.penalty = top * middle
            dense = float(dictionary.encode(x).l0().float().mean()) > l0
            low, high = (middle, high) if dense else (low, middle)
    finally:
        dictionary.penalty = before
    return float(top * (low * high) ** 0.5)
