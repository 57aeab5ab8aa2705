"""vSAE: pre-activations are means of Gaussians that are sampled in training, and drawn towards N(0, 1).

Paper: Baker and Li 2025, https://arxiv.org/abs/2509.22994: ``z = mu + sigma * noise`` with ``mu = relu(W_enc (x - b) +
b_enc)``; the k of largest ``|z|`` are kept, and the loss gets ``kl * KL(N(mu, sigma^2) | N(0, 1))``, summed over all
atoms, whose weight rises over the first tenth of the training. ``sigma`` is fixed, or learned by an encoder of its own.
Encoding takes ``mu``. The paper's finding is negative: many more dead atoms than TopK has, and worse reconstruction.
Elsewhere the authors fix ``sigma`` at 1, and code of such models takes ``mu`` itself then (`deviation` 0). Their atoms
are not held at norm 1, so that small codes escape the divergence, whose weight is 0.5 or 1; here atoms are, and it is a
factor on nats where the error is summed over the width. Beside noise of 1 an atom's value has to be well above 1 to be
chosen for what it is; activations of the norm ``sqrt(width)`` hardly give that, and little is reconstructed.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..checks import check_int, check_range
from ..kernels.codes import encode_kept
from ..kernels.select import topk
from ..ops.formats import Codes
from . import parallel
from .base import Batch
from .rules import warmed
from .sae import Draft, Rule, SparseAutoencoder

ROWS = 1024
LOWEST, HIGHEST, FIRST = -6.0, 2.0, -2.0  # log variance


class Variational(Rule):
    """Keep ``k`` of each row of what was sampled.

    Args:
        k: entries of a code, at most the atoms that there are.
        kl: weight of the divergence, in nats, beside the error summed over the width.
        warmup: share of the training over which the weight rises.
        deviation: of the noise, in the scale of training; None has an encoder of its own learn it.
        seed: of the noise, which depends on nothing else but the step.
    """

    log_scale: Tensor

    def __init__(
        self, k: int = 32, *, kl: float = 0.1, warmup: float = 0.1, deviation: float | None = None, seed: int = 0
    ) -> None:
        super().__init__()
        check_int("Variational", "k", k)
        check_range("Variational", "kl", kl, 0)
        check_range("Variational", "warmup", warmup, 0, 1)
        if deviation is not None:
            check_range("Variational", "deviation", deviation, 0)
        self.k, self.kl, self.warmup, self.deviation, self.seed = k, kl, warmup, deviation, seed
        self.register_buffer("log_scale", torch.zeros(()))

    def attach(self, sae: SparseAutoencoder) -> None:
        """Make the encoder of deviations; raise InputError if there are fewer atoms than ``k``."""
        check_int("Variational", "k", self.k, 1, sae.dict_size)
        if self.deviation is None:
            self.encoder = nn.Parameter(torch.zeros(sae.dict_size, sae.input_size))
            self.bias = nn.Parameter(torch.full((sae.dict_size,), FIRST))

    def encode(self, sae: SparseAutoencoder, x: Tensor) -> Codes:
        """See `Rule.encode`; the means, without noise."""
        _, indices = topk(sae.pre(x), self.k)
        return Codes(sae.kept(x, indices).relu(), indices, sae.dict_size)

    def train_codes(self, sae: SparseAutoencoder, batch: Batch) -> Draft:
        """See `Rule.train_codes`."""
        generator = torch.Generator().manual_seed(1_000_003 * (self.seed + 1_009 * parallel.rank()) + batch.step)
        with torch.no_grad():
            mean = sae.pre(batch.x).relu_()
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
            noise *= self._deviations(sae, batch.x, None)
            _, indices = topk(mean + noise, self.k, by_abs=True)
            at = noise.gather(1, indices.long())
        if self.deviation is None:  # noise is deviation times epsilon: put the gradient of the deviation back
            deviation = self._deviations(sae, batch.x, indices)
            at = at / deviation.detach() * deviation
        codes = Codes(sae.kept(batch.x, indices).relu() + at, indices, sae.dict_size)
        if not self.kl:
            return Draft(codes)
        return Draft(codes, {"divergence": self.kl * warmed(batch, self.warmup) * self.divergence(sae, batch.x)})

    def divergence(self, sae: SparseAutoencoder, x: Tensor) -> Tensor:
        """Nats of ``KL(N(mu, sigma^2) | N(0, 1))`` over all atoms, mean over rows ``[n, input_size]``.

        Without what is constant where the deviation is fixed. Rows are done in portions that the backward pass computes
        once more: nothing ``[n, dict_size]`` is kept.
        """
        parts = [checkpoint(self._nats, sae, rows, use_reentrant=False) for rows in torch.split(x, ROWS)]
        return torch.stack(parts).sum() / max(1, len(x))

    def _nats(self, sae: SparseAutoencoder, x: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        mean = F.linear(sae.centred(x), sae.encoder, sae.encoder_bias).relu() / scale
        nats = mean.square().sum()
        if self.deviation is None:
            log_variance = self._log_variance(sae, x, None)
            nats = nats + (log_variance.exp() - 1 - log_variance).sum()
        return nats / 2

    def _log_variance(self, sae: SparseAutoencoder, x: Tensor, indices: Tensor | None) -> Tensor:
        """In the scale of training: of all atoms, or at ``indices``."""
        x = sae.centred(x) / self.log_scale.exp()
        if indices is None:
            return F.linear(x, self.encoder, self.bias).clamp(LOWEST, HIGHEST)
        return encode_kept(x, self.encoder, self.bias, indices).clamp(LOWEST, HIGHEST)

    def _deviations(self, sae: SparseAutoencoder, x: Tensor, indices: Tensor | None) -> Tensor:
        if self.deviation is not None:
            return self.log_scale.exp() * self.deviation
        return (self._log_variance(sae, x, indices) / 2 + self.log_scale).exp()

    def rescale(self, factor: float) -> None:
        """See `Rule.rescale`; the Gaussians keep the scale of training."""
        self.log_scale += torch.tensor(factor).log()

    def settings(self) -> dict[str, Any]:
        """See `Rule.settings`."""
        names = ("k", "kl", "warmup", "deviation", "seed")
        return {name: getattr(self, name) for name in names}
