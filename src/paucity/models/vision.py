"""Two image classifiers of ordinary modules, small enough to train on two cores: a ConvNet and a vision transformer."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_divides, check_int, fail
from .resize import fit_to


class SeparableBlock(nn.Module):
    """A depthwise 3x3 and a 1x1 convolution, each with BatchNorm; a residual where the shapes fit.

    Args:
        channels: that come in.
        out_channels: that go out.
        stride: of the depthwise convolution.
    """

    def __init__(self, channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, stride, padding=1, groups=channels, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.residual = stride == 1 and channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """``[B, channels, H, W] -> [B, out_channels, H / stride, W / stride]``."""
        out: Tensor = self.norm2(self.pointwise(F.relu(self.norm1(self.depthwise(x)), inplace=True)))
        return F.relu(out + x if self.residual else out, inplace=True)


class ConvNet(nn.Module):
    """A net of depthwise-separable blocks (MobileNet, https://arxiv.org/abs/1704.04861): mostly 1x1 convolutions.

    A 3x3 stem, then ``depth`` blocks in three stages of ``2 w``, ``4 w`` and ``8 w`` channels, where the second and the
    third stage halve the picture, then the mean over the places and a linear head. The stem halves pictures of 24
    pixels and more.

    Args:
        num_classes: logits that come out.
        in_channels: of a picture.
        width: w, the channels of the stem.
        depth: blocks, at least 3.
        image_size: side of a picture in pixels.
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, width: int = 16, depth: int = 6, image_size: int = 28
    ) -> None:
        super().__init__()
        self._config = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "width": width,
            "depth": depth,
            "image_size": image_size,
        }
        for name, value in self._config.items():
            check_int("ConvNet", name, value, 3 if name == "depth" else 1)
        self.stem = nn.Conv2d(in_channels, width, 3, 2 if image_size >= 24 else 1, padding=1, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        blocks, channels = [], width
        for index in range(depth):
            stage = 3 * index // depth
            first = index == 0 or 3 * (index - 1) // depth < stage
            wide = 2 ** (stage + 1) * width
            blocks.append(SeparableBlock(channels, wide, 2 if first and stage else 1))
            channels = wide
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, H, W] -> [B, num_classes]``."""
        x = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits

    def config(self) -> dict[str, Any]:
        """The arguments that build such a net again."""
        return dict(self._config)


class Attention(nn.Module):
    """Multi-head attention of all tokens to all tokens.

    Args:
        dim: width of a token.
        heads: that divide it.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.o_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, dim] -> [B, T, dim]``."""
        q, k, v = (
            each(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in (self.q_proj, self.k_proj, self.v_proj)
        )
        out: Tensor = self.o_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between them.

    Args:
        dim: width of a token.
        hidden: neurons.
    """

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, dim] -> [B, T, dim]``."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class TransformerBlock(nn.Module):
    """Attention and an MLP of four times the width, each behind a LayerNorm and beside a residual.

    Args:
        dim: width of a token.
        heads: of the attention.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, T, dim] -> [B, T, dim]``."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """A vision transformer (https://arxiv.org/abs/2010.11929), pre-norm, which takes the mean over its tokens.

    Args:
        num_classes: logits that come out.
        in_channels: of a picture.
        image_size: side of a picture in pixels.
        patch_size: side of a patch, which divides it.
        dim: width of a token.
        depth: blocks.
        heads: of attention, which divide ``dim``.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_channels: int = 1,
        image_size: int = 28,
        patch_size: int = 4,
        dim: int = 64,
        depth: int = 4,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self._config = {
            "num_classes": num_classes,
            "in_channels": in_channels,
            "image_size": image_size,
            "patch_size": patch_size,
            "dim": dim,
            "depth": depth,
            "heads": heads,
        }
        for name, value in self._config.items():
            check_int("ViT", name, value)
        check_divides("ViT", "patch_size", patch_size, image_size, "the side of a picture")
        check_divides("ViT", "heads", heads, dim, "dim")
        self.patches = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.position_embeddings = nn.Embedding((image_size // patch_size) ** 2, dim)
        nn.init.normal_(self.position_embeddings.weight, std=0.02)
        self.blocks = nn.ModuleList([TransformerBlock(dim, heads) for _ in range(depth)])
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, in_channels, image_size, image_size] -> [B, num_classes]``."""
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position_embeddings.weight
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits

    def config(self) -> dict[str, Any]:
        """The arguments that build such a model again."""
        return dict(self._config)


BUILDERS: dict[str, type[ConvNet] | type[ViT]] = {"convnet": ConvNet, "vit": ViT}
"""Image classifiers by name; ``BUILDERS[name](**config)`` builds one, of random weights drawn from torch's seed."""


def description(model: nn.Module) -> dict[str, Any]:
    """What `load_classifier` needs beside the weights, to be saved as ``extra``; empty for a model of another kind."""
    name = next((name for name, builder in BUILDERS.items() if type(model) is builder), None)
    return {} if name is None else {"builder": name, "config": model.config()}  # type: ignore[operator]


def load_classifier(folder: str | Path) -> ConvNet | ViT:
    """A classifier that was saved with its `description`, in eval mode; one with channels removed in its own sizes.

    Raises:
        InputError: if the folder holds no such model, or its weights do not fit.
    """
    folder = Path(folder)
    try:
        extra = json.loads((folder / "paucity.json").read_text(encoding="utf-8"))["extra"]
        model = BUILDERS[extra["builder"]](**extra["config"])
        fit_to(model, load_file(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError):
        choices = " or ".join(BUILDERS)
        raise fail("load_classifier", "folder", f"hold a {choices} that paucity saved", folder) from None
    return model.eval()
