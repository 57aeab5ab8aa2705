"""Small networks that tell how informative the blocks of a text are to a layer, for LeMo (`paucity.attention.lemo`).

Paper: Wang et al. 2025, https://arxiv.org/abs/2501.09767, Sec. 4.3 (Eq. 3).

A layer has a pair of networks for its attention, ``score(m, n) = f_q(block m) . f_k(block n)``; where dropped tokens
are to skip the MLP there is one for that too (the paper has none: its own choice needs the activations). Each is three
low-rank matrices with ReLU between; it reads a block as the mean and the largest value of each feature over its tokens.
The paper takes "the representative embedding" of a block and does not say how (its code reads all 64 tokens at once, by
head). They learn the exact scores of a few texts by a smooth L1 loss, and the *elastic size transformation* prunes
neurons that are mostly zero as they learn.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..ops.blocks import pool_blocks
from ..ops.informative import block_totals, valid_blocks

if TYPE_CHECKING:
    from .lemo import LeMo


class Tower(nn.Module):
    """Three low-rank matrices with ReLU between them, whose inner neurons can be pruned.

    Args:
        features: of a block.
        rank: neurons of both inner layers.
        out: values for a block.
    """

    def __init__(self, features: int, rank: int, out: int) -> None:
        super().__init__()
        self.matrices = nn.ModuleList([nn.Linear(features, rank), nn.Linear(rank, rank), nn.Linear(rank, out)])
        self.zeros: list[Tensor] = []
        self.count = 0

    def forward(self, x: Tensor) -> Tensor:
        """``[..., features]`` to ``[..., out]``; in training mode zeros are counted."""
        for i, matrix in enumerate(self.matrices):
            x = matrix(x)
            if i == 2:
                break
            x = x.relu()
            if self.training:
                zeros = (x.detach() == 0).flatten(0, -2).sum(0)
                if len(self.zeros) > i:
                    self.zeros[i] = self.zeros[i] + zeros
                else:
                    self.zeros.append(zeros)
        self.count += x[..., 0].numel() if self.training else 0
        return x

    def prune(self, zero_share: float) -> None:
        """Drop inner neurons that were zero in a share above ``zero_share`` since the last time; one always stays."""
        for i, zeros in enumerate(self.zeros):
            kept = zeros <= zero_share * self.count
            kept[zeros.argmin()] = True
            _keep(self.matrices[i], kept, 0)
            _keep(self.matrices[i + 1], kept, 1)
        self.zeros, self.count = [], 0


class Predictor(nn.Module):
    """Scores of a layer's blocks, told from what goes into its attention or its MLP.

    Args:
        site: ``attention`` or ``mlp``.
        features: of a token.
        block_size: tokens in a block.
        rank: of the matrices.
    """

    def __init__(self, site: str, features: int, block_size: int, rank: int) -> None:
        super().__init__()
        self.block_size, self.site = block_size, site
        outs = (rank, rank) if site == "attention" else (1,)
        self.towers = nn.ModuleList([Tower(2 * features, rank, out) for out in outs])
        self.register_buffer("scale", torch.ones(()))

    def forward(self, summary: Tensor) -> Tensor:
        """From `block_summary` ``[B, n, 2 * features]`` to scores in units of their mean.

        Returns:
            ``[B, n, n]`` for pairs (blocks of queries by blocks of keys, all of them), or ``[B, n]`` for an MLP.
        """
        outs = [tower(summary) for tower in self.towers]
        found: Tensor = outs[0] @ outs[1].mT if len(outs) == 2 else outs[0][..., 0]
        return found

    @classmethod
    def restored(cls, site: str, tensors: Mapping[str, Tensor], block_size: int) -> "Predictor":
        """The predictor that has this `state_dict`, in eval mode and frozen; matrices have the sizes they had."""
        features = tensors["towers.0.matrices.0.weight"].shape[1] // 2
        predictor = cls(site, features, block_size, 1)
        for name, module in predictor.named_modules():
            if isinstance(module, nn.Linear):
                module.weight, module.bias = (nn.Parameter(tensors[f"{name}.{kind}"]) for kind in ("weight", "bias"))
                module.out_features, module.in_features = module.weight.shape
        predictor.load_state_dict(dict(tensors))
        return predictor.eval().requires_grad_(False)

    @torch.no_grad()
    def score(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Scores of blocks ``[B, n]`` float32.

        Args:
            hidden: ``[B, T, C]``, what goes into the module.
            valid: ``[B, T]`` bool, False for padding.
        """
        scale: Tensor = self.get_buffer("scale")
        if scale.device != hidden.device:
            self.to(hidden.device)
            scale = self.get_buffer("scale")
        found = self(block_summary(hidden, self.block_size, valid)).relu_() * scale
        there = valid_blocks(valid, self.block_size)
        if self.site == "mlp":
            return found * there  # type: ignore[no-any-return]
        return block_totals((found * there[:, :, None] * there[:, None]).tril_(), there)


