"""RA-SAE: atoms that stay close to convex combinations of data, and so come out alike in every training.

Paper: Fel et al. 2025, https://arxiv.org/abs/2502.12892, Eq. 4. ``D = exp(m) (W C + Lambda)`` with rows of ``W``
non-negative with sum 1, ``||Lambda_i|| <= delta``, and ``C`` the centroids of k-means on the activations. A linear
encoder with top-k gives the codes; encoder, ``W``, ``Lambda`` and ``m`` are trained on the squared error. ``delta = 0``
is the strict A-SAE.

Activations are taken as they come, without an offset, since atoms are places in the data and not directions: what all
activations share costs entries, so that a large mean is better taken off before. Atoms do not have norm 1. The official
encoder has a batch norm, here it has none. The paper's other encoders (JumpReLU, BatchTopK) are not combined with it.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_int, check_range, check_shape, fail
from ..kernels.codes import encode_kept
from ..kernels.select import topk
from ..ops.formats import Codes
from .base import Batch, Dictionary, Objective
from .sources import as_source


class Archetypal(Dictionary):
    """Atoms near the convex hull of centroids.

    Args:
        input_size: width of an activation.
        dict_size: number of atoms.
        k: entries of a code.
        num_centroids: candidates, at least ``dict_size``; twice ``dict_size`` if not given.
        delta: how far an atom may leave the hull, before the common factor; for activations of mean norm
            ``sqrt(input_size)``, to which training scales them.
        seed: of the centroids and of the encoder.

    Attributes:
        centroids: ``[num_centroids, input_size]``, set by `fit`.
        mixing: ``[dict_size, num_centroids]``, rows on the simplex.
        away: ``[dict_size, input_size]``, rows of norm at most ``delta``.
        log_scale: the logarithm of the common factor.
    """

    centroids: Tensor

    def __init__(
        self,
        input_size: int,
        dict_size: int,
        k: int = 32,
        *,
        num_centroids: int | None = None,
        delta: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(input_size, dict_size)
        num_centroids = 2 * dict_size if num_centroids is None else num_centroids
        check_int("Archetypal", "k", k, 1, dict_size)
        check_int("Archetypal", "num_centroids", num_centroids, dict_size)
        check_range("Archetypal", "delta", delta, 0)
        self.k, self.num_centroids, self.delta, self.seed = k, num_centroids, delta, seed
        generator = torch.Generator().manual_seed(seed)
        self.encoder = nn.Parameter(F.normalize(torch.randn(dict_size, input_size, generator=generator), dim=1))
        self.encoder_bias = nn.Parameter(torch.zeros(dict_size))
        self.mixing = nn.Parameter(torch.eye(dict_size, num_centroids))
        self.away = nn.Parameter(torch.zeros(dict_size, input_size))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("centroids", torch.zeros(num_centroids, input_size))

    @property
    def atoms(self) -> Tensor:
        """``[dict_size, input_size]``."""
        return self.log_scale.exp() * (self.mixing @ self.centroids + self.away)

    def encode(self, x: Tensor) -> Codes:
        """See `Dictionary.encode`."""
        self.check_input(x)
        if not bool(self.centroids.any()):
            raise fail("Archetypal.encode", "the dictionary", "be fit or placed first", "no centroids")
        rows = x.reshape(-1, self.input_size).to(self.encoder.dtype)
        with torch.no_grad():
            _, indices = topk(F.linear(rows, self.encoder, self.encoder_bias), self.k)
        values = encode_kept(rows, self.encoder, self.encoder_bias, indices).relu()
        shape = (*x.shape[:-1], self.k)
        return Codes(values.view(shape), indices.view(shape), self.dict_size)

    def objective(self, batch: Batch) -> Objective:
        """Squared error summed over the width, mean over rows."""
        codes = self.encode(batch.x)
        reconstruction = self.decode(codes)
        error = (reconstruction - batch.target).square().sum(-1).mean()
        return Objective(error, codes, reconstruction, {"error": error})

    @torch.no_grad()
    def after_step(self) -> None:
        """Rows of ``mixing`` on the simplex, rows of ``away`` within ``delta``."""
        self.mixing.clamp_min_(0)
        self.mixing.div_(self.mixing.sum(1, keepdim=True).clamp_min(1e-12))
        self.away.mul_((self.delta / self.away.norm(dim=1, keepdim=True).clamp_min(1e-12)).clamp_max(1))

    @torch.no_grad()
    def rescale(self, factor: float) -> None:
        """What has the unit of an activation: places and the encoder's bias; then codes need no change."""
        self.centroids.mul_(factor)
        self.away.mul_(factor)
        self.delta *= factor
        self.encoder.div_(factor)

    @torch.no_grad()
    def place(self, centroids: Tensor, sample: Tensor | None = None) -> None:
        """Start every atom at a centroid, its row of the encoder in that direction.

        Args:
            centroids: ``[num_centroids, input_size]``.
            sample: ``[n, input_size]``, activations for which the common factor starts at its best; else it is 1.
        """
        check_shape("Archetypal.place", "centroids", centroids, self.num_centroids, self.input_size)
        self.centroids.copy_(centroids)
        self.mixing.copy_(torch.eye(self.dict_size, self.num_centroids))
        self.away.zero_()
        self.log_scale.zero_()
        self.encoder.copy_(F.normalize(self.centroids[: self.dict_size], dim=1))
        self.encoder_bias.zero_()
        if sample is not None:
            made = self(sample)
            best = float((made * sample).sum() / made.square().sum().clamp_min(1e-12))
            self.log_scale.fill_(math.log(max(best, 1e-6)))

    def fit(self, activations: Any, *, centroids: Tensor | None = None, **options: Any) -> Any:
        """Find centroids by k-means, unless given, and train; see `paucity.dictionary.trainer.train`.

        Args:
            activations: ``[n, input_size]`` or a source.
            centroids: ``[num_centroids, input_size]``, in the unit of the activations.
            options: of `train`. Where it scales activations, ``delta`` is in the unit of the scaled ones.
        """
        from .trainer import TrainOptions, train

        given = {"keep": options.pop("keep", None), "on_progress": options.pop("on_progress", None)}
        base: TrainOptions = options.pop("options", None) or TrainOptions(centre=False)
        plan = TrainOptions.model_validate(base.model_dump() | options)
        source = as_source(activations)
        if centroids is None:
            centroids = kmeans_centroids(activations, self.num_centroids, seed=self.seed)
        sample = source.sample(max(plan.batch_size, 1024)).float()
        scale = 1.0
        if plan.normalise:
            scale = math.sqrt(sample.shape[1]) / max(float(sample.norm(dim=1).mean()), 1e-12)
        self.place(centroids * scale, sample * scale)
        self.is_fit = False  # it stands in the unit of the training that comes
        return train(self, source, options=plan, **given)

    def settings(self) -> dict[str, Any]:
        """See `Dictionary.settings`."""
        names = ("input_size", "dict_size", "k", "num_centroids", "delta", "seed")
        return {name: getattr(self, name) for name in names}


def kmeans_centroids(activations: Any, count: int, *, seed: int = 0, num_tokens: int = 100_000) -> Tensor:
    """``[count, input_size]`` float32, centroids of k-means in mini-batches (scikit-learn's), in a fixed order.

    Args:
        activations: ``[n, input_size]`` or a source, of which ``num_tokens`` are read; at least ``count`` of them.
        count: of centroids.
        seed: of the start.
        num_tokens: most activations.
    """
    from sklearn.cluster import MiniBatchKMeans

    source = as_source(activations)
    rows = activations[:num_tokens] if isinstance(activations, Tensor) else source.sample(num_tokens)
    check_int("kmeans_centroids", "the number of activations", len(rows), count)
    found = MiniBatchKMeans(count, batch_size=max(1024, 2 * count), n_init=1, random_state=seed)
    found.fit(rows.detach().float().cpu().numpy())
    return torch.from_numpy(found.cluster_centers_).float()
