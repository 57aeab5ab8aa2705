"""Crosscoder: one code for several layers or models, each with an encoder and a decoder of its own.

Source: Lindsey et al. 2024, "Sparse Crosscoders for Cross-Layer Features and Model Diffing",
https://transformer-circuits.pub/2024/crosscoders/index.html, the acausal crosscoder. Taken from it: with activations
``a^l`` at the places ``l``, ``z = relu(sum_l W_enc^l a^l + b_enc)``, ``a_hat^l = W_dec^l z + b_dec^l``, the loss
``sum_l |a^l - a_hat^l|^2 + l1 * sum_i z_i sum_l |W_dec,i^l|``, where norms are summed and not joined, so that an atom
pays for each place it writes to; and the relative norm of an atom at two places as the measure of whom it belongs to.
Norms of atoms are free. Places are scaled to mean norm ``sqrt(width)`` each. Encoders start as the transposed decoders,
of a small norm.

Not implemented: causal crosscoders, where a place is read only by later ones, and cross-layer transcoders; TopK in
place of the penalty; revival of silent atoms.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_int, check_range, fail
from ..kernels.codes import decode_codes, encode_kept
from ..ops.formats import Codes
from .base import Batch, Dictionary, Objective
from .rules import above, warmed
from .sources import ActivationSource, as_source


class Crosscoder(Dictionary):
    """Codes of rows in which the activations of all places stand side by side.

    Args:
        widths: of each place, in the order of a row (`paucity.dictionary.live.live_source` of several hooks, or tensors
            joined along their width).
        dict_size: number of atoms.
        l1: weight of the penalty, against the squared error summed over all places.
        warmup: share of the steps over which the weight rises from 0.
        initial_norm: of each atom at each place.
        silent_after: tokens without a code after which an atom counts as silent, for telemetry.
        seed: of the initial atoms.

    Attributes:
        encoder: ``[dict_size, sum(widths)]``.
        encoder_bias: ``[dict_size]``.
        decoder: ``[dict_size, sum(widths)]``.
        decoder_bias: ``[sum(widths)]``.
        scales: ``[places]``, what the activations of each place are multiplied by.
    """

    scales: Tensor

    def __init__(
        self,
        widths: Sequence[int],
        dict_size: int,
        *,
        l1: float = 5.0,
        warmup: float = 0.05,
        initial_norm: float = 0.1,
        silent_after: int = 10_000_000,
        seed: int = 0,
    ) -> None:
        if not len(widths):
            raise fail("Crosscoder", "widths", "hold at least one place", "none")
        for width in widths:
            check_int("Crosscoder", "widths", width)
        super().__init__(sum(widths), dict_size)
        check_range("Crosscoder", "l1", l1, 0)
        check_range("Crosscoder", "warmup", warmup, 0, 1)
        check_range("Crosscoder", "initial_norm", initial_norm, 0, open_low=True)
        check_int("Crosscoder", "silent_after", silent_after)
        self.widths, self.l1, self.warmup, self.initial_norm = tuple(widths), l1, warmup, initial_norm
        self.silent_after, self.seed = silent_after, seed
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(dict_size, self.input_size, generator=generator)
        atoms = torch.cat([F.normalize(part, dim=1) for part in self.split(drawn)], 1) * initial_norm
        self.decoder = nn.Parameter(atoms)
        self.encoder = nn.Parameter(atoms.clone())
        self.encoder_bias = nn.Parameter(torch.zeros(dict_size))
        self.decoder_bias = nn.Parameter(torch.zeros(self.input_size))
        self.register_buffer("scales", torch.ones(len(self.widths)))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, sum(widths)]``, in the unit of the activations."""
        return self.decoder / self._columns()

    @property
    def offset(self) -> Tensor:
        """``[sum(widths)]``, in the unit of the activations."""
        return self.decoder_bias / self._columns()

    def split(self, rows: Tensor) -> Sequence[Tensor]:
        """Activations, reconstructions or atoms ``[..., sum(widths)]`` by place."""
        return torch.split(rows, list(self.widths), -1)

    def norms(self) -> Tensor:
        """Norm of each atom at each place, ``[dict_size, places]``, places scaled alike; differentiable."""
        return torch.stack([part.norm(dim=1) for part in self.split(self.decoder)], 1)

    @torch.no_grad()
    def relative_norms(self, first: int, second: int) -> Tensor:
        """How far each atom belongs to ``second``: ``[dict_size]``; 0 is to ``first`` alone, 1/2 to both alike."""
        for name, place in (("first", first), ("second", second)):
            check_int("relative_norms", name, place, 0, len(self.widths) - 1)
        norms = self.norms()
        return norms[:, second] / (norms[:, first] + norms[:, second]).clamp_min(torch.finfo(norms.dtype).tiny)

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`; of all places together."""
        self.check_input(x)
        codes = self._codes(x.reshape(-1, self.input_size).to(self.encoder.dtype) * self._columns())
        shape = (*x.shape[:-1], codes.k)
        return Codes(codes.values.view(shape), codes.indices.view(shape), self.dict_size)

    def objective(self, batch: Batch) -> Objective:
        """Squared error summed over places and widths, mean over rows, and the weighted l1."""
        columns = self._columns()
        codes = self._codes(batch.x * columns)
        reconstruction = decode_codes(codes.values, codes.indices, self.decoder) + self.decoder_bias
        error = (reconstruction - batch.target * columns).square().sum(-1).mean()
        paid = codes.values * self.norms().sum(1)[codes.indices.long()]
        penalty = self.l1 * warmed(batch, self.warmup) * paid.sum(-1).mean()
        return Objective(error + penalty, codes, reconstruction / columns, {"error": error, "l1": penalty})

    def start_at(self, mean: Tensor) -> None:
        """See `Dictionary.start_at`."""
        self.decoder_bias.copy_(mean * self._columns())

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """Biases times ``factor``: codes are then as much larger as activations are."""
        self.encoder_bias.mul_(factor)
        self.decoder_bias.mul_(factor)

    @torch.no_grad()
    def balance(self, activations: ActivationSource | Tensor, count: int = 4096) -> None:
        """Set the scales by the first ``count`` rows: mean norm ``sqrt(width)`` at each place.

        Raises:
            InputError: if the width does not fit, or a place is 0 throughout or not finite.
        """
        source = as_source(activations)
        if source.input_size != self.input_size:
            raise fail("Crosscoder", "activations", f"be {self.input_size} wide (sum of widths)", source.input_size)
        means = [float(part.float().norm(dim=1).mean()) for part in self.split(source.sample(count))]
        if not all(math.isfinite(mean) and mean > 0 for mean in means):
            raise fail("Crosscoder", "activations", "be finite and not 0 at a whole place", f"mean norms {means}")
        for place, (mean, width) in enumerate(zip(means, self.widths, strict=True)):
            self.scales[place] = math.sqrt(width) / mean

    def fit(self, activations: Any, **options: Any) -> Any:
        """`balance` and train, without another scale; options are those of `paucity.dictionary.trainer.train`."""
        from .trainer import train

        self.balance(activations)
        return train(self, activations, **({"normalise": False} | options))

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("dict_size", "l1", "warmup", "initial_norm", "silent_after", "seed")
        return {"widths": list(self.widths)} | {name: getattr(self, name) for name in names}

    def _columns(self) -> Tensor:
        widths = torch.tensor(self.widths, device=self.scales.device)
        return self.scales.repeat_interleave(widths)

    def _codes(self, scaled: Tensor) -> Codes:
        with torch.no_grad():
            indices, used = above(F.linear(scaled, self.encoder, self.encoder_bias))
        values = encode_kept(scaled, self.encoder, self.encoder_bias, indices)
        return Codes(torch.where(used, values, 0).relu(), indices, self.dict_size)
