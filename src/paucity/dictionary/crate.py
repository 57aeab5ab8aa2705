"""CRATE: a transformer block that compresses tokens into subspaces, then takes one step of sparse coding.

Paper: Yu et al. 2023, https://arxiv.org/abs/2306.01129, Sections 2.3-2.5. With ``w_h = U_h^T LN(z)`` for head ``h``, a
single projection for queries, keys and values, attention is ``MSSA(z) = sum_h W_h w_h softmax(w_h^T w_h / sqrt(p))``
and the block is ``y = LN(z + MSSA(z))``, ``z' = relu(y + eta (D^T y - D^T D y) - eta lambda)``: one step of ISTA
towards nonnegative codes of ``y`` over a square, complete dictionary ``D``, started at ``y`` and without a residual.
``eta`` and ``lambda`` are 0.1. As in the authors' code, the output map ``W`` is learned freely, patches are normalised
before and after they are embedded, and places are added to a class token and patches alike.

Not implemented: overcomplete dictionaries and residuals around ISTA (CRATE-alpha), the autoencoder, causal attention.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_divides, check_floating, check_int, check_ndim, check_range
from ..measure.images import Images
from ..measure.tokens import device_of, evaluating
from ..ops.formats import Codes


class MSSA(nn.Module):
    """Multi-head subspace self-attention: queries, keys and values are one projection.

    Args:
        width: of a token.
        heads: subspaces.
        head_width: of each; ``width / heads`` if not given.

    Attributes:
        subspaces: ``U``, the projection onto all subspaces.
        out: from them to the width; the identity for one subspace as wide as a token.
    """

    def __init__(self, width: int, heads: int, head_width: int | None = None) -> None:
        super().__init__()
        check_int("MSSA", "width", width)
        check_int("MSSA", "heads", heads)
        if head_width is None:
            check_divides("MSSA", "heads", heads, width, "the width")
        else:
            check_int("MSSA", "head_width", head_width)
        self.width, self.heads, self.head_width = width, heads, head_width or width // heads
        self.subspaces = nn.Linear(width, heads * self.head_width, bias=False)
        whole = heads == 1 and self.head_width == width
        self.out: nn.Module = nn.Identity() if whole else nn.Linear(heads * self.head_width, width)

    def project(self, x: Tensor) -> Tensor:
        """``[B, T, width] -> [B, heads, T, head_width]``, coordinates in each subspace."""
        coords: Tensor = self.subspaces(x)
        return coords.view(*x.shape[:-1], self.heads, self.head_width).transpose(-2, -3)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width] -> [B, T, width]``."""
        w = self.project(x)
        attended: Tensor = self.out(F.scaled_dot_product_attention(w, w, w).transpose(-2, -3).flatten(-2))
        return attended


class ISTA(nn.Module):
    """One proximal gradient step towards sparse, nonnegative codes, from the input itself.

    Args:
        width: of a token, and number of atoms.
        step: ``eta``.
        penalty: ``lambda``, of the l1 norm.

    Attributes:
        atoms: ``D [width, width]``, atoms as columns.
    """

    def __init__(self, width: int, *, step: float = 0.1, penalty: float = 0.1) -> None:
        super().__init__()
        check_int("ISTA", "width", width)
        check_range("ISTA", "step", step, 0, open_low=True)
        check_range("ISTA", "penalty", penalty, 0)
        self.width, self.step, self.penalty = width, step, penalty
        self.atoms = nn.Parameter(torch.empty(width, width))
        nn.init.kaiming_uniform_(self.atoms)

    def forward(self, y: Tensor) -> Tensor:
        """``[..., width] -> [..., width]``, at least 0 and in part exactly 0."""
        downhill = (y - y @ self.atoms.T) @ self.atoms  # D^T (y - D y), for rows
        return F.relu(y + self.step * downhill - self.step * self.penalty)


