"""SparseJEPA: a joint-embedding predictive architecture whose latents are penalised in groups.

Paper: Hartman and Varshney 2025, https://arxiv.org/abs/2504.16140, on I-JEPA (https://arxiv.org/abs/2301.08243). The
context encoder sees some patches; what it gives becomes latents ``z = mu + sigma e``, from which the predictor says
what the target encoder, an average of the context encoder over time, gives at hidden patches. The loss is
``mean |s_hat - s|^2 + kl * KL(N(mu, sigma^2) | N(0, 1)) + group * sum_g sqrt(p_g) |z_g|`` (squared error, KL and group
lasso); with ``kl = group = 0`` and no noise it is JEPA. Targets are normalised by token as in I-JEPA.

What is ours: latents are grouped by equal runs of neighbouring coordinates, token by token. The paper follows
oi-VAE (https://arxiv.org/abs/1802.06765), which penalises the columns of a map from latents to groups of observations;
`group_lasso` takes such a map as well. Weights and sizes are not the paper's.

Not implemented: several context blocks, augmentations, the low-level tasks of the paper.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_divides, check_floating, check_int, check_range, fail
from ..measure.images import Images
from ..measure.tokens import device_of, evaluating
from ..models.vision import TransformerBlock
from ..training import learning_rate_at


def group_lasso(x: Tensor, num_groups: int, dim: int = -1) -> Tensor:
    """``sum_g sqrt(p) |x_g|_2`` over equal groups of neighbouring entries, mean over all other dimensions.

    Args:
        x: any float dtype; latents with the latent last, or a map whose ``dim`` is grouped.
        num_groups: that divide the size of ``dim``.
        dim: the dimension that is grouped.

    Returns:
        Scalar, differentiable; at a group that is 0 the gradient is 0.
    """
    check_floating("group_lasso", "x", x)
    check_int("group_lasso", "num_groups", num_groups)
    size = x.shape[dim]
    check_divides("group_lasso", "num_groups", num_groups, size, "the grouped size")
    grouped = x.movedim(dim, -1).reshape(-1, num_groups, size // num_groups)
    norms: Tensor = torch.linalg.vector_norm(grouped, dim=-1)
    return math.sqrt(size // num_groups) * norms.sum(-1).mean()


def kl_to_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """``KL(N(mean, exp(log_variance)) | N(0, 1))`` in nats, summed over the last dimension, mean over the others."""
    return (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean() / 2


class PatchEncoder(nn.Module):
    """Patches of a picture through transformer blocks, of all of them or of some.

    Args:
        in_channels: of a picture.
        image_size: side of a picture in pixels.
        patch_size: side of a patch, which divides it.
        width: of a token.
        depth: blocks.
        heads: of attention, which divide the width.
    """

    def __init__(self, in_channels: int, image_size: int, patch_size: int, width: int, depth: int, heads: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(in_channels, width, patch_size, patch_size)
        self.side = image_size // patch_size
        self.places = nn.Parameter(0.02 * torch.randn(self.side**2, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)

    def forward(self, pixels: Tensor, seen: Tensor | None = None) -> Tensor:
        """``[B, C, H, W] -> [B, n, width]`` for the patches ``seen`` (int64 ``[n]``), which see no others."""
        x = self.patches(pixels).flatten(2).transpose(1, 2) + self.places
        tokens: Tensor = self.norm(self.blocks(x if seen is None else x[:, seen]))
        return tokens


@dataclass(frozen=True, eq=False)
class JepaLoss:
    """What a step is to make small: the whole and its terms, scalars."""

    loss: Tensor
    error: Tensor
    kl: Tensor
    group: Tensor


class SparseJepa(nn.Module):
    """Context encoder, target encoder, latents and predictor.

    Args:
        in_channels: of a picture.
        image_size: side of a picture in pixels.
        patch_size: side of a patch, which divides it; at least four patches a side.
        width: of a token and of its latents.
        depth: blocks of an encoder.
        heads: of attention.
        predictor_depth: blocks of the predictor.
        num_groups: of latents.
        kl: weight of the KL term; 0 leaves out the noise, too.
        group: weight of the group lasso.
    """

    def __init__(
        self,
        in_channels: int = 1,
        image_size: int = 28,
        patch_size: int = 7,
        width: int = 64,
        depth: int = 3,
        heads: int = 4,
        predictor_depth: int = 1,
        *,
        num_groups: int = 16,
        kl: float = 1e-4,
        group: float = 1e-3,
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "width": width, "depth": depth, "predictor_depth": predictor_depth}
        for name, value in sizes.items():
            check_int("SparseJepa", name, value)
        check_divides("SparseJepa", "patch_size", patch_size, image_size, "the side of a picture")
        check_divides("SparseJepa", "heads", heads, width, "the width")
        check_divides("SparseJepa", "num_groups", num_groups, width, "the width")
        if image_size // patch_size < 4:
            raise fail("SparseJepa", "patch_size", "leave at least 4 patches a side", image_size // patch_size)
        for name, weight in (("kl", kl), ("group", group)):
            check_range("SparseJepa", name, weight, 0)
        self.kl, self.group, self.num_groups = kl, group, num_groups
        self.context = PatchEncoder(in_channels, image_size, patch_size, width, depth, heads)
        self.target = copy.deepcopy(self.context).requires_grad_(False)
        self.to_latents = nn.Linear(width, 2 * width)
        self.from_latents = nn.Linear(width, width)
        self.hidden_token = nn.Parameter(0.02 * torch.randn(width))
        self.places = nn.Parameter(0.02 * torch.randn(self.context.side**2, width))
        self.predictor = nn.Sequential(
            *(TransformerBlock(width, heads) for _ in range(predictor_depth)), nn.LayerNorm(width)
        )
        self.out = nn.Linear(width, width)

    def latents(self, pixels: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Means and log variances ``[B, n, width]`` of the latents of the patches ``seen``."""
        mean, log_variance = self.to_latents(self.context(pixels, seen)).chunk(2, -1)
        return mean, log_variance.clamp(-10, 10)

    def predict(self, latents: Tensor, seen: Tensor, hidden: Tensor) -> Tensor:
        """What the target encoder is to give at ``hidden`` (int64 ``[m]``), ``[B, m, width]``."""
        known = self.from_latents(latents) + self.places[seen]
        asked = (self.hidden_token + self.places[hidden]).expand(len(latents), -1, -1)
        predicted: Tensor = self.out(self.predictor(torch.cat([known, asked], 1))[:, len(seen) :])
        return predicted

    def loss(self, pixels: Tensor, generator: torch.Generator | None = None) -> JepaLoss:
        """The loss on pictures ``[B, C, H, W]``, of one choice of hidden patches for all of them."""
        seen, hidden = draw_patches(self.context.side, generator)
        seen, hidden = seen.to(pixels.device), hidden.to(pixels.device)
        with torch.no_grad():
            told = self.target(pixels)[:, hidden]
            told = F.layer_norm(told, told.shape[-1:])
        mean, log_variance = self.latents(pixels, seen)
        latents = mean
        if self.kl:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype).to(mean.device)
            latents = mean + (log_variance / 2).exp() * noise
        error = (self.predict(latents, seen, hidden) - told).square().mean()
        kl, group = kl_to_normal(mean, log_variance), group_lasso(latents, self.num_groups)
        return JepaLoss(error + self.kl * kl + self.group * group, error, kl, group)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """Move the target encoder towards the context encoder by ``1 - momentum``."""
        for own, other in zip(self.target.parameters(), self.context.parameters(), strict=True):
            own.lerp_(other, 1 - momentum)

    @torch.no_grad()
    def embed(self, images: Images, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """Latent means, and what the context encoder gives, each the mean over all patches: ``[N, width]`` float32."""
        found: list[tuple[Tensor, Tensor]] = []
        with evaluating(self):
            for pixels in images.batches(batch_size):
                tokens = self.context(pixels.to(device_of(self)))
                mean = self.to_latents(tokens).chunk(2, -1)[0]
                found.append((mean.mean(1).float().cpu(), tokens.mean(1).float().cpu()))
        return torch.cat([each[0] for each in found]), torch.cat([each[1] for each in found])


def draw_patches(side: int, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
    """Patches that are seen and patches that are to be predicted, of a square of ``side``: two int64 tensors.

    Two blocks of about a quarter of the square each are hidden, in shapes between 3:4 and 4:3; all others are seen.
    """
    hidden = torch.zeros(side, side, dtype=torch.bool)
    for _ in range(2):
        share, shape = torch.rand(2, generator=generator).tolist()
        area, ratio = (0.15 + 0.15 * share) * side**2, (3 / 4) ** (1 - 2 * shape)
        tall = min(side - 1, max(1, round(math.sqrt(area * ratio))))
        wide = min(side - 1, max(1, round(math.sqrt(area / ratio))))
        top = int(torch.randint(side - tall + 1, (), generator=generator))
        left = int(torch.randint(side - wide + 1, (), generator=generator))
        hidden[top : top + tall, left : left + wide] = True
    return (~hidden).flatten().nonzero()[:, 0], hidden.flatten().nonzero()[:, 0]


def train_jepa(
    model: SparseJepa,
    images: Images,
    *,
    steps: int,
    batch_size: int = 128,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.05,
    momentum: tuple[float, float] = (0.99, 1.0),
    seed: int = 0,
) -> list[JepaLoss]:
    """Train in place by AdamW with a cosine schedule; the same seed gives the same batches, blocks and noise.

    Args:
        model: trained, and left in eval mode.
        images: labels are not looked at.
        steps: of gradient descent.
        batch_size: pictures of a step, drawn with replacement.
        learning_rate: the highest, after a rise over the first twentieth of the steps.
        weight_decay: of AdamW.
        momentum: of the target encoder, first and last; it rises in a straight line.
        seed: of all that is drawn.

    Returns:
        The loss of each step, detached.
    """
    check_int("train_jepa", "steps", steps)
    check_int("train_jepa", "batch_size", batch_size)
    check_range("train_jepa", "learning_rate", learning_rate, 0, open_low=True)
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, weight_decay=weight_decay, fused=True)
    losses: list[JepaLoss] = []
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * learning_rate_at(step, steps)
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        parts = model.loss(images.pixels[chosen].to(device_of(model)), generator)
        if not bool(parts.loss.detach().isfinite()):
            raise fail("train_jepa", "learning_rate", "keep the loss finite", f"{float(parts.loss)} at step {step}")
        optimizer.zero_grad()
        parts.loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        model.follow(momentum[0] + (momentum[1] - momentum[0]) * step / steps)
        losses.append(JepaLoss(*(each.detach() for each in (parts.loss, parts.error, parts.kl, parts.group))))
    model.eval()
    return losses
