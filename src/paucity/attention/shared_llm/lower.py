"""The lower model of SharedLLM: the first layers of the language model turn chunks into trees of keys and values.

Paper: Han et al. 2024, https://arxiv.org/abs/2410.19318, Sec. 3.2. Every preserved node is read by itself, from its
own first token; a uniform share of its keys and values stays. Keys lose their positions in the node and get the number
of the chunk instead (Eq. 2); the authors' code turns them by that number on top.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity
from transformers import DynamicCache

from ..rotary import Rotary
from .inject import Memory
from .tree import Choose, grow


class LowerModel:
    """The first layers of a decoder; the weights are the decoder's own, not copies.

    Args:
        decoder: all layers of a language model, without its head.
        rotary: of each layer that is read.
        ratios: as in `tree.grow`.
    """

    def __init__(self, decoder: nn.Module, rotary: Sequence[Rotary], ratios: Sequence[int]) -> None:
        self.rotary, self.ratios = rotary, ratios
        self.view, self.probe = _first_layers(decoder, len(rotary)), _first_layers(decoder, 1)

    def sketch(self, ids: Tensor) -> Tensor:
        """State ``[R, hidden]`` of the last token of ``ids [R, T]`` after one layer, detached."""
        with torch.no_grad():
            states: Tensor = self.probe(input_ids=ids, use_cache=False).last_hidden_state
        return states[:, -1]

    def nearest(self, query: Tensor) -> Choose:
        """The half whose sketch has the greater cosine with ``query [R, hidden]``; the right one at a tie."""

        def choose(left: Tensor, right: Tensor) -> Tensor:
            near = [cosine_similarity(self.sketch(half), query, dim=-1) for half in (left, right)]
            return near[1] >= near[0]

        return choose

    def encode(
        self, chunks: Tensor, first: int, query: Tensor | None = None, noise: Sequence[float] = ()
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys and values of the trees of some chunks.

        Args:
            chunks: ``[B, n, l]`` int64, the chunks ``first`` and following of each text.
            first: number of the first of them.
            query: ``[B, hidden]`` as `sketch` gives it; None goes right at every split.
            noise: as in `tree.grow`.

        Returns:
            for each layer ``(keys, values)`` ``[B, H_kv, n * kept, D]``, the keys turned to the number of their chunk.
        """
        batch, count, length = chunks.shape
        flat = chunks.reshape(-1, length)
        choose = None if query is None else self.nearest(query.repeat_interleave(count, 0))
        levels = []
        for nodes in grow(flat, self.ratios, choose, noise):
            ids = flat.gather(1, nodes.positions.flatten(1)).view(-1, nodes.positions.shape[-1])
            cache = DynamicCache()  # not of the configuration, by which a sliding window would drop keys
            self.view(input_ids=ids, past_key_values=cache, use_cache=True)
            levels.append(
                [self._read(cache, index, nodes.kept, batch, count, first) for index in range(len(self.rotary))]
            )
        return [
            (torch.cat([level[index][0] for level in levels], 2), torch.cat([level[index][1] for level in levels], 2))
            for index in range(len(self.rotary))
        ]

    def _read(
        self, cache: DynamicCache, index: int, kept: Tensor, batch: int, count: int, first: int
    ) -> tuple[Tensor, Tensor]:
        """What stays of a layer's keys and values ``[B * n * nodes, H_kv, length, D]``."""
        layer: Any = cache.layers[index]
        key, value = (_by_text(part[:, :, kept], batch) for part in (layer.keys, layer.values))
        per_chunk = key.shape[2] // count
        number = torch.arange(first, first + count, device=kept.device).repeat_interleave(per_chunk)
        return self.rotary[index].turn(key, kept.repeat(key.shape[2] // len(kept)), number), value


def compress(
    lower: LowerModel,
    context_ids: Tensor,
    query: Tensor | None = None,
    *,
    chunk_size: int,
    parallel_chunks: int | None = None,
    noise: Sequence[float] = (),
) -> Memory:
    """The trees of ``context_ids [B, T]``, at least one token; chunks count from the end, the first may be shorter.

    Args:
        lower: the lower model.
        context_ids: int64.
        query: as in `LowerModel.encode`.
        chunk_size: tokens of a chunk.
        parallel_chunks: chunks of each text that are read at a time; None is all.
        noise: as in `tree.grow`.
    """
    batch, length = context_ids.shape
    front = length % chunk_size
    step = chunk_size * (parallel_chunks or max(1, length // chunk_size))
    found, number = [], 0
    for part in (context_ids[:, :front], *torch.split(context_ids[:, front:], step, dim=1)):
        if part.numel():
            chunks = part.reshape(batch, -1, min(chunk_size, part.shape[1]))
            found.append(lower.encode(chunks, number, query, noise))
            number += chunks.shape[1]
    keys, values = ([torch.cat([part[i][j] for part in found], 2) for i in range(len(found[0]))] for j in (0, 1))
    return Memory(tuple(keys), tuple(values), number, length)


def _by_text(x: Tensor, batch: int) -> Tensor:
    """``[B * nodes, H, S, D]`` as ``[B, H, nodes * S, D]``."""
    _, heads, kept, dim = x.shape
    return x.view(batch, -1, heads, kept, dim).transpose(1, 2).reshape(batch, heads, -1, dim)


def _first_layers(decoder: nn.Module, count: int) -> Any:
    view: Any = copy.copy(decoder)
    view._modules = dict(decoder._modules)
    view.config = copy.deepcopy(decoder.config)
    view.config.num_hidden_layers = count
    if getattr(view.config, "layer_types", None):
        view.config.layer_types = view.config.layer_types[:count]
    layers: Any = decoder.layers
    view.layers = layers[:count]
    return view