class CrateBlock(nn.Module):
    """Compression, then sparsification.

    Args:
        width: of a token.
        heads: of `MSSA`.
        head_width: of `MSSA`.
        step: of `ISTA`.
        penalty: of `ISTA`.
    """

    def __init__(
        self, width: int, heads: int, head_width: int | None = None, *, step: float = 0.1, penalty: float = 0.1
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MSSA(width, heads, head_width)
        self.ista = ISTA(width, step=step, penalty=penalty)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, width] -> [B, T, width]``, sparse."""
        codes: Tensor = self.ista(self.norm2(x + self.attention(self.norm1(x))))
        return codes

    def codes(self, x: Tensor) -> Codes:
        """The output as codes over ``width`` atoms."""
        return Codes.from_dense(self(x))


class Crate(nn.Module):
    """A classifier of square pictures: patches, a class token, blocks, a linear head.

    Args:
        num_classes: logits that come out.
        in_channels: of a picture.
        image_size: side of a picture in pixels.
        patch_size: side of a patch, which divides it.
        width: of a token.
        depth: blocks.
        heads: that divide the width.
        step: of `ISTA`.
        penalty: of `ISTA`.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        patch_size: int = 4,
        width: int = 96,
        depth: int = 6,
        heads: int = 4,
        *,
        step: float = 0.1,
        penalty: float = 0.1,
    ) -> None:
        super().__init__()
        sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size, "depth": depth}
        for name, value in sizes.items():
            check_int("Crate", name, value)
        check_divides("Crate", "patch_size", patch_size, image_size, "the side of a picture")
        self.patch_size, values = patch_size, in_channels * patch_size**2
        self.embed = nn.Sequential(nn.LayerNorm(values), nn.Linear(values, width), nn.LayerNorm(width))
        self.class_token = nn.Parameter(torch.randn(1, 1, width))
        self.places = nn.Parameter(torch.randn(1, 1 + (image_size // patch_size) ** 2, width))
        self.blocks = nn.ModuleList([CrateBlock(width, heads, step=step, penalty=penalty) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, num_classes)

    def tokens(self, pixels: Tensor) -> Tensor:
        """``[B, in_channels, image_size, image_size] -> [B, 1 + patches, width]``, the class token first."""
        patches: Tensor = self.embed(F.unfold(pixels, self.patch_size, stride=self.patch_size).transpose(1, 2))
        return torch.cat([self.class_token.expand(len(patches), -1, -1), patches], 1) + self.places

    def forward(self, pixels: Tensor) -> Tensor:
        """``[B, in_channels, image_size, image_size] -> [B, num_classes]``."""
        x = self.tokens(pixels)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x[:, 0]))
        return logits


def coding_rate(coords: Tensor, *, epsilon: float = 0.01) -> Tensor:
    """How many nats tokens take in their subspaces: ``1/2 sum_h logdet(I + p / (T epsilon) W_h^T W_h)``.

    As the authors measure it: each token's coordinates are first brought to norm 1 in each subspace.

    Args:
        coords: ``[..., heads, T, p]``, of `MSSA.project`, float.
        epsilon: the square of the paper's distortion.

    Returns:
        ``[...]``, of at least 0.
    """
    check_floating("coding_rate", "coords", coords)
    check_range("coding_rate", "epsilon", epsilon, 0, open_low=True)
    unit = F.normalize(coords.float(), dim=-1)
    num_tokens, width = unit.shape[-2:]
    gram = unit.mT @ unit if width <= num_tokens else unit @ unit.mT
    eye = torch.eye(gram.shape[-1], device=gram.device)
    rates: Tensor = torch.linalg.slogdet(eye + width / (num_tokens * epsilon) * gram)[1]
    return rates.sum(-1) / 2


@torch.no_grad()
def layer_terms(model: Crate, images: Images, *, batch_size: int = 500) -> list[dict[str, float]]:
    """What each block makes of its objective on ``images``, means over them.

    Returns:
        For each block ``coding_rate`` of what attention takes, as coordinates in the block's own subspaces;
        ``coding_rate_after`` of ``z + MSSA(z)`` in the same; and ``nonzeros``, the share of the output that is not 0.
    """
    sums: list[dict[str, Any]] = [
        dict.fromkeys(("coding_rate", "coding_rate_after", "nonzeros"), 0.0) for _ in model.blocks
    ]
    with evaluating(model):
        for pixels in images.batches(batch_size):
            check_ndim("layer_terms", "pixels", pixels, 4)
            x = model.tokens(pixels.to(device_of(model)))
            for total, block in zip(sums, model.blocks, strict=True):
                assert isinstance(block, CrateBlock)
                attention = block.attention
                after = x + attention(block.norm1(x))
                rates = [coding_rate(attention.project(block.norm1(each))).sum() for each in (x, after)]
                x = block.ista(block.norm2(after))
                total["coding_rate"] += float(rates[0])
                total["coding_rate_after"] += float(rates[1])
                total["nonzeros"] += float((x != 0).float().mean((1, 2)).sum())
    return [{name: value / len(images) for name, value in total.items()} for total in sums]