def block_summary(hidden: Tensor, block_size: int, valid: Tensor) -> Tensor:
    """Mean and largest value of each feature over the tokens of each block: ``[B, n, 2 C]`` float32.

    Args:
        hidden: ``[B, T, C]`` float.
        block_size: tokens in a block.
        valid: ``[B, T]`` bool, False for padding; blocks of nothing else are 0.
    """
    hidden = hidden.detach()
    if bool(valid.all()):
        return torch.cat([pool_blocks(hidden, block_size), pool_blocks(hidden, block_size, reduce="amax")], dim=-1)
    count = pool_blocks(valid[..., None].float(), block_size, reduce="sum")
    total = pool_blocks(hidden * valid[..., None], block_size, reduce="sum") / count.clamp(min=1)
    most = pool_blocks(hidden.masked_fill(~valid[..., None], -torch.inf), block_size, reduce="amax")
    return torch.cat([total, most.masked_fill(count == 0, 0.0)], dim=-1)


def train_predictor(
    site: str, pairs: Sequence[tuple[Tensor, Tensor]], options: "LeMo", generator: torch.Generator
) -> tuple[Predictor, float]:
    """A predictor of ``attention`` or ``mlp`` and its loss at the end.

    Args:
        site: which of the two.
        pairs: `block_summary` and exact scores of each text, pairs of blocks ``[B, n, n]`` or blocks ``[B, n]``.
        options: how to train.
        generator: of the first weights.
    """
    device = pairs[0][0].device
    lengths = sorted({score.shape[1] for _, score in pairs})  # texts of one length are learned together
    groups = [[pair for pair in pairs if pair[1].shape[1] == length] for length in lengths]
    pairs = [(torch.cat([x for x, _ in group]), torch.cat([y for _, y in group])) for group in groups]
    predictor = Predictor(site, pairs[0][0].shape[-1] // 2, options.block_size, options.rank)
    for parameter in predictor.parameters():
        bound = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.0
        parameter.data = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
    predictor.to(device).train()
    scale = torch.cat([_seen_pairs(score) for _, score in pairs]).mean().clamp(min=1e-12)
    predictor.get_buffer("scale").copy_(scale)
    optimizer = torch.optim.Adam(predictor.parameters(), lr=options.learning_rate)
    loss, zero_share = torch.zeros(()), options.zero_share
    with torch.enable_grad():
        for step in range(1, options.steps + 1):
            parts = [nn.functional.smooth_l1_loss(_seen_pairs(predictor(x)), _seen_pairs(y / scale)) for x, y in pairs]
            loss = torch.stack(parts).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if options.prune_every and step % options.prune_every == 0 and step < options.steps and zero_share > 0:
                for tower in predictor.towers:
                    tower.prune(zero_share)  # type: ignore[operator]
                zero_share -= 0.05
                optimizer = torch.optim.Adam(predictor.parameters(), lr=options.learning_rate)
    predictor.eval().requires_grad_(False)
    return predictor, float(loss.detach())


def _seen_pairs(score: Tensor) -> Tensor:
    """The scores that there are: those on and below the diagonal of pairs."""
    if score.ndim == 2:
        return score.flatten()
    rows, columns = torch.tril_indices(*score.shape[1:], device=score.device)
    return score[:, rows, columns].flatten()


def _keep(matrix: nn.Module, kept: Tensor, dim: int) -> None:
    """Leave of a linear map the rows (``dim`` 0) or the columns that are kept."""
    assert isinstance(matrix, nn.Linear)
    matrix.weight = nn.Parameter(matrix.weight.detach()[kept] if dim == 0 else matrix.weight.detach()[:, kept])
    if dim == 0:
        matrix.bias = nn.Parameter(matrix.bias.detach()[kept])
    matrix.out_features, matrix.in_features = matrix.weight.shape
