"""MP-SAE: matching pursuit unrolled, on atoms that encode and decode.

Paper: Costa et al. 2025, https://arxiv.org/abs/2506.03093, Algorithm 1. With the offset taken off, each step takes the
unit atom of the largest positive product with the residual, ``j = argmax_i d_i . r``, ``z_j += d_j . r``,
``r -= (d_j . r) d_j``; it stops after ``k`` steps, once the residual is small or once an atom comes again. Choices have
no gradient, values have, through all earlier steps. More steps never make the error larger, and the number of steps can
be changed after training.

The authors' code for the tree of Section 5 starts from atoms of norm 1 but does not keep them there: ``unit=False``.
They end at norm 1 by themselves where few steps code a row, and more of them end on the true ones; held at norm 1 they
stay in minima where a row takes many small steps. An atom whose squared norm is 2 or more makes the error larger.

The loss is the squared error alone, as in the paper: silent atoms are not revived.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_int, check_range
from ..kernels.pursuit import atom_products, matching_pursuit
from ..ops.formats import Codes
from .base import Batch, Dictionary, Objective


class MatchingPursuit(Dictionary):
    """Atoms, of norm 1 unless asked otherwise, and an offset; codes by matching pursuit.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        k: most steps; it may be changed at any time.
        tolerance: a row ends after a step that leaves a residual of a smaller norm; in the unit of the activations,
            of the scaled ones while training (`TrainOptions.normalise`).
        stop_on_repeat: a row ends after a step that takes an atom again.
        centre: whether there is an offset, which is taken off first; the paper's experiments on a tree have none.
        unit: keep atoms at norm 1.
        signed: choose by absolute product, so that codes have either sign (an extension: the paper's are positive).
        seed: of the initial atoms.

    Attributes:
        decoder: ``[dict_size, input_size]``, rows of norm 1 if ``unit``.
        decoder_bias: ``[input_size]``, or None.
    """

    def __init__(
        self,
        input_size: int,
        dict_size: int,
        k: int = 32,
        *,
        tolerance: float = 0.0,
        stop_on_repeat: bool = False,
        centre: bool = True,
        unit: bool = True,
        signed: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(input_size, dict_size)
        check_int("MatchingPursuit", "k", k)
        check_range("MatchingPursuit", "tolerance", tolerance, 0)
        self.k, self.tolerance, self.stop_on_repeat, self.signed, self.seed = k, tolerance, stop_on_repeat, signed, seed
        generator = torch.Generator().manual_seed(seed)
        self.decoder = nn.Parameter(F.normalize(torch.randn(dict_size, input_size, generator=generator), dim=1))
        self.centre, self.unit = centre, unit
        self.decoder_bias = nn.Parameter(torch.zeros(input_size)) if centre else None
        self._products: tuple[Tensor, Tensor | None] | None = None

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``, rows of norm 1 if ``unit``."""
        return self.decoder

    @property
    def offset(self) -> Tensor | None:
        """``[input_size]``, or None."""
        return self.decoder_bias

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`; the atoms' products are kept between calls in eval mode."""
        self.check_input(x)
        x = x.to(self.decoder.dtype)
        x = x if self.decoder_bias is None else x - self.decoder_bias
        held = None if self.training else self._held()
        options: dict[str, Any] = {
            name: getattr(self, name) for name in ("tolerance", "stop_on_repeat", "unit", "signed")
        }
        return matching_pursuit(x, self.decoder, self.k, products=held, **options)

    def _held(self) -> Tensor | None:
        atoms = self.decoder.detach()
        held = None if self._products is None else self._products[0]
        if held is None or held.device != atoms.device or held.dtype != atoms.dtype or not torch.equal(held, atoms):
            self._products = (atoms.clone(), atom_products(atoms))
        assert self._products is not None
        return self._products[1]

    def objective(self, batch: Batch) -> Objective:
        """Squared error summed over the width, mean over rows."""
        codes = self.encode(batch.x)
        reconstruction = self.decode(codes)
        error = (reconstruction - batch.target).square().sum(-1).mean()
        return Objective(error, codes, reconstruction, {"error": error})

    @torch.no_grad()
    def before_step(self) -> None:
        """Take from the gradients of atoms that keep their norm what would only change it."""
        if self.unit and self.decoder.grad is not None:
            along = (self.decoder.grad * self.decoder).sum(1, keepdim=True)
            self.decoder.grad -= along * self.decoder

    @torch.no_grad()
    def after_step(self) -> None:
        """Atoms of norm 1, if they are kept there."""
        if self.unit:
            self.decoder.div_(self.decoder.norm(dim=1, keepdim=True).clamp_min(torch.finfo(self.decoder.dtype).tiny))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Offset and tolerance times ``factor``; the codes scale by themselves."""
        if self.decoder_bias is not None:
            self.decoder_bias.mul_(factor)
        self.tolerance *= factor

    def fit(self, activations: Any, **options: Any) -> Any:
        """See `paucity.dictionary.trainer.train`, whose options these are."""
        from .trainer import train

        return train(self, activations, **options)

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "k", "tolerance", "stop_on_repeat", "centre", "unit", "signed", "seed")
        return {name: getattr(self, name) for name in names}
