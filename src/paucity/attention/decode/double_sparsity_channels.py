"""Double Sparsity's decoding: a few channels of every key, in four bits, tell which keys to read.

Paper: Yang et al. 2024 (Double Sparsity), https://arxiv.org/abs/2408.07092, Sec. 3.

The label cache holds the channels of each KV head that matter most to its products (`paucity.attention.double_sparsity`
finds them). A query's products with the labels score all keys, and the best ``num_keys`` are read in full. With
``offload`` keys and values lie in a memory-mapped file and only rows that are read come into memory (Sec. 3.4; there
from the memory of the host to that of a GPU).

Labels are stored as whole numbers from 0 to 15 between the least and the greatest value of a channel over
``group_size`` keys (the paper gives neither groups nor rounding). Queries that share a KV head choose together, by
their mean softmax over the scores. Not here: keys that are fetched ahead of a layer by the query of the layer before
(the operating system reads ahead nothing), and offloading from a GPU: the model is handed all keys of a cache at every
step, and these would have to be brought back first.
"""

import os
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ...checks import fail
from ..cache.cached import Cached
from ..cache.mapped import Mapped
from ..prompt import Prompt
from .policy import DecodePolicy, Pages, Read
from .scores import seen, top_pages

_NAME = "double_sparsity_channels"


class DoubleSparsityChannels(DecodePolicy):
    """Options of ``double_sparsity_channels``.

    Attributes:
        channels: for each layer of the model and each KV head the channels of its keys that labels hold; the same
            number for all heads of a layer. One list stands for all of them.
        num_keys: keys that each KV head reads.
        density: share of the list that it reads, instead of ``num_keys``.
        bits: of a label; 16 stores them as they are, which is faster to read on a CPU.
        group_size: keys that share the range of a channel.
        offload: folder of the files that hold keys and values; None leaves them in memory.
    """

    channels: list[list[list[int]]] = Field(min_length=1)
    dense_layers: int = Field(2, ge=0)
    num_keys: int = Field(256, ge=1)
    density: float | None = Field(None, gt=0, le=1)
    bits: Literal[4, 16] = 4
    group_size: int = Field(32, ge=1)
    offload: str | None = None

    @model_validator(mode="after")
    def _even(self) -> "DoubleSparsityChannels":
        for rows in self.channels:
            if not rows or not rows[0] or any(len(row) != len(rows[0]) for row in rows):
                raise fail(_NAME, "channels", "have as many for every head of a layer", list(map(len, rows)))
            for row in rows:
                if min(row) < 0 or len(set(row)) < len(row):
                    raise fail(_NAME, "channels", "be different and not negative", row)
        return self

    def check_model(self, layers: Sequence[int], num_heads: int, num_kv_heads: int) -> None:
        """Raise InputError unless there are channels for every layer and KV head, and the folder exists."""
        if len(self.channels) != max(layers) + 1:
            raise fail(_NAME, "channels", f"have {max(layers) + 1} layers", len(self.channels))
        for rows in self.channels:
            if len(rows) not in (1, num_kv_heads):
                raise fail(_NAME, "channels", f"have {num_kv_heads} KV heads in every layer", len(rows))
        if self.offload is not None and not os.path.isdir(self.offload):
            raise fail(_NAME, "offload", "be a folder", self.offload)

    def attend(self, query: Tensor, cached: Cached, prompt: Prompt) -> Read:
        """As every policy; with ``offload`` keys and values are first moved to files, if they are not there yet."""
        if self.offload is not None and cached.store.allocate != (home := Mapped(self.offload)):
            cached.store.relocate(home)
        return super().attend(query, cached, prompt)

    def select(self, query: Tensor, cached: Cached, prompt: Prompt) -> Pages:
        """The keys with the best scores by their labels."""
        heads = cached.lengths.shape[1]
        rows = query.view(len(query), heads, query.shape[1] // heads, query.shape[-1])
        channels = torch.tensor(self.channels[prompt.layer], device=query.device)
        if int(channels.max()) >= query.shape[-1]:
            raise fail(_NAME, "channels", f"be below {query.shape[-1]}", int(channels.max()))
        labels = self._labels(cached, channels)
        logits = (_take(rows, channels) @ labels.mT.to(rows.dtype)).float() * prompt.scale
        logits = logits.masked_fill(~seen(cached, prompt).unsqueeze(2), -torch.inf)
        score = logits.softmax(-1).mean(2) if rows.shape[2] > 1 else logits[:, :, 0]
        if self.density is None:
            return Pages(top_pages(score, cached, self.num_keys, window=prompt.window), 1)
        wanted = (cached.lengths * self.density).round().long().clamp(min=1).unsqueeze(-1)
        best = top_pages(score, cached, int(wanted.max()), window=prompt.window)
        return Pages(best.where(torch.arange(best.shape[-1], device=best.device) < wanted, -1), 1)

    def _labels(self, cached: Cached, channels: Tensor) -> Tensor:
        """The labels of all keys, ``[B, H_kv, longest, channels]``."""

        def summarise(keys: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
            labels = _take(keys.flatten(2, 3), channels).view(*keys.shape[:4], -1)
            return quantise(labels, counts) if self.bits == 4 else (labels,)

        # Channels differ between layers, each of which has its own indexes.
        name = f"labels {self.bits} {self.group_size} {channels.tolist()}"
        summaries = cached.index(name, self.group_size, summarise)
        summaries = tuple(x[:, :, : -(-cached.longest // self.group_size)] for x in summaries)
        labels = dequantise(summaries, channels.shape[1]) if self.bits == 4 else summaries[0]
        return labels.flatten(2, 3)[:, :, : cached.longest]


def quantise(labels: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Four bits for each label, two of them in a byte.

    Args:
        labels: ``[..., n, C]`` float: a group of ``n`` keys.
        counts: ``[..., n]`` bool, which of them sway the range; the others may have any code.

    Returns:
        ``[..., n, ceil(C / 2)]`` uint8, the first half of the channels in the low bits; the least value of each channel
        and the step, ``[..., C]`` each, in the dtype of ``labels``.
    """
    absent = ~counts.unsqueeze(-1)
    low = labels.masked_fill(absent, torch.inf).amin(-2).nan_to_num(0.0, 0.0, 0.0)
    high = labels.masked_fill(absent, -torch.inf).amax(-2).nan_to_num(0.0, 0.0, 0.0)
    step = ((high.float() - low.float()) / 15).to(labels.dtype)
    away = (labels - low.unsqueeze(-2)).float() / step.float().clamp(min=1e-30).unsqueeze(-2)
    codes = away.round().clamp(0, 15).to(torch.uint8)
    half = -(-codes.shape[-1] // 2)
    first, second = codes[..., :half], torch.nn.functional.pad(codes[..., half:], (0, codes.shape[-1] % 2))
    return first | (second << 4), low, step


def dequantise(stored: tuple[Tensor, ...], num_channels: int) -> Tensor:
    """The labels ``[..., n, num_channels]`` that `quantise` stored, to half a step."""
    codes, low, step = stored
    whole = torch.cat([codes & 15, codes >> 4], dim=-1)[..., :num_channels]
    return torch.addcmul(low.unsqueeze(-2), whole.to(low.dtype), step.unsqueeze(-2))


def _take(x: Tensor, channels: Tensor) -> Tensor:
    """The channels of each KV head, ``[B, H_kv, n, C]``, of ``[B, H_kv, n, D]``."""
    return x.gather(-1, channels.unsqueeze(1).expand(*x.shape[:3], -1))
